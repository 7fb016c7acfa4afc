"""Progress of long work: a bar on a terminal, plain lines in a log. All of it goes to stderr."""

import sys
import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 10.0


def log(message: str) -> None:
    """Print one line on stderr; data belongs on stdout."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Count towards a total and show it.

    Args:
        what: what is being done, `"tokenizing"`.
        total: amount at the end, or `None` when it is not known.
        unit: of the amount, `"documents"`.
        seconds_between_lines: pause between two lines when stderr is no terminal.
        quiet: show nothing (ranks other than the first).
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
        """Add `amount`; `note` is shown beside the count (a loss, a file name)."""
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
