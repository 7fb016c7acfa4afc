"""The model that a server answers with: names, limits, and requests that run on its driver."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field

from ascendspeed_core.models.cache import BLOCK_TOKENS, blocks_of
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.prompting import PromptLayout
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.llm_engine import RequestOutput, check_length
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import Request
from ascendspeed_infer.serve.config import ServerConfig
from ascendspeed_infer.serve.engine_driver import EngineDriver, NewRequest, OutputListener
from ascendspeed_infer.serve.errors import ApiError, refused
from ascendspeed_infer.serve.metrics import Metrics
from ascendspeed_infer.serve.structured import Grammars
from ascendspeed_infer.text_generator import TextGenerator, encode_prompt

DEFAULT_CACHE_TOKENS = 65536
CACHE_SALT: ContextVar[str | None] = ContextVar("cache_salt", default=None)
"""Of the request that is answered: those with another one do not share its keys and values."""


def cache_size(config: ServerConfig, longest: int) -> int:
    """Return the tokens of the key-value cache."""
    if config.cache_tokens is not None:
        return config.cache_tokens
    whole = blocks_of(PassShapes().slot_tokens(longest, 0, batch_invariant=True)) * BLOCK_TOKENS
    return max(min(DEFAULT_CACHE_TOKENS, config.max_num_seqs * whole), whole)


@dataclass(frozen=True)
class ServedModel:
    """A model behind the server.

    Attributes:
        name: in requests and answers.
        model: encodes and decodes.
        driver: runs its engine.
        limits: what requests may ask for.
        metrics: counts.
        say: where lines for the log go.
        layout: of conversations; `None` if the model has no chat template.
        layout_for_tools: of those with tools; `None` for the same.
        created: seconds since the epoch.
    """

    name: str
    model: TextGenerator
    driver: EngineDriver
    limits: ServerConfig
    metrics: Metrics
    say: Callable[[str], None]
    layout: PromptLayout | None = None
    layout_for_tools: PromptLayout | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    planner: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "plan"))
    """Reads requests, one after another, while others are answered."""
    _grammars: list[Grammars] = field(default_factory=list)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the key-value cache."""
        return cache_size(self.limits, self.driver.engine.max_model_len)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name as their model: the base, and its adapters."""
        return (self.name, *self.driver.engine.adapter_names)

    def adapter_named(self, name: str | None) -> str | None:
        """Return the adapter that a request names as its model; `None` for the model alone.

        Raises:
            ApiError: there is no such model.
        """
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ApiError(f"the model {name!r} does not exist; there is {known}", 404, "model")
        return None if name == self.name else name

    def encode(self, prompt: str | Sequence[int], param: str = "prompt") -> list[int]:
        """Return the ids of a prompt.

        Raises:
            ApiError: it cannot be read, or holds an id that the model does not have.
        """
        try:
            return encode_prompt(self.model.tokenizer, self.model.engine.vocab_size, prompt)
        except AscendSpeedError as error:
            raise ApiError(str(error), param=param) from None

    def check_length(self, num_prompt: int, max_tokens: int) -> None:
        """Raise `ApiError` unless prompt and answer fit the model."""
        try:
            check_length(num_prompt, max_tokens, self.driver.engine.max_model_len)
        except AscendSpeedError as error:
            raise ApiError(str(error).replace("max_new_tokens", "max_tokens"), param="max_tokens") from None

    def grammars(self) -> Grammars:
        """Return what makes constraints; the tokens are read at first use, on the thread of `planner`.

        Raises:
            AscendSpeedError: see `Grammars`.
        """
        if not self._grammars:
            ends = (*self.model.eos_token_ids(), *(self.layout.end_ids if self.layout is not None else ()))
            self._grammars.append(
                Grammars(self.model.tokenizer, self.model.engine.vocab_size, tuple(dict.fromkeys(ends)))
            )
        return self._grammars[0]

    async def run(
        self, requests: Sequence[Request | ScoringRequest], adapter: str | None = None
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Run requests side by side and yield what each gets, with its number; those that are open at the end of the
        iteration, however it ends, are cancelled.

        Raises:
            ApiError: they were not taken.
            Exception: the error of one of them.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()

        def listener(number: int) -> OutputListener:
            def tell(output: RequestOutput) -> None:
                # The loop may be closed when the server ends.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(outputs.put_nowait, (number, output))

            return tell

        new = [
            NewRequest(one, listener(number), self.limits.batch_invariant, CACHE_SALT.get(), adapter)
            for number, one in enumerate(requests)
        ]
        try:
            names = self.driver.submit(new, self.limits.request_seconds)
        except AscendSpeedError as error:
            raise refused(error) from None
        try:
            num_open = len(requests)
            while num_open:
                number, output = await outputs.get()
                if output.error is not None:
                    raise output.error
                num_open -= output.is_finished
                yield number, output
        finally:
            self.driver.cancel(names)
