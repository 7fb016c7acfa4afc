"""The own engine behind the interface of `engines`."""

from collections.abc import Iterator, Sequence

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_infer.config import SamplingConfig
from ascendspeed_infer.engine.batch_invariant import Tiles
from ascendspeed_infer.engine.runner import check_batch_invariance
from ascendspeed_infer.engine.sequences import BeamSearch, Generated, Text
from ascendspeed_infer.engines import OWN, TokenRequest
from ascendspeed_infer.generation import ChatMemory, Step, complete_in_order, stream_ids


class NativeEngine:
    """Continues ids with a model of `load_model`; under a layout of several processes all call alike."""

    name = OWN
    knows = frozenset(SamplingConfig.model_fields)

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self._model, self._mesh = model, mesh
        self._tiles: Tiles | None = None

    @property
    def limit_tokens(self) -> int:
        """The longest text."""
        return self._model.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Ids are below."""
        return self._model.config.vocab_size

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text, of the model's config."""
        return self._model.config.eos_token_ids

    def complete(self, requests: Sequence[TokenRequest], config: SamplingConfig) -> Iterator[list[Generated]]:
        """Continue requests side by side; see `TextEngine`."""
        max_rows = max(config.batch_size, config.num_beams)
        texts = [_continued(request) for request in requests]
        for text in complete_in_order(self._model, self._mesh, texts, max_rows, self._tiles_of(config)):
            yield text.generated() if isinstance(text, BeamSearch) else [text.generated()]

    def stream(
        self, request: TokenRequest, config: SamplingConfig, memory: ChatMemory | None
    ) -> Iterator[Step]:
        """Continue one request; see `TextEngine`."""
        return stream_ids(
            self._model,
            self._mesh,
            request.prompt_ids,
            request.settings,
            request.ends,
            memory,
            self._tiles_of(config),
        )

    def new_memory(self) -> ChatMemory:
        """Return memory for keys and values of a chat."""
        return ChatMemory(self._model, self._mesh)

    def tiles(self) -> Tiles:
        """Return the shapes of batch-invariant passes, tried once; see `check_batch_invariance`."""
        if self._tiles is None:
            self._tiles = check_batch_invariance(self._model, self._mesh)
        return self._tiles

    def _tiles_of(self, config: SamplingConfig) -> Tiles | None:
        return self.tiles() if config.batch_invariant else None


def _continued(request: TokenRequest) -> Text | BeamSearch:
    if request.beams is None:
        return Text(request.prompt_ids, request.settings, request.ends)
    return BeamSearch(request.prompt_ids, request.settings, request.beams, request.ends)
