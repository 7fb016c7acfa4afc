"""Run tasks on several threads, and count bytes from all of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were just written."""


def run_in_threads(tasks: Sequence[Callable[[], None]], workers: int) -> None:
    """Run tasks on up to `workers` threads; the first error stops the rest and is raised.

    Reading, copying, checksums and writing release Python's global lock, so threads are enough.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            task()
        return
    stop = threading.Event()

    def guarded(task: Callable[[], None]) -> None:
        if stop.is_set():
            return
        try:
            task()
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(guarded, task) for task in tasks]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            # Ctrl-C, too: what has not begun does not begin.
            stop.set()
            raise


class ByteCounter:
    """Passes byte counts of several threads on, one at a time.

    Args:
        on_bytes: receives the counts.
    """

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes, self._lock = on_bytes, threading.Lock()

    def __call__(self, num_bytes: int) -> None:
        """Report bytes that were written."""
        with self._lock:
            self._on_bytes(num_bytes)
