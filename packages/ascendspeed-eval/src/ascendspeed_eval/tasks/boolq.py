"""BoolQ (Clark et al., 2019): yes/no questions about a passage."""

from importlib import resources
from pathlib import Path
from types import MappingProxyType

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.small_files import check_keys
from ascendspeed_eval.tasks.base import Task, TaskVariant
from ascendspeed_eval.tasks.reading import find_files, not_empty, read_json_lines
from ascendspeed_eval.tasks.samples import Benchmark, Record

TEMPLATE = "{passage}\nQuestion: {question}?\nAnswer:"
TITLE_SEPARATOR = " -- "
"""What SuperGLUE puts between title and passage."""
CHOICES = {"ascendspeed": (" Yes", " No"), "lm-eval": (" no", " yes")}


class BoolQ(Task):
    """The development file of BoolQ, its own or SuperGLUE's; a `train.jsonl` beside it gives examples.

    A target is "yes" or "no"; its index depends on the variant's order of choices.
    """

    name = "boolq"
    version = 2
    summary = "yes/no questions about a passage"
    size = "3,270 (development split)"
    format = "JSON lines with question, title, passage and answer (true or false), or SuperGLUE's with label"
    reference_scores = (("LLaMA-7B", "2023 README, zero-shot", 0.742),)
    variants = MappingProxyType(
        {
            "ascendspeed": TaskVariant(
                "ascendspeed",
                "the likelier of ' Yes' and ' No' after 'Answer:', yes when equal "
                "(the rule of the 2023 AscendSpeed)",
                TEMPLATE,
                lambda record: CHOICES["ascendspeed"],
                lambda record: [0 if record.target == "yes" else 1],
                seq_length=512,
            ),
            "lm-eval": TaskVariant(
                "lm-eval",
                "the likelier of ' no' and ' yes' after 'Answer:', no when equal; the title before the "
                "passage, as in SuperGLUE (boolq of lm-evaluation-harness 0.4)",
                "{title}" + TITLE_SEPARATOR + TEMPLATE,
                lambda record: CHOICES["lm-eval"],
                lambda record: [1 if record.target == "yes" else 0],
                # The task names no split for examples, so the harness draws one more, in case it is the question.
                surplus_draws=1,
            ),
        }
    )

    def read(self, path: str) -> Benchmark:
        """Read a file, a folder's `dev.jsonl` or other `*.jsonl`, or for `sample` the package's small file."""
        if path == "sample":
            files = [Path(str(resources.files("ascendspeed_eval") / "samples" / "boolq.jsonl"))]
        else:
            hint = f"boolq reads {self.format} (--task-data-path sample reads the small file that the package contains)"
            found = find_files(path, ("*.jsonl",), hint)
            files = [file for file in found if file.stem != "train"] if Path(path).is_dir() else found
        train = files[0].parent / "train.jsonl" if files else None
        records = [record for file in files for record in self._records(file)]
        not_empty(records, files, f"boolq reads {self.format}")
        examples = (
            self._records(train) if train is not None and train.is_file() and train not in files else []
        )
        return Benchmark(records, {"boolq": examples}, [*files, *([train] if examples and train else [])])

    def question(self, variant: TaskVariant, record: Record) -> str:
        """Return the question.

        Raises:
            EvaluationError: the prompt shows titles, and the record has none.
        """
        if "{title}" in variant.template and "title" not in record.fields:
            raise EvaluationError(
                f"record {record.id} has no title, which protocol {variant.name} shows before the passage; give "
                "BoolQ's own dev.jsonl, or SuperGLUE's (hf:aps/super_glue)"
            )
        return super().question(variant, record)

    def _records(self, file: Path) -> list[Record]:
        records = []
        for number, fields in read_json_lines(file, {"question": str, "passage": str}):
            where, answer = f"{file}, line {number}", "answer"
            if "label" in fields and "answer" not in fields:
                # SuperGLUE's passages begin with the title.
                title, separator, passage = fields["passage"].partition(TITLE_SEPARATOR)
                fields = {**fields, "title": title, "passage": passage} if separator else fields
                answer = "label"
            check_keys(fields, {answer: bool}, where)
            if "title" in fields:
                check_keys(fields, {"title": str}, where)
            records.append(
                Record(f"{file.stem}-{number}", "boolq", fields, "yes" if fields[answer] else "no")
            )
        return records
