"""Words that the vocabulary (docs/glossary.md) has replaced, and where they still stand.

Run it as a program, `python tests/support/words.py [REPOSITORY]`, to count them in any checkout.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

PARTS = {
    "place": "rank, device, index, position, slot, offset or shard",
    "places": "ranks, devices, indices, positions, slots, offsets or shards",
    "room": "cache slot, or free blocks",
    "rooms": "cache slots",
    "obstacle": "unsupported reason",
    "answering": "inference",
    "foreign": "external",
    "remembered": "state keys",
    "beginning": "prefix",
    "beginnings": "prefixes",
}
"""Words that no identifier or file name has as a part, and what to say."""

NAMES = {
    "AnsweringWeight": "InferenceWeight",
    "Asked": "PromptRecord",
    "Draws": "DropoutMasks, AttentionInputs",
    "Piece": "TensorShard, SequenceChunk",
    "Setting": "KernelContext",
    "Standing": "RankStatus",
    "NOTHING_TO_US": "IGNORED_HF_KEYS",
    "forget_beginnings": "clear_prefix_cache",
    "check_layout": "resolve_global_batch_size",
    "_tell": "_advance",
}
"""Whole identifiers."""

CLASSES_BY_PACKAGE = {
    "core": {"Turn": "PipelineAction"},
    "eval": {"Protocol": "TaskVariant"},
    "infer": {"Text": "Sequence"},
}
"""Classes that are good names elsewhere."""

FILES_BY_PACKAGE = {
    "core": (
        "rows batches run_data plan not_finite stop measure choose_engine shared_folder answering packed head tables "
        "target recognise record arguments stored open initial dispatch slices"
    ),
    "infer": "texts opening own_engine new_text sharing tiles while_training evaluation options_2023",
    "data": "",
    "ckpt": "",
    "eval": "",
}
"""File names without `.py`."""

PHRASES = {
    r"(?:is|are|was|were|be|been|being) told(?! apart)": "say what gives it: takes, knows, receives, gets",
    r"so many": "say of what: N, that many, the number of",
    r"one behind the other|behind one another": "one after another, concatenated",
    r"(?:models?|weights?) that answers?": "a model for inference, inference weights",
}
"""Phrases that no docstring, comment, message or document has; spaces stand for any white space."""

_EVERYDAY_PLACE = r"(?<!in )(?<!take )(?<!takes )(?<!decimal )(?<!first )\bplaces?\b"
"""Of the word in prose: counted, not refused."""


@dataclass(frozen=True)
class Hit:
    """A gone word, and where it stands.

    Attributes:
        path: relative to the repository.
        line: number of the line, from 1.
        found: identifier, file name or phrase.
        better: what to say.
    """

    path: str
    line: int
    found: str
    better: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found} ({self.better})"


def gone_identifiers(repository: Path = REPOSITORY) -> list[Hit]:
    """Return the classes, functions, arguments, variables, attributes and files that are named by a gone word."""
    hits = []
    for path in _sources(repository):
        where, package = str(path.relative_to(repository)), _package(path)
        if path.stem in FILES_BY_PACKAGE[package].split():
            hits.append(Hit(where, 1, path.name, "see docs/architecture.md"))
        named = [(1, part, False) for part in (path.stem, path.parent.name)]
        for line, name, is_class in [*named, *_defined(ast.parse(path.read_text(encoding="utf-8")))]:
            better = NAMES.get(name) or next((PARTS[part] for part in _parts(name) if part in PARTS), None)
            if is_class:
                better = better or CLASSES_BY_PACKAGE.get(package, {}).get(name)
            if better:
                hits.append(Hit(where, line, name, better))
    return hits


def gone_phrases(repository: Path = REPOSITORY) -> list[Hit]:
    """Return the phrases of docstrings, comments, messages and documents that plain English has no use for."""
    hits = []
    for path in [*_sources(repository), *_documents(repository)]:
        text = path.read_text(encoding="utf-8")
        for phrase, better in PHRASES.items():
            pattern = r"\b(?:" + phrase.replace(" ", r"\s+(?:#\s*)?") + r")\b"
            for match in re.finditer(pattern, text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                hits.append(Hit(str(path.relative_to(repository)), line, " ".join(match[0].split()), better))
    return hits


def _sources(repository: Path) -> list[Path]:
    return sorted(repository.glob("packages/*/src/**/*.py"))


def _documents(repository: Path) -> list[Path]:
    readmes = [repository / "README.md", *sorted(repository.glob("packages/*/README.md"))]
    return [
        path for path in [*readmes, *sorted(repository.glob("docs/**/*.md"))] if path.name != "glossary.md"
    ]


def _package(path: Path) -> str:
    return next(part for part in path.parts if part.startswith("ascendspeed_")).removeprefix("ascendspeed_")


def _defined(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield line, name, and whether it is a class, of what a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.lineno, node.name, True
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name, False
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg, False
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False
        elif isinstance(node, ast.alias) and node.asname:
            yield getattr(node, "lineno", 1), node.asname, False


def _parts(name: str) -> list[str]:
    """Return the words of an identifier: `first_placeOf` gives first, place, of."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)]


def main(repository: Path) -> None:
    """Print each hit, then how often each word stands in identifiers and prose."""
    identifiers, phrases = gone_identifiers(repository), gone_phrases(repository)
    for hit in [*identifiers, *phrases]:
        print(hit)
    everyday = sum(
        len(re.findall(_EVERYDAY_PLACE, path.read_text(encoding="utf-8"), re.IGNORECASE))
        for path in [*_sources(repository), *_documents(repository)]
    )
    by_package = Counter(hit.path.split("/")[1] if "/" in hit.path else hit.path for hit in identifiers)
    print(
        f"\nidentifiers: {len(identifiers)}",
        *(f"{name} {count}" for name, count in by_package.most_common()),
        sep=", ",
    )
    found = Counter(hit.found.lower() for hit in phrases)
    print(f"phrases: {len(phrases)}", *(f"{name} {count}" for name, count in found.most_common()), sep=", ")
    print(f"place(s) in text and code, but for everyday uses: {everyday}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else REPOSITORY)
