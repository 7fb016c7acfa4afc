"""Texts that the engine continues on the device, against those that it continues on the host.

Greedy ids may part where two tokens are nearly equal. So a text that parts is continued on the host along the
device's ids: each of them must be within the tolerance of the likeliest token there, in units of the logits' spread.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ascendspeed_core.build import apply_inference_kernels, load_model
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import HOST
from ascendspeed_core.models.cache import SequenceChunk
from ascendspeed_core.models.inference_weight import InferenceWeight
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.model_runner import ModelRunner, ScheduledChunk
from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings
from ascendspeed_infer.generation import generate_batch, search_beams
from ascendspeed_infer.sampling import SamplingParams
from on_device.plan import SMALL
from on_device.setting import Setting, llama, relative_error

NEW_TOKENS, TEXTS, LENGTH = 24, 12, 1024
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Of an id's distance: the largest error of this model's logits in each format against float64, over their spread. An
id that has nothing to do with the text is 2 to 3 away."""

LOGITS = {"float32": 1e-4, "bfloat16": 6e-2, "int8": 6e-2}
"""Of all logits of a text, read through the cache, against float64: twice the error of the host's own."""

PLAIN = llama(SMALL, length=LENGTH, initializer_range=0.3)


@dataclass(frozen=True)
class Case:
    """What is continued, and how."""

    model: ModelConfig = PLAIN
    dtype: str = "float32"
    longest_prompt: int = 60
    common: int = 0
    quantization: str = "none"
    batch_invariant: bool = False
    beams: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)


def cases() -> dict[str, Case]:
    """Return the cases of `plan.DECODING_CASES`."""
    alibi = PLAIN.model_copy(
        update={
            "family": "bloom", "position": "alibi", "norm": "layernorm", "mlp": "gelu", "num_key_value_heads": 4,
            "qkv_bias": True, "output_bias": True, "mlp_bias": True, "embedding_norm": True, "ffn_hidden_size": 256,
        }
    )  # fmt: skip
    return {
        "llama float32": Case(),
        "llama bfloat16": Case(dtype="bfloat16"),
        "window float32": Case(PLAIN.model_copy(update={"family": "mistral", "sliding_window": 17})),
        "ALiBi float32": Case(alibi),
        "long prompts in chunks bfloat16": Case(dtype="bfloat16", longest_prompt=900),
        "shared prefixes bfloat16": Case(dtype="bfloat16", common=40),
        "batch-invariant float32": Case(batch_invariant=True),
        "int8 bfloat16": Case(dtype="bfloat16", quantization="int8"),
        "beams float32": Case(beams=3),
        "drawn tokens float32": Case(
            sampling=SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
        ),
    }


def check(setting: Setting, name: str) -> dict[str, Any]:
    """Continue texts on both and compare ids."""
    case = cases()[name]
    prompts = drawn_prompts(case)
    engine = engine_on(ParallelMesh(setting.device, setting.mesh.layout), case)
    ours = continued(engine, prompts, case)
    host = engine_on(ParallelMesh(HOST, setting.mesh.layout), case)
    theirs = continued(host, prompts, case)
    parted = [number for number in range(len(prompts)) if ours[number] != theirs[number]]
    largest = 0.0
    for number in parted:
        if case.beams > 1 or case.sampling.do_sample:
            raise AssertionError(f"text {number}: {ours[number]} and {theirs[number]}")
        largest = max(largest, distance_from_greedy(host, prompts[number], ours[number]))
    if not largest <= TOLERANCE[case.dtype]:
        raise AssertionError(
            f"an id lies {largest:.2e} below the likeliest, more than {TOLERANCE[case.dtype]:.0e}"
        )
    name_of_limit = case.quantization if case.quantization in LOGITS else case.dtype
    logits = logits_error(engine, host, [*prompts[0], *ours[0]])
    if not logits <= LOGITS[name_of_limit]:
        raise AssertionError(f"logits are off by {logits:.2e}, more than {LOGITS[name_of_limit]:.0e}")
    return {
        "texts": len(prompts),
        "tokens": sum(map(len, ours)),
        "texts that part": len(parted),
        "distance": largest,
        "logits": logits,
    }


def engine_on(mesh: ParallelMesh, case: Case) -> LLMEngine:
    """Return an engine with the same weights on any device."""
    model = load_model(
        InitialWeights(case.model, 2),
        mesh,
        getattr(torch, case.dtype),
        True,
        weight_quantization=case.quantization,
    ).eval()
    apply_inference_kernels(model, mesh)
    return LLMEngine(model, mesh)


def continued(engine: LLMEngine, prompts: Sequence[Sequence[int]], case: Case) -> list[tuple[int, ...]]:
    """Return the ids that follow each prompt."""
    settings = GenerationSettings(NEW_TOKENS, case.sampling)
    if case.beams > 1:
        found: list[CompletionOutput] = []
        for prompt in prompts:
            found += search_beams(engine, prompt, settings, BeamSettings(case.beams))
    else:
        found = generate_batch(
            engine, prompts, [settings] * len(prompts), batch_size=8, batch_invariant=case.batch_invariant
        )
    return [one.token_ids for one in found]


def distance_from_greedy(host: LLMEngine, prompt: Sequence[int], ids: Sequence[int]) -> float:
    """Return by how much any id falls short of the likeliest on the host, over the spread of the logits there."""
    logits = host.forward([*prompt, *ids])[len(prompt) - 1 : -1].float()
    chosen = logits.gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def logits_error(engine: LLMEngine, host: LLMEngine, ids: Sequence[int]) -> float:
    """Return the relative error of a text's logits, read in two chunks through the cache, against the host's.

    The host computes in float64 with the same rounded weights, unless they are integers.
    """
    runner = ModelRunner(engine.model, engine.mesh, len(ids))
    slot, half = runner.cache.reserve(len(ids)), len(ids) // 2
    chunks = [(0, ids[:half]), (half, ids[half:])]
    ours = [
        runner.run([ScheduledChunk(SequenceChunk(slot, start, len(some)), some, len(some))])[0]
        for start, some in chunks
    ]
    wide = host
    if not any(isinstance(one, InferenceWeight) for one in host.model.parameters()):
        model = load_model(InitialWeights(host.model.config, 2), host.mesh, torch.float64).eval()
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), host.model.parameters(), strict=True):
                mine.copy_(theirs)
        wide = LLMEngine(model, host.mesh)
    return relative_error(torch.cat(ours), wide.forward(ids))


def drawn_prompts(case: Case) -> list[list[int]]:
    """Return prompts of unequal lengths, with the same beginning if the case has one."""
    draw = random.Random(5)
    common = draw.choices(range(3, case.model.vocab_size), k=case.common)
    return [
        [*common, *draw.choices(range(3, case.model.vocab_size), k=draw.randint(1, case.longest_prompt))]
        for _ in range(TEXTS)
    ]
