"""Log-probabilities of the tokens of a prompt, computed as scores are.

Shapes: P positions, V vocabulary.
"""

from collections.abc import Sequence

import torch

from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.scoring_request import Score, ScoringInput, ScoringRequest, log_probs_of
from ascendspeed_infer.engine.sequence import TokenOutput


class PromptRequest(ScoringRequest):
    """What the model thinks of each token of a prompt but the first, the same bit for bit whatever else is computed.

    Args:
        prompt_ids: at least two.
        num_top_log_probs: how many of the likeliest tokens are wanted at the place of each.
        shapes: fixed shapes of the passes.

    Attributes:
        prompt_ids: as they were given.
        num_top: how many of the likeliest tokens are wanted.
        tokens: of the second token and all after it, once the request is finished.
    """

    def __init__(self, prompt_ids: Sequence[int], num_top_log_probs: int, shapes: PassShapes) -> None:
        super().__init__([ScoringInput(tuple(prompt_ids), len(prompt_ids) - 1, 0)], shapes)
        self.prompt_ids, self.num_top = list(prompt_ids), num_top_log_probs
        self.tokens: list[TokenOutput] = []

    def take_tokens(self, tokens: Sequence[TokenOutput]) -> None:
        """Take what another engine thinks of the tokens, all of them."""
        self.tokens = list(tokens)
        total = sum(one.log_prob or 0.0 for one in tokens)
        self.scores = {ScoringInput(tuple(self.prompt_ids), len(tokens), 0): Score(total, False, 0)}

    def take_logits(self, logits: torch.Tensor, inputs: Sequence[ScoringInput]) -> None:
        """See `ScoringRequest`; logits of every position but the last, [P, V]."""
        super().take_logits(logits, inputs)
        log_probs = log_probs_of(logits).cpu()
        values, ids = log_probs.topk(min(self.num_top, log_probs.shape[-1]))
        tops = zip(ids.tolist(), values.tolist(), strict=True)
        for token, row, (top_ids, top_values) in zip(inputs[0].token_ids[1:], log_probs, tops, strict=True):
            top = tuple(zip(top_ids, top_values, strict=True))
            self.tokens.append(TokenOutput(token, float(row[token]), None, top))
