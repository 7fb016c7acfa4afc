"""Run all hostile programs at one level of the sandbox and print, as JSON, what happened inside and outside.

Usage: hostile_run.py LEVEL SECONDS. It runs as whoever starts it; `support.ordinary_user` starts it as a user without
rights.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from ascendspeed_eval.sandbox.run import ProgramUnderTest, Sandbox, SandboxLevel, SandboxLimits
from support.hostile_programs import PRELUDE, PROGRAMS, Hostile

AT_ONCE = 4
TESTS = "def check(candidate):\n    assert candidate(2) == 6\n    assert candidate(5) == 15\n"
PROMPT = 'def triple(x):\n    """ Return three times x. """\n'
BYSTANDER = """
import signal, sys, time
def note(number, frame):
    open(sys.argv[1], 'a').write(f'{number} ')
for number in range(1, 65):
    try: signal.signal(number, note)
    except (OSError, ValueError): pass
print('ready', flush=True)
while True: time.sleep(100)
"""


def main() -> None:
    """Run every program, with a process, files and queues outside to watch."""
    os.environ["SECRET_OF_THE_TEST"] = "secret"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        victim, notes, own_tmp = folder / "victim", folder / "signals", folder / "tmp"
        victim.mkdir()
        (victim / "kept.txt").write_text("kept")
        victim.chmod(0o777)
        (victim / "kept.txt").chmod(0o666)
        own_tmp.mkdir()
        tempfile.tempdir = str(own_tmp)
        received: list[int] = []
        for number in (signal.SIGUSR1, signal.SIGIO, signal.SIGALRM, signal.SIGRTMIN + 6):
            signal.signal(number, lambda got, _: received.append(got))
        bystander = subprocess.Popen([sys.executable, "-c", BYSTANDER, notes], stdout=subprocess.PIPE)
        assert bystander.stdout is not None
        bystander.stdout.readline()
        names = {"{evaluation}": os.getpid(), "{other}": bystander.pid, "{victim}": victim}
        before = _state(victim, own_tmp)
        started = time.monotonic()
        rows = _run_all(SandboxLevel(sys.argv[1]), float(sys.argv[2]), {k: str(v) for k, v in names.items()})
        seconds = time.monotonic() - started
        after = _state(victim, own_tmp)
        alive = bystander.poll() is None
        bystander.kill()
        bystander.wait()
        noted = notes.read_text().split() if notes.exists() else []
    seen = [f"{key}: {before[key]} became {after[key]}" for key in before if before[key] != after[key]]
    seen += [] if alive else ["the process outside ended"]
    seen += [f"signal {number} outside" for number in [*noted, *received]]
    print(json.dumps({"user": os.geteuid(), "seconds": seconds, "rows": rows, "seen": seen}))


def _run_all(level: SandboxLevel, seconds: float, names: dict[str, str]) -> list[dict[str, object]]:
    free: SimpleQueue[Sandbox] = SimpleQueue()
    boxes = [Sandbox(level, SandboxLimits(seconds=seconds)) for _ in range(AT_ONCE)]
    for one in boxes:
        free.put(one)

    def run(program: Hostile) -> dict[str, object]:
        code = PRELUDE + program.code
        for name, value in names.items():
            code = code.replace(name, value)
        box = free.get()
        try:
            result = box.run(ProgramUnderTest(code, PROMPT, TESTS, "triple"))
        finally:
            free.put(box)
        return {"tries": program.tries, "passed": result.passed, "reason": result.reason,
                "protections": result.protections}  # fmt: skip

    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(run, PROGRAMS))
    good = boxes[0].run(ProgramUnderTest(PROMPT + "    return 3 * x\n", PROMPT, TESTS, "triple"))
    rows.append({"tries": "", "passed": good.passed, "reason": good.reason, "protections": good.protections})
    for one in boxes:
        one.close()
    return rows


def _state(victim: Path, own_tmp: Path) -> dict[str, object]:
    """Return everything outside that a program might change."""
    watched = [victim, victim / "kept.txt", Path(os.__file__), Path("/etc/passwd")]
    states = [
        (str(p), p.stat().st_mode, p.stat().st_mtime_ns, p.stat().st_uid, p.stat().st_nlink) for p in watched
    ]
    return {
        "files": states,
        "attributes": [os.listxattr(p) for p in watched],
        "victim": {p.name: p.read_text() for p in victim.iterdir()},
        "beside Python": sorted(
            p.name for p in Path(os.__file__).parent.iterdir() if p.name != "__pycache__"
        ),
        "scratch left": sorted(p.name for p in own_tmp.iterdir()),
        "shared memory": sorted(p.name for p in Path("/dev/shm").glob("left-*")),
        "queues": [Path("/proc/sysvipc", name).read_text() for name in ("shm", "msg", "sem")],
        "processes": _processes_of_the_sandbox(),
    }


def _processes_of_the_sandbox() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"ascendspeed_eval.sandbox" in line and parent in ("1", str(os.getpid())):
            found.append(process.name)
    return found


if __name__ == "__main__":
    main()
