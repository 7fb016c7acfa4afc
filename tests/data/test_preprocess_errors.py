"""Bad input of many kinds: what is said, and with which exit status. The table is printed at the end of the session."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.reading import shards
from support.commands import MODULES, Finished, call, environment, run_command
from support.corpus import make_texts, write_json_lines
from support.tables import ReportTables

LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in make_texts(400))


def bomb() -> bytes:
    """Some kilobytes of gzip that are one line of 200 MB."""
    zeros = b"a" * (1 << 20)
    compressor = gzip.zlib.compressobj(9, gzip.zlib.DEFLATED, 31)
    parts = [compressor.compress(b'{"text": "')]
    parts += [compressor.compress(zeros) for _ in range(200)]
    return b"".join([*parts, compressor.compress(b'"}\n'), compressor.flush()])


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": make_texts(50)}), path)
    content = bytearray(path.read_bytes())
    content[200:260] = b"\xff" * 60
    path.write_bytes(content)


FILES: dict[str, tuple[str, bytes | Callable[[Path], None], int, str]] = {
    "a gzip file that was cut short": ("x.jsonl.gz", gzip.compress(LINES)[:-20], 1, "cannot be read"),
    "a gzip file with a flipped byte": (
        "x.jsonl.gz",
        gzip.compress(LINES)[:3000] + b"\x00\xff\x00\xff" + gzip.compress(LINES)[3004:],
        1,
        "cannot be read",
    ),
    "a gzip bomb (200 kB, one line of 200 MB)": ("x.jsonl.gz", bomb(), 1, "line 1 is longer than 128 MiB"),
    "a zstd file that was cut short": ("x.jsonl.zst", zstandard.compress(LINES)[:-20], 1, "ended inside a frame"),
    "a zstd file that is none": ("x.jsonl.zst", LINES, 1, "cannot be read"),
    "invalid JSON in line 251": (
        "x.jsonl",
        b"".join([*LINES.splitlines(True)[:250], b'{"text": "a\n', *LINES.splitlines(True)[250:]]),
        1,
        "x.jsonl, line 251: not JSON",
    ),
    "a JSON list that breaks off": ("x.json", b'[{"text": "a"}, {"text": "b"', 1, "record 2: not JSON"),
    "a JSON list with an error inside": ("x.json", b'[{"text": "a"}, {"text" "b"}, {"text": "c"}]' + b" " * 99, 1,
                                         "record 2: not JSON: Expecting ':' delimiter"),
    "a column that is not there": ("x.jsonl", b'{"body": "a", "id": 1}\n', 1, "(--json-key); the record has body, id"),
    "a number for a text": ("x.jsonl", b'{"text": 5}\n', 1, "holds int, not text"),
    "an empty file": ("x.jsonl", b"", 1, "has no records"),
    "an empty JSON list": ("x.json", b"[]", 1, "has no records"),
    "only empty texts": ("x.jsonl", b'{"text": ""}\n' * 3, 1, "has no text"),
    "NUL bytes after a crash": (
        "x.jsonl", LINES[: LINES.index(b"\n") + 1] + b"\0" * 500, 1, "NUL bytes, as files do after a crash",
    ),
    "NUL bytes in plain text": ("x.txt", b"some text\nmore\0text\n", 1, "line 2: contains a NUL byte"),
    "half a surrogate pair": (
        "x.jsonl", b'{"text": "ok"}\n{"text": "a\\ud83d"}\n', 1, "line 2: half a surrogate pair",
    ),
    "Latin-1 for UTF-8": (
        "x.jsonl", '{"text": "ok"}\n{"text": "Zürich"}\n'.encode("latin-1"), 1, "line 2 cannot be read as UTF-8",
    ),
    "a CSV row with too many values": ("x.csv", b"id,text\n1,a\n2,b,c\n", 1, "line 3: the line has more values"),
    "a CSV quote that never ends": ("x.csv", b'id,text\n1,"a\n2,b\n', 1, "not CSV: unexpected end of data"),
    "a Parquet file with flipped bytes": ("x.parquet", parquet, 1, "cannot be read: Corrupt snappy"),
    "an Arrow file that is none": ("x.arrow", b"ARROW1", 1, "damaged or not an Arrow file"),
    "JSON nested 100,000 deep": ("x.jsonl", b'{"text": ' + b"[" * 100_000, 1, "nested too deeply"),
    "an ending that is not read": ("x.docx", b"x", 2, "has an unsupported format"),
}  # fmt: skip

TABLE = "Bad input"
HEADER = ("what", "exit", "message")


def note(report: ReportTables, case: str, done: Finished, folder: Path) -> None:
    message = done.complaint.replace(f"{folder}/", "").removeprefix("asd-data: error: ")
    report.add(TABLE, HEADER, case, done.status, message)


def run(tmp_path: Path, tokenizer: Path, source: Path, *flags: object) -> Finished:
    return call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", tokenizer, *flags,
    )  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_reported_with_their_line(
    tmp_path: Path, tokenizer_folder: Path, case: str, report: ReportTables
) -> None:
    name, content, status, complaint = FILES[case]
    source = tmp_path / name
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        content(source)
    done = run(tmp_path, tokenizer_folder, source)
    note(report, case, done, tmp_path)
    assert done.status == status, done.stderr
    assert complaint in done.complaint
    assert name in done.complaint or "column 'text'" in done.complaint
    assert len(done.complaint.splitlines()) == 1
    assert not [path for path in tmp_path.glob("out*") if path.suffix in (".bin", ".idx", ".json")]


def damage(prefix: Path, place: int, value: bytes, suffix: str = ".idx") -> None:
    path = Path(f"{prefix}{suffix}")
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


INDICES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an .idx with a count beyond the file": (
        lambda p: damage(p, 18, struct.pack("<Q", 1 << 40)),
        "document boundaries need",
    ),
    "an .idx with a pointer beyond the .bin": (
        lambda p: damage(p, 34 + 4 * 200, struct.pack("<q", 1 << 50)),
        "is outside",
    ),
    "a .bin that was cut short": (
        lambda p: Path(f"{p}.bin").write_bytes(Path(f"{p}.bin").read_bytes()[:-2]) and None,
        "is outside",
    ),
    "one id of a .bin changed": (lambda p: damage(p, 100, b"\x07\x00", ".bin"), "its SHA-256 differs"),
}


@pytest.mark.parametrize("case", INDICES)
def test_damaged_indexes_are_reported(tmp_path: Path, dataset: Path, case: str, report: ReportTables) -> None:
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{dataset}{suffix}", tmp_path / f"{dataset.name}{suffix}")
    change, complaint = INDICES[case]
    copy = tmp_path / dataset.name
    assert call("asd-data", "verify", copy).status == 0
    change(copy)
    done = call("asd-data", "verify", copy)
    note(report, case, done, tmp_path)
    assert done.status == 1
    assert complaint in done.complaint


def test_a_second_run_on_the_same_prefix_fails(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables
) -> None:
    from ascendspeed_data.lock import output_lock

    source = write_json_lines(tmp_path / "x.jsonl", make_texts(3))
    with output_lock(tmp_path / "out.lock", "the other run"):
        done = run(tmp_path, tokenizer_folder, source)
    note(report, "two runs on one output prefix", done, tmp_path)
    assert done.status == 1
    assert f"is being written by another run (process {os.getpid()})" in done.complaint
    assert run(tmp_path, tokenizer_folder, source).status == 0
    again = run(tmp_path, tokenizer_folder, source)
    note(report, "an output that exists", again, tmp_path)
    assert "exists; give --overwrite" in again.complaint


@pytest.mark.parametrize(("kind", "limit"), [("ascii", 1024), ("chinese", 2048)])
def test_a_document_of_50_megabytes_is_tokenized(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables, kind: str, limit: int
) -> None:
    """It is no error. Text without spaces costs more: the tokenizer merges it as one word of 17 million characters."""
    text = " ".join(make_texts(200)) if kind == "ascii" else "道可道，非常道。名可名，非常名。\n" * 600
    text *= 50_000_000 // len(text.encode()) + 1
    source = write_json_lines(tmp_path / "x.jsonl", ["the first", text, "the last"])
    # getrusage would count the memory of the test process, which the command is forked from.
    measured = (
        "import re, sys, runpy; sys.argv[0] = 'asd-data'\n"
        f"try: runpy.run_module({MODULES['asd-data']!r}, run_name='__main__')\n"
        "finally: print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", measured, "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
         "--tokenizer-name-or-path", tokenizer_folder],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    megabytes = int(done.stdout.split()[-1])
    report.add(TABLE, HEADER, f"a document of 50 MB ({kind})", 0, f"tokenized, {megabytes} MiB at most")
    assert len(open_dataset(tmp_path / "out_text_document").ids) == 3
    assert megabytes < limit


def test_a_folder_without_permission_is_reported(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables
) -> None:
    """The superuser may read everything, so the command runs as another user where the tests do not."""
    folder = tmp_path / "in" / "closed"
    folder.mkdir(parents=True)
    write_json_lines(folder / "x.jsonl", make_texts(2))
    write_json_lines(folder.parent / "y.jsonl", make_texts(2))
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    folder.chmod(0)
    command = (
        "import os, sys; from ascendspeed_data import cli; from ascendspeed_data.reading import inputs\n"
    )
    command += "from ascendspeed_data.command_line import run_app\n"
    if os.geteuid() == 0:
        for parent in (tmp_path, *tmp_path.parents[:3]):
            parent.chmod(0o755)
        command += "os.setgid(65534); os.setuid(65534)\n"
    command += "sys.exit(run_app(cli.app, 'asd-data', sys.argv[1:]))"
    # Imported before the change of user, for whom this Python may be out of reach.
    command = command.replace("import os", "import ascendspeed_data.commands.preprocess; import os", 1)
    try:
        done = subprocess.run(
            [sys.executable, "-c", command, "preprocess", "--input", folder.parent, "--output-prefix", tmp_path / "out",
             "--tokenizer-name-or-path", tmp_path / "tokenizer"],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        folder.chmod(0o755)
    finished = Finished(done.returncode, done.stdout, done.stderr)
    note(report, "a folder that may not be read", finished, tmp_path)
    assert finished.status == 1, finished.stderr
    assert "closed cannot be read: Permission denied" in finished.complaint


def test_a_full_disk_is_reported_and_the_run_resumes(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables
) -> None:
    """On a tmpfs of a megabyte the run stops, keeps what it wrote, and goes on when there is room."""
    source = write_json_lines(tmp_path / "x.jsonl", make_texts(15_000))
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs the superuser")
    command = [
        "asd-data", "preprocess", "--input", source, "--output-prefix", small / "out", "--tokenizer-name-or-path",
        tokenizer_folder, "--shard-size", 64,
    ]  # fmt: skip
    try:
        done = run_command(*command)
        note(report, "a full disk", done, tmp_path)
        assert done.status == 1, done.stderr
        assert "no space left" in done.complaint
        assert "Traceback" not in done.stderr
        assert "documents are finished" in done.stderr
        assert not (small / "out_text_document.bin").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
        finished = run_command(*command)
        assert finished.status == 0, finished.stderr
        assert "resuming after" in finished.stderr
        undisturbed = run(tmp_path, tokenizer_folder, source)
        assert undisturbed.status == 0
        for suffix in (".bin", ".idx"):
            name = f"out_text_document{suffix}"
            assert (small / name).read_bytes() == (tmp_path / name).read_bytes()
    finally:
        subprocess.run(["umount", small], check=True)


def test_too_long_lines_are_refused(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_RECORD_BYTES", 1 << 13)
    for name, content in (
        ("x.jsonl", b'{"text": "' + b"a" * 20_000 + b'"}\n{"text": "b"}\n'),
        ("x.json", b'[{"text": "' + b"a" * 3_000_000 + b'"}, {"text": "b"}]'),
        ("x.csv", b"text\n" + b"a" * 20_000 + b"\nb\n"),
    ):
        (tmp_path / name).write_bytes(content)
        done = run(tmp_path, tokenizer_folder, tmp_path / name, "--shard-size", 1)
        assert done.status == 1, name
        assert "is longer than" in done.complaint, name
