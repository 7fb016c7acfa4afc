"""The engine: one long-lived loop that every request of a model runs on.

    engine = LLMEngine(model, mesh)
    engine.add_request("a", SamplingRequest(prompt_ids, GenerationSettings(max_new_tokens=64)))
    while engine.has_unfinished_requests():
        for output in engine.step():
            ...

Requests are added and aborted at any time, from any thread; what is added joins the next step. Each step runs one pass
of the model for all requests together. An error of one request ends that request only.

Under several ranks either all make the same calls (the default; no rank waits for another but in the model), or the
others follow rank 0: `lead_or_follow`.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ascendspeed_core.models.cache import BLOCK_TOKENS, blocks_of
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.control_channel import open_channel
from ascendspeed_infer.engine.scheduled_request import ScheduledRequest
from ascendspeed_infer.engine.scheduler import PREFILL_TOKENS_PER_STEP, Scheduler
from ascendspeed_infer.engine.scoring_request import Score, ScoringInput, ScoringRequest
from ascendspeed_infer.engine.sequence import CompletionOutput, Request, TokenOutput
from ascendspeed_infer.engine.worker import Worker


@dataclass(frozen=True)
class RequestOutput:
    """What one step did for a request.

    Attributes:
        request_id: its name.
        new_tokens: tokens since the last output; none for beams and scores.
        is_finished: whether this is its last output.
        completions: of a finished request, the best first.
        scores: of a finished scoring request, by input.
        error: what ended the request, if something went wrong.
    """

    request_id: str
    new_tokens: tuple[TokenOutput, ...] = ()
    is_finished: bool = False
    completions: tuple[CompletionOutput, ...] = ()
    scores: dict[ScoringInput, Score] | None = None
    error: Exception | None = None


class LLMEngine:
    """Continue and score any number of requests with one model.

    Args:
        model: this rank's part.
        mesh: the layout and this rank's position in it.
        cache_tokens: capacity of the key-value cache; by default it is made for what is asked, between requests.
        max_num_seqs: most sequences in one pass; by default as many as the cache holds.
        prefill_tokens_per_step: about the most tokens of prompts in one pass.
        enable_prefix_caching: keep keys and values of finished requests for prompts with the same prefix, while there
            is memory.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: ParallelMesh,
        *,
        cache_tokens: int | None = None,
        max_num_seqs: int | None = None,
        prefill_tokens_per_step: int = PREFILL_TOKENS_PER_STEP,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.model, self.mesh = model, mesh
        self._worker = Worker(model, mesh)
        self._scheduler = Scheduler(
            self._worker, self.shapes, max_num_seqs, prefill_tokens_per_step, enable_prefix_caching
        )
        self._cache_tokens = cache_tokens
        self._next_cache_tokens = cache_tokens
        self._inbox: deque[ScheduledRequest | str] = deque()
        self._ids: set[str] = set()
        self._counter = itertools.count()
        self._invariance_error: AscendSpeedError | None = None
        self._is_invariance_checked = False
        self.adapter_for_all: str | None = None
        """Adapter of requests that name none."""

    @property
    def shapes(self) -> PassShapes:
        """The fixed shapes of batch-invariant passes."""
        return self._worker.runner.shapes

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that requests may name."""
        return () if self.model.adapters is None else self.model.adapters.names

    @property
    def max_model_len(self) -> int:
        """The longest text, prompt and new tokens together."""
        return self.model.config.max_position_embeddings

    @property
    def num_blocks(self) -> int:
        """Blocks of the key-value cache."""
        return self._worker.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks of the cache that hold nothing; those of kept prefixes count as used."""
        return self._worker.free_blocks

    @property
    def num_running(self) -> int:
        """Requests that the last step let into the cache and that have not left it."""
        return len(self._scheduler.running)

    @property
    def num_preemptions(self) -> int:
        """How often a request had to leave the cache, to be computed again."""
        return self._scheduler.num_preemptions

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts whose keys and values were copied, not computed."""
        return self._scheduler.reused_tokens

    def unique_name(self, kind: str) -> str:
        """Return a name for a request or a salt that this engine has not given before."""
        return f"{kind}-{next(self._counter)}"

    def add_request(
        self,
        request_id: str,
        request: Request | ScoringRequest,
        batch_invariant: bool = False,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> None:
        """Add a request; it joins the next step that has memory for it, after those that came before.

        Args:
            request_id: a name that no unfinished request has.
            request: a new one.
            batch_invariant: give the same result bit for bit whatever else is computed; see `check_batch_invariance`.
            cache_salt: only requests with the same salt share the keys and values of a common prefix.
            adapter: which of the model's adapters to use, by name; by default that of `adapter_for_all`.

        Raises:
            AscendSpeedError: the name is taken, the model has no such adapter, there is no prompt, or the request can
                never fit.
        """
        if request_id in self._ids:
            raise AscendSpeedError(
                f"request_id={request_id} is the name of an unfinished request; give another"
            )
        number = self._adapter_number(adapter or self.adapter_for_all)
        scheduled = ScheduledRequest(request_id, request, batch_invariant, cache_salt, self.shapes, number)
        if not isinstance(request, ScoringRequest):
            check_length(len(request.prompt_ids), request.max_new_tokens, self.max_model_len)
        limit = self._scheduler.max_num_seqs
        if limit is not None and scheduled.num_seqs > limit:
            raise AscendSpeedError(
                f"the request continues {scheduled.num_seqs} sequences side by side, more than max_num_seqs={limit} "
                "of the engine; ask for fewer beams"
            )
        if self._cache_tokens is not None and scheduled.num_blocks > blocks_of(self._cache_tokens):
            raise AscendSpeedError(
                f"{scheduled.num_seqs} x {scheduled.slot_tokens} tokens of prompt and continuation need "
                f"{scheduled.num_blocks} blocks of the key-value cache, which has {blocks_of(self._cache_tokens)}; "
                "shorten the prompt, ask for fewer tokens, or make the cache larger"
            )
        self._ids.add(request_id)
        self._inbox.append(scheduled)

    def abort_request(self, request_id: str) -> None:
        """Drop a request, if it is unfinished; the next step frees its memory. What it has so far stays in it."""
        self._inbox.append(request_id)

    def has_unfinished_requests(self) -> bool:
        """Return whether a step has anything to do."""
        return bool(self._inbox or self._scheduler.waiting or self._scheduler.running)

    def step(self) -> list[RequestOutput]:
        """Let requests enter and leave, run one pass, and choose the next tokens.

        Returns:
            One output for each request that got a token, was finished or failed.
        """
        self._take_inbox()
        self._fit_cache()
        output = self._scheduler.schedule()
        if output is None:
            return []
        logits = self._worker.run(output.chunks)
        return [self._report(*one) for one in self._scheduler.update(output, logits)]

    def run(self) -> None:
        """Step until every request is finished."""
        while self.has_unfinished_requests():
            self.step()

    def fix_cache(
        self, num_tokens: int, max_num_seqs: int | None = None, optimistic_admission: bool = False
    ) -> None:
        """Keep the cache at this size from now on, whatever is asked, as a server does; nothing may run.

        Args:
            num_tokens: of all sequences that are to run side by side.
            max_num_seqs: most sequences in one pass.
            optimistic_admission: let requests enter when their text so far fits; see `scheduler`.
        """
        assert not self.has_unfinished_requests()
        self._cache_tokens = self._next_cache_tokens = num_tokens
        self._scheduler.max_num_seqs = max_num_seqs
        self._scheduler.optimistic = optimistic_admission

    def resize_cache(self, num_tokens: int, only_grow: bool = False) -> None:
        """Make the cache for this many tokens as soon as nothing runs; kept prefixes are lost.

        Without effect on an engine with a fixed cache.

        Args:
            num_tokens: of all sequences that are to run side by side.
            only_grow: leave a cache that is large enough as it is.
        """
        is_enough = self._next_cache_tokens is None and self.num_blocks >= blocks_of(num_tokens)
        if self._cache_tokens is None and not (only_grow and is_enough):
            self._next_cache_tokens = max(num_tokens, self._next_cache_tokens or 0)

    def clear_prefix_cache(self) -> None:
        """Free the memory of finished requests."""
        self._scheduler.clear_prefix_cache()

    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits at every position of one text, [S, V]."""
        return self._worker.forward(token_ids)

    def check_batch_invariance(self) -> None:
        """Try once whether batch-invariant passes are that on this machine.

        Raises:
            AscendSpeedError: they are not, or the layout does not allow it.
        """
        if not self._is_invariance_checked:
            try:
                self._worker.check_batch_invariance()
            except AscendSpeedError as error:
                self._invariance_error = error
            self._is_invariance_checked = True
        if self._invariance_error is not None:
            raise self._invariance_error

    @contextmanager
    def lead_or_follow(self, each_replica: bool = False) -> Iterator[bool]:
        """Let rank 0 decide alone, and the other ranks follow it until it leaves; all ranks enter together.

        Args:
            each_replica: let the first rank of each data-parallel replica lead the ranks of that replica.

        Yields:
            Whether this rank leads. On a follower that is over: it has run all that its leader ran.
        """
        if self.mesh.mesh is None:
            yield True
            return
        self._reset()
        ranks = self.mesh.mesh.mesh
        groups = [ranks[:, number].flatten().tolist() for number in range(ranks.shape[1])]
        channel = open_channel(groups if each_replica else [ranks.flatten().sort().values.tolist()])
        assert channel is not None
        self._worker.channel = channel
        try:
            if not channel.is_leader:
                self._worker.follow()
            yield channel.is_leader
        finally:
            self.shutdown()

    def shutdown(self) -> None:
        """Drop all requests, free the cache, and let the followers go."""
        self._worker.shutdown()
        self._reset()

    def _reset(self) -> None:
        self._inbox.clear()
        self._ids.clear()
        self._scheduler.reset()
        self._worker.allocate_cache(0)
        self._next_cache_tokens = self._cache_tokens

    def _adapter_number(self, name: str | None) -> int | None:
        if name is None:
            return None
        if name not in self.adapter_names:
            known = ", ".join(self.adapter_names) or "none"
            raise AscendSpeedError(
                f"adapter={name} is not one of the model's: {known}; choose one, or leave it out"
            )
        return self.adapter_names.index(name)

    def _take_inbox(self) -> None:
        while self._inbox:
            arrived = self._inbox.popleft()
            if isinstance(arrived, ScheduledRequest):
                self._scheduler.add(arrived)
            elif self._scheduler.abort(arrived):
                self._ids.discard(arrived)

    def _fit_cache(self) -> None:
        """Make the cache as large as was asked for, and for what waits, while nothing runs."""
        if self._scheduler.running:
            return
        wanted, self._next_cache_tokens = self._next_cache_tokens, None
        waiting = self._scheduler.waiting
        if self._cache_tokens is None and waiting:
            blocks = self.num_blocks if wanted is None else blocks_of(wanted)
            if waiting[0].num_blocks > blocks:
                wanted = cache_tokens_for(
                    [(one.num_seqs, one.slot_tokens) for one in waiting], self._scheduler.max_num_seqs
                )
        if wanted is not None:
            self._scheduler.reset_cache()
            self._worker.allocate_cache(wanted)

    def _report(self, scheduled: ScheduledRequest, error: Exception | None) -> RequestOutput:
        request, request_id = scheduled.request, scheduled.request_id
        if error is not None:
            request.error = error
        if request.is_finished:
            self._ids.discard(request_id)
        if isinstance(request, ScoringRequest):
            scores = request.scores if request.is_finished and error is None else None
            return RequestOutput(request_id, (), request.is_finished, (), scores, error)
        new_tokens = tuple(request.new_tokens(scheduled.num_reported))
        scheduled.num_reported += len(new_tokens)
        completions = tuple(request.outputs()) if request.is_finished and error is None else ()
        return RequestOutput(request_id, new_tokens, request.is_finished, completions, None, error)


def cache_tokens_for(sequences: Iterable[tuple[int, int]], max_num_seqs: int | None) -> int:
    """Return the cache that the `max_num_seqs` longest sequences of some requests need at once.

    Args:
        sequences: of each request how many there are, and how long each can become.
        max_num_seqs: how many run at once; `None` for all.
    """
    blocks = sorted(blocks_of(length) for count, length in sequences for _ in range(count))
    return sum(blocks if max_num_seqs is None else blocks[-max_num_seqs:]) * BLOCK_TOKENS


def check_length(prompt_tokens: int, new_tokens: int, limit: int) -> None:
    """Raise `AscendSpeedError` unless prompt and new tokens fit the model."""
    if prompt_tokens == 0:
        raise AscendSpeedError("the prompt has no token and the tokenizer adds none; give a text to continue")
    if prompt_tokens + new_tokens > limit:
        raise AscendSpeedError(
            f"the prompt has {prompt_tokens} tokens; with max_new_tokens={new_tokens} that is more than "
            f"max_position_embeddings={limit} of the model; shorten the prompt or ask for "
            f"{max(limit - prompt_tokens, 0)} tokens"
        )
