"""The backend of ascendspeed-eval for any causal model of transformers, without our engine.

Importing this module imports neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.eval_backend import BackendOption, GenerateResult, ModelDescription, RequestFailure
from ascendspeed_infer.transformers_engine import TransformersEngine, load_transformers

if TYPE_CHECKING:
    from ascendspeed_data.tokenizer import Tokenizer
    from ascendspeed_infer.chat_prompts import ChatPrompts

OPTIONS = (
    BackendOption("transformers_model", str, "Hugging Face folder or name of a causal model."),
    BackendOption("transformers_dtype", str, "Format to compute in. [default: as stored]"),
    BackendOption("transformers_device", str, "Where it runs, in torch's words. [default: cpu]"),
)


class TransformersModel:
    """Score and generate text by text: slow and simple, which makes it a reference."""

    def __init__(self, model: Any, tokenizer: "Tokenizer", name: str) -> None:
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._engine = TransformersEngine(model)
        self._limit = self._engine.max_model_len
        self._chat: ChatPrompts | None = None

    def describe(self) -> ModelDescription:
        """Say which model this is."""
        details = {
            "backend": "transformers",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "tokenizer": self._tokenizer.fingerprint,
        }
        if self._chat is not None:
            details |= self._chat.details()
        return ModelDescription(self._name, self._model.num_parameters(), None, details)

    def start_chat(self, template_values: Mapping[str, Any], day: str | None) -> None:
        """Get ready to answer conversations, by the tokenizer's own chat template.

        Raises:
            AscendSpeedError: there is none, or it does not read a value.
        """
        from ascendspeed_data.prompting import layout_named
        from ascendspeed_infer.chat_prompts import ChatPrompts, values_of

        values = values_of(template_values, day)
        self._tokenizer.template_values = values
        self._chat = ChatPrompts(layout_named("tokenizer", self._tokenizer), values)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        """Return a conversation up to the answer, and the messages that it shows."""
        assert self._chat is not None
        return self._chat.render(messages)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Score continuations; one that cannot be scored fails alone."""
        import torch

        from ascendspeed_infer.scoring import IdPair, Score, TextPair, inputs_or_errors

        pairs: Sequence[TextPair | IdPair] = (
            [TextPair(one.context, one.continuation) for one in requests]
            if self._chat is None
            else self._chat.pairs([(one.messages, one.continuation) for one in requests])
        )
        scores: list[Any] = []
        for one in inputs_or_errors(self._tokenizer, pairs, self._limit):
            if isinstance(one, AscendSpeedError):
                scores.append(RequestFailure(str(one)))
                continue
            with torch.no_grad():
                tokens = torch.tensor([one.token_ids[:-1]], device=self._model.device)
                logits = self._model(tokens).logits[0, -one.num_continuation :].float()
            targets = torch.tensor(one.token_ids[-one.num_continuation :], device=logits.device)
            chosen = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()
            is_greedy = bool((logits.argmax(-1) == targets).all())
            scores.append(Score(float(chosen), is_greedy, one.truncated_tokens))
        return scores

    def generate(self, requests: Sequence[Any]) -> list[GenerateResult | RequestFailure]:
        """Continue prompts; one whose logits are not finite fails alone."""
        results: list[GenerateResult | RequestFailure] = []
        for request in requests:
            try:
                results.append(self._continue(request))
            except AscendSpeedError as error:
                results.append(RequestFailure(str(error)))
        return results

    def _continue(self, request: Any) -> GenerateResult:
        from ascendspeed_infer.config import SamplingConfig
        from ascendspeed_infer.detokenizer import Detokenizer
        from ascendspeed_infer.engine.sequence import GenerationSettings
        from ascendspeed_infer.engines import TokenRequest
        from ascendspeed_infer.sampling import SamplingParams

        chat = self._chat
        ids = self._tokenizer.encode(request.prompt) if chat is None else list(chat.ids(request.messages))
        cut = max(len(ids) - (self._limit - request.max_new_tokens), 0)
        eos_token_ids = self._engine.eos_token_ids or (self._tokenizer.eos_id,)
        settings = GenerationSettings(
            request.max_new_tokens,
            SamplingParams(request.temperature > 0, request.temperature or 1.0, seed=request.seed),
            (
                *(token for token in eos_token_ids if token is not None),
                *(() if chat is None else chat.end_ids),
            ),
            tuple(request.stop),
        )
        detokenizer = Detokenizer(self._tokenizer, ids[cut:], settings.eos_token_ids, settings.stop)
        token_request = TokenRequest(tuple(ids[cut:]), settings, detokenizer.has_stop_string)
        ((output,),) = self._engine.generate([token_request], SamplingConfig())
        return GenerateResult(detokenizer.final_text(output.token_ids), output.finish_reason, cut)


class TransformersBackend:
    """The entry point `transformers`."""

    name = "transformers"
    summary = "any causal model of transformers"
    options: Sequence[BackendOption] = OPTIONS

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Wanted when such a model is named."""
        return "transformers_model" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """One process is enough."""
        return False

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """Load the model and the tokenizer of its folder."""
        from pathlib import Path

        from ascendspeed_data.tokenizer import load_tokenizer

        name, dtype = options["transformers_model"], options.get("transformers_dtype", "auto")
        model = load_transformers(name, dtype, options.get("transformers_device", "cpu"))
        yield TransformersModel(model, load_tokenizer(Path(name)), Path(name).name)


backend = TransformersBackend()
