"""The engine `transformers`: `generate` of Hugging Face, one text after the other; plain, which makes it a reference.

Importing this module imports neither torch nor transformers.
"""

import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_infer.config import LoadedModelConfig, SamplingConfig
from ascendspeed_infer.engines import TokenRequest, adapter_folder, hugging_face_folder, show_option

if TYPE_CHECKING:
    from ascendspeed_infer.engine.sequence import CompletionOutput, TokenOutput

OnToken = Callable[[int], bool]
"""Told each new id, says whether to stop."""


ENGINE_OPTIONS = ("attn_implementation",)
"""Arguments of `from_pretrained` that `--engine-option` takes; all are texts."""


def read_options(given: Mapping[str, str]) -> Mapping[str, str]:
    """Return options of `--engine-option`.

    Raises:
        ConfigError: transformers has no such argument, or an option of the command decides it.
    """
    for name, value in given.items():
        if name not in ENGINE_OPTIONS:
            raise ConfigError(
                f"{show_option(name, value)} is none of engine=transformers, which takes "
                f"{', '.join(ENGINE_OPTIONS)}{did_you_mean(name, ENGINE_OPTIONS)}"
            )
    return given


def load_transformers(
    folder: str, dtype: str, device: Any, options: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Return a causal model of transformers, ready to answer.

    Args:
        folder: Hugging Face folder or name.
        dtype: format to compute in, or `auto`.
        device: where, in torch's words.
        options: further arguments of `from_pretrained`.

    Raises:
        AscendSpeedError: transformers is not installed, or cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise AscendSpeedError(
            f"{error.name} is not installed; pip install ascendspeed-infer[transformers]"
        ) from None
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise AscendSpeedError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from None
    return model.to(device).eval()


DEFAULT_MAX_MODEL_LEN = 2048
"""Tokens of a text for a model whose config states no `max_position_embeddings`, as those of Bloom do not."""


class TransformersEngine:
    """Continues ids by `generate` of transformers.

    Args:
        model: a causal model of transformers; its own defaults of generation have no effect.
    """

    name = "transformers"
    supported_options = frozenset(
        ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "return_log_probs")
    )

    def __init__(self, model: Any) -> None:
        self._model = model
        stated = getattr(model.generation_config, "eos_token_id", None)
        self.eos_token_ids: tuple[int, ...] = (
            () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)
        )
        self.vocab_size = int(model.config.vocab_size)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is None:
            log(
                f"the model's config states no longest text; engine=transformers takes {DEFAULT_MAX_MODEL_LEN} tokens"
            )
        self.max_model_len = int(limit or DEFAULT_MAX_MODEL_LEN)

    def generate(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list["CompletionOutput"]]:
        """Continue one request after the other; see `TextEngine`."""
        for request in requests:
            yield [self._generate(request, lambda token: False)]

    def stream(self, request: TokenRequest, config: SamplingConfig, session: Any) -> Iterator["TokenOutput"]:
        """Continue one request on a thread, and give each id once the next is there; see `TextEngine`.

        Raises:
            ConfigError: log-probabilities are wanted, which transformers gives at the end only.
        """
        from ascendspeed_infer.engine.sequence import TokenOutput

        if request.settings.return_log_probs:
            raise ConfigError("engine=transformers gives log-probabilities at the end only; leave stream out")
        results: queue.Queue[int | BaseException | CompletionOutput] = queue.Queue()
        is_stopped = threading.Event()

        def on_token(token: int) -> bool:
            results.put(token)
            return is_stopped.is_set()

        def work() -> None:
            try:
                results.put(self._generate(request, on_token))
            except BaseException as error:  # noqa: BLE001 - raised where the texts are read
                results.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            latest: int | None = None
            while isinstance(result := results.get(), int):
                if latest is not None:
                    yield TokenOutput(latest, None, None)
                latest = result
            if isinstance(result, BaseException):
                raise result
            assert latest is not None
            yield TokenOutput(latest, None, result.finish_reason)
        finally:
            is_stopped.set()
            thread.join()

    def new_session(self) -> None:
        """Keep nothing: each prompt is read whole."""

    def _generate(self, request: TokenRequest, on_token: OnToken) -> "CompletionOutput":
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        from ascendspeed_infer.engine.sequence import CompletionOutput
        from ascendspeed_infer.sampling import check_finite_logits

        settings, prompt = request.settings, list(request.prompt_ids)
        sampling = settings.sampling
        drawing = (
            {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            if sampling.do_sample
            else {}
        )
        # The model's own would fill in what is not given here.
        self._model.generation_config = GenerationConfig(pad_token_id=0)

        def criterion(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            new = ids[0, len(prompt) :].tolist()
            stops = on_token(new[-1]) | request.stop_check(new)
            return torch.tensor([stops], device=ids.device)

        def checked(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            check_finite_logits(float(scores.max()))
            return scores

        tokens = torch.tensor([prompt], device=self._model.device)
        torch.manual_seed(sampling.seed)
        out = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=settings.max_new_tokens,
            do_sample=sampling.do_sample,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=list(settings.eos_token_ids) or None,
            logits_processor=LogitsProcessorList([checked]),
            stopping_criteria=StoppingCriteriaList([criterion]),
            return_dict_in_generate=True,
            output_logits=settings.return_log_probs,
            **drawing,
        )
        new = tuple(int(token) for token in out.sequences[0, len(prompt) :])
        has_ended = new[-1] in settings.eos_token_ids or request.stop_check(new)
        log_probs = None
        if settings.return_log_probs:
            rows = torch.cat(out.logits).double().log_softmax(-1)
            log_probs = tuple(float(row[token]) for row, token in zip(rows, new, strict=True))
        return CompletionOutput(new, "stop" if has_ended else "length", log_probs)


class TransformersKind:
    """The entry point `transformers`."""

    name = "transformers"
    options = frozenset(("lora_load", "dtype", "fp16", "bf16", "device", "engine_option"))

    @contextmanager
    def open(self, config: LoadedModelConfig, dtype: str) -> Iterator[TransformersEngine]:
        """Load the model, and the adapter beside it."""
        from ascendspeed_core.device import choose_device

        options = read_options(config.engine.engine_options)
        folder, adapter = hugging_face_folder(config, self.name), adapter_folder(config, self.name)
        model = load_transformers(str(folder), dtype, choose_device(config.launch.device).torch, options)
        if adapter is not None:
            _load_adapter(model, adapter)
        yield TransformersEngine(model)


def _load_adapter(model: Any, folder: Path) -> None:
    """Let peft put an adapter into the layers of `model`, in place."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # Weights under names that peft does not know would be left out.
            warnings.filterwarnings("error", "Found missing adapter keys")
            PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise AscendSpeedError(
            f"peft cannot load {folder}: {str(error).splitlines()[0]}; merge it: asd-ckpt merge-lora --load BASE "
            f"--lora-load {folder} --save OUT"
        ) from None


kind = TransformersKind()
