"""A model, its tokenizer and this rank's position in the layout, as one object."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.build import apply_inference_kernels, load_model
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import WeightQuantization
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.device import choose_device
from ascendspeed_core.launch import world_of_environment
from ascendspeed_core.models.packed_weight import pack_weights
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.deepspeed import answer_from_shares
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource, open_source
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.config import AdapterConfig, check_parallel, inference_layout
from ascendspeed_infer.engine.llm_engine import LLMEngine, check_length
from ascendspeed_infer.engine.scoring_request import Score
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import generate_each, score
from ascendspeed_infer.loading import (
    open_tokenizer,
    stored_dtype,
    with_adapter,
    with_named_adapters,
    zero_settings,
)
from ascendspeed_infer.native_engine import NativeEngine
from ascendspeed_infer.requests import Completion, GenerationRequest
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.scoring import (
    IdPair,
    TextPair,
    check_finite_scores,
    inputs_of_ids,
    inputs_of_texts,
    inputs_or_errors,
)
from ascendspeed_infer.text_generator import TextGenerator


class LanguageModel(TextGenerator):
    """Generate and score with one model.

    Under a layout of several ranks each holds its part. Either all make the same calls and get the same, or the others
    follow the first: `lead_or_follow`.
    """

    engine: NativeEngine

    def __init__(self, model: Transformer, tokenizer: Tokenizer, mesh: ParallelMesh) -> None:
        super().__init__(tokenizer, NativeEngine(model.eval(), mesh))
        self.model, self.mesh = model, mesh
        self.is_main_process = mesh.rank == 0
        self._deepspeed: Any = None

    @property
    def llm_engine(self) -> LLMEngine:
        """The loop that all requests of the model run on."""
        return self.engine.llm_engine

    @contextmanager
    def lead_or_follow(self, each_replica: bool = False) -> Iterator[bool]:
        """Let rank 0 make all calls and the other ranks follow; see `LLMEngine.lead_or_follow`."""
        with self.llm_engine.lead_or_follow(each_replica) as leads:
            self.is_main_process = leads and self.mesh.rank == 0
            yield leads

    @contextmanager
    def with_adapter(self, name: str | None) -> Iterator[None]:
        """Use one of the `adapters` that the model was loaded with, or none, for what is asked meanwhile."""
        before, self.llm_engine.adapter_for_all = self.llm_engine.adapter_for_all, name
        try:
            yield
        finally:
            self.llm_engine.adapter_for_all = before

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
        adapters: Mapping[str, Path | str] | None = None,
        weight_quantization: WeightQuantization = "none",
        model_config: Path | str | None = None,
        needs_tokenizer: bool = True,
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
            adapters: folders of LoRA adapters by name, of which each request uses one or none: `with_adapter`.
            weight_quantization: `int8` holds the matrices of layers and head as integers; arithmetic stays in `dtype`.
            model_config: config.json of a checkpoint of another program that does not say what model it is.
            needs_tokenizer: refuse a checkpoint without a tokenizer; ids in and out need none.

        Raises:
            AscendSpeedError: nothing there, not recognised, damaged, no tokenizer, or an adapter of another model.
        """
        described = Path(model_config) if model_config is not None else None
        source = open_source(ModelSourceConfig(load=Path(path), model_config_file=described), seed=0)
        given = validate(AdapterConfig, {"lora_load": adapter, "merge_adapter": merge_adapter})
        source = with_adapter(source, given, announces=True)
        named = {name: Path(folder) for name, folder in (adapters or {}).items()}
        return cls.from_source(
            with_named_adapters(source, named) if named else source,
            tokenizer,
            device,
            dtype,
            parallel,
            False,
            weight_quantization,
            needs_tokenizer,
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
        needs_tokenizer: bool = True,
    ) -> "LanguageModel":
        """Load the weights of a source; see `from_pretrained`.

        With `data_parallel`, ranks that the layout leaves over hold the model again, and the caller shares work out;
        under ZeRO-3 they hold it together, and all do all of it.
        """
        opened = open_tokenizer(source, Path(tokenizer) if tokenizer is not None else None, needs_tokenizer)
        parallel = parallel or ParallelConfig()
        check_parallel(parallel)
        world = world_of_environment()
        layout = parallel.layout(world.size) if data_parallel else inference_layout(parallel, world.size)
        parallel.check_model(source.config)
        mesh = ParallelMesh.create(choose_device(device, world.local_rank, quiet=True), layout)
        if opened.vocab_size > source.config.vocab_size:
            raise AscendSpeedError(
                f"tokenizer {opened.path} has vocab_size={opened.vocab_size}, the model {source.config.vocab_size}; "
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
        apply_inference_kernels(model, mesh)
        loaded = cls(model, opened, mesh)
        if settings is not None:
            loaded._deepspeed = answer_from_shares(model, mesh, settings)
        return loaded

    def generate_batch(
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
            batch_invariant: give each the same bit for bit whatever is computed with it.

        Raises:
            AscendSpeedError: a request for more new tokens than fit, or logits that are not finite.
        """
        found = self.generate_each(requests, batch_size, max_tokens, batch_invariant)
        for number, one in enumerate(found, 1):
            if isinstance(one, AscendSpeedError):
                raise one if len(found) == 1 else AscendSpeedError(f"prompt {number}: {one}")
        return [one for one in found if isinstance(one, Completion)]

    def generate_each(
        self,
        requests: Sequence[GenerationRequest],
        batch_size: int,
        max_tokens: int,
        batch_invariant: bool = False,
    ) -> list[Completion | AscendSpeedError]:
        """Continue several prompts as `generate_batch` does; an error of one stands in its place."""
        limit = min(max_tokens, self.llm_engine.max_model_len)
        prompts = []
        for one in requests:
            check_length(1, one.max_new_tokens, limit)
            prompts.append(one.ids(self.tokenizer)[-(limit - one.max_new_tokens) :])
        settings = [
            GenerationSettings(
                one.max_new_tokens,
                SamplingParams(one.temperature > 0, one.temperature or 1.0, seed=one.seed),
                (*self.eos_token_ids(), *one.end_ids),
                tuple(one.stop),
            )
            for one in requests
        ]
        if batch_invariant:
            self.check_batch_invariance()
        # The longest first, so that none is left to be computed alone at the end.
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        outputs = generate_each(
            self.llm_engine,
            [prompts[number] for number in order],
            [settings[number] for number in order],
            [self._new_detokenizer(prompts[number], settings[number]).has_stop_string for number in order],
            batch_size,
            batch_invariant,
        )
        by_number = dict(zip(order, outputs, strict=True))
        found: list[Completion | AscendSpeedError] = []
        for number, (one, ids, own) in enumerate(zip(requests, prompts, settings, strict=True)):
            output = by_number[number]
            if isinstance(output, AscendSpeedError):
                found.append(output)
            else:
                prompt = one.prompt if isinstance(one.prompt, str) else self.tokenizer.decode(ids)
                found.append(self._completion(prompt, ids, own, output))
        return found

    def check_batch_invariance(self) -> None:
        """Try once whether batch-invariant passes are that on this machine; see `LLMEngine`."""
        self.llm_engine.check_batch_invariance()

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str] | TextPair], max_tokens: int | None = None
    ) -> list[Score]:
        """Score continuations after their contexts.

        Args:
            pairs: each a context and its continuation.
            max_tokens: longest input, by default the model's; longer ones lose the beginning of their context, which is
                counted.

        Raises:
            AscendSpeedError: a continuation alone is longer than `max_tokens`, or has nothing before it, or its
                log-likelihood is not finite.
        """
        texts = [pair if isinstance(pair, TextPair) else TextPair(*pair) for pair in pairs]
        inputs = inputs_of_texts(self.tokenizer, texts, self._longest(max_tokens))
        return check_finite_scores(score(self.llm_engine, inputs))

    def loglikelihood_each(
        self, pairs: Sequence[tuple[str, str] | TextPair | IdPair], max_tokens: int | None = None
    ) -> list[Score | AscendSpeedError]:
        """Score continuations as `loglikelihood` does; an error of one stands in its place, its number may be any."""
        given = [pair if isinstance(pair, TextPair | IdPair) else TextPair(*pair) for pair in pairs]
        inputs = inputs_or_errors(self.tokenizer, given, self._longest(max_tokens))
        found = iter(score(self.llm_engine, [one for one in inputs if not isinstance(one, AscendSpeedError)]))
        return [one if isinstance(one, AscendSpeedError) else next(found) for one in inputs]

    def _longest(self, max_tokens: int | None) -> int:
        return int(min(max_tokens or math.inf, self.llm_engine.max_model_len))

    def loglikelihood_of_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Score ids after ids.

        Raises:
            AscendSpeedError: a context or a continuation is empty, or a log-likelihood is not finite.
        """
        return check_finite_scores(score(self.llm_engine, inputs_of_ids(pairs)))

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of the next token at every position of one text, [S, V]."""
        return self.llm_engine.forward(ids)
