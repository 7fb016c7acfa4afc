"""C-Eval (Huang et al., 2023): Chinese multiple-choice questions of 52 subjects."""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.small_files import check_keys
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant, letters, without_first_space
from ascendspeed_eval.tasks.ceval_subjects import SUBJECTS
from ascendspeed_eval.tasks.reading import find_folder, letter_index, read_csv
from ascendspeed_eval.tasks.samples import Benchmark, Record

QUESTION = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}"
NO_LABELS = "the test split of C-Eval has no labels"


def letter_in(text: str, record: Record) -> Extracted:
    """Strict is the rule of 2023: the whole text is the letter. Flexible: the first letter that stands by itself."""
    flexible = re.search(r"(?<![A-Za-z])([ABCD])(?![A-Za-z])", text)
    return {"strict": without_first_space(text), "flexible": flexible[1] if flexible else None}


def is_letter(answer: Any, record: Record) -> bool:
    """Compare a letter with the index of the right choice."""
    return bool(record.target and answer == "ABCD"[record.target[0]])


def _by_category() -> dict[str, tuple[str, ...]]:
    categories = sorted({category for _, category in SUBJECTS.values()})
    return {c: tuple(s for s, (_, own) in SUBJECTS.items() if own == c) for c in categories}


class CEval(Task):
    """The folders `dev` (five examples per subject), `val` (the questions) and `test` (unlabelled)."""

    name = "ceval"
    version = 1
    summary = "Chinese multiple-choice questions of 52 subjects"
    size = "1,346 (val split), 12,342 (test split, no labels), 52 subjects"
    format = (
        "folders dev and val (or test) of <subject>_dev.csv, <subject>_val.csv (id,question,A,B,C,D,answer)"
    )
    groups = MappingProxyType(_by_category())
    groups_source = "hkust-nlp/ceval, subject_mapping.json"
    reference_scores = (("LLaMA-7B", "2023 README, 5-shot, val split", 0.408),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "the whole answer is the letter (the rule of the 2023 AscendSpeed)",
                "问：" + QUESTION + "\n答：",
                header="请从下列选择题中选择正确的选项。\n\n",
                num_fewshot=5,
                answer_prefix="",
                extract=letter_in,
                matches=is_letter,
                max_new_tokens=1,
                seq_length=2048,
                main="strict",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the likeliest of ' A' to ' D' (ceval-valid of lm-evaluation-harness 0.4, whose own number of examples "
                "is 0)",
                QUESTION + "\n答案：",
                letters(4),
                header="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
                num_fewshot=5,
                normalised=True,
            ),
            "authors": TaskVariant(
                "authors",
                "the likeliest of 'A' to 'D' right after '答案：' (answer-only setting of hkust-nlp/ceval)",
                QUESTION + "\n答案：",
                letters(4, ""),
                header="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
                num_fewshot=5,
                answer_prefix="",
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read every subject of the val split; of the test split when `path` is that folder."""
        split = "test" if Path(path).name == "test" else "val"
        folder = find_folder(path, (f"{split}/*_{split}.csv",), f"{split} split; ceval reads {self.format}")
        records, examples, read = [], {}, []
        for file in sorted((folder / split).glob(f"*_{split}.csv")):
            subject = file.name.removesuffix(f"_{split}.csv")
            if subject not in SUBJECTS:
                raise EvaluationError(
                    f"{file}: {subject} is not a subject of C-Eval; rename or remove the file"
                )
            records += self._records(file, subject, labels=split == "val")
            dev = folder / "dev" / f"{subject}_dev.csv"
            if dev.is_file():
                examples[subject] = self._records(dev, subject, labels=True)
            read += [file, *([dev] if dev.is_file() else [])]
        return Benchmark(records, examples, read)

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
    def _records(file: Path, subject: str, labels: bool) -> list[Record]:
        records = []
        for number, row in enumerate(read_csv(file)):
            where = f"{file}, row {number + 2}"
            check_keys(row, dict.fromkeys(("question", *"ABCD", *(["answer"] if labels else [])), str), where)
            fields = {**row, "subject": SUBJECTS[subject][0]}
            target = [letter_index(row["answer"].strip(), where)] if labels else []
            records.append(Record(f"{subject}/{row.get('id', number)}", subject, fields, target))
        return records
