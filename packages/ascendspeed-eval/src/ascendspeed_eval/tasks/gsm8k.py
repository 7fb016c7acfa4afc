"""GSM8K (Cobbe et al., 2021): grade-school mathematics in words."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.tasks.answer_marks import without_reasoning
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant
from ascendspeed_eval.tasks.number_answers import ReadNumber, find_number, value_of
from ascendspeed_eval.tasks.reading import find_files, not_empty, read_json_lines
from ascendspeed_eval.tasks.samples import Benchmark, Record

EXAMPLES_2023 = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, "
        "there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have "
        "been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, "
        "they had 74 - 35 = 39. The answer is 39.",
    ),
)
"""The first three examples of Wei et al. (2022), Chain-of-Thought Prompting, table 20."""

INVALID = "[invalid]"


def number_of_2023(text: str, record: Record) -> Extracted:
    """Find the number after "The answer is", by the rule of 2023; flexible: `find_number`.

    That rule cuts at the next `Q:`, drops `$` and `,`, and ends the number at a space or a full stop, so that a
    decimal number loses its fraction.
    """
    cut = text.split("Q:")[0].replace("$", "").replace(",", "") + "  "
    found = re.findall(r"The answer is (.*?) ", cut.replace(".", " "))
    return {"strict": found[0] if found else None, "flexible": find_number(without_reasoning(text))}


def number_of_lm_eval(text: str, record: Record) -> Extracted:
    """Find the number after `####`; flexible: the last number of the text. The filters of lm-evaluation-harness."""
    strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return {"strict": strict[0].strip() if strict else INVALID, "flexible": last_number(text)}


def last_number(text: str) -> str:
    """Return the last number, with its `$`, `,` and `.`."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next((part for part in found[-1] if part), INVALID).strip() if found else INVALID


def same_number(answer: Any, record: Record) -> bool:
    """Compare without thousands commas, `$` and a final full stop, as lm-evaluation-harness does; numbers by value."""
    if isinstance(answer, ReadNumber):
        return answer.value == value_of(str(record.target))
    return answer is not None and _plain(answer) == _plain(str(record.target))


def _plain(number: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        number = re.sub(pattern, "", number)
    return number.lower()


class GSM8K(Task):
    """`test.jsonl`, with the examples of `train.jsonl` beside it."""

    name = "gsm8k"
    version = 2
    summary = "grade-school mathematics in words"
    size = "1,319 (test split)"
    format = 'JSON lines with question and answer, which ends in "#### <number>" (or a JSON list, as in 2023)'
    reference_scores = (("LLaMA-7B", "2023 README, 3-shot", 0.102),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "the number after the first 'The answer is' (the rule of the 2023 AscendSpeed, "
                "whose question has neither 'Q:' nor 'A:')",
                "{question}",
                num_fewshot=3,
                answer_prefix="",
                extract=number_of_2023,
                matches=same_number,
                max_new_tokens=128,
                seq_length=2048,
                main="strict",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the number after '####' (strict) or the last number (flexible) (gsm8k of "
                "lm-evaluation-harness 0.4)",
                "Question: {question}\nAnswer:",
                num_fewshot=5,
                extract=number_of_lm_eval,
                matches=same_number,
                max_new_tokens=256,
                stop=("Question:", "</s>", "<|im_end|>"),
                surplus_draws=0,
                main="strict",
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read a file, or a folder's `test.jsonl`, and the `train.jsonl` beside it."""
        found = find_files(path, ("*.jsonl", "*.json"), f"gsm8k reads {self.format}")
        files = [f for f in found if f.stem == "test"] or [f for f in found if f.stem != "train"]
        files = files if Path(path).is_dir() else found
        records = [record for file in files for record in self._records(file)]
        not_empty(records, found, f"gsm8k reads {self.format}")
        train = files[0].parent / "train.jsonl"
        examples = self._records(train) if train.is_file() and train not in files else []
        return Benchmark(records, {"gsm8k": examples}, [*files, *([train] if examples else [])])

    def fewshot_examples(
        self, variant: TaskVariant, benchmark: Benchmark, record: Record, count: int
    ) -> Sequence[Record]:
        """Return the three examples of 2023; under `lm-eval` those of `train.jsonl`."""
        made = [
            Record(
                f"example/{number}", "gsm8k", {"question": f"Q: {question}\n\nA:", "answer": answer}, answer
            )
            for number, (question, answer) in enumerate(EXAMPLES_2023)
        ]
        return (
            made[:count]
            if variant.name == "ascendspeed"
            else super().fewshot_examples(variant, benchmark, record, count)
        )

    def answer(self, variant: TaskVariant, record: Record) -> str:
        """Return the worked answer."""
        return str(record.fields["answer"])

    @staticmethod
    def _records(file: Path) -> list[Record]:
        records = []
        for number, fields in read_json_lines(file, {"question": str, "answer": (str, list)}):
            answer = fields["answer"]
            if isinstance(answer, list) and len(answer) == 1:
                target = str(answer[0])
            elif isinstance(answer, str) and "#### " in answer:
                target = answer.rpartition("#### ")[2].strip()
            else:
                raise EvaluationError(f'{file}, line {number}: the answer does not end in "#### <number>"')
            records.append(Record(f"{file.stem}-{number}", "gsm8k", fields, target))
        return records
