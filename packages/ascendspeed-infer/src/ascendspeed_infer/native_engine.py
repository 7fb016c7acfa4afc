"""This project's engine behind the interface of `engines`."""

from collections.abc import Iterator, Sequence

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_infer.config import SamplingConfig
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import (
    BeamSearchRequest,
    CompletionOutput,
    Request,
    SamplingRequest,
    TokenOutput,
)
from ascendspeed_infer.engines import NATIVE, TokenRequest
from ascendspeed_infer.generation import complete_in_order, stream_tokens


class NativeEngine:
    """Continues ids with a model of `load_model`, on one long-lived engine.

    Attributes:
        llm_engine: the loop that all requests of the model run on.
    """

    name = NATIVE
    supported_options = frozenset(SamplingConfig.model_fields)

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self.llm_engine = LLMEngine(model, mesh)

    @property
    def max_model_len(self) -> int:
        """The longest text."""
        return self.llm_engine.max_model_len

    @property
    def vocab_size(self) -> int:
        """Ids are below."""
        return self.llm_engine.model.config.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, of the model's config."""
        return self.llm_engine.model.config.eos_token_ids

    def generate(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list[CompletionOutput]]:
        """Continue requests side by side; see `TextEngine`."""
        batch_size = max(config.batch_size, config.num_beams)
        new = [_new_request(request) for request in requests]
        self._check(config)
        for finished in complete_in_order(self.llm_engine, new, batch_size, config.batch_invariant):
            yield finished.outputs()

    def stream(
        self, request: TokenRequest, config: SamplingConfig, session: str | None
    ) -> Iterator[TokenOutput]:
        """Continue one request; see `TextEngine`."""
        self._check(config)
        return stream_tokens(self.llm_engine, _new_request(request), config.batch_invariant, session)

    def new_session(self) -> str:
        """Return the salt of a chat, whose turns share the keys and values of its history."""
        return self.llm_engine.unique_name("session")

    def _check(self, config: SamplingConfig) -> None:
        if config.batch_invariant:
            self.llm_engine.check_batch_invariance()


def _new_request(request: TokenRequest) -> Request:
    if request.beams is None:
        return SamplingRequest(request.prompt_ids, request.settings, request.stop_check)
    return BeamSearchRequest(request.prompt_ids, request.settings, request.beams, request.stop_check)
