"""Read the small files of checkpoints; whatever is wrong with one is a `CheckpointError`."""

from pathlib import Path
from typing import Any, TypeVar, overload

from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data import small_files
from ascendspeed_data.small_files import JsonObject

Shape = TypeVar("Shape")


@overload
def read_json(path: Path) -> JsonObject: ...
@overload
def read_json(path: Path, shape: type[Shape]) -> Shape: ...
def read_json(path: Path, shape: Any = JsonObject) -> Any:
    """Read a JSON file, an object unless `shape` says otherwise.

    Raises:
        CheckpointError: the file does not exist, or holds something else.
    """
    return small_files.read_json(path, shape, error=CheckpointError)


def read_name(path: Path) -> str:
    """Read a file that holds one word: an iteration, or the name of a folder.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    text = small_files.read_text(path, remedy="write which checkpoint to use", error=CheckpointError).strip()
    if len(text) > 100 or not text.isprintable():
        raise CheckpointError(
            f"{path} says {text[:20]!r}..., which is no name; write which checkpoint to use"
        )
    return text


def read_iteration(path: Path) -> str:
    """Read a tracker: the digits of an iteration, or another word, such as `release`.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    text = read_name(path)
    return str(int(text)) if text.isdecimal() else text
