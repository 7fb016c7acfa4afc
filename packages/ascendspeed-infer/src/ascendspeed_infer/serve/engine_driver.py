"""Drive the engine from one thread, for callers in any other: requests come and go between its passes.

    driver = EngineDriver(engine, max_waiting=256)
    driver.start()
    tickets = driver.submit([NewRequest(request, on_output)])
    driver.cancel(tickets)
    driver.close(timeout_seconds=30)

`on_output` of a request gets what each pass did for it, on the driver's thread, so it returns at once. An error of
one request ends that request; an error of a pass ends all of them and the driver, because nobody knows what the cache
holds then.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.llm_engine import RequestOutput
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import Request
from ascendspeed_infer.serve.engine_loop import EngineLoop

OutputListener = Callable[[RequestOutput], None]
"""Gets what each pass did for a request; the last output is finished or has an error."""


class QueueFullError(AscendSpeedError):
    """As many requests wait as may."""


class ServerClosingError(AscendSpeedError):
    """No request is taken any more, and those that run were ended."""


class TimeLimitError(AscendSpeedError):
    """A request took longer than it may."""


class EngineFailedError(AscendSpeedError):
    """A pass of the engine failed, so no request can go on."""


@dataclass(frozen=True)
class NewRequest:
    """A request, and who hears of it.

    Attributes:
        request: a new one.
        on_output: gets what each pass did for it.
        batch_invariant: see `LLMEngine.add_request`.
        cache_salt: see `LLMEngine.add_request`.
        adapter: see `LLMEngine.add_request`.
    """

    request: Request | ScoringRequest
    on_output: OutputListener
    batch_invariant: bool = False
    cache_salt: str | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class _Ticket:
    new: NewRequest
    deadline: float | None


class EngineDriver:
    """Runs an engine on a thread of its own.

    Args:
        engine: used by nobody else from `start` to `close`.
        max_waiting: most requests that wait for the engine beside those that it runs.
        on_failure: told once, on the driver's thread, that a pass failed.
    """

    def __init__(
        self,
        engine: EngineLoop,
        max_waiting: int,
        on_failure: Callable[[EngineFailedError], None] | None = None,
    ) -> None:
        self.engine, self.max_waiting = engine, max_waiting
        self.failure: EngineFailedError | None = None
        self._on_failure = on_failure
        self._changed = threading.Condition()
        """Guards all below; notified when there is something to do, and when a request has left."""
        self._tickets: dict[str, _Ticket] = {}
        self._num_waiting = 0
        self._is_closing = self._is_stopped = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the engine, as of the last pass."""
        return self._num_waiting

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._tickets)

    @property
    def is_accepting(self) -> bool:
        """Whether `submit` takes requests."""
        return not self._is_closing and self.failure is None

    def start(self) -> None:
        """Begin to run requests."""
        self._thread.start()

    def submit(self, requests: Sequence[NewRequest], time_limit_seconds: float | None = None) -> list[str]:
        """Add requests, all of them or none; they join the next pass that has room for them.

        Args:
            requests: in order.
            time_limit_seconds: after which each is ended with a `TimeLimitError`.

        Returns:
            Their names, for `cancel`.

        Raises:
            QueueFullError: too many wait.
            ServerClosingError: the driver is closing.
            EngineFailedError: the engine failed before.
            AscendSpeedError: a request can never run.
        """
        deadline = None if time_limit_seconds is None else time.monotonic() + time_limit_seconds
        with self._changed:
            self._check_open(len(requests))
            names: list[str] = []
            try:
                for one in requests:
                    name = self.engine.unique_name("http")
                    self.engine.add_request(
                        name, one.request, one.batch_invariant, one.cache_salt, one.adapter
                    )
                    names.append(name)
            except AscendSpeedError:
                for name in names:
                    self.engine.abort_request(name)
                self._changed.notify_all()
                raise
            self._tickets |= {name: _Ticket(one, deadline) for name, one in zip(names, requests, strict=True)}
            self._num_waiting += len(requests)
            self._changed.notify_all()
        return names

    def cancel(self, names: Sequence[str]) -> None:
        """Drop those of the requests that are not finished; their memory is free before the next pass."""
        with self._changed:
            for name in names:
                if self._tickets.pop(name, None) is not None:
                    self.engine.abort_request(name)
            self._changed.notify_all()

    def close(self, timeout_seconds: float) -> None:
        """Take no more requests, let those that run finish, and stop.

        Args:
            timeout_seconds: after which those that still run are ended with a `ServerClosingError`.
        """
        with self._changed:
            self._is_closing = True
            self._changed.wait_for(lambda: not self._tickets, timeout_seconds)
            for name in list(self._tickets):
                self._end_early(name, ServerClosingError("the server is shutting down; ask again later"))
            self._is_stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _check_open(self, count: int) -> None:
        if self.failure is not None:
            raise self.failure
        if self._is_closing:
            raise ServerClosingError("the server is shutting down; ask again later")
        if count > self.max_waiting:
            raise AscendSpeedError(
                f"the request asks for {count} texts, more than the {self.max_waiting} that may wait; ask for fewer"
            )
        if self._num_waiting + count > self.max_waiting:
            raise QueueFullError(
                f"{self._num_waiting} texts wait already, and at most {self.max_waiting} may; ask again later"
            )

    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                outputs = self.engine.step()
            except Exception as error:  # noqa: BLE001 - told to everybody who waits
                self._fail(error)
                return
            with self._changed:
                for output in outputs:
                    self._report(output)
                self._num_waiting = max(len(self._tickets) - self.engine.num_running, 0)
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait until the engine has something to do, and end what took too long; return whether to run a pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self.engine.has_unfinished_requests())
            now = time.monotonic()
            late = [
                name
                for name, one in self._tickets.items()
                if one.deadline is not None and one.deadline <= now
            ]
            for name in late:
                self._end_early(
                    name,
                    TimeLimitError("the request took longer than the server allows; ask for fewer tokens"),
                )
            # What was aborted last is still taken out of the cache.
            return not self._is_stopped or self.engine.has_unfinished_requests()

    def _report(self, output: RequestOutput) -> None:
        ticket = self._tickets.get(output.request_id)
        if ticket is None:
            return  # Cancelled while its pass ran.
        if output.is_finished or output.error is not None:
            del self._tickets[output.request_id]
        ticket.new.on_output(output)

    def _end_early(self, name: str, error: AscendSpeedError) -> None:
        self.engine.abort_request(name)
        self._tickets.pop(name).new.on_output(RequestOutput(name, is_finished=True, error=error))

    def _fail(self, cause: Exception) -> None:
        failure = EngineFailedError(
            f"a pass of the engine failed, and the server ends: {type(cause).__name__}: {cause}"
        )
        with self._changed:
            self.failure = failure
            tickets, self._tickets = self._tickets, {}
            for name, ticket in tickets.items():
                ticket.new.on_output(RequestOutput(name, is_finished=True, error=failure))
            self._num_waiting = 0
            self._changed.notify_all()
        if self._on_failure is not None:
            self._on_failure(failure)
