"""Runs that are cut off go on and end with the same bytes; how the work is cut does not show."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.indexed import IndexedDatasetWriter
from ascendspeed_data.preprocessing.journal import Journal
from support.commands import call, command_line, environment
from support.corpus import make_texts, write_json_lines
from support.tables import ReportTables

TEXTS = make_texts(9_000, seed=5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files, 2.5 MB together."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_json_lines(folder / f"part{number}.jsonl", TEXTS[number * 3000 : number * 3000 + 3000])
        for number in range(3)
    ]


def arguments(sources: list[Path], tokenizer: Path, prefix: Path, *flags: object) -> list[object]:
    return [
        "asd-data", "preprocess", "--input", *sources, "--output-prefix", prefix, "--tokenizer-name-or-path", tokenizer,
        "--shard-size", 4, *flags,
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".bin", ".idx")
    }


@pytest.fixture(scope="module")
def undisturbed(
    sources: list[Path], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = call(*arguments(sources, tokenizer_folder, folder / "out"))
    assert done.status == 0, done.stderr
    assert len(open_dataset(folder / "out_text_document").ids) == 9_000
    return digests(folder)


def documents_kept(journal: Path) -> int:
    """Documents that the last whole line of a journal vouches for."""
    lines = journal.read_text().split("\n")[1:-1] if journal.exists() else []
    return int(next(iter(json.loads(lines[-1])["outputs"].values()))[2]) if lines else 0


def reached(journal: Path, least: int) -> bool:
    return documents_kept(journal) >= least


def kill_when(condition: Callable[[], bool], command: list[object]) -> None:
    """Start a command and kill it as soon as `condition` holds."""
    running = subprocess.Popen(command_line(*command), env=environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not condition():
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL


class Killed(BaseException):
    """Stands for a death of the process."""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path,
    sources: list[Path],
    tokenizer_folder: Path,
    undisturbed: dict[str, str],
    workers: int,
    report: ReportTables,
) -> None:
    slow = ("--workers", workers, "--tokenizer-not-use-fast")
    command = arguments(sources, tokenizer_folder, tmp_path / "out", *slow)
    for least in (900, 3_600, 6_300):
        kill_when(partial(reached, tmp_path / "out.journal", least), command)
        assert not (tmp_path / "out_text_document.bin").exists()
    kept = documents_kept(tmp_path / "out.journal")
    assert 0 < kept <= 9_000
    finished = call(*command)
    assert finished.status == 0, finished.stderr
    assert f"resuming after {kept:,} documents" in finished.stderr
    assert digests(tmp_path) == undisturbed
    assert call("asd-data", "verify", tmp_path / "out_text_document").status == 0
    assert {path.name for path in tmp_path.iterdir()} == {*undisturbed, "out_text_document.manifest.json"}
    report.add("Killed three times, then finished", ("workers", "documents at the last kill", "same bytes"), workers,
               f"{kept:,} of 9,000", "yes")  # fmt: skip


@pytest.mark.parametrize(
    "flags",
    [
        ["--workers", 2],
        ["--workers", 3],
        pytest.param(["--shard-size", 1], marks=pytest.mark.nightly),
        ["--shard-size", 9999],
        ["--tokenizer-not-use-fast"],
    ],
)
def test_workers_and_shard_size_do_not_change_the_bytes(
    tmp_path: Path,
    sources: list[Path],
    tokenizer_folder: Path,
    undisturbed: dict[str, str],
    flags: list[object],
) -> None:
    done = call(*arguments(sources, tokenizer_folder, tmp_path / "out", *flags))
    assert done.status == 0, done.stderr
    assert digests(tmp_path) == undisturbed


def test_a_kill_between_the_renames_is_completed(
    tmp_path: Path, sources: list[Path], tokenizer_folder: Path, undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever renames happened before the process died, the next run does the others."""
    original = Path.replace
    for survivors in range(3):
        renamed: list[Path] = []

        def dies(self: Path, target: Path, renamed: list[Path] = renamed, allowed: int = survivors) -> Path:
            if self.name.endswith(".incomplete"):
                if len(renamed) == allowed:
                    raise Killed
                renamed.append(self)
            return original(self, target)

        folder = tmp_path / str(survivors)
        command = arguments(sources, tokenizer_folder, folder / "out")
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "replace", dies)
            # The kill: nothing that the process would still do, closing files aside, may matter.
            patched.setattr(IndexedDatasetWriter, "discard", lambda self: None)
            patched.setattr(Journal, "remove", lambda self: None)
            call(*command)
        assert len(renamed) == survivors
        done = call(*command)
        assert done.status == 0, done.stderr
        assert "renaming the files" in done.stderr
        assert digests(folder) == undisturbed
        assert call("asd-data", "verify", folder / "out_text_document").status == 0


def test_a_run_resumes_after_a_damaged_line_is_repaired(
    tmp_path: Path, tokenizer_folder: Path, sources: list[Path], undisturbed: dict[str, str]
) -> None:
    copies = [tmp_path / source.name for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        copy.write_bytes(source.read_bytes())
    good = copies[2].read_text()
    lines = good.splitlines(keepends=True)
    copies[2].write_text("".join([*lines[:1500], '{"text": \n', *lines[1501:]]))
    (tmp_path / "made").mkdir()
    command = arguments(copies, tokenizer_folder, tmp_path / "made" / "out")
    failed = call(*command)
    assert failed.status == 1
    assert "part2.jsonl, line 1501: not JSON" in failed.complaint
    assert "documents are finished; run the same command again to resume after them" in failed.stderr
    copies[2].write_text(good)
    done = call(*command)
    assert done.status == 0, done.stderr
    assert "resuming after 6,000 documents" in done.stderr
    assert digests(tmp_path / "made") == undisturbed


def test_an_interrupted_run_with_other_settings_is_not_overwritten(
    tmp_path: Path, tokenizer_folder: Path, sources: list[Path], undisturbed: dict[str, str]
) -> None:
    bad = tmp_path / "part3.jsonl"
    bad.write_text("{")
    command = arguments([*sources, bad], tokenizer_folder, tmp_path / "out")
    assert call(*command).status == 1
    other = call(*command, "--no-append-eod")
    assert other.status == 1
    assert "interrupted run with other settings (append_eod was true, now false)" in other.complaint
    fewer = call(*arguments(sources, tokenizer_folder, tmp_path / "out"))
    assert "it had other inputs" in fewer.complaint
    done = call(*arguments(sources, tokenizer_folder, tmp_path / "out", "--overwrite"))
    assert done.status == 0, done.stderr
    assert digests(tmp_path) == undisturbed


def test_a_killed_packing_run_resumes_to_the_same_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    records = [
        {"instruction": one, "output": two} for one, two in zip(TEXTS[:4500], TEXTS[4500:], strict=True)
    ]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [
        "--handler-name",
        "GeneralInstructionHandler",
        "--pack",
        "--seq-length",
        600,
        "--tokenizer-not-use-fast",
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert call(*arguments([source], tokenizer_folder, tmp_path / "one" / "out", *flags)).status == 0
    command = arguments([source], tokenizer_folder, tmp_path / "two" / "out", *flags, "--workers", 2)
    journal = tmp_path / "two" / "out.journal"
    kill_when(lambda: documents_kept(journal) > 1000, command)
    done = call(*command)
    assert done.status == 0, done.stderr
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert len(list((tmp_path / "two").iterdir())) == 7


def test_workers_exit_with_their_parent_process(
    tmp_path: Path, tokenizer_folder: Path, sources: list[Path]
) -> None:
    journal = tmp_path / "out.journal"
    command = arguments(
        sources, tokenizer_folder, tmp_path / "out", "--workers", 2, "--tokenizer-not-use-fast"
    )
    kill_when(lambda: documents_kept(journal) > 0, command)
    end = time.monotonic() + 30
    while any(str(tmp_path) in line for line in _command_lines()):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.05)


def _command_lines() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            open_files = [str(link.readlink()) for link in (folder / "fd").iterdir()]
            found.append((folder / "cmdline").read_text() + " ".join(open_files))
        except OSError:
            continue
    return found
