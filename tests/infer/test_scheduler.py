"""What each pass runs, decided without a model: budgets, order, prefixes, and slots that come back."""

import torch

from ascendspeed_core.models.cache import BLOCK_TOKENS, KeyValueCache, LayerCache
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.scheduled_request import ScheduledRequest
from ascendspeed_infer.engine.scheduler import Scheduler, SchedulerOutput
from ascendspeed_infer.engine.sequence import BeamSearchRequest, GenerationSettings, Request, SamplingRequest

VOCAB = 12


def make_scheduler(blocks: int, prefill_tokens: int = 100) -> tuple[Scheduler, KeyValueCache]:
    layers = [LayerCache(((1, 2), (1, 2)))]
    cache = KeyValueCache(layers, blocks * BLOCK_TOKENS, torch.float32, torch.device("cpu"))
    return Scheduler(cache, PassShapes(), prefill_tokens_per_step=prefill_tokens), cache


def add(scheduler: Scheduler, name: str, request: Request, salt: str | None = None) -> None:
    scheduler.add(ScheduledRequest(name, request, cache_salt=salt))


def ran(output: SchedulerOutput | None) -> list[tuple[int, int, int]]:
    """Start, length and wanted logits of each chunk."""
    assert output is not None
    return [(one.chunk.start, one.chunk.count, one.num_logits) for one in output.chunks]


def step(scheduler: Scheduler, likeliest: int = 5) -> list[tuple[int, int, int]]:
    """Run a step of a model that always finds the same token likeliest."""
    output = scheduler.schedule()
    found = ran(output)
    assert output is not None
    row = torch.nn.functional.one_hot(torch.tensor([likeliest]), VOCAB).float()
    scheduler.update(output, [row.expand(one.num_logits, -1) for one in output.chunks])
    return found


def sampled(prompt: list[int], new: int) -> SamplingRequest:
    return SamplingRequest(prompt, GenerationSettings(new))


def test_prompts_share_a_budget_and_decoding_goes_on() -> None:
    scheduler, cache = make_scheduler(20, prefill_tokens=10)
    first = sampled([3] * 4, 6)
    add(scheduler, "first", first)
    assert step(scheduler) == [(0, 4, 1)]
    add(scheduler, "second", sampled([4] * 8, 2))
    add(scheduler, "third", sampled([6] * 7, 2))
    assert step(scheduler) == [(4, 1, 1), (0, 8, 1), (0, 2, 0)]
    assert step(scheduler) == [(5, 1, 1), (8, 1, 1), (2, 5, 1)]
    while scheduler.running:
        step(scheduler)
    assert first.new_ids == [5] * 6
    scheduler.clear_prefix_cache()
    assert cache.free_blocks == cache.num_blocks


def test_only_requests_of_one_salt_share_a_prefix() -> None:
    scheduler, _ = make_scheduler(20)
    prompt = list(range(3, 11)) * 4
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        add(scheduler, name, sampled(prompt, 1), salt)
        step(scheduler)
    assert scheduler.reused_tokens == len(prompt) - 1


def test_beams_take_slots_of_their_own_and_give_them_back() -> None:
    scheduler, cache = make_scheduler(6)
    add(scheduler, "beams", BeamSearchRequest([3] * 20, GenerationSettings(6), BeamSettings(3)))
    assert step(scheduler) == [(0, 20, 1)]
    assert cache.free_blocks == 0
    assert step(scheduler) == [(20, 1, 1)] * 3
    assert scheduler.abort("beams")
    assert not scheduler.abort("beams")
    assert cache.free_blocks == 6


def test_a_request_that_waits_is_aborted_without_a_slot() -> None:
    scheduler, cache = make_scheduler(2)
    add(scheduler, "running", sampled([3] * 20, 8))
    add(scheduler, "waiting", sampled([4] * 20, 8))
    step(scheduler)
    assert [one.request_id for one in scheduler.waiting] == ["waiting"]
    assert scheduler.abort("waiting")
    assert (scheduler.waiting, cache.free_blocks) == ([], 0)
