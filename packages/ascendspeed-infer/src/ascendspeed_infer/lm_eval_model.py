"""Our model as a model of lm-evaluation-harness, so that its thousands of tasks run on any checkpoint and layout.

    import lm_eval
    from ascendspeed_infer.lm_eval_model import AscendSpeedLM

    lm_eval.simple_evaluate(AscendSpeedLM("run"), tasks=["arc_easy"])

Under several ranks (`torchrun`, tensor and pipeline parallel) all make the same calls.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.requests import GenerationRequest
from ascendspeed_infer.scoring import TextPair

DEFAULT_NEW_TOKENS = 256
GENERATION_BATCH_SIZE = 8


class AscendSpeedLM(LM):
    """A checkpoint, as the harness wants a model.

    Args:
        model: checkpoint, or a model that is loaded already (with its layout).
        batch_size: texts generated at once; changes no result.
        max_length: longest input in tokens, by default the model's.
        options: of `LanguageModel.from_pretrained`.
    """

    def __init__(
        self,
        model: LanguageModel | Path | str,
        batch_size: int = GENERATION_BATCH_SIZE,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = (
            model if isinstance(model, LanguageModel) else LanguageModel.from_pretrained(model, **options)
        )
        self._batch_size = int(batch_size)
        limit = self.model.llm_engine.max_model_len
        self.max_length = min(max_length or limit, limit)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Score continuations."""
        pairs = [TextPair(*request.args) for request in requests]
        scores = self.model.loglikelihood(pairs, self.max_length)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Score whole texts, in the harness's windows: each token once."""
        tokenizer, found = self.model.tokenizer, []
        for request in requests:
            (text,) = request.args
            ids = tokenizer.encode(text, add_special_tokens=False)
            start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
            if start is None:
                raise ValueError(
                    "the tokenizer has neither a begin nor an end of text; a text has no first context"
                )
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, start, self.max_length, 1))
            scores = self.model.loglikelihood_of_ids(list(windows))
            found.append(sum(score.logprob for score in scores))
        return found

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continue prompts."""
        generation_requests = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or []
            drawn = bool(settings.get("do_sample"))
            generation_requests.append(
                GenerationRequest(
                    prompt,
                    int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)),
                    (until,) if isinstance(until, str) else tuple(until),
                    float(settings.get("temperature") or 0.0) if drawn else 0.0,
                )
            )
        completions = self.model.generate_batch(
            generation_requests, self._batch_size, self.max_length, batch_invariant=True
        )
        return [completion.text for completion in completions]
