"""Progress of long work on stderr: a bar on a terminal, plain lines in a log."""

import os
import sys
import time
from multiprocessing import parent_process
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


def log(message: str) -> None:
    """Print one line on stderr; data belongs on stdout."""
    print(message, file=sys.stderr, flush=True)


def announce(message: str) -> None:
    """Log a line that every process of a run would find out: not in worker processes, of torchrun's ranks in rank 0."""
    if parent_process() is None and os.environ.get("RANK", "0") == "0":
        log(message)


class Progress:
    """Show the progress towards a total.

    Args:
        what: label, such as `"tokenizing"`.
        total: final amount, or `None` if it is unknown.
        unit: unit of the amount, such as `"documents"`.
        seconds_between_lines: minimum time between two lines if stderr is not a terminal.
        quiet: show nothing, for ranks other than 0.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
        quiet: bool = False,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._pause = seconds_between_lines
        self._quiet = quiet
        self._started = self._shown = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" " + unit, desc=what, file=sys.stderr, unit_scale=True)

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Add `amount`; show `note` next to the count (a loss, a file name)."""
        self.done += amount
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif not self._quiet and time.monotonic() - self._shown >= self._pause:
            self._shown = time.monotonic()
            log(self._line(note))

    def _line(self, note: str) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = self.done / elapsed
        amount = f"{self.done:,} of {self.total:,}" if self.total else f"{self.done:,}"
        left = f", {(self.total - self.done) / rate:,.0f} s left" if self.total and rate > 0 else ""
        return f"{self.what}: {amount} {self.unit}, {rate:,.1f}/s{left}" + (f", {note}" if note else "")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
