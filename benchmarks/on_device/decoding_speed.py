"""Greedy decoding of a LLaMA shape in bfloat16, against the time in which its bytes can be read.

Each token reads every weight but the embedding once, for all texts together, and the keys and values of each text. The
limit is that many bytes over the rate of a large copy.
"""

import random
import time
from typing import Any

import torch

from ascendspeed_core.build import apply_inference_kernels
from ascendspeed_infer.engine.llm_engine import LLMEngine, cache_tokens_for
from ascendspeed_infer.engine.sequence import GenerationSettings, SamplingRequest
from ascendspeed_infer.generation import generate_batch
from on_device.limits import bandwidth
from on_device.setting import Setting, drawn_model, llama

PROMPT_TOKENS, NEW_TOKENS = 512, 32


def measure(setting: Setting, name: str, texts: int) -> dict[str, Any]:
    """Time the passes that give one more token to each text; prompts are read before the clock starts."""
    shape = setting.shape(name)
    prompt, new = (16, 8) if setting.is_small else (PROMPT_TOKENS, NEW_TOKENS)
    speed = bandwidth(setting)["copy GB/s"] * 1e9
    setting.free()
    config = llama(shape, length=prompt + new + 1)
    model = drawn_model(config, setting.mesh, torch.bfloat16, joined_projections=True).eval()
    apply_inference_kernels(model, setting.mesh)
    # All texts are read at once, so that all of them are continued together.
    engine = LLMEngine(
        model, setting.mesh, enable_prefix_caching=False, prefill_tokens_per_step=texts * prompt
    )
    weights = sum(one.nbytes for key, one in model.named_parameters() if key != "embedding.weight")
    kept = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * 2
    read = weights + texts * (prompt + new / 2) * kept
    draw = random.Random(0)
    prompts = [draw.choices(range(3, config.vocab_size), k=prompt) for _ in range(texts)]
    passes = decode_passes(setting, engine, prompts, new)
    first, second = decode_passes(setting, engine, prompts, new), decode_passes(setting, engine, prompts, new)
    # The best of all: what disturbs a pass only ever adds to it.
    step = min(*passes, *first, *second)
    middle = sorted(second)[len(second) // 2]
    figures: dict[str, Any] = {
        "ms/token": 1e3 * middle, "best ms/token": 1e3 * step, "tokens/s": texts / middle,
        "GB/token": read / 1e9, "limit ms/token": 1e3 * read / speed, "of the bandwidth": read / middle / speed,
        "GB": setting.device.peak_memory_bytes() / 1e9,
    }  # fmt: skip
    if setting.with_profile:
        figures["profile"] = setting.busy(lambda: generate(engine, prompts, 9), 18)
    return figures


def generate(engine: LLMEngine, prompts: list[list[int]], new: int) -> None:
    generate_batch(engine, prompts, [GenerationSettings(new)] * len(prompts))


def decode_passes(setting: Setting, engine: LLMEngine, prompts: list[list[int]], new: int) -> list[float]:
    """Return the seconds of each step in which all texts got one more token."""
    engine.resize_cache(cache_tokens_for([(1, len(one) + new) for one in prompts], len(prompts)))
    requests = [SamplingRequest(one, GenerationSettings(new)) for one in prompts]
    for request in requests:
        engine.add_request(engine.unique_name("timed"), request)
    seconds = []
    while engine.has_unfinished_requests():
        is_decode = all(request.new_ids and not request.is_finished for request in requests)
        setting.device.synchronize()
        started = time.perf_counter()
        engine.step()
        setting.device.synchronize()
        if is_decode and engine.has_unfinished_requests():
            seconds.append(time.perf_counter() - started)
    return seconds
