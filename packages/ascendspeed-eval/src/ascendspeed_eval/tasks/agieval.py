"""AGIEval (Zhong et al., 2023): questions of admission and qualification exams, English and Chinese."""

import ast
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.progress import log
from ascendspeed_eval.small_files import KeyTypes, check_keys, is_a
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant, without_first_space
from ascendspeed_eval.tasks.math_answers import find_answer, same_answer
from ascendspeed_eval.tasks.reading import find_folder, read_csv, read_json_lines
from ascendspeed_eval.tasks.samples import Benchmark, Record

ENGLISH = (
    "aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-en-without-passage",
    "sat-math",
)  # fmt: skip
CHINESE = (
    "gaokao-biology", "gaokao-chemistry", "gaokao-chinese", "gaokao-geography", "gaokao-history", "gaokao-mathqa",
    "gaokao-physics", "jec-qa-ca", "jec-qa-kd", "logiqa-zh",
)  # fmt: skip
CLOZE = ("gaokao-mathcloze", "math")
MULTI_ANSWER = ("gaokao-physics", "jec-qa-ca", "jec-qa-kd")
"""Subsets whose questions may have several right choices."""

EXAMPLES_2023 = {
    "gaokao-chinese": 1, "gaokao-english": 1, "jec-qa-ca": 3, "jec-qa-kd": 4, "logiqa-en": 2, "lsat-ar": 2,
    "lsat-lr": 1, "lsat-rc": 1, "sat-en": 1,
}  # fmt: skip
"""Number of examples in the prompts of 2023; prompts of other subsets show all (three or five)."""

LETTERS = "ABCDEFG"


def is_chinese(subset: str) -> bool:
    """Return whether the prompts of a subset are Chinese."""
    return subset in CHINESE or subset == "gaokao-mathcloze"


def line_of_2023(text: str, record: Record) -> Extracted:
    """Strict is the rule of 2023: the first line without `$`. Flexible: the rule of the authors."""
    line = without_first_space(text).split("\n")[0].replace("$", "")
    return {"strict": line, "flexible": _authors_answer(text, record)}


def line_matches(answer: Any, record: Record) -> bool:
    """Compare with the labels joined by a comma, or the answer without `$`; a list by the authors' rule."""
    if isinstance(answer, _AuthorsAnswer):
        return _authors_match(answer, record)
    right = ",".join(record.target) if isinstance(record.target, list) else record.target.replace("$", "")
    return bool(answer == right)


def authors_answer(text: str, record: Record) -> Extracted:
    """The authors' rule for zero-shot answers (post_process.py), under both names."""
    found = _authors_answer(text, record)
    return {"strict": found, "flexible": found}


class _AuthorsAnswer(list[str]):
    """The answer by the authors' rule: letters, or one answer of a cloze question."""


def _authors_answer(text: str, record: Record) -> "_AuthorsAnswer":
    if record.subset in CLOZE:
        answer = find_answer(_without_prefix(text))
        return _AuthorsAnswer([] if answer is None else [answer])
    if record.subset in MULTI_ANSWER:
        return _AuthorsAnswer(re.findall(r"\(*([A-F])\)*", text))
    letter = re.search(r"[A-F]", text)
    return _AuthorsAnswer(letter[0] if letter else [])


def _authors_match(answer: Any, record: Record) -> bool:
    if record.subset in CLOZE:
        return bool(answer) and same_answer(answer[0], record.target)
    return set(answer) == set(record.target)


def _without_prefix(text: str) -> str:
    for prefix in ("The answer is therefore", "答案是"):
        if prefix in text:
            text = text.rpartition(prefix)[2].strip()
    return text


def lm_eval_answer(text: str, record: Record) -> Extracted:
    """Return the whole text; `lm_eval_matches` finds the answer in it, as in the target."""
    return {"strict": text, "flexible": _authors_answer(text, record)}


def lm_eval_matches(answer: Any, record: Record) -> bool:
    """Find the answers in both texts, and compare (agieval/utils.py of lm-evaluation-harness)."""
    if isinstance(answer, _AuthorsAnswer):
        return _authors_match(answer, record)
    ours, theirs = find_answer(answer), find_answer(record.target)
    if ours is None or theirs is None:
        return ours is theirs
    return same_answer(ours, theirs)


def options(record: Record) -> Sequence[str]:
    """Return the choices with their letters, each after a space."""
    return [" " + option for option in record.fields["options"]]


def target_indices(record: Record) -> Sequence[int]:
    """Return the indices of the right choices."""
    return [LETTERS.index(letter) for letter in record.target if letter in LETTERS]


class AGIEval(Task):
    """The folder `v1` with one file per subset, and `few_shot_prompts.csv` beside it."""

    name = "agieval"
    version = 1
    summary = "admission and qualification exams, 21 subsets, English and Chinese"
    size = "8,269 (version 1), 21 subsets"
    format = "a folder v1 of <subset>.jsonl, and few_shot_prompts.csv beside it"
    groups = MappingProxyType(
        {
            "english": (*ENGLISH, "math"),
            "chinese": (*CHINESE, "gaokao-mathcloze"),
            "cloze": CLOZE,
            "choice": (*ENGLISH, *CHINESE),
        }
    )
    groups_source = "ruixiangcui/AGIEval, dataset_loader.py"
    reference_scores = (("LLaMA-7B", "2023 README", 0.210),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "the first line is the label or the answer, labels joined by a comma (rule of the 2023 AscendSpeed)",
                "",
                num_fewshot=5,
                answer_prefix="",
                extract=line_of_2023,
                matches=line_matches,
                max_new_tokens=1024,
                stop=("\n",),
                seq_length=2048,
                main="strict",
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the likeliest whole option; for cloze questions the generated text (agieval of "
                "lm-evaluation-harness 0.4)",
                "",
                options,
                target_indices,
                normalised=True,
                extract=lm_eval_answer,
                matches=lm_eval_matches,
                max_new_tokens=32,
                stop=("Q:",),
                main="strict",
            ),
            "authors": TaskVariant(
                "authors",
                "the first letter, all letters where several can be right, or the cloze answer "
                "compared as mathematics (ruixiangcui/AGIEval)",
                "",
                extract=authors_answer,
                matches=_authors_match,
                max_new_tokens=64,
                main="strict",
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read every subset, and the examples."""
        version_1 = Path(path) / "v1"
        where = str(version_1) if version_1.is_dir() else path
        folder = find_folder(
            where,
            tuple(f"{name}.jsonl" for name in (*ENGLISH, *CHINESE, *CLOZE)),
            f"subset; agieval reads {self.format}",
        )
        files = sorted(file for file in folder.glob("*.jsonl") if file.stem in (*ENGLISH, *CHINESE, *CLOZE))
        records = [record for file in files for record in self._records(file)]
        prompts = next(
            (
                p
                for p in (folder / "few_shot_prompts.csv", folder.parent / "few_shot_prompts.csv")
                if p.is_file()
            ),
            None,
        )
        examples = read_examples(prompts) if prompts is not None else {}
        return Benchmark(records, examples, [*files, *([prompts] if prompts is not None else [])])

    def header(self, variant: TaskVariant, record: Record) -> str:
        """Return the line of the exam."""
        if variant.name != "ascendspeed":
            return ""
        return (
            "以下是考试中各个问题的答案。\n"
            if is_chinese(record.subset)
            else "Here are the answers for the problems in the exam.\n"
        )

    def question(self, variant: TaskVariant, record: Record) -> str:
        """Return the question in the form of 2023, or the authors' zero-shot one, which the harness has too."""
        if variant.name == "ascendspeed":
            return _question_2023(record)
        fields, chinese = record.fields, is_chinese(record.subset)
        text = str(fields["passage"] or "") + ("问题：" if chinese else "Q: ") + str(fields["question"])
        if record.subset in CLOZE:
            return text + ("\n答案：" if chinese else "\nA: The answer is")
        last = LETTERS[(len(fields["options"]) if len(fields["options"]) > 1 else 4 if chinese else 5) - 1]
        shown = " ".join(fields["options"])
        if chinese:
            return f"{text} 选项：{shown}\n答案：从A到{last}, 我们应选择"
        return f"{text} Answer Choices: {shown}\nA: Among A through {last}, the answer is"

    def answer(self, variant: TaskVariant, record: Record) -> str:
        """Return the labels joined by a comma, or the answer."""
        return ",".join(record.target) if isinstance(record.target, list) else str(record.target)

    def fewshot_examples(
        self, variant: TaskVariant, benchmark: Benchmark, record: Record, count: int
    ) -> Sequence[Record]:
        """Return the numbered examples that the prompts of 2023 show for this subset."""
        wanted = benchmark.examples.get(
            "sat-en" if record.subset == "sat-en-without-passage" else record.subset, ()
        )
        limit = min(count, EXAMPLES_2023.get(record.subset, count))
        shown = []
        for number, one in enumerate(wanted[:limit], 1):
            fields = dict(one.fields)
            if record.subset == "sat-en-without-passage":
                fields["passage"] = ""
            shown.append(Record(one.id, record.subset, {**fields, "number": number}, one.target))
        return shown

    def samples(
        self, benchmark: Benchmark, variant: TaskVariant, num_fewshot: int | None = None
    ) -> list[Any]:
        """Build the prompts; some subsets have fewer examples than `num_fewshot`."""
        if variant.name != "ascendspeed":
            if num_fewshot:
                raise EvaluationError(
                    f"num_fewshot={num_fewshot}: agieval ({variant.name}) is zero-shot; leave --num-fewshot out"
                )
            return super().samples(benchmark, variant, 0)
        made = []
        for record in benchmark.records:
            count = len(
                self.fewshot_examples(
                    variant, benchmark, record, variant.num_fewshot if num_fewshot is None else num_fewshot
                )
            )
            fields = {**record.fields, "number": count + 1, "is_question": True}
            asked = Record(record.id, record.subset, fields, record.target)
            made += super().samples(Benchmark([asked], benchmark.examples, ()), variant, count)
        return made

    def requests(self, sample: Any, variant: TaskVariant, settings: Any) -> Sequence[Any]:
        """Compare the options; generate text for cloze questions."""
        return super().requests(sample, _variant_of(sample.record, variant), settings)

    def score(self, sample: Any, results: Sequence[Any], variant: TaskVariant, settings: Any) -> Any:
        """Score the options, or the text of a cloze question."""
        return super().score(sample, results, _variant_of(sample.record, variant), settings)

    def baselines(self, records: Sequence[Record], variant: TaskVariant) -> dict[str, float]:
        """Return the score of guessing on the questions with choices, if the variant compares choices."""
        if variant.choices is None:
            return super().baselines(records, variant)
        return super().baselines([r for r in records if r.subset not in CLOZE], variant)

    @staticmethod
    def _records(file: Path) -> list[Record]:
        cloze = file.stem in CLOZE
        wanted: KeyTypes = {"answer": str} if cloze else {"options": list, "label": (str, list)}
        keys: KeyTypes = {"question": str, **wanted}
        records = []
        for number, fields in read_json_lines(file, keys):
            _check_texts(fields, f"{file}, line {number}")
            target = fields["answer"] if cloze else fields["label"]
            if not cloze:
                target = list(target)
                # Some lists hold a stray "。" beside the letters; the authors compare them as they are.
                if not any(letter in LETTERS for letter in target):
                    raise EvaluationError(f"{file}, line {number}: label={fields['label']!r} is no letter")
                if not any(letter in LETTERS[: len(fields["options"])] for letter in target):
                    log(
                        f"{file}, line {number}: label={fields['label']!r} names none of its options; none is right"
                    )
            records.append(Record(f"{file.stem}/{number}", file.stem, {"passage": None, **fields}, target))
        return records


def _variant_of(record: Record, variant: TaskVariant) -> TaskVariant:
    return replace(variant, choices=None) if record.subset in CLOZE else variant


def _check_texts(fields: Any, where: str) -> None:
    """Raise `EvaluationError` unless passage, options and label of a record are texts."""
    options, label = fields.get("options"), fields.get("label")
    texts = (
        [*(options or ()), *(label if isinstance(label, list) else ())] if _is_list(options) else [options]
    )
    if not all(is_a(one, (str,)) for one in texts) or not is_a(fields.get("passage"), (str, type(None))):
        raise EvaluationError(f"{where}: passage, options or label is no text; correct it")


def _is_list(value: Any) -> bool:
    return value is None or isinstance(value, list)


def _question_2023(record: Record) -> str:
    fields, chinese = record.fields, is_chinese(record.subset)
    text, asked = str(fields["passage"] or ""), str(fields["question"])
    start = f"问题 {fields['number']}.   " if chinese else f"Problem {fields['number']}.   "
    if fields.get("is_question"):
        # The program of 2023 asked gaokao-english in Chinese, after English examples.
        chinese = chinese or record.subset == "gaokao-english"
        # The question has its passage on a line of its own; in examples a space follows the passage.
        text += ("\n" if text else "") + asked
        shown = "\n".join(fields["options"] or ())
        choose = "\n从以下选项中选择:\n" if chinese else "\nChoose from the following options:\n"
        return start + text + "\n" + choose + "\n" + shown + "\n" + ("\n答案：" if chinese else "\nAnswer:")
    if record.subset in CLOZE:
        return start + asked + ("\n答案:" if chinese else "\nAnswer:")
    choose = "\n从以下选项中选择:\n" if chinese else "\nChoose from the following options:\n"
    shown = "\n".join(fields["options"])
    return start + text + " " + asked + choose + shown + ("\n答案:" if chinese else "\nAnswer:")


def read_examples(path: Path) -> dict[str, list[Record]]:
    """Return the examples of `few_shot_prompts.csv`: Python-repr dicts in every second row."""
    examples: dict[str, list[Record]] = {}
    for number, row in enumerate(read_csv(path)):
        if number % 2:
            continue
        for subset, text in row.items():
            if not subset or not text:
                continue
            try:
                fields = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise EvaluationError(
                    f"{path}, row {number + 2}, column {subset}: not a record; copy it again"
                ) from None
            where = f"{path}, row {number + 2}, column {subset}"
            check_keys(fields, {"question": str}, where)
            _check_texts(fields, where)
            label = fields.get("label")
            target = list(label) if label else str(fields.get("answer"))
            examples.setdefault(subset, []).append(Record(f"example/{number // 2}", subset, fields, target))
    return examples
