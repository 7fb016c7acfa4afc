"""Progress of a run on stderr: one updating line on a terminal, plain lines in a log."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


def log(message: str) -> None:
    """Print one line on stderr; data belongs on stdout."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Count samples towards a total.

    Args:
        what: label of the line, such as the task.
        total: number of samples.
        done: samples that an earlier run finished.
    """

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._first, self._done = what, total, done, done
        self._started = self._shown = time.monotonic()

    def advance(self, amount: int) -> None:
        """Add `amount` samples."""
        self._done += amount
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if now - self._shown < (0.2 if terminal else SECONDS_BETWEEN_LINES) and self._done < self._total:
            return
        self._shown = now
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        line = f"{self._what}: {self._done} of {self._total} samples, {rate:,.1f}/s, {left:,.0f} s left"
        if terminal:
            print(
                f"\r{line}\x1b[K", end="\n" if self._done == self._total else "", file=sys.stderr, flush=True
            )
        else:
            log(line)
