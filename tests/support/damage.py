"""Damage to files, drawn at random: what disks, copies and editors do, and values of another type."""

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Bytes = Callable[[bytes, random.Random], bytes]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", "x", "4", "\0", "../../x", "é\u2028",
    [], {}, [[]], [1, "a"], {"a": {"b": 1}}, [None] * 40,
)  # fmt: skip
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 3000, '{"a": 1, "a": 2}', "'x'", "")
"""What no parser should let pass, in place of a value."""

WORDS = (
    b"\xff\xfe", b"9" * 5000, b"../..", b"", b"\0", b" \n", "\u0663".encode(), b"-1", b"1e3", b"x" * 300, b"release",
    "\ufeff100".encode(),
)  # fmt: skip
"""In place of the one word that a tracker holds."""


def bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 4, 30))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def early_bits(content: bytes, draw: random.Random) -> bytes:
    """Where headers lie."""
    return bits(content[:200], draw) + content[200:]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))] if content else content


def empty(content: bytes, draw: random.Random) -> bytes:
    return b""


def zeros(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content)) if content else 0
    end = min(len(content), start + draw.choice((1, 8, 64, 4096)))
    return content[:start] + bytes(end - start) + content[end:]


def added(content: bytes, draw: random.Random) -> bytes:
    more = draw.randbytes(draw.choice((1, 2, 3, 8, 100)))
    at = draw.choice((0, len(content), draw.randrange(len(content) + 1)))
    return content[:at] + more + content[at:]


def doubled(content: bytes, draw: random.Random) -> bytes:
    """A copy that was written after another."""
    start = draw.randrange(len(content)) if content else 0
    return content + content[start:]


def not_utf8(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x80abc")) + content[at:]


def another_word(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(WORDS)


def another_value(content: bytes, draw: random.Random) -> bytes:
    """One JSON value of another type, somewhere in the file or in one of its lines."""
    text = content.decode("utf-8")
    lines = text.split("\n")
    try:
        json.loads(text)
        number, text = -1, text
    except ValueError:
        number = draw.choice([n for n, line in enumerate(lines) if line.strip()])
        text = lines[number]
    changed = _change(json.loads(text), draw)
    if number < 0:
        return changed.encode("utf-8", "surrogatepass")
    lines[number] = changed
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _change(value: Any, draw: random.Random) -> str:
    """Return JSON with one node changed."""
    places = list(_places(value))
    mark = "\x01place\x01"
    if not places:
        return draw.choice(RAW)
    holder, key = draw.choice(places)
    how = draw.randrange(10)
    if how == 0 and isinstance(holder, dict):
        del holder[key]
        return json.dumps(value)
    if how == 1 and isinstance(holder, dict):
        holder[draw.choice(("x", "", str(key).upper(), f"{key} "))] = holder.pop(key)
        return json.dumps(value)
    old = holder[key]
    holder[key] = mark
    new = draw.choice(RAW) if how == 2 else json.dumps(_other(old, draw))
    return json.dumps(value).replace(json.dumps(mark), new)


def _other(old: Any, draw: random.Random) -> Any:
    if draw.randrange(4) == 0 and type(old) in (int, float, str):
        return draw.choice((str(old), [old], {"x": old}, -old if not isinstance(old, str) else old + old))
    return draw.choice(VALUES)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of every node below the top."""
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(found):
        yield value, key
        yield from _places(below)


def another_assignment(content: bytes, draw: random.Random) -> bytes:
    """The value of one key of a TOML or YAML file."""
    found = list(re.finditer(rb"(?m)^([\w-]+\s*[=:]\s*)(.+)$", content))
    if not found:
        return bits(content, draw)
    one = draw.choice(found)
    new = draw.choice(
        ("true", "-1", "0.5", '"x"', "[]", "[1]", "{}", "null", "2020-13-45", "9" * 5000, "nan", "'")
    )
    return content[: one.start(2)] + new.encode() + content[one.end(2) :]


def inner_pickle(content: bytes, draw: random.Random) -> bytes:
    """The pickle inside an archive of torch.save, with the right checksum of the damage."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        for record in old.infolist():
            data = old.read(record)
            how = draw.choice((bits, cut, zeros, added))
            new.writestr(record.filename, how(data, draw) if record.filename.endswith("data.pkl") else data)
    return changed.getvalue()


def safetensors_header(content: bytes, draw: random.Random) -> bytes:
    """One value of the header, whose length is right again."""
    (length,) = struct.unpack("<Q", content[:8])
    header = another_value(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


ANYWHERE: tuple[Bytes, ...] = (bits, early_bits, cut, empty, zeros, added, doubled)


def kinds_for(path: Path) -> list[Bytes]:
    """Return the kinds of damage that fit a file; those that fit its format alone are as likely as the others."""
    name = path.name
    if name.startswith("latest"):
        special: tuple[Bytes, ...] = (not_utf8, another_word)
    elif path.suffix in (".json", ".jsonl"):
        special = (not_utf8, another_value, another_value, another_value)
    elif path.suffix in (".toml", ".yaml"):
        special = (not_utf8, another_assignment, another_assignment)
    elif path.suffix in (".txt", ".csv", ".jinja", ".py"):
        special = (not_utf8,)
    elif path.suffix == ".safetensors":
        special = (safetensors_header,)
    elif _is_archive(path):
        special = (inner_pickle,)
    else:
        special = ()
    return [*ANYWHERE, *(special * 2 if special else ())]


def _is_archive(path: Path) -> bool:
    return path.suffix in (".pt", ".bin") and zipfile.is_zipfile(path)


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in place, and return how."""
    before = path.read_bytes()
    for _ in range(20):
        kind = draw.choice(kinds_for(path))
        try:
            after = kind(before, draw)
        except (ValueError, IndexError, zipfile.BadZipFile):
            continue
        if after != before:
            path.write_bytes(after)
            return kind.__name__
    path.write_bytes(before + b"\0")
    return "one byte added"
