"""Damage files of every kind at random, run the commands that read them, and see what becomes of it."""

import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from support.commands import Finished, call
from support.damage import damage
from support.damaged_subjects import OUT, Subject, Subjects, at, matches

CONSISTENT = frozenset(
    ("another_value", "another_assignment", "inner_pickle", "safetensors_header", "another_word")
)
"""Damage that leaves a file well-formed: another value that is also right cannot be told from it."""

SECONDS_OF_A_COMMAND = 120
MORE_MEMORY_BYTES = 6 << 30


class DamagedWorld(Subjects):
    """All subjects, and what commands make of each of them."""

    def result(self, subject: Subject, number: int) -> tuple[Finished, dict[str, str]]:
        """Run a command on a subject; return what it said and what it wrote, and leave the subject as it was."""
        out = self.folder / OUT
        before = {path: path.read_bytes() for path in _all_files(subject.folder)}
        out.mkdir()
        try:
            with limits():
                done = call(*at(subject.commands[number], out))
            made = {
                str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in _all_files(out)
                if path.suffix != ".npy"
            }
        finally:
            shutil.rmtree(out)
            shutil.rmtree(subject.folder / "cache", ignore_errors=True)
            for path in _all_files(subject.folder):
                if path not in before:
                    path.unlink()
                elif path.read_bytes() != before[path]:
                    path.write_bytes(before[path])
            for path, content in before.items():
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
        lines = {f"line {n}": line for n, line in enumerate(done.stdout.replace(str(out), OUT).splitlines())}
        return done, made | lines

    def undamaged(self, subject: Subject, number: int) -> dict[str, str]:
        """What a command gives without damage; what differs between two such runs, such as times, is left out."""
        if number not in subject.results:
            runs = [self.result(subject, number) for _ in range(2)]
            for done, _ in runs:
                assert done.status == 0, (subject.name, subject.commands[number], done.stderr)
            first, second = (found for _, found in runs)
            subject.results[number] = {key: value for key, value in first.items() if second.get(key) == value}
        return subject.results[number]


@dataclass(frozen=True)
class Trial:
    """One damage, and what a command made of it.

    Attributes:
        subject: name.
        file: that was damaged.
        kind: of damage.
        command: its first two words.
        outcome: `refused`, `equal`, `accepted` where no reader can tell, or what is wrong.
        is_wrong: whether it breaks the rule.
    """

    subject: str
    file: str
    kind: str
    command: str
    outcome: str
    is_wrong: bool


def try_one(world: DamagedWorld, seed: int, number: int) -> Trial:
    """Damage one file, run one command, and repair the file.

    The rule: no traceback, crash or hang; an error is one line with status 1 or 2; without an error the result is that
    of the whole file, unless nothing in the format can tell.
    """
    draw = random.Random(f"{seed}/{number}")
    subject = draw.choice(world.subjects)
    path = draw.choice(subject.files())
    command = draw.randrange(len(subject.commands))
    content = path.read_bytes()
    name = " ".join(map(str, subject.commands[command][:2]))
    kind = damage(path, draw)

    def trial(outcome: str, is_wrong: bool = False) -> Trial:
        return Trial(subject.name, str(path.relative_to(subject.folder)), kind, name, outcome, is_wrong)

    try:
        done, found = world.result(subject, command)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = traceback.format_exception(error)
        return trial(f"{type(error).__name__}: {error}\n{''.join(lines[-4:])}", True)
    finally:
        path.write_bytes(content)
    if done.status:
        complaints = [line for line in done.stderr.splitlines() if ": error: " in line]
        if done.status not in (1, 2) or len(complaints) != 1 or done.complaint != complaints[0].strip():
            return trial(f"status {done.status}: {done.stderr[-500:]!r}", True)
        return trial("refused")
    if kind in CONSISTENT or matches(path, subject.unnoticed):
        return trial("accepted")
    expected = world.undamaged(subject, command)
    if _named(found, expected):
        return trial("accepted")
    if all(found.get(key) == value for key, value in expected.items()):
        return trial("equal")
    different = [key for key, value in expected.items() if found.get(key) != value]
    return trial(f"another result without an error: {different[:5]}", True)


def _named(found: dict[str, str], expected: dict[str, str]) -> bool:
    """Whether a command said just as much as without the damage, and besides what it did not compare."""
    lines = [line for line in found.values() if ": not compared: " not in line]
    return len(lines) < len(found) and lines == list(expected.values())


@contextmanager
def limits() -> Iterator[None]:
    """Raise an error in a command that takes too long or too much memory."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS_OF_A_COMMAND} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_OF_A_COMMAND)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, earlier)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def main(seed: int, count: int, first: int = 0) -> int:
    """Try `count` damages, print what is wrong and a summary, and return how many were wrong."""
    with tempfile.TemporaryDirectory(prefix="damaged-") as scratch:
        world = DamagedWorld(Path(scratch) / "world")
        found: Counter[str] = Counter()
        for number in range(first, first + count):
            print(f"trying {seed} {number}", file=sys.stderr, flush=True)
            trial = try_one(world, seed, number)
            found["wrong" if trial.is_wrong else trial.outcome] += 1
            if trial.is_wrong:
                print(json.dumps({"seed": seed, "number": number, **asdict(trial)}), flush=True)
    print(json.dumps({"seed": seed, "tried": count, **found}), flush=True)
    return found["wrong"]


if __name__ == "__main__":
    sys.exit(min(main(*map(int, sys.argv[1:])), 1))
