"""MMLU (Hendrycks et al., 2021): multiple-choice questions of 57 subjects."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant, letters, without_first_space
from ascendspeed_eval.tasks.mmlu_subjects import CATEGORIES, CATEGORIES_OF_LM_EVAL
from ascendspeed_eval.tasks.reading import find_folder, letter_index, read_csv
from ascendspeed_eval.tasks.samples import Benchmark, Record

COLUMNS = ("question", "A", "B", "C", "D", "answer")
QUESTION = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
HEADER = "The following are multiple choice questions (with answers) about"


def first_letter(text: str, record: Record) -> Extracted:
    """Find the answer letter.

    Strict is the rule of 2023: the last letter before a full stop in the first line, else a letter with which the
    text begins. It spelled its class of letters `[A|B|C|D]`, which takes `|` too. Flexible: the first letter that
    stands by itself.
    """
    bare = without_first_space(text)
    strict = re.match(r".*([A|B|C|D])\..*", bare) or re.match(r"([A|B|C|D])", bare)
    flexible = re.search(r"(?<![A-Za-z])([ABCD])(?![A-Za-z])", text)
    return {"strict": strict[1] if strict else None, "flexible": flexible[1] if flexible else None}


def is_letter(answer: Any, record: Record) -> bool:
    """Compare a letter with the index of the right choice."""
    return bool(answer == "ABCD"[record.target[0]])


class MMLU(Task):
    """The folders `dev` (five examples per subject), `val` and `test` (the questions)."""

    name = "mmlu"
    version = 1
    summary = "multiple-choice questions of 57 subjects"
    size = "14,042 (test split), 57 subjects"
    format = "folders dev and test of <subject>_dev.csv, <subject>_test.csv (question, A, B, C, D, answer; no header)"
    groups = MappingProxyType(CATEGORIES)
    groups_source = "hendrycks/test, categories.py"
    reference_scores = (
        ("LLaMA-7B", "2023 README, 5-shot", 0.333),
        ("LLaMA-65B", "original implementation (Hugging Face blog, 2023)", 0.637),
        ("LLaMA-65B", "lm-evaluation-harness of January 2023 (the same)", 0.488),
        ("LLaMA-65B", "HELM (the same)", 0.636),
    )
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "a letter before a full stop, or at the beginning (rule of the 2023 AscendSpeed)",
                QUESTION,
                header=HEADER + "  {subject}.\n",
                num_fewshot=5,
                separator="\n",
                last_separator="\n\n",
                extract=first_letter,
                matches=is_letter,
                max_new_tokens=2,
                seq_length=2048,
                main="strict",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the likeliest of ' A' to ' D' (mmlu of lm-evaluation-harness 0.4, whose own number of examples is 0)",
                QUESTION,
                letters(4),
                header=HEADER + " {subject}.\n\n",
                num_fewshot=5,
            ),
            "authors": TaskVariant(
                "authors",
                "the likeliest of ' A' to ' D' (evaluate.py of hendrycks/test: questions not stripped, two "
                "spaces after 'about')",
                QUESTION,
                letters(4),
                header=HEADER + "  {subject}.\n\n",
                num_fewshot=5,
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read every subject of the test split, with the examples of the dev split."""
        folder = find_folder(path, ("test/*_test.csv",), f"test split of MMLU; mmlu reads {self.format}")
        files = sorted((folder / "test").glob("*_test.csv"))
        known = {subject for subjects in CATEGORIES.values() for subject in subjects}
        records, examples, read = [], {}, []
        for file in files:
            subject = file.name.removesuffix("_test.csv")
            if subject not in known:
                raise EvaluationError(
                    f"{file}: {subject} is not a subject of MMLU; rename or remove the file"
                )
            records += self._records(file, subject)
            dev = folder / "dev" / f"{subject}_dev.csv"
            if dev.is_file():
                examples[subject] = self._records(dev, subject)
            read += [file, *([dev] if dev.is_file() else [])]
        return Benchmark(records, examples, read)

    def groups_of(self, variant: TaskVariant) -> tuple[str, Mapping[str, Sequence[str]]]:
        """Return the authors' categories; under `lm-eval` those of the harness, which has anatomy elsewhere."""
        if variant.name == "lm-eval":
            return "lm-evaluation-harness, tasks/mmlu", CATEGORIES_OF_LM_EVAL
        return super().groups_of(variant)

    def question(self, variant: TaskVariant, record: Record) -> str:
        """Return the question; under `lm-eval` without spaces at both ends."""
        if variant.name == "lm-eval":
            fields = {**record.fields, "question": record.fields["question"].strip()}
            record = Record(record.id, record.subset, fields, record.target)
        return super().question(variant, record)

    def answer(self, variant: TaskVariant, record: Record) -> str:
        """Return the letter."""
        return "ABCD"[record.target[0]]

    @staticmethod
    def _records(file: Any, subject: str) -> list[Record]:
        return [
            Record(
                f"{subject}/{number}",
                subject,
                {**row, "subject": subject.replace("_", " ")},
                [letter_index(row["answer"].strip(), f"{file}, row {number + 1}")],
            )
            for number, row in enumerate(read_csv(file, COLUMNS))
        ]
