"""BIG-Bench Hard (Suzgun et al., 2022): 27 tasks, with three worked examples each."""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.small_files import check_keys, parse_json, read_text
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant
from ascendspeed_eval.tasks.reading import find_folder
from ascendspeed_eval.tasks.samples import Benchmark, Record

THINK = "Let's think step by step.\n"
QUESTION = "Q: {input}\nA:"


def first_line(text: str, record: Record) -> Extracted:
    """Strict is the rule of 2023: the first line. Flexible compares it loosely.

    The tokenizer of 2023 dropped the space before an answer when it decoded. So both ignore spaces at both ends;
    flexible also ignores case, brackets and a final full stop.
    """
    line = text.lstrip("\n").split("\n")[0].strip() if text.strip() else ""
    return {"strict": line, "flexible": line}


def after_answer_is(text: str, record: Record) -> Extracted:
    """Find what follows "the answer is": strict to the last character of the line but one, as lm-evaluation-harness.

    Flexible takes the last match, in any case, up to a full stop at the end of the line.
    """
    strict = re.findall(r"(?<=the answer is )(.*)(?=.)", text)
    flexible = re.findall(r"answer is:?\s*(.*?)\.?\s*$", text, re.IGNORECASE | re.MULTILINE)
    return {
        "strict": strict[0].strip() if strict else "[invalid]",
        "flexible": flexible[-1] if flexible else text,
    }


def exact_text(text: str, record: Record) -> Extracted:
    """Return the whole text; flexible: its first line."""
    return {"strict": text, "flexible": text.strip().split("\n")[0]}


class _LooseAnswer(str):
    """An answer to compare without case, brackets and a final full stop."""


def matches(answer: Any, record: Record) -> bool:
    """Compare a `_LooseAnswer` loosely, any other answer exactly."""
    if isinstance(answer, _LooseAnswer):
        return _plain(answer) == _plain(record.target)
    return bool(answer == record.target)


def _plain(text: str) -> str:
    bare = text.strip().removesuffix(".").strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?(?:[\s.:].*)?", bare)
    return letter[1] if letter else " ".join(bare.lower().split())


def _loosely(extract: Any) -> Any:
    def both(text: str, record: Record) -> Extracted:
        found = extract(text, record)
        return {"strict": found["strict"], "flexible": _LooseAnswer(found["flexible"])}

    return both


class BBH(Task):
    """The folders `bbh` (a JSON file per task) and `cot-prompts` (a text per task) of suzgunmirac/BIG-Bench-Hard."""

    name = "bbh"
    version = 1
    summary = "27 hard tasks of BIG-Bench"
    size = "6,511, 27 tasks"
    format = "folders bbh (<task>.json) and cot-prompts (<task>.txt)"
    reference_scores = (("LLaMA-7B", "2023 README, 3-shot", 0.334),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "without reasoning; the first line is the answer (rule of the 2023 AscendSpeed)",
                QUESTION,
                header="{description}\n\n",
                num_fewshot=3,
                extract=_loosely(first_line),
                matches=matches,
                max_new_tokens=32,
                stop=("\n",),
                seq_length=2048,
                main="strict",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "with reasoning; what follows 'the answer is' (bbh, that is bbh_cot_fewshot, of "
                "lm-evaluation-harness 0.4; prompts and rule are the authors')",
                QUESTION + " " + THINK,
                header="{description}\n\n",
                num_fewshot=3,
                answer_prefix="",
                extract=_loosely(after_answer_is),
                matches=matches,
                max_new_tokens=1024,
                stop=("</s>", "Q", "\n\n"),
                main="strict",
            ),
            "lm-eval-direct": TaskVariant(
                "lm-eval-direct",
                "without reasoning; the whole text is the answer, with its leading space "
                "(bbh_fewshot of lm-evaluation-harness 0.4)",
                QUESTION,
                header="{description}\n\n",
                num_fewshot=3,
                extract=_loosely(exact_text),
                matches=matches,
                max_new_tokens=256,
                stop=("</s>", "Q", "\n\n"),
                main="strict",
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read every task, with the examples and the description of its prompt."""
        folder = find_folder(path, ("bbh/*.json",), f"folder bbh; bbh reads {self.format}")
        records, examples, read = [], {}, []
        for file in sorted((folder / "bbh").glob("*.json")):
            prompt = folder / "cot-prompts" / f"{file.stem}.txt"
            description, shown = read_prompt(prompt) if prompt.is_file() else ("", [])
            examples[file.stem] = shown
            content = parse_json(read_text(file), str(file))
            check_keys(content, {"examples": list}, str(file))
            for number, one in enumerate(content["examples"]):
                check_keys(one, {"input": str, "target": str}, f"{file}, example {number}")
                fields = {**one, "description": description}
                records.append(Record(f"{file.stem}/{number}", file.stem, fields, one["target"]))
            read += [file, *([prompt] if prompt.is_file() else [])]
        return Benchmark(records, examples, read)

    def answer(self, variant: TaskVariant, record: Record) -> str:
        """Return the reasoning, or the answer alone."""
        return str(record.fields["reasoning"]) if variant.name == "lm-eval" else str(record.target)


def read_prompt(path: Path) -> tuple[str, list[Record]]:
    """Return the description and the worked examples of a prompt of the authors."""
    text = read_text(path)
    body = text.partition("-----\n")[2] or text
    description, *parts = body.rstrip("\n").split("\n\nQ: ")
    examples = []
    for number, part in enumerate(parts):
        question, _, reasoning = part.partition("\nA: " + THINK.rstrip())
        reasoning = reasoning.lstrip()
        answer = re.search(r"So the answer is (.*)\.\s*$", reasoning, re.DOTALL)
        if not answer:
            raise EvaluationError(
                f"{path}, example {number + 1}: the text does not end in 'So the answer is ...'"
            )
        fields = {"input": question, "description": description, "reasoning": reasoning}
        examples.append(Record(f"example/{number}", path.stem, fields, answer[1]))
    return description, examples
