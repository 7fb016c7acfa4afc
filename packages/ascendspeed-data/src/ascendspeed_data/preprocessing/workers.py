"""Encode shards in order, in this process or in worker processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import connection, get_context, parent_process

from ascendspeed_data.encoding import EncodedOutput, ShardEncoder
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.fast_tokenizer import EncoderChoice
from ascendspeed_data.handlers import find_handler
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.template_values import TemplateValues

SHARDS_IN_FLIGHT_PER_WORKER = 2

Encoded = dict[str, EncodedOutput]


@dataclass(frozen=True)
class WorkerTask:
    """The settings that every worker needs.

    Attributes:
        handler_name: handler that turns records into documents or samples.
        json_keys: columns to tokenize.
        append_eod: whether documents end with the end-of-sequence id.
        choice: tokenizer and encoder.
        chat_template: chat template to use instead of the tokenizer's.
        parse_special: read special pieces that records of samples spell as control.
        template_values: further values that chat templates get.
        columns: names of columns in the input, by the names that the handler reads.
    """

    handler_name: str
    json_keys: tuple[str, ...]
    append_eod: bool
    choice: EncoderChoice
    chat_template: str | None = None
    parse_special: bool = False
    template_values: TemplateValues = field(default_factory=TemplateValues)
    columns: dict[str, str] = field(default_factory=dict, hash=False)

    def open(self) -> ShardEncoder:
        """Load the tokenizer and the handler."""
        tokenizer, encoder = self.choice.open()
        if self.chat_template is not None:
            tokenizer.chat_template, tokenizer.named_chat_templates = self.chat_template, {}
        tokenizer.template_values = self.template_values
        return ShardEncoder(
            find_handler(self.handler_name), self.json_keys, self.append_eod, tokenizer, encoder,
            self.parse_special, self.columns,
        )  # fmt: skip


def encode_shards(task: WorkerTask, shards: Iterator[Shard], workers: int) -> Iterator[tuple[Shard, Encoded]]:
    """Yield every shard, without its content, and its encoded documents, in order.

    Raises:
        AscendSpeedError: a worker was killed, or an input is damaged.
    """
    if workers == 1:
        encoder = task.open()
        for shard in shards:
            yield _without_content(shard), encoder.encode(shard)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start, initargs=(task,)
    ) as pool:
        waiting: deque[tuple[Shard, Future[Encoded]]] = deque()
        try:
            for shard in shards:
                with _held_back_interrupts():
                    future = pool.submit(_encode, task, shard)
                waiting.append((_without_content(shard), future))
                if len(waiting) >= workers * SHARDS_IN_FLIGHT_PER_WORKER:
                    yield _next_result(waiting)
            while waiting:
                yield _next_result(waiting)
        except BrokenProcessPool:
            raise AscendSpeedError(
                "a worker process was killed, most likely because memory ran out; run the same command with fewer "
                "--workers to resume"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _held_back_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while processes may be started: a half-started one would end with a traceback.

    Processes that start inherit the blocked signal, and leave it to this one from the start. Other threads of this
    process may still be given it, so its handler waits too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _next_result(waiting: deque[tuple[Shard, Future[Encoded]]]) -> tuple[Shard, Encoded]:
    shard, future = waiting.popleft()
    return shard, future.result()


def _without_content(shard: Shard) -> Shard:
    return Shard(shard.input_index, shard.path, shard.start, shard.end)


def _start(task: WorkerTask) -> None:
    """Load tokenizer and handler before the first shard; exit when the parent process exits."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _opened(task)


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@cache
def _opened(task: WorkerTask) -> ShardEncoder:
    return task.open()


def _encode(task: WorkerTask, shard: Shard) -> Encoded:
    return _opened(task).encode(shard)
