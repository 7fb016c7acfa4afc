"""Find out what this machine can put around an untrusted program."""

import sys

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.sandbox.run import ProgramUnderTest, Sandbox, SandboxError, SandboxLevel

PROBE = ProgramUnderTest(
    "def probe():\n    return 1\n", "", "def check(candidate):\n    assert candidate() == 1\n", "probe"
)


def open_sandbox(*, allow_weak: bool = False) -> Sandbox:
    """Return a sandbox of the best level that this machine has, after a harmless program has run in it.

    Args:
        allow_weak: go on with limits alone where neither namespaces nor Landlock with seccomp can be had.

    Raises:
        EvaluationError: this machine has less than the least that programs may run in.
    """
    if not sys.platform.startswith("linux"):
        raise EvaluationError(
            f"programs of a model run on Linux only, not on {sys.platform}; use a Linux container"
        )
    refused = []
    for level in SandboxLevel:
        if level is SandboxLevel.WEAK and not allow_weak:
            break
        sandbox = Sandbox(level)
        try:
            result = sandbox.run(PROBE)
        except SandboxError as error:
            refused.append(f"{level.value}: {str(error).removeprefix('the sandbox did not start: ')}")
            sandbox.close()
            continue
        if not result.passed:
            raise EvaluationError(f"a harmless program fails in the sandbox: {result.reason}")
        return sandbox
    raise EvaluationError(
        f"this machine cannot confine programs of a model ({'; '.join(refused)}); docs/sandbox.md says what it needs; "
        "--allow-weak-sandbox runs them with limits alone"
    )
