"""The backend of ascendspeed-eval for any causal model of transformers, without our engine.

Importing this module imports neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ascendspeed_infer.evaluation import Description, Option, Text

if TYPE_CHECKING:
    from ascendspeed_data.tokenizer import Tokenizer

OPTIONS = (
    Option("transformers_model", str, "Hugging Face folder or name of a causal model."),
    Option("transformers_dtype", str, "Format to compute in. [default: as stored]"),
    Option("transformers_device", str, "Where it runs, in torch's words. [default: cpu]"),
)


class TransformersModel:
    """Score and generate one text after the other: slow and plain, which makes it a reference."""

    def __init__(self, model: Any, tokenizer: "Tokenizer", name: str) -> None:
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._limit = int(getattr(model.config, "max_position_embeddings", 2048))

    def describe(self) -> Description:
        """Say which model this is."""
        details = {
            "backend": "transformers",
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "tokenizer": self._tokenizer.fingerprint,
        }
        return Description(self._name, self._model.num_parameters(), None, details)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Score continuations."""
        import torch

        from ascendspeed_infer.scoring import Score, encode_pair

        scores = []
        for request in requests:
            before, after = encode_pair(self._tokenizer, request.context, request.continuation)
            if not before:
                before = [t for t in (self._tokenizer.bos_id, self._tokenizer.eos_id) if t is not None][:1]
            ids = before + after
            cut = max(len(ids) - self._limit - 1, 0)
            with torch.no_grad():
                tokens = torch.tensor([ids[cut:-1]], device=self._model.device)
                logits = self._model(tokens).logits[0, -len(after) :].float()
            targets = torch.tensor(after, device=logits.device)
            chosen = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()
            scores.append(Score(float(chosen), bool((logits.argmax(-1) == targets).all()), cut))
        return scores

    def generate(self, requests: Sequence[Any]) -> list[Text]:
        """Continue prompts."""
        return [self._continue(request) for request in requests]

    def _continue(self, request: Any) -> Text:
        import torch

        ids = self._tokenizer.encode(request.prompt)
        room = self._limit - request.max_new_tokens
        cut = max(len(ids) - room, 0)
        tokens = torch.tensor([ids[cut:]], device=self._model.device)
        torch.manual_seed(request.seed)
        sampling = (
            {"do_sample": True, "temperature": request.temperature}
            if request.temperature
            else {"do_sample": False}
        )
        out = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=request.max_new_tokens,
            pad_token_id=self._tokenizer.eos_id,
            **sampling,
        )
        new = [int(token) for token in out[0, tokens.shape[1] :]]
        kept = [token for token in new if token != self._tokenizer.eos_id]
        before, whole = self._tokenizer.decode(ids[cut:]), self._tokenizer.decode([*ids[cut:], *kept])
        text = whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(kept)
        ended = len(kept) < len(new) or any(stop in text for stop in request.stop)
        for stop in request.stop:
            text = text.partition(stop)[0]
        return Text(text, "stop" if ended else "length", cut)


class TransformersBackend:
    """The entry point `transformers`."""

    name = "transformers"
    summary = "any causal model of transformers"
    options: Sequence[Option] = OPTIONS

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

        from transformers import AutoModelForCausalLM

        from ascendspeed_data.errors import AscendSpeedError
        from ascendspeed_data.tokenizer import load_tokenizer

        name = options["transformers_model"]
        try:
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=options.get("transformers_dtype", "auto")
            )
        except (OSError, ValueError) as error:
            raise AscendSpeedError(
                f"transformers_model={name} cannot be loaded: {str(error).splitlines()[0]}"
            ) from None
        tokenizer = load_tokenizer(Path(name))
        yield TransformersModel(
            model.to(options.get("transformers_device", "cpu")).eval(), tokenizer, Path(name).name
        )


backend = TransformersBackend()
