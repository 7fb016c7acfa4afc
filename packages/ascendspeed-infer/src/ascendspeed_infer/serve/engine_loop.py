"""What the server needs of an engine: this project's `LLMEngine`, or another program behind the same door."""

from typing import Protocol

from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.llm_engine import RequestOutput
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import Request


class EngineLoop(Protocol):
    """Runs requests that are added and aborted at any time; see `LLMEngine`, which is one."""

    @property
    def shapes(self) -> PassShapes:
        """The fixed shapes of batch-invariant passes, which scoring requests need."""
        ...

    @property
    def max_model_len(self) -> int:
        """The longest text, prompt and new tokens together."""
        ...

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that requests may name."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the key-value cache."""
        ...

    @property
    def free_blocks(self) -> int:
        """Blocks of it that hold nothing."""
        ...

    @property
    def num_running(self) -> int:
        """Requests in the cache."""
        ...

    @property
    def num_preemptions(self) -> int:
        """How often a request had to leave the cache."""
        ...

    def unique_name(self, kind: str) -> str:
        """Return a name that was not given before."""
        ...

    def add_request(
        self,
        request_id: str,
        request: Request | ScoringRequest,
        batch_invariant: bool = False,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Add a request; it joins a later step."""
        ...

    def abort_request(self, request_id: str) -> None:
        """Drop a request, if it is unfinished."""
        ...

    def has_unfinished_requests(self) -> bool:
        """Return whether a step has anything to do."""
        ...

    def step(self) -> list[RequestOutput]:
        """Run one pass."""
        ...
