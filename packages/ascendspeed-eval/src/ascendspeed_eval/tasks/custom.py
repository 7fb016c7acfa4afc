"""Your own task in one YAML file.

    name: capitals
    data: capitals.jsonl            # beside this file; --task-data-path names another
    question: "Q: {{ country }}\nA:"
    choices: [" Paris", " Rome"]    # or a template that renders a list; without choices the model generates text
    target: "{{ capital }}"         # the right text, or the index of the right choice
    max_new_tokens: 8
    stop: ["\n"]
    extract: "([A-Z][a-z]+)"        # group 1 of the first match is the answer

Templates are Jinja's in its sandbox; the file is read by YAML's safe loader.
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError, ScoringError, did_you_mean
from ascendspeed_eval.small_files import is_a, parse_json, read_text
from ascendspeed_eval.tasks.base import Extracted, Task, TaskVariant
from ascendspeed_eval.tasks.reading import find_files, not_empty, read_csv, read_json_lines
from ascendspeed_eval.tasks.samples import Benchmark, Record

KEYS: Mapping[str, tuple[type, ...]] = {
    "name": (str,), "version": (int,), "summary": (str,), "data": (str,), "examples": (str,), "question": (str,),
    "choices": (str, list), "target": (str,), "header": (str,), "num_fewshot": (int,), "separator": (str,),
    "answer_prefix": (str,), "subset": (str,), "max_new_tokens": (int,), "stop": (list,), "extract": (str,),
    "seq_length": (int,),
}  # fmt: skip
REQUIRED = ("name", "question", "target")
MAX_SECONDS = 5
"""Of a search by `extract`; some regular expressions take years for a text that does not match."""


def read_task(path: Path) -> Task:
    """Return the task that a YAML file describes.

    Raises:
        EvaluationError: the file is missing, not YAML, or has a key that is unknown, missing or of another type.
    """
    import yaml

    text = read_text(path, f"task={path}", "--task")
    try:
        content = yaml.safe_load(text)
        names = [node.value for node, _ in getattr(yaml.compose(text, yaml.SafeLoader), "value", [])]
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise EvaluationError(f"{path} is not YAML: {' '.join(str(error).split())}; correct it") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is not a YAML mapping; it needs {', '.join(REQUIRED)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(f"{path}: {twice} is there twice; keep one")
    for key, value in content.items():
        _check_value(path, key, value)
    for key in REQUIRED:
        if key not in content:
            raise EvaluationError(f"{path}: {key} is missing; add it")
    _check_pattern(path, content.get("extract"))
    if "extract" in content and "choices" in content:
        raise EvaluationError(
            f"{path}: extract has no effect beside choices, of which none is generated; leave it out"
        )
    return YamlTask(path, content)


def _check_value(path: Path, key: object, value: object) -> None:
    """Raise `EvaluationError` unless a key is known, and its value has the right type and says something."""
    if not isinstance(key, str) or key not in KEYS:
        raise EvaluationError(
            f"{path}: {key} is unknown{did_you_mean(str(key), KEYS)}; known keys are {', '.join(KEYS)}"
        )
    kinds = KEYS[key]
    shown = f"{path}: {key}={reprlib.repr(value)}"
    odd = next((x for x in (value if isinstance(value, list) else [value]) if not is_a(x, (str,))), None)
    is_right = is_a(value, kinds) and (not isinstance(value, list) or odd is None)
    if not is_right:
        named = " or ".join({str: "a text", int: "a number", list: "a list of texts"}[x] for x in kinds)
        hint = ", with quotes if a text is meant (YAML reads Yes, No and the like without them as true and false)"
        wants_text = isinstance(odd, bool) and (str in kinds or list in kinds)
        raise EvaluationError(f"{shown} is not {named}; correct it{hint if wants_text else ''}")
    if isinstance(value, int) and value < (0 if key in ("num_fewshot", "version") else 1):
        raise EvaluationError(f"{shown} is too small; correct it")
    if isinstance(value, list) and not value and key == "choices":
        raise EvaluationError(f"{shown} has no choice; add some, or leave it out to generate text")
    if isinstance(value, list) and "" in value:
        raise EvaluationError(f"{shown} holds an empty text; leave that out")
    if isinstance(value, list) and len(set(value)) < len(value):
        raise EvaluationError(f"{shown} holds a text twice; leave one out")
    if value == "" and key not in ("header", "separator", "answer_prefix", "summary"):
        raise EvaluationError(f"{shown} is empty; fill it in, or leave it out")


def _check_pattern(path: Path, pattern: str | None) -> None:
    import regex

    try:
        compiled = regex.compile(pattern or "")
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise EvaluationError(f"{path}: extract is not a regular expression: {error}; correct it") from None
    if pattern is not None and compiled.fullmatch("") and not compiled.groups:
        raise EvaluationError(f"{path}: extract={pattern!r} finds an empty text everywhere; correct it")


class YamlTask(Task):
    """A task that a YAML file describes."""

    format = "JSON lines, CSV with a header, or a JSON list"

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self._path, self._content = path, content
        self.name = content["name"]
        self.version = content.get("version", 1)
        self.summary = content.get("summary", f"described in {path.name}")
        self.size = "as in its files"
        self.default_variant = "own"
        self._question = _compile(content["question"], path, "question")
        self._target = _compile(content["target"], path, "target")
        self._header = _compile(content.get("header", ""), path, "header")
        self._subset = _compile(content.get("subset", self.name), path, "subset")
        choices = content.get("choices", [])
        shown = choices if isinstance(choices, list) else [choices]
        self._choice_templates = [_compile(one, path, "choices") for one in shown]
        self.variants = {"own": self._variant()}

    def read(self, path: str) -> Benchmark:
        """Read the records; `sample` means the file that the key `data` names."""
        named = self._content.get("data")
        if path == "sample":
            if named is None:
                raise EvaluationError(f"{self._path} has no key data; give --task-data-path FILE")
            path = str(self._path.parent / named)
        files = find_files(path, ("*.jsonl", "*.csv", "*.json"), f"{self.name} reads {self.format}")
        records = [record for file in files for record in self._records(file)]
        not_empty(records, files, f"{self.name} reads {self.format}")
        shown: dict[str, list[Record]] = {}
        if "examples" in self._content:
            example_file = self._path.parent / self._content["examples"]
            for record in self._records(example_file):
                shown.setdefault(record.subset, []).append(record)
            files = [*files, example_file]
        return Benchmark(records, shown, [*files, self._path])

    def header(self, variant: TaskVariant, record: Record) -> str:
        """Render the header."""
        return _render(self._header, record.fields, f"{self._path}: header")

    def question(self, variant: TaskVariant, record: Record) -> str:
        """Render the question; a `--prompt-template` has fields in braces instead."""
        if variant.template != self._content["question"]:
            return super().question(variant, record)
        return _render(self._question, record.fields, f"{self._path}: question")

    def _records(self, file: Path) -> list[Record]:
        rows: Sequence[tuple[int, Mapping[str, Any]]]
        rows = list(enumerate(read_csv(file), 2)) if file.suffix == ".csv" else read_json_lines(file, {})
        return [self._record(file, number, fields) for number, fields in rows]

    def _record(self, file: Path, number: int, fields: Mapping[str, Any]) -> Record:
        where = f"{file}, line {number}"
        target: Any = _render(self._target, fields, where)
        record = Record(f"{file.stem}-{number}", _render(self._subset, fields, where), fields, target)
        if "choices" in self._content:
            shown = [
                choice.removeprefix(self._content.get("answer_prefix", " "))
                for choice in self._choices(record)
            ]
            if target in shown:
                target = [shown.index(target)]
            elif target.isdecimal() and len(target) < 9 and int(target) < len(shown):
                target = [int(target)]
            else:
                raise EvaluationError(f"{where}: target {target!r} is none of the choices {shown}")
        return Record(record.id, record.subset, fields, target)

    def _choices(self, record: Record) -> Sequence[str]:
        where = f"{self._path}: choices of {record.id}"
        rendered = [_render(one, record.fields, where) for one in self._choice_templates]
        if isinstance(self._content["choices"], list):
            return _checked_choices(rendered, where)
        found = parse_json(rendered[0], f"{where} render to {reprlib.repr(rendered[0])}, which is no list")
        if not isinstance(found, list):
            raise EvaluationError(
                f"{where} render to {reprlib.repr(rendered[0])}, which is not a JSON list; use `| tojson`"
            )
        odd = next((one for one in found if not is_a(one, (str, int, float))), None)
        if odd is not None or None in found:
            raise EvaluationError(f"{where} hold {json.dumps(odd)}, which is no text; correct them")
        return _checked_choices([one if isinstance(one, str) else json.dumps(one) for one in found], where)

    def _variant(self) -> TaskVariant:
        content = self._content
        pattern = content.get("extract")

        def extract(text: str, record: Record) -> Extracted:
            found = _search(pattern, text, f"{self._path}: extract") if pattern else None
            answer = (found[1] if found.groups() else found[0]) if found else None
            return {"strict": answer if pattern else text.strip(), "flexible": (answer or text).strip()}

        return TaskVariant(
            "own",
            f"the rule of {self._path.name}",
            content["question"],
            self._choices if "choices" in content else None,
            num_fewshot=content.get("num_fewshot", 0),
            separator=content.get("separator", "\n\n"),
            answer_prefix=content.get("answer_prefix", " "),
            extract=extract,
            max_new_tokens=content.get("max_new_tokens", 32),
            stop=tuple(content.get("stop", ())),
            seq_length=content.get("seq_length"),
            main="accuracy" if "choices" in content else "strict",
        )


def _search(pattern: str, text: str, where: str) -> Any:
    """Return the first match of a regular expression.

    Raises:
        ScoringError: it takes too long, as `(a|aa)+$` does where something else follows.
    """
    import regex

    try:
        return regex.search(pattern, text, timeout=MAX_SECONDS)
    except TimeoutError:
        raise ScoringError(
            f"{where}={pattern!r} takes more than {MAX_SECONDS} s for a text of {len(text):,} characters; write it "
            "without repetitions inside repetitions"
        ) from None


def _checked_choices(choices: Sequence[str], where: str) -> Sequence[str]:
    if not choices or "" in choices or len(set(choices)) < len(choices):
        problem = (
            "are none" if not choices else "hold an empty text" if "" in choices else "hold a text twice"
        )
        raise EvaluationError(f"{where} {problem}: {reprlib.repr(list(choices))}; correct them")
    return choices


def _compile(template: str, path: Path, key: str) -> Any:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        return ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True
        ).from_string(template)
    except TemplateSyntaxError as error:
        raise EvaluationError(f"{path}: {key} is not a valid template: {error.message}") from None


def _render(template: Any, fields: Mapping[str, Any], where: str) -> str:
    try:
        return str(template.render(fields))
    except Exception as error:  # noqa: BLE001 - a template may compute anything
        raise EvaluationError(f"{where}: {type(error).__name__}: {error}; correct the template") from None
