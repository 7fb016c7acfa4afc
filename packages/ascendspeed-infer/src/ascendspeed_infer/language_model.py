"""A model, its tokenizer and its place among processes, as one object."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import WeightQuantization
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.device import choose_device
from ascendspeed_core.launch import world_of_environment
from ascendspeed_core.models.onednn_weight import pack_weights
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.deepspeed import answer_from_shares
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import WeightSource, open_source
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
from ascendspeed_infer.broadcast import from_first
from ascendspeed_infer.config import AdapterConfig, check_parallel, inference_layout
from ascendspeed_infer.engine.batch_invariant import Tiles
from ascendspeed_infer.generation import (
    Generated,
    GenerationSettings,
    check_length,
    generate_together,
)
from ascendspeed_infer.loading import find_tokenizer, stored_dtype, with_adapter, zero_settings
from ascendspeed_infer.native_engine import NativeEngine
from ascendspeed_infer.requests import Completion, GenerationRequest
from ascendspeed_infer.sampling import Sampling
from ascendspeed_infer.scoring import Pair, Score, loglikelihood
from ascendspeed_infer.text_generator import TextGenerator, Value


class LanguageModel(TextGenerator):
    """Generate and score with one model; under tensor parallelism every process holds its part and calls alike."""

    engine: NativeEngine

    def __init__(self, model: Transformer, tokenizer: Tokenizer, mesh: ParallelMesh) -> None:
        super().__init__(tokenizer, NativeEngine(model.eval(), mesh))
        self.model, self.mesh = model, mesh
        self.is_first = mesh.rank == 0
        self._deepspeed: Any = None

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return what `make` gives on the first process, on every process."""
        return from_first(self.mesh, make)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        tokenizer: Path | str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        parallel: ParallelConfig | None = None,
        adapter: Path | str | None = None,
        merge_adapter: bool = True,
        weight_quantization: WeightQuantization = "none",
    ) -> "LanguageModel":
        """Load a checkpoint of any kind: a training run's folder, a Hugging Face folder, shards of 2023 or Megatron-LM.

        Args:
            path: the checkpoint, of whatever layout; a missing one is an error.
            tokenizer: folder of the tokenizer, when none came with the checkpoint.
            device: `auto`, `npu`, `cuda` or `cpu`.
            dtype: format to compute in; by default the one the weights are stored in.
            parallel: layout; more than one process needs torchrun and an initialised process group.
            adapter: folder of a LoRA adapter in peft's format.
            merge_adapter: add it to the weights as they are read; otherwise layers compute it beside them.
            weight_quantization: `int8` holds the matrices of layers and head as integers; arithmetic stays in `dtype`.

        Raises:
            AscendSpeedError: nothing there, not recognised, damaged, no tokenizer, or an adapter of another model.
        """
        source = open_source(ModelSourceConfig(load=Path(path)), seed=0)
        given = validate(AdapterConfig, {"lora_load": adapter, "merge_adapter": merge_adapter})
        return cls.from_source(
            with_adapter(source, given), tokenizer, device, dtype, parallel, False, weight_quantization
        )

    @classmethod
    def from_config(
        cls,
        config: Path | str,
        *,
        tokenizer: Path | str,
        seed: int = 1234,
        device: str = "auto",
        dtype: str = "float32",
        parallel: ParallelConfig | None = None,
    ) -> "LanguageModel":
        """Make a model with random weights from a Hugging Face `config.json`."""
        source = open_source(ModelSourceConfig(model_config_file=Path(config)), seed)
        return cls.from_source(source, tokenizer, device, dtype, parallel)

    @classmethod
    def from_source(
        cls,
        source: WeightSource,
        tokenizer: Path | str | None,
        device: str,
        dtype: str | None,
        parallel: ParallelConfig | None,
        data_parallel: bool = False,
        weight_quantization: WeightQuantization = "none",
    ) -> "LanguageModel":
        """Load the weights of a source; see `from_pretrained`.

        With `data_parallel`, processes that the layout leaves over hold the model again, and the caller shares work
        out; under ZeRO-3 they hold it together, and all do all of it.
        """
        folder = find_tokenizer(source, Path(tokenizer) if tokenizer is not None else None)
        parallel = parallel or ParallelConfig()
        check_parallel(parallel)
        world = world_of_environment()
        layout = parallel.layout(world.size) if data_parallel else inference_layout(parallel, world.size)
        parallel.check_model(source.config)
        mesh = ParallelMesh.create(choose_device(device, world.local_rank, quiet=True), layout)
        opened = load_tokenizer(folder)
        if opened.vocab_size > source.config.vocab_size:
            raise AscendSpeedError(
                f"tokenizer {folder} has vocab_size={opened.vocab_size}, the model {source.config.vocab_size}; "
                "give the model's own tokenizer"
            )
        format_ = dtype or stored_dtype(source)
        settings = zero_settings(parallel, mesh, format_)
        # ZeRO's shares are of weights as they are stored.
        model = load_model(
            source, mesh, getattr(torch, format_), settings is None, settings, weight_quantization
        )
        if settings is None:
            pack_weights(model)
        loaded = cls(model, opened, mesh)
        if settings is not None:
            loaded._deepspeed = answer_from_shares(model, mesh, settings)
        return loaded

    def _in_batches(
        self,
        asked: Sequence[tuple[Sequence[int], GenerationSettings]],
        batch_size: int,
        tiles: Tiles | None,
    ) -> list[Generated]:
        # The longest first, so that none is left to be computed alone at the end.
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number][0]))
        prompts, settings = zip(*(asked[number] for number in order), strict=True)
        ends = [self._new_text(*asked[number]).ends for number in order]
        generated = generate_together(self.model, self.mesh, prompts, settings, ends, batch_size, tiles)
        found = dict(zip(order, generated, strict=True))
        return [found[number] for number in range(len(asked))]

    def generate_together(
        self,
        requests: Sequence[GenerationRequest],
        batch_size: int,
        max_tokens: int,
        batch_invariant: bool = False,
    ) -> list[Completion]:
        """Continue several prompts at once, each by its own settings; long prompts lose their beginning.

        Args:
            requests: prompts and how each is continued.
            batch_size: texts computed at once.
            max_tokens: prompt and new tokens together.
            batch_invariant: each the same bit for bit whatever the company.

        Raises:
            AscendSpeedError: a request for more new tokens than fit.
        """
        limit = min(max_tokens, self.model.config.max_position_embeddings)
        encoded = []
        for one in requests:
            check_length(1, one.max_new_tokens, limit)
            encoded.append(self.tokenizer.encode(one.prompt)[-(limit - one.max_new_tokens) :])
        settings = [
            GenerationSettings(
                one.max_new_tokens,
                Sampling(one.temperature > 0, one.temperature or 1.0, seed=one.seed),
                self.end_ids(),
                tuple(one.stop),
            )
            for one in requests
        ]
        tiles = self.tiles() if batch_invariant else None
        found = self._in_batches(list(zip(encoded, settings, strict=True)), batch_size, tiles)
        return [
            self._completion(one.prompt, ids, own, generated)
            for one, ids, own, generated in zip(requests, encoded, settings, found, strict=True)
        ]

    def tiles(self) -> Tiles:
        """Return the shapes of batch-invariant passes, tried once; see `check_batch_invariance`."""
        return self.engine.tiles()

    def loglikelihood(
        self,
        pairs: Sequence[tuple[str, str] | Pair],
        max_tokens: int | None = None,
    ) -> list[Score]:
        """Score continuations after their contexts; see `scoring.loglikelihood`."""
        limit = min(max_tokens or math.inf, self.model.config.max_position_embeddings)
        scored = [pair if isinstance(pair, Pair) else Pair(*pair) for pair in pairs]
        return loglikelihood(self.model, self.mesh, self.tokenizer, scored, int(limit))

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of the next token at every place of one text: [S, V]."""
        tokens = torch.tensor([list(ids)], device=self.mesh.device.torch)
        logits = forward_through_stages(self.model, self.mesh, ModelInput(tokens))
        return gather_logits(logits[0], self.model.config.vocab_size, self.mesh.group("tp"))
