"""BoolQ (Clark et al., 2019): yes/no questions about a passage."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.model import EvaluatedModel
from ascendspeed_eval.tasks.base import Protocol_, Sample, Scored, answer_choice, fill

TEMPLATE = "{passage}\nQuestion: {question}?\nAnswer:"
KEYS: dict[str, type] = {"question": str, "passage": str, "answer": bool}


class BoolQ:
    """The development file of BoolQ: one JSON object per line with `question`, `passage`, `answer` (true or false)."""

    name = "boolq"
    version = 1
    metric = "accuracy"
    default_protocol = "ascendspeed"
    format = "JSON lines with question, passage and answer (true or false)"
    protocols: Mapping[str, Protocol_] = MappingProxyType(
        {
            "ascendspeed": Protocol_(
                "ascendspeed",
                "zero-shot; the likelier of ' Yes' and ' No' after 'Answer:', yes when equal "
                "(the rule of the 2023 AscendSpeed)",
                TEMPLATE,
                (" Yes", " No"),
            ),
            "lm-eval": Protocol_(
                "lm-eval",
                "zero-shot; the likelier of ' no' and ' yes' after 'Answer:', no when equal "
                "(boolq of lm-evaluation-harness 0.4)",
                TEMPLATE,
                (" no", " yes"),
            ),
        }
    )

    def find_files(self, path: str) -> list[Path]:
        """Return a file, a folder's `*.jsonl`, or for `sample` the small file that comes with the package."""
        if path == "sample":
            return [Path(str(resources.files("ascendspeed_eval") / "samples" / "boolq.jsonl"))]
        place = Path(path)
        files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place] if place.is_file() else []
        if not files:
            raise EvaluationError(
                f"task_data_path={path} holds no .jsonl file; boolq reads {self.format} "
                "(--task-data-path sample takes the small file that comes with the package)"
            )
        return files

    def load(self, files: Sequence[Path], protocol: Protocol_) -> list[Sample]:
        """Read all records."""
        samples: list[Sample] = []
        yes = next(n for n, choice in enumerate(protocol.choices) if choice.strip().lower() == "yes")
        for path in files:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    record = _parse(line, f"{path}, line {number}")
                    target = yes if record["answer"] else 1 - yes
                    samples.append(Sample(f"{path.stem}-{number}", fill(protocol.template, record), target))
        if not samples:
            raise EvaluationError(f"{files[0]} holds no record; boolq reads {self.format}")
        return samples

    def ask(self, model: EvaluatedModel, samples: Sequence[Sample], protocol: Protocol_) -> list[Scored]:
        """Compare the likelihood of yes and no."""
        return answer_choice(model, samples, protocol)

    def baselines(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Chance, and always giving the more frequent answer."""
        share = sum(sample.target for sample in scored) / len(scored)
        return {"chance": 0.5, "majority": max(share, 1 - share)}


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    for key, kind in KEYS.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise EvaluationError(f"{where}: {key} is missing or no {kind.__name__}; the record has {have}")
    return dict(record)
