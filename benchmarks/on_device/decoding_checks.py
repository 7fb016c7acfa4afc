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
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings
from ascendspeed_infer.generation import generate_batch, search_beams
from ascendspeed_infer.sampling import SamplingParams
from on_device.plan import SMALL
from on_device.setting import Setting, llama

NEW_TOKENS, TEXTS, LENGTH = 24, 12, 1024
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Round-off of each format after two layers and a head, over the spread of the logits."""

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
    ours = continued(engine_on(ParallelMesh(setting.device, setting.mesh.layout), case), prompts, case)
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
    return {
        "texts": len(prompts),
        "tokens": sum(map(len, ours)),
        "texts that part": len(parted),
        "distance": largest,
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


def drawn_prompts(case: Case) -> list[list[int]]:
    """Return prompts of unequal lengths, with the same beginning if the case has one."""
    draw = random.Random(5)
    common = draw.choices(range(3, case.model.vocab_size), k=case.common)
    return [
        [*common, *draw.choices(range(3, case.model.vocab_size), k=draw.randint(1, case.longest_prompt))]
        for _ in range(TEXTS)
    ]
