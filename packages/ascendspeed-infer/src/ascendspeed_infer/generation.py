"""Run requests on an engine and wait for them: one, several side by side, token by token, or beams.

Each function adds its requests, steps the engine until they are finished, and takes them away again if its caller
stops early. Requests of others on the same engine go on meanwhile.
"""

from collections.abc import Iterator, Sequence

from ascendspeed_core.models.cache import BLOCK_TOKENS, blocks_of
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.llm_engine import LLMEngine, cache_tokens_for, check_length
from ascendspeed_infer.engine.scoring_request import Score, ScoringInput, ScoringRequest
from ascendspeed_infer.engine.sequence import (
    BeamSearchRequest,
    CompletionOutput,
    GenerationSettings,
    Request,
    SamplingRequest,
    StopCheck,
    TokenOutput,
    never_stop,
)

CACHE_GROWTH = 2
"""The cache of a chat is made for conversations this many times as long as the present one, as they get longer."""


def complete_in_order(
    engine: LLMEngine,
    requests: Sequence[Request],
    batch_size: int,
    batch_invariant: bool = False,
    raise_errors: bool = True,
) -> Iterator[Request]:
    """Continue requests side by side and yield each once it and those before it are finished.

    Args:
        engine: runs them.
        requests: new ones; others are computed while one is waited for.
        batch_size: most sequences at once; a beam search counts with its beams.
        batch_invariant: see `LLMEngine.add_request`.
        raise_errors: raise the error of a request; otherwise it is yielded with its `error`.

    Raises:
        AscendSpeedError: a prompt that leaves no room for the new tokens, before anything is computed.
    """
    for one in requests:
        check_length(len(one.prompt_ids), one.max_new_tokens, engine.max_model_len)
    batch_size = max([batch_size, *(one.max_num_seqs for one in requests)])
    sizes = [
        (
            one.max_num_seqs,
            engine.shapes.slot_tokens(len(one.prompt_ids), one.max_new_tokens, batch_invariant),
        )
        for one in requests
    ]
    engine.resize_cache(cache_tokens_for(sizes, batch_size))
    salt = engine.unique_name("batch")
    running: list[tuple[str, Request]] = []
    waiting = list(reversed(requests))
    try:
        for request in requests:
            while not request.is_finished:
                running = [(name, one) for name, one in running if not one.is_finished]
                free = batch_size - sum(one.max_num_seqs for _, one in running)
                while waiting and waiting[-1].max_num_seqs <= free:
                    name = engine.unique_name("request")
                    running.append((name, waiting.pop()))
                    free -= running[-1][1].max_num_seqs
                    engine.add_request(name, running[-1][1], batch_invariant, salt)
                engine.step()
            if request.error is not None and raise_errors:
                raise request.error
            yield request
    finally:
        for name, one in running:
            if not one.is_finished:
                engine.abort_request(name)


def stream_tokens(
    engine: LLMEngine,
    request: Request,
    batch_invariant: bool = False,
    cache_salt: str | None = None,
) -> Iterator[TokenOutput]:
    """Continue one prompt, token by token; under several ranks that call alike all get the same tokens.

    Args:
        engine: runs it.
        request: a new one, of a single sequence.
        batch_invariant: see `LLMEngine.add_request`.
        cache_salt: of earlier requests, as those of a chat, whose prefix need not be read again.

    Raises:
        AscendSpeedError: an empty prompt, or one that leaves no room for the new tokens.
    """
    check_length(len(request.prompt_ids), request.max_new_tokens, engine.max_model_len)
    needed = engine.shapes.slot_tokens(len(request.prompt_ids), request.max_new_tokens, batch_invariant)
    if cache_salt is None:
        engine.resize_cache(needed)
    else:
        # This text beside the one before; when the cache must grow, with some room for later ones.
        needed = blocks_of(needed)
        if engine.num_blocks < 2 * needed:
            needed = min(CACHE_GROWTH * needed, blocks_of(engine.max_model_len))
        engine.resize_cache(2 * needed * BLOCK_TOKENS, only_grow=True)
    name = engine.unique_name("request")
    engine.add_request(name, request, batch_invariant, cache_salt or name)
    num_seen = 0
    try:
        # Whoever else steps the engine brings this request on too, even while its tokens are taken here.
        while (tokens := request.new_tokens(num_seen)) or not request.is_finished:
            for token in tokens:
                num_seen += 1
                yield token
            if not tokens:
                engine.step()
        if request.error is not None:
            raise request.error
    finally:
        # The caller may stop before the end.
        if not request.is_finished:
            engine.abort_request(name)


def score(engine: LLMEngine, inputs: Sequence[ScoringInput]) -> list[Score]:
    """Return the log-likelihood of each continuation, the same bit for bit whatever else is computed.

    One that is not finite is returned as it is.
    """
    request = ScoringRequest(inputs, engine.shapes)
    if not inputs:
        return []
    engine.resize_cache(request.max_tokens)
    name = engine.unique_name("request")
    engine.add_request(name, request, batch_invariant=True)
    try:
        while not request.is_finished:
            engine.step()
    finally:
        if not request.is_finished:
            engine.abort_request(name)
    if request.error is not None:
        raise request.error
    return [request.scores[one] for one in inputs]


def generate_ids(
    engine: LLMEngine,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    stop_check: StopCheck = never_stop,
) -> CompletionOutput:
    """Continue one prompt to its end."""
    return generate_batch(engine, [prompt_ids], [settings], [stop_check])[0]


def generate_batch(
    engine: LLMEngine,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    stop_checks: Sequence[StopCheck] | None = None,
    batch_size: int | None = None,
    batch_invariant: bool = False,
) -> list[CompletionOutput]:
    """Continue several prompts, of any lengths, at most `batch_size` of them in a pass."""
    checks = [never_stop] * len(prompts) if stop_checks is None else stop_checks
    requests = [SamplingRequest(*one) for one in zip(prompts, settings, checks, strict=True)]
    finished = complete_in_order(engine, requests, batch_size or len(requests), batch_invariant)
    return [output for request in finished for output in request.outputs()]


def generate_each(
    engine: LLMEngine,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    stop_checks: Sequence[StopCheck],
    batch_size: int,
    batch_invariant: bool = False,
) -> list[CompletionOutput | AscendSpeedError]:
    """Continue several prompts as `generate_batch` does; an error of one, such as logits that are not finite, ends it
    alone and stands in its place.
    """
    requests = [SamplingRequest(*one) for one in zip(prompts, settings, stop_checks, strict=True)]
    found: list[CompletionOutput | AscendSpeedError] = []
    for one in complete_in_order(engine, requests, batch_size, batch_invariant, raise_errors=False):
        if one.error is not None and not isinstance(one.error, AscendSpeedError):
            raise one.error
        found.append(one.error or one.outputs()[0])
    return found


def search_beams(
    engine: LLMEngine,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    beam_settings: BeamSettings,
    stop_check: StopCheck = never_stop,
    batch_invariant: bool = False,
) -> list[CompletionOutput]:
    """Continue one prompt by beam search.

    Returns:
        `num_return_sequences` texts, the best first; fewer if the rules leave no more.
    """
    request = BeamSearchRequest(prompt_ids, settings, beam_settings, stop_check)
    (finished,) = complete_in_order(engine, [request], request.max_num_seqs, batch_invariant)
    return finished.outputs()
