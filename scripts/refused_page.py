"""Write docs/refused.md, "What is refused, and why", from the code: `python scripts/refused_page.py`.

A table of the page is an entry of `TABLES`: a title, what holds for all its rows, the names of its columns, and a
function that makes the rows from data in the packages. To add one, expose the data there as a table that the code
itself goes by, and add an entry here. tests/contracts/test_refused_page.py compares the page with the code.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "refused.md"
INTRODUCTION = """\
# What is refused, and why

<!-- Written by scripts/refused_page.py from the code; change the code and run it again. -->

A command never guesses. What it cannot honour ends it with one line that names what, where, the rule and the remedy. \
This page lists what is refused by a table of the code. [Damaged files](damage.md) has what becomes of files that are \
not what they should be.
"""

Row = Sequence[str]


@dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        title: heading.
        introduction: what holds for all rows.
        columns: heads of the columns.
        rows: makes the rows.
    """

    title: str
    introduction: str
    columns: Row
    rows: Callable[[], Iterable[Row]]


def exit_statuses() -> Iterator[Row]:
    from ascendspeed_core.weights.source import CheckpointError
    from ascendspeed_data import errors
    from ascendspeed_eval import errors as eval_errors

    for kind in (
        errors.ConfigError, errors.DataError, CheckpointError, errors.AscendSpeedError, eval_errors.UsageError,
        eval_errors.EvaluationError,
    ):  # fmt: skip
        yield str(kind.exit_code), f"`{kind.__name__}`", (inspect.getdoc(kind) or "").splitlines()[0]


def input_formats() -> Iterator[Row]:
    from ascendspeed_data.reading.inputs import COLUMN_FORMATS, COMPRESSIONS, TEXT_FORMATS

    yield code(TEXT_FORMATS), f"also {' and '.join(code([x]) for x in COMPRESSIONS)}"
    yield code(COLUMN_FORMATS), "they compress themselves"


def record_keys() -> Iterator[Row]:
    from ascendspeed_data.fields import FIELDS

    for field in FIELDS:
        yield field.level, code(field.names), field.reason, field.remedy


def handler_columns() -> Iterator[Row]:
    from ascendspeed_data.handlers import SampleHandler, all_handlers

    for handler, origin in all_handlers():
        if isinstance(handler, SampleHandler) and origin == "built in":
            read = [*handler.columns, *handler.optional_columns]
            yield f"`{handler.name}`", code(read), code(handler.refused_columns)


def model_keys() -> Iterator[Row]:
    from ascendspeed_core.models.families import FAMILIES

    for family in FAMILIES.values():
        for key, values in family.must_be.items():
            yield family.name, f"`{key}`", code(map(shown, values))


def rope_scaling() -> Iterator[Row]:
    from ascendspeed_core.models.families.config_rules import SCALING_KEYS

    for kind, keys in SCALING_KEYS.items():
        yield f"`{kind}`", code(("factor", *keys))


def largest_models() -> Iterator[Row]:
    from ascendspeed_core.config.model import ModelConfig

    for name, field in ModelConfig.model_fields.items():
        limit = next((found.le for found in field.metadata if getattr(found, "le", None) is not None), None)
        if limit is not None:
            yield f"`{name}`", f"{limit:,}"


def megatron_arguments() -> Iterator[Row]:
    from ascendspeed_core.weights.external.config_of_arguments import MUST_BE

    for name, values in MUST_BE.items():
        yield f"`{name}`", code(shown(value) for value in values if value is not None) or "none"


def adapter_fields() -> Iterator[Row]:
    from ascendspeed_core.weights.adapters.adapter_config import REFUSED

    for field in REFUSED:
        yield f"`{field.name}`", field.reason, field.remedy


def quantised_weights() -> Iterator[Row]:
    from ascendspeed_core.weights.huggingface.quantised import METHODS

    for method in METHODS:
        yield method.name, code(method.marks) or "`quantization_config` alone", method.remedy


def deepspeed_keys() -> Iterator[Row]:
    from ascendspeed_core.config.deepspeed import REFUSED

    for key, reason in REFUSED.items():
        yield f"`{key}`", reason


def megatron_options() -> Iterator[Row]:
    from ascendspeed_core.config.megatron import LACKING_OPTIONS

    for option in LACKING_OPTIONS:
        values = code(option.values) if option.values is not None else "all but the default"
        yield f"`{option.name}`", values, option.reason


def megatron_models() -> Iterator[Row]:
    from ascendspeed_core.config.megatron import LACKING_MODELS

    for lacking in LACKING_MODELS:
        yield lacking.what, lacking.reason


def megatron_families() -> Iterator[Row]:
    from ascendspeed_core.config.megatron import LACKING_MODELS
    from ascendspeed_core.models.families import FAMILIES

    for family in FAMILIES.values():
        for name, keys in family.sizes.items():
            config = family.read_config(keys)
            lacking = [row.what for row in LACKING_MODELS if row.has(config)]
            if lacking:
                yield family.name, name, "; ".join(lacking)


def megatron_fields() -> Iterator[Row]:
    from ascendspeed_core.optim.megatron.further_fields import UNSUPPORTED

    for name, reason in UNSUPPORTED.items():
        yield f"`{name}`", reason


def engine_options() -> Iterator[Row]:
    from ascendspeed_infer.transformers_engine import TransformersEngine
    from ascendspeed_infer.transformers_engine import kind as transformers_kind
    from ascendspeed_infer.vllm_engine import VllmEngine
    from ascendspeed_infer.vllm_engine import kind as vllm_kind

    for kind, engine in ((transformers_kind, TransformersEngine), (vllm_kind, VllmEngine)):
        yield f"`{kind.name}`", code(sorted(engine.supported_options)), code(sorted(kind.options))


def options_of_2023() -> Iterator[Row]:
    from ascendspeed_infer.legacy_options import IGNORED_OPTIONS

    for name, reason in IGNORED_OPTIONS.items():
        yield f"`{name}`", reason


CONFIGS = (
    "ascendspeed-data/src/ascendspeed_data/preprocessing/job.py",
    "ascendspeed-core/src/ascendspeed_core/config",
    "ascendspeed-core/src/ascendspeed_core/training/validate.py",
    "ascendspeed-core/src/ascendspeed_core/training/run_length.py",
    "ascendspeed-core/src/ascendspeed_core/training/eval_prompts.py",
    "ascendspeed-ckpt/src/ascendspeed_ckpt/config.py",
    "ascendspeed-infer/src/ascendspeed_infer/config.py",
    "ascendspeed-infer/src/ascendspeed_infer/engines.py",
    "ascendspeed-eval/src/ascendspeed_eval/commands/run.py",
)
"""Files and folders whose errors are about options."""

OPTION_ERRORS = ("ConfigError", "UsageError", "ValueError")


def options() -> Iterator[Row]:
    for name in CONFIGS:
        path = ROOT / "packages" / name
        package = name.partition("/")[0].removeprefix("ascendspeed-")
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for message in messages(file):
                rule, _, remedy = message.rpartition("; ")
                yield (package, rule, remedy) if rule else (package, remedy, "")


def messages(file: Path) -> Iterator[str]:
    """Yield the messages of all errors about options that a file raises; what is put into them is an ellipsis."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OPTION_ERRORS:
            text = literal(node.args[0]) if node.args else ""
            if any(character.isalpha() for character in text):
                yield text


def literal(node: ast.expr) -> str:
    """Return the text of a string or f-string; empty for other expressions."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def pickled_classes() -> Iterator[Row]:
    from ascendspeed_core.weights.files.torch_files import INERT_PACKAGES, STORAGE_DTYPES

    yield "tensors, dictionaries, lists, texts, numbers, `argparse.Namespace`", "read as data"
    yield f"storages: {code(STORAGE_DTYPES)}", "read by position, later"
    yield f"objects of {code(INERT_PACKAGES)}", "kept as a name without behaviour"
    yield "anything else", "refused by name; nothing of it is run"


TABLES = (
    Table(
        "Exit statuses",
        "Every error is one line on stderr. Scripts tell by the status who has to act: 2 is the command line, 1 is a "
        "file, a device or another process.",
        ("status", "class in Python", "when"),
        exit_statuses,
    ),
    Table(
        "Options",
        "An option that would be ignored, or that contradicts another, is an error before anything is computed.",
        ("package", "rule", "remedy"),
        options,
    ),
    Table(
        "Files of `asd-data preprocess`",
        "Other endings are refused: a guess at a format would train on its markup.",
        ("endings", "compressed"),
        input_formats,
    ),
    Table(
        "Keys of records",
        "These keys can change what is learned. A filled one that the handler or the chat template does not read, or "
        "whose value is not supported, ends the run; [handlers](handlers.md#keys-that-change-what-is-learned) say "
        "which are read. Handlers of text only count them.",
        ("of", "keys", "why", "remedy"),
        record_keys,
    ),
    Table(
        "Columns that handlers read",
        "Another column is refused if it is one of the keys above, and counted if it is not.",
        ("handler of samples or pairs", "columns", "refused besides"),
        handler_columns,
    ),
    Table(
        "Keys of a model's `config.json`",
        "The code computes one value of these keys. Another one would be another model, so it is refused.",
        ("family", "key", "what is computed"),
        model_keys,
    ),
    Table(
        "Scaling of rotary positions",
        "Another kind, or another key of these, is refused: positions would be wrong without a sign.",
        ("kind", "keys that are read"),
        rope_scaling,
    ),
    Table(
        "Largest sizes of a model",
        "A config beyond them is damaged; nothing is allocated for it.",
        ("size", "at most"),
        largest_models,
    ),
    Table(
        "Arguments in checkpoints of Megatron-LM and AscendSpeed 2023",
        "The arguments pickled beside the weights describe a model only with these values. With others the model's "
        "own config is needed: `--model-config`.",
        ("argument", "value, if it is there"),
        megatron_arguments,
    ),
    Table(
        "Fields of an adapter's `adapter_config.json`",
        "peft's own class reads the file. A field or a value of this table, and every field that this version does not "
        "know, is refused unless it has the value that changes nothing; [fine-tuning](finetuning.md#adapters-of-peft) "
        "has the fields that are honoured.",
        ("field, or field and value", "why", "remedy"),
        adapter_fields,
    ),
    Table(
        "Quantised weights",
        "Integers and narrow floats mean something only together with their scales, in one of many packings.",
        ("method", "known by tensors that end so", "remedy"),
        quantised_weights,
    ),
    Table(
        "Keys of a DeepSpeed JSON",
        "They would change what is trained, or are not supported. A key that contradicts an option of the run is "
        "refused too, and so is an unknown one.",
        ("key", "why"),
        deepspeed_keys,
    ),
    Table(
        "What the engine megatron lacks",
        "megatron-core does not have these options; `--engine ascendspeed` has all of them. Adapters, and float64 with "
        "the distributed optimizer, are refused too. [Engines](engines.md) say when to take which.",
        ("option", "values", "why"),
        megatron_options,
    ),
    Table(
        "Models that the engine megatron lacks",
        "`GPTModel` does not express these; `--engine ascendspeed` has all families.",
        ("fields of the model", "why"),
        megatron_models,
    ),
    Table(
        "Published models that the engine megatron lacks",
        "All other published models of the [families](families.md) it trains.",
        ("family", "model", "what it lacks"),
        megatron_families,
    ),
    Table(
        "Fields of megatron-core that a run may not give",
        "`--megatron-args` may give neither these nor the fields that the run's own options decide.",
        ("field", "why"),
        megatron_fields,
    ),
    Table(
        "Options of other engines",
        "`--engine` takes a library that obeys these options; others are refused, since it would ignore them.",
        ("engine", "of sampling", "of loading"),
        engine_options,
    ),
    Table(
        "Options of generation of 2023",
        "These are accepted, and a line says why they have no effect.",
        ("option", "why"),
        options_of_2023,
    ),
    Table(
        "What a pickled file may hold",
        "No line of a pickle runs, whoever wrote the file.",
        ("content", "what becomes of it"),
        pickled_classes,
    ),
)


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for table in TABLES:
        lines = [table.columns, *table.rows()]
        head, *body = (
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
        )
        rule = "|" + "---|" * len(table.columns)
        parts.append("\n".join([f"## {table.title}", "", table.introduction, "", head, rule, *body, ""]))
    return "\n".join(parts)


def code(words: Iterable[str]) -> str:
    """Return words in monospace."""
    return ", ".join(f"`{word}`" for word in words)


def shown(value: object) -> str:
    """Return a value as JSON has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
