"""A model, its tokenizer and its place among processes, as one object."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import torch

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import WeightQuantization
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.device import choose_device
from ascendspeed_core.launch import world_of_environment
from ascendspeed_core.models.packed import pack_weights
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.build import load_model
from ascendspeed_core.parallel.deepspeed import answer_from_shares
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import WeightSource, open_source
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.config import AdapterConfig, SamplingConfig, check_parallel, inference_layout
from ascendspeed_infer.engine.runner import check_batch_invariance
from ascendspeed_infer.engine.texts import BeamSearch, Text
from ascendspeed_infer.engine.tiles import Tiles
from ascendspeed_infer.generation import (
    ChatMemory,
    Generated,
    GenerationSettings,
    check_length,
    complete_in_order,
    generate_together,
    stream_ids,
)
from ascendspeed_infer.new_text import NewText
from ascendspeed_infer.opening import find_tokenizer, stored_dtype, with_adapter, zero_settings
from ascendspeed_infer.options_2023 import todays_options
from ascendspeed_infer.requests import Completion, GenerateOptions, GenerationRequest, Prompts, StreamedText
from ascendspeed_infer.sampling import Sampling
from ascendspeed_infer.scoring import Pair, Score, loglikelihood


class LanguageModel:
    """Generate and score with one model; under tensor parallelism every process holds its part and calls alike."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, mesh: ParallelMesh) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.mesh = mesh
        self._tiles: Tiles | None = None
        self._deepspeed: Any = None

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

    @overload
    def generate(
        self,
        prompts: Prompts,
        *,
        stream: Literal[False] = False,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self, prompts: Prompts, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> Iterator[StreamedText]: ...

    def generate(
        self,
        prompts: Prompts,
        *,
        stream: bool = False,
        seeds: Sequence[int] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion] | Iterator[StreamedText]:
        """Continue each prompt; under a layout of several processes all call alike and get the same.

        Args:
            prompts: one text or several, or their ids.
            stream: give the text as it grows, token by token; for one prompt.
            seeds: of each prompt its own, in place of `seed`.
            options: the fields of `config.SamplingConfig`, each explained there, with its default.

        Returns:
            `num_return_sequences` completions of each prompt, in order; when streaming, an iterator.

        Raises:
            ConfigError: an unknown option, a value outside its range, options that contradict each other.
            AscendSpeedError: a prompt that leaves no room for the new tokens.
        """
        if not stream:
            found = self.completions(prompts, seeds=seeds, **options)
            return [one for several in found for one in several]
        if seeds is not None:
            raise ConfigError("seeds are for several prompts; give seed with stream")
        return self.stream(prompts, **options)

    def stream(
        self, prompt: Prompts, *, memory: ChatMemory | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[StreamedText]:
        """Continue one prompt, and give what each token adds; what begins like the text before is in `memory`."""
        config = self._checked(options)
        encoded = self._encoded(prompt)
        if len(encoded) != 1 or config.num_beams > 1 or config.num_return_sequences > 1:
            raise ConfigError("stream gives one text as it grows; give one prompt, and no beams")
        return self._stream(encoded[0], self._settings(config, encoded[0], config.seed), config, memory)

    def completions(
        self, prompts: Prompts, *, seeds: Sequence[int] | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[list[Completion]]:
        """Continue each prompt as `generate` does; give the completions of each once it and those before it are ready.

        Options and prompts are checked before anything is computed.
        """
        config = self._checked(options)
        encoded = self._encoded(prompts)
        if seeds is not None and len(seeds) != len(encoded):
            raise ConfigError(f"{len(seeds)} seeds were given for {len(encoded)} prompts; give one for each")
        own = [
            self._settings(config, ids, config.seed if seeds is None else seeds[number])
            for number, ids in enumerate(encoded)
        ]
        texts = _texts([prompts] if isinstance(prompts, str) else list(prompts), encoded)
        return self._completions(texts, encoded, own, config)

    def _completions(
        self,
        texts: Sequence[str | None],
        encoded: Sequence[Sequence[int]],
        settings: Sequence[GenerationSettings],
        config: SamplingConfig,
    ) -> Iterator[list[Completion]]:
        requests = [self._requests(*one, config) for one in zip(encoded, settings, strict=True)]
        flat = [request for several in requests for request in several]
        max_rows = max(config.batch_size, config.num_beams)
        complete = complete_in_order(self.model, self.mesh, flat, max_rows, self._tiles_of(config))
        for text, ids, own, several in zip(texts, encoded, settings, requests, strict=True):
            prompt = self.tokenizer.decode(ids) if text is None else text
            found = [one for _ in several for one in _found(next(complete))]
            if len(found) < config.num_return_sequences and self.mesh.rank == 0:
                log(
                    f"only {len(found)} of {config.num_return_sequences} texts were found: the filters leave no more"
                )
            yield [self._completion(prompt, ids, own, one, config) for one in found]

    def _requests(
        self, ids: Sequence[int], settings: GenerationSettings, config: SamplingConfig
    ) -> list[Text] | list[BeamSearch]:
        """Return what the engine continues for one prompt; several draws have seeds that follow."""
        ends = self._new_text(ids, settings).ends
        if config.num_beams > 1:
            beams = BeamSettings(
                config.num_beams, config.length_penalty, config.early_stopping, config.num_return_sequences
            )
            return [BeamSearch(ids, settings, beams, ends)]
        sampling = settings.sampling
        seeds = range(sampling.seed, sampling.seed + config.num_return_sequences)
        return [Text(ids, replace(settings, sampling=replace(sampling, seed=seed)), ends) for seed in seeds]

    def _checked(self, options: GenerateOptions) -> SamplingConfig:
        given = todays_options(options)
        for name in given.keys() - SamplingConfig.model_fields.keys():
            raise ConfigError(
                f"generate has no option {name}{did_you_mean(name, SamplingConfig.model_fields)}"
            )
        config = validate(SamplingConfig, given)
        if self.mesh.rank == 0:
            for line in config.without_effect():
                log(line)
        return config

    def _encoded(self, prompts: Prompts) -> list[list[int]]:
        """Return the ids of each prompt."""
        if isinstance(prompts, str):
            return [self.tokenizer.encode(prompts)]
        if prompts and all(isinstance(one, int) for one in prompts):
            prompts = [cast(Sequence[int], prompts)]
        several = cast(Sequence[str | Sequence[int]], prompts)
        encoded = [self.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in several]
        limit = self.model.config.vocab_size
        for ids in encoded:
            wrong = next((token for token in ids if not 0 <= token < limit), None)
            if wrong is not None:
                raise ConfigError(f"prompt id {wrong} is not in 0 to {limit - 1}, the model's vocabulary")
        return encoded

    def _settings(self, config: SamplingConfig, ids: Sequence[int], seed: int) -> GenerationSettings:
        if config.max_length is not None and config.max_length <= len(ids):
            raise AscendSpeedError(
                f"the prompt has {len(ids)} tokens, which leaves none of max_length={config.max_length}; "
                "shorten the prompt, or give max_new_tokens"
            )
        room = config.max_new_tokens if config.max_length is None else config.max_length - len(ids)
        check_length(len(ids), room, self.model.config.max_position_embeddings)
        eos_ids = () if config.ignore_eos else self.end_ids()
        sampling = Sampling(
            config.do_sample,
            config.temperature,
            config.top_k,
            config.top_p,
            seed,
            config.repetition_penalty,
        )
        return GenerationSettings(
            room, sampling, config.eos_token_ids or eos_ids, config.stop, config.return_log_probs
        )

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

    def _stream(
        self,
        ids: Sequence[int],
        settings: GenerationSettings,
        config: SamplingConfig,
        memory: ChatMemory | None,
    ) -> Iterator[StreamedText]:
        text, new_ids = self._new_text(ids, settings), []
        before = self.tokenizer.decode(ids) if config.echo and config.detokenize else ""
        tiles = self._tiles_of(config)
        for step in stream_ids(self.model, self.mesh, ids, settings, text.ends, memory, tiles):
            new_ids.append(step.token_id)
            added = text.grown(new_ids, step.finish_reason is not None) if config.detokenize else ""
            yield StreamedText(before + added, step.token_id, step.log_prob, step.finish_reason)
            before = ""

    def _new_text(self, ids: Sequence[int], settings: GenerationSettings) -> NewText:
        return NewText(self.tokenizer, ids, settings.eos_ids, settings.stop)

    def _completion(
        self,
        prompt: str,
        ids: Sequence[int],
        settings: GenerationSettings,
        generated: Generated,
        config: SamplingConfig | None = None,
    ) -> Completion:
        text = ""
        if config is None or config.detokenize:
            text = self._new_text(ids, settings).final(generated.token_ids)
            text = prompt + text if config is not None and config.echo else text
        return Completion(
            prompt,
            text,
            generated.token_ids,
            generated.finish_reason,
            tuple(ids),
            generated.log_probs,
            generated.score,
        )

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
        if self._tiles is None:
            self._tiles = check_batch_invariance(self.model, self.mesh)
        return self._tiles

    def _tiles_of(self, config: SamplingConfig) -> Tiles | None:
        return self.tiles() if config.batch_invariant else None

    def end_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text: those of the model's config, or else the tokenizer's."""
        eos_ids = self.model.config.eos_token_ids or (self.tokenizer.eos_id,)
        return tuple(token for token in eos_ids if token is not None)

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
        logits = forward_through_stages(self.model, self.mesh, tokens)
        return gather_logits(logits[0], self.model.config.vocab_size, self.mesh.group("tp"))


def _found(request: Text | BeamSearch) -> list[Generated]:
    return request.generated() if isinstance(request, BeamSearch) else [request.generated()]


def _texts(prompts: Sequence[Any], encoded: Sequence[Sequence[int]]) -> list[str | None]:
    """Return each prompt's text as it was given; `None` where ids were."""
    if len(prompts) != len(encoded):
        return [None] * len(encoded)
    return [one if isinstance(one, str) else None for one in prompts]
