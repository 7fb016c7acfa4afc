"""A model, its tokenizer and its place among processes, as one object."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.device import choose_device
from ascendspeed_core.launch import world_of_environment
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.build import load_model
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import NativeSource, WeightSource, open_source
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.manifest import check_tokenizer
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
from ascendspeed_infer.config import inference_layout
from ascendspeed_infer.generation import (
    GenerationSettings,
    check_length,
    generate_ids,
    generate_together,
)
from ascendspeed_infer.sampling import Sampling
from ascendspeed_infer.scoring import Pair, Score, loglikelihood

SCORING_BATCH_SIZE = 8
ANCHOR_TOKENS = 16
"""Ids of a prompt that new ids are decoded after, so that the space before the first is kept."""


@dataclass(frozen=True)
class Completion:
    """A continued text.

    Attributes:
        prompt: as given.
        text: what follows it.
        token_ids: the new ids.
        finish_reason: `stop` when the text ended by itself, `length` when the limit was reached.
        prompt_token_ids: ids of the prompt.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["length", "stop"]
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how it is continued.

    Attributes:
        prompt: text.
        max_new_tokens: at most so many.
        stop: texts that end it.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        seed: of the draws.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 1234


class LanguageModel:
    """Generate and score with one model; under tensor parallelism every process holds its part and calls alike."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, mesh: ParallelMesh) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.mesh = mesh

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        tokenizer: Path | str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        parallel: ParallelConfig | None = None,
    ) -> "LanguageModel":
        """Load a checkpoint: a training run's folder of any layout, or a Hugging Face folder.

        Args:
            path: the checkpoint; a missing one is an error.
            tokenizer: folder of the tokenizer, when none came with the checkpoint.
            device: `auto`, `npu`, `cuda` or `cpu`.
            dtype: format to compute in; by default the one the weights are stored in.
            parallel: layout; more than one process needs torchrun and an initialised process group.

        Raises:
            AscendSpeedError: nothing there, not recognised, damaged, or no tokenizer.
        """
        source = open_source(ModelSourceConfig(load=Path(path)), seed=0)
        return cls.from_source(source, tokenizer, device, dtype, parallel)

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
    ) -> "LanguageModel":
        """Load the weights of a source; see `from_pretrained`.

        With `data_parallel`, processes that the layout leaves over hold the model again; the caller shares work out.
        """
        folder = find_tokenizer(source, Path(tokenizer) if tokenizer is not None else None)
        parallel = parallel or ParallelConfig()
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
        return cls(load_model(source, mesh, getattr(torch, dtype or stored_dtype(source))), opened, mesh)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 1234,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        max_tokens: int | None = None,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: one text or several.
            max_new_tokens: exactly so many, unless the text ends before.
            do_sample: draw tokens; otherwise the likeliest is taken.
            temperature: flattens (above 1) or sharpens the distribution.
            top_k: draw only from the k likeliest; 0 is all.
            top_p: draw only from the smallest set with this probability; 1 is all.
            seed: of the draws, for each prompt anew.
            stop: texts that end a completion and are cut off.
            ignore_eos: go on past end ids.
            max_tokens: prompts that with the new tokens are longer lose their beginning; by default they are an error.

        Raises:
            AscendSpeedError: a prompt that leaves no room.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
        settings = GenerationSettings(
            max_new_tokens, sampling, () if ignore_eos else self._end_ids(), tuple(stop)
        )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self.tokenizer.encode(text) for text in texts]
        limit = self.model.config.max_position_embeddings
        if max_tokens is not None:
            room = min(max_tokens, limit) - max_new_tokens
            check_length(1, max_new_tokens, min(max_tokens, limit))
            encoded = [ids[-room:] for ids in encoded]
        for ids in encoded:
            check_length(len(ids), max_new_tokens, limit)
        return [
            self._complete([text], [ids], [settings])[0] for text, ids in zip(texts, encoded, strict=True)
        ]

    def generate_together(
        self, requests: Sequence[GenerationRequest], batch_size: int, max_tokens: int
    ) -> list[Completion]:
        """Continue several prompts at once, each by its own settings; long prompts lose their beginning.

        Args:
            requests: prompts and how each is continued.
            batch_size: texts computed at once.
            max_tokens: prompt and new tokens together.

        Raises:
            AscendSpeedError: a request for more new tokens than fit.
        """
        limit = min(max_tokens, self.model.config.max_position_embeddings)
        encoded = []
        for one in requests:
            check_length(1, one.max_new_tokens, limit)
            encoded.append(self.tokenizer.encode(one.prompt)[-(limit - one.max_new_tokens) :])
        order = sorted(range(len(requests)), key=lambda number: -len(encoded[number]))
        found: dict[int, Completion] = {}
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            settings = [self._settings(requests[number]) for number in numbers]
            completions = self._complete(
                [requests[number].prompt for number in numbers],
                [encoded[number] for number in numbers],
                settings,
            )
            found |= dict(zip(numbers, completions, strict=True))
        return [found[number] for number in range(len(requests))]

    def _settings(self, request: GenerationRequest) -> GenerationSettings:
        sampling = Sampling(request.temperature > 0, request.temperature or 1.0, seed=request.seed)
        return GenerationSettings(request.max_new_tokens, sampling, self._end_ids(), tuple(request.stop))

    def _end_ids(self) -> tuple[int, ...]:
        eos_ids = self.model.config.eos_token_ids or (self.tokenizer.eos_id,)
        return tuple(token for token in eos_ids if token is not None)

    def loglikelihood(
        self,
        pairs: Sequence[tuple[str, str] | Pair],
        batch_size: int = SCORING_BATCH_SIZE,
        max_tokens: int | None = None,
    ) -> list[Score]:
        """Score continuations after their contexts; see `scoring.loglikelihood`."""
        limit = min(max_tokens or math.inf, self.model.config.max_position_embeddings)
        scored = [pair if isinstance(pair, Pair) else Pair(*pair) for pair in pairs]
        return loglikelihood(self.model, self.mesh, self.tokenizer, scored, batch_size, int(limit))

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits of the next token at every place of one text: [S, V]."""
        tokens = torch.tensor([list(ids)], device=self.mesh.device.torch)
        logits = forward_through_stages(self.model, self.mesh, tokens)
        return gather_logits(logits[0], self.model.config.vocab_size, self.mesh.group("tp"))

    def _complete(
        self,
        prompts: Sequence[str],
        encoded: Sequence[Sequence[int]],
        settings: Sequence[GenerationSettings],
    ) -> list[Completion]:
        texts = [_NewText(self.tokenizer, ids, own) for ids, own in zip(encoded, settings, strict=True)]
        if len(prompts) == 1:
            generated = [generate_ids(self.model, self.mesh, encoded[0], settings[0], texts[0].ends)]
        else:
            ends = [text.ends for text in texts]
            generated = generate_together(self.model, self.mesh, encoded, settings, ends)
        return [
            Completion(prompt, text.final(done.token_ids), done.token_ids, done.finish_reason, tuple(ids))
            for prompt, ids, text, done in zip(prompts, encoded, texts, generated, strict=True)
        ]


class _NewText:
    """The text of new ids after a prompt.

    Only the last ids of the prompt are decoded with them, for the space before the first: decoding all of it again at
    every token would cost more than the model does.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], settings: GenerationSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._anchor = list(prompt[-ANCHOR_TOKENS:])
        self._before = tokenizer.decode(self._anchor)

    def of(self, new_ids: Sequence[int]) -> str:
        """Return the text of ids."""
        kept = [token for token in new_ids if token not in self._settings.eos_ids]
        whole = self._tokenizer.decode([*self._anchor, *kept])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._tokenizer.decode(kept)

    def ends(self, new_ids: Sequence[int]) -> bool:
        """Tell whether a stop text is there."""
        if not self._settings.stop:
            return False
        text = self.of(new_ids)
        return any(stop in text for stop in self._settings.stop)

    def final(self, new_ids: Sequence[int]) -> str:
        """Return the text before any stop text."""
        text = self.of(new_ids)
        for stop in self._settings.stop:
            text = text.partition(stop)[0]
        return text


def stored_dtype(source: WeightSource) -> str:
    """Return the format that the weights are stored in."""
    return str(next(iter(source.tensors().values())).dtype).removeprefix("torch.")


def find_tokenizer(source: WeightSource, given: Path | None) -> Path:
    """Return the tokenizer to use: the one given, or the one that came with the checkpoint.

    Raises:
        AscendSpeedError: there is none, or the one given is not the one the run was trained with.
    """
    own = source.tokenizer
    if given is None and own is None:
        raise AscendSpeedError(
            f"{source.path or 'random weights'} came without a tokenizer; give --tokenizer-name-or-path"
        )
    if given is None:
        assert own is not None
        return own
    if isinstance(source, NativeSource) and source.data_manifest is not None:
        check_tokenizer(
            source.data_manifest, load_tokenizer(given), f"the data that {source.path} was trained on"
        )
    elif isinstance(source, NativeSource) and own is not None:
        trained, wanted = load_tokenizer(own), load_tokenizer(given)
        if trained.fingerprint != wanted.fingerprint:
            raise AscendSpeedError(
                f"tokenizer {given} is not the one that {source.path} was trained with ({own}); leave "
                "--tokenizer-name-or-path out"
            )
    return given
