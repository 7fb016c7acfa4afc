"""Log-likelihoods of continuations: what benchmark scores stand on.

Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context.

    Attributes:
        logprob: natural logarithm of its probability, added up over its tokens.
        is_greedy: greedy decoding would have produced it.
        truncated_tokens: tokens of the context that did not fit and were left out.
    """

    logprob: float
    is_greedy: bool
    truncated_tokens: int


@dataclass(frozen=True)
class _Row:
    """A tokenized pair, cut to what the model can take."""

    ids: tuple[int, ...]
    num_continuation: int
    truncated_tokens: int


@torch.no_grad()
def loglikelihood(
    model: Transformer,
    mesh: ParallelMesh,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    max_tokens: int,
) -> list[Score]:
    """Score continuations after their contexts.

    Pairs of similar length are computed together; shorter ones are padded at the end, which causal attention
    never looks at.

    Args:
        model: this process's part.
        mesh: its place; all processes of a tensor-parallel group call alike.
        tokenizer: of the model.
        pairs: (context, continuation).
        batch_size: pairs computed at once.
        max_tokens: longest input; longer ones lose the beginning of their context, which is counted.

    Raises:
        AscendSpeedError: a continuation alone is longer than `max_tokens`.
    """
    rows = [_row(tokenizer, context, continuation, max_tokens) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        scores.update(zip(numbers, _score(model, mesh, [rows[n] for n in numbers]), strict=True))
    return [scores[number] for number in range(len(rows))]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize a pair as one text and cut it where the context's own tokens end.

    Spaces at the end of the context count to the continuation, where tokenizers put them; the rule of
    lm-evaluation-harness.
    """
    trailing = len(context) - len(context.rstrip())
    if trailing:
        context, continuation = context[:-trailing], context[-trailing:] + continuation
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context))
    return whole[:cut], whole[cut:]


def _row(tokenizer: Tokenizer, context: str, continuation: str, max_tokens: int) -> _Row:
    before, after = encode_pair(tokenizer, context, continuation)
    if not before:
        before = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
    if len(after) > max_tokens:
        raise AscendSpeedError(
            f"the continuation {continuation[:40]!r} has {len(after)} tokens, more than the {max_tokens} that the "
            "model takes; no score of a part would be its score"
        )
    ids = before + after
    truncated = max(len(ids) - (max_tokens + 1), 0)
    return _Row(tuple(ids[truncated:]), len(after), truncated)


def _score(model: Transformer, mesh: ParallelMesh, rows: Sequence[_Row]) -> list[Score]:
    """Run one batch, [B, S], and read each row's continuation off its logits."""
    length = max(len(row.ids) - 1 for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row.ids) - 1] = torch.tensor(row.ids[:-1])
    logits = forward_through_stages(model, mesh, tokens.to(mesh.device.torch))
    scores = []
    for place, row in enumerate(rows):
        end = len(row.ids) - 1
        part = logits[place, end - row.num_continuation : end]
        whole = gather_logits(part, model.config.vocab_size, mesh.group("tp"))
        wide = whole if whole.dtype == torch.float64 else whole.float()
        targets = torch.tensor(row.ids[len(row.ids) - row.num_continuation :], device=wide.device)
        chosen = wide.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).sum()
        is_greedy = bool((wide.argmax(dim=-1) == targets).all())
        scores.append(Score(float(chosen), is_greedy, row.truncated_tokens))
    return scores
