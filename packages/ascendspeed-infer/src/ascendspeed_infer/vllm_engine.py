"""The engine `vllm`: vLLM, and vllm-ascend where that is installed, in this process and those that it starts itself.

Written against vLLM's source (`SamplingParams` at commit 00388f6573cc of vllm-project/vllm); it has not been run, as
vLLM needs hardware that this project has not had.
Importing this module imports neither torch nor vllm.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.config import LoadedModelConfig, SamplingConfig
from ascendspeed_infer.engines import TokenRequest, adapter_folder, hugging_face_folder

if TYPE_CHECKING:
    from ascendspeed_core.config.model import ModelConfig
    from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings, TokenOutput

TEMPERATURES = (0.01, 2.0)
"""vLLM raises lower ones to the first without asking, and refuses higher ones than the second."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `max_lora_rank` that vLLM takes."""


def model_arguments(
    config: LoadedModelConfig, folder: Path, dtype: str, lora_rank: int | None
) -> dict[str, Any]:
    """Translate what was asked for into arguments of `vllm.LLM`.

    Args:
        config: the layout.
        folder: of the model.
        dtype: format to compute in.
        lora_rank: of the adapter, if there is one.

    Raises:
        ConfigError: a rank that vLLM does not take.
    """
    arguments: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": str(config.tokenizer.tokenizer_name_or_path or folder),
        "dtype": dtype,
        "tensor_parallel_size": config.layout.tensor_model_parallel_size,
        "pipeline_parallel_size": config.layout.pipeline_model_parallel_size,
        # Nothing of generation_config.json unasked; log-probabilities of the model itself.
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
    }
    if lora_rank is not None:
        ranks = [rank for rank in LORA_RANKS if rank >= lora_rank]
        if not ranks:
            raise ConfigError(
                f"engine=vllm takes adapters of rank {LORA_RANKS[-1]} at most, this one has {lora_rank}"
            )
        arguments |= {"enable_lora": True, "max_lora_rank": ranks[0]}
    return arguments


def sampling_arguments(settings: "GenerationSettings") -> dict[str, Any]:
    """Translate how a text is continued into arguments of `vllm.SamplingParams`.

    Raises:
        ConfigError: a temperature that vLLM would change or refuse.
    """
    sampling = settings.sampling
    arguments: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens,
        "temperature": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(settings.stop),
        # Its own end ids would be added to ours.
        "stop_token_ids": list(settings.eos_token_ids),
        "ignore_eos": True,
        # Stop texts are looked for in its own text; ours is made of the ids.
        "detokenize": bool(settings.stop),
        # 0 further tokens beside the chosen one.
        "logprobs": 0 if settings.return_log_probs else None,
    }
    if sampling.do_sample:
        low, high = TEMPERATURES
        if not low <= sampling.temperature <= high:
            raise ConfigError(f"engine=vllm takes temperature={low} to {high}, not {sampling.temperature}")
        arguments |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
    return arguments


def log_probs_of(
    token_ids: Sequence[int], stated: Sequence[Mapping[int, Any]] | None
) -> tuple[float, ...] | None:
    """Return each chosen token's log-probability from vLLM's tables of the likeliest."""
    if stated is None:
        return None
    return tuple(float(table[token].logprob) for token, table in zip(token_ids, stated, strict=True))


class VllmEngine:
    """Continues ids with `vllm.LLM`.

    Args:
        vllm: the package.
        llm: its model.
        limits: longest text and size of the vocabulary.
        adapter: its `LoRARequest`, if there is one.
    """

    name = "vllm"
    supported_options = frozenset(
        ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "return_log_probs")
    )

    def __init__(
        self, vllm: Any, llm: Any, limits: tuple[int, int], eos_token_ids: tuple[int, ...], adapter: Any
    ) -> None:
        self._vllm, self._llm, self._adapter = vllm, llm, adapter
        self.max_model_len, self.vocab_size = limits
        self.eos_token_ids = eos_token_ids
        self._streamed = 0

    def generate(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list["CompletionOutput"]]:
        """Continue all requests together, as vLLM batches them; see `TextEngine`."""
        from ascendspeed_infer.engine.sequence import CompletionOutput

        outputs = self._llm.generate(
            [self._prompt(request) for request in requests],
            [self._vllm.SamplingParams(**sampling_arguments(request.settings)) for request in requests],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        for output in outputs:
            (text,) = output.outputs
            ids = tuple(int(token) for token in text.token_ids)
            yield [CompletionOutput(ids, _reason(text.finish_reason), log_probs_of(ids, text.logprobs))]

    def stream(self, request: TokenRequest, config: SamplingConfig, session: Any) -> Iterator["TokenOutput"]:
        """Continue one request step by step; see `TextEngine`."""
        from ascendspeed_infer.engine.sequence import TokenOutput

        engine, self._streamed = self._llm.llm_engine, self._streamed + 1
        name, count = f"stream-{self._streamed}", 0
        params = self._vllm.SamplingParams(**sampling_arguments(request.settings))
        engine.add_request(name, self._prompt(request), params, lora_request=self._adapter)
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    (text,) = output.outputs
                    ids = list(text.token_ids)
                    log_probs = log_probs_of(ids, text.logprobs) or (None,) * len(ids)
                    for number in range(count, len(ids)):
                        is_last = output.finished and number == len(ids) - 1
                        yield TokenOutput(
                            ids[number], log_probs[number], _reason(text.finish_reason) if is_last else None
                        )
                    count = len(ids)
        finally:
            if engine.has_unfinished_requests():
                engine.abort_request([name])

    def new_session(self) -> None:
        """Leave it to vLLM, which has a prefix cache of its own."""

    def _prompt(self, request: TokenRequest) -> Any:
        return self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))


def _reason(stated: str | None) -> Any:
    if stated not in ("stop", "length"):
        raise AscendSpeedError(f"vllm ended a text with {stated!r}; its own log says why")
    return stated


def lora_rank(folder: Path, model: "ModelConfig") -> int:
    """Return the rank of an adapter that vLLM computes as peft does.

    Args:
        folder: of the adapter, in peft's format.
        model: architecture of its base.

    Raises:
        ConfigError: vLLM ignores or refuses a part of it.
    """
    from ascendspeed_core.weights.adapters.adapter_config import CONFIG, read_adapter_config
    from ascendspeed_core.weights.adapters.ascendspeed import open_adapter

    adapter, config = open_adapter(folder, model), read_adapter_config(folder / CONFIG)
    beyond = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name)]
    if adapter.saved:
        beyond.append(f"its own {', '.join(sorted(adapter.saved))}")
    if adapter.unties:
        beyond.append("a head that its embedding is not tied to")
    if beyond:
        raise ConfigError(
            f"engine=vllm takes adapters of one rank and scale that replace nothing, {folder} has "
            f"{' and '.join(beyond)}; merge it: asd-ckpt merge-lora --load BASE --lora-load {folder} --save OUT"
        )
    return int(config.r)


class VllmKind:
    """The entry point `vllm`."""

    name = "vllm"
    options = frozenset(
        ("lora_load", "dtype", "fp16", "bf16", "tensor_model_parallel_size", "pipeline_model_parallel_size")
    )

    @contextmanager
    def open(self, config: LoadedModelConfig, dtype: str) -> Iterator[VllmEngine]:
        """Let vLLM load the model; it starts the processes of its layout itself."""
        folder, adapter = hugging_face_folder(config, self.name), adapter_folder(config, self.name)
        try:
            vllm = importlib.import_module("vllm")
            lora = importlib.import_module("vllm.lora.request")
        except ModuleNotFoundError as error:
            raise AscendSpeedError(
                f"{error.name} is not installed, which engine=vllm needs; install vllm for this machine's "
                "accelerator (vllm-ascend on an NPU), or leave --engine out"
            ) from None
        from ascendspeed_core.weights import open_weights

        model = open_weights(folder).config
        rank = None if adapter is None else lora_rank(adapter, model)
        llm = vllm.LLM(**model_arguments(config, folder, dtype, rank))
        request = None if adapter is None else lora.LoRARequest(adapter.name, 1, str(adapter))
        limits = (model.max_position_embeddings, model.vocab_size)
        yield VllmEngine(vllm, llm, limits, model.eos_token_ids, request)


kind = VllmKind()
