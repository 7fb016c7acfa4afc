"""Start vLLM: read the options that are its own, and make one line of a failure in any of its processes.

Importing this module imports neither torch nor vllm.
"""

import dataclasses
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_infer.engines import show_option

OWN_FLAGS: Mapping[str, str] = {
    "model": "--load",
    "tokenizer": "--tokenizer-name-or-path",
    "skip_tokenizer_init": "--no-detokenize",
    "dtype": "--dtype",
    "seed": "--seed",
    "tensor_parallel_size": "--tensor-model-parallel-size",
    "pipeline_parallel_size": "--pipeline-model-parallel-size",
    "enable_lora": "--lora-load",
    "max_lora_rank": "--lora-load",
    "generation_config": "options of sampling",
    "logprobs_mode": "--return-log-probs",
    "trust_remote_code": "nothing, as code of a checkpoint never runs",
}
"""Arguments of vLLM that an option of the command decides."""

KEPT_LINES = 4000
LOG_LEVEL = "VLLM_LOGGING_LEVEL"
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d [\d:]+ \[(?P<location>[^\]]*)\] ?)?")
_ERROR = re.compile(r"^(?:[\w.]+\.)?(?P<kind>[A-Z]\w*(?:Error|Exception|Exit|Interrupt)): (?P<said>.+)")
_POINTS_ELSEWHERE = re.compile(
    r"see (the )?(stack trace|root cause)|root cause above|failed to start|died", re.IGNORECASE
)


def read_options(given: Mapping[str, str]) -> dict[str, Any]:
    """Return options of `--engine-option` as vLLM's own command line reads them.

    Args:
        given: by name, as typed.

    Raises:
        ConfigError: vLLM has no such argument, an option of the command decides it, or vLLM refuses the value.
    """
    if not given:
        return {}
    arguments = import_module("vllm.engine.arg_utils").EngineArgs
    parser = arguments.add_cli_args(import_module("vllm.utils.argparse_utils").FlexibleArgumentParser())
    known = {field.name for field in dataclasses.fields(arguments)}
    known &= {action.dest for action in parser._actions}
    read = {}
    for name, value in given.items():
        if name in OWN_FLAGS:
            raise ConfigError(
                f"{show_option(name, value)} is decided by {OWN_FLAGS[name]}; leave it out of --engine-option"
            )
        if name not in known:
            raise ConfigError(f"{show_option(name, value)} is no argument of vLLM{did_you_mean(name, known)}")
        read[name] = _read(parser, name, value)
    return read


def _read(parser: Any, name: str, value: str) -> Any:
    """Return a value as the parser of vLLM's command line reads it."""

    def refuse(message: str) -> NoReturn:
        _, _, why = message.partition(": ")
        raise ConfigError(f"{show_option(name, value)}: vLLM refuses it: {_one_line(why or message)}")

    parser.error = refuse
    (action,) = [one for one in parser._actions if one.dest == name]
    is_switch = action.nargs == 0
    if is_switch and value.lower() not in ("true", "false"):
        refuse("give true or false")
    flag = f"--{name.replace('_', '-')}"
    off = f"--no-{flag[2:]}"
    if is_switch and value.lower() == "false" and off not in action.option_strings:
        refuse("it can only be true")
    arguments = [f"{flag}={value}"]
    if is_switch:
        arguments = [flag if value.lower() == "true" else off]
    elif action.nargs in ("+", "*"):
        arguments = [flag, *value.split(",")]
    try:
        return getattr(parser.parse_args(arguments), name)
    except (ValueError, TypeError) as error:
        refuse(str(error))


class OutputOfVllm:
    """What vLLM and its processes write to stdout and stderr: warnings go on to stderr, the rest is kept for errors.

    Where the environment sets VLLM_LOGGING_LEVEL, all lines of the log go on to stderr.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._shows_all = LOG_LEVEL in os.environ
        self._stderr = os.dup(2)
        # vLLM writes its log to stdout, where completions go.
        os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take what is written inside, and what processes that start inside write until they end.

        Raises:
            AscendSpeedError: an exception inside, as one line with its cause.
        """
        source, sink = os.pipe()
        reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        reader.start()
        saved = os.dup(1), os.dup(2)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.close(sink)
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - vLLM raises exceptions of many libraries
            failure = error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
        if failure is not None:
            # Its processes have ended, so the pipe has; one that hangs is not waited for.
            reader.join(5)
            raise self.error("did not start", failure) from None

    def error(self, what: str, failure: Exception) -> AscendSpeedError:
        """Return one line for an exception of vLLM, with the cause that one of its processes wrote before it.

        Args:
            what: what vLLM did, such as `did not start`.
            failure: what reached this process.
        """
        if isinstance(failure, AscendSpeedError):
            return failure
        found = cause(self.lines) if _POINTS_ELSEWHERE.search(str(failure)) else None
        said = found or f"{type(failure).__name__}: {_one_line(str(failure)) or 'no message'}"
        return AscendSpeedError(
            f"vLLM {what}: {said}; --engine-option NAME=VALUE sets its arguments, {LOG_LEVEL}=INFO shows its log"
        )

    def _read(self, source: int) -> None:
        """Keep all lines; the first line of a warning goes on to stderr."""
        last = None
        with os.fdopen(source, encoding="utf-8", errors="replace") as file:
            for line in file:
                self.lines.append(line.rstrip("\n"))
                found = _PREFIX.match(line)
                level, location = (found["level"], found["location"]) if found else (None, None)
                if self._shows_all or (level == "WARNING" and location != last):
                    os.write(self._stderr, line.encode())
                last = location


def cause(lines: Iterable[str]) -> str | None:
    """Return the first exception in a log that does not point to another one: the one that came first."""
    for line in lines:
        found = _ERROR.match(_PREFIX.sub("", line, count=1))
        if found and not _POINTS_ELSEWHERE.search(found["said"]):
            return f"{found['kind']}: {_one_line(found['said'])}"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".;")
