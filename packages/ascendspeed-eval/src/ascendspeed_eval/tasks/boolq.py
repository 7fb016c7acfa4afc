"""BoolQ (Clark et al., 2019): yes/no questions about a passage."""

from importlib import resources
from pathlib import Path
from types import MappingProxyType

from ascendspeed_eval.tasks.base import Benchmark, Record, Task, TaskVariant
from ascendspeed_eval.tasks.reading import find_files, not_empty, read_json_lines

TEMPLATE = "{passage}\nQuestion: {question}?\nAnswer:"
CHOICES = {"ascendspeed": (" Yes", " No"), "lm-eval": (" no", " yes")}


class BoolQ(Task):
    """The development file of BoolQ; a `train.jsonl` beside it gives examples.

    A target is "yes" or "no"; its index depends on the variant's order of choices.
    """

    name = "boolq"
    version = 1
    summary = "yes/no questions about a passage"
    size = "3,270 (development split)"
    format = "JSON lines with question, passage and answer (true or false)"
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
                "the likelier of ' no' and ' yes' after 'Answer:', no when equal "
                "(boolq of lm-evaluation-harness 0.4)",
                TEMPLATE,
                lambda record: CHOICES["lm-eval"],
                lambda record: [1 if record.target == "yes" else 0],
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

    def _records(self, file: Path) -> list[Record]:
        keys = {"question": str, "passage": str, "answer": bool}
        return [
            Record(f"{file.stem}-{number}", "boolq", fields, "yes" if fields["answer"] else "no")
            for number, fields in read_json_lines(file, keys)
        ]
