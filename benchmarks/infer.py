"""Decoding beside transformers `generate` and beside two limits: reading the weights, and the matrix-vector products.

python benchmarks/infer.py [--sizes small,large] [--dtypes float32,bfloat16] [--threads 2] [--rounds 3]

Weights are random, prompts too; no text ends before its limit. Ours and theirs take turns, and each figure is the best
of `--rounds`, of which `large` runs one after a first that does not count. The limits: `bandwidth` is what a sum over
1 GB reads in a second, `matrix-vector` the products of one token alone, by the operator that decoding uses. `large` is
one text only, and needs about 16 GB of memory in fp32. All of it takes about 7 minutes on two cores.
"""

import argparse
import gc
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ascendspeed_core.build import apply_inference_kernels, load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.packed_weight import pack_weights
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import generate_batch, generate_ids

LARGE = "large"
SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    LARGE: {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
    },
}
"""About 19 million, 134 million and 1.1 billion parameters."""
VOCAB, PROMPT_TOKENS, NEW_TOKENS, BATCH = 32000, 128, 32, 16
Ids = list[int]


def save_model(size: str, dtype: str, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        num_key_value_heads=SIZES[size]["num_attention_heads"] // 4,
        **SIZES[size],
    )
    LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Seconds of each, the best of some rounds in which they take turns."""
    for work in works:
        work()
    measured = [[seconds(work) for work in works] for _ in range(rounds)]
    return [min(times) for times in zip(*measured, strict=True)]


def loaded_ours(folder: Path, dtype: str) -> LLMEngine:
    mesh = ParallelMesh.create(Device("cpu"), Layout())
    model = load_model(open_weights(folder), mesh, getattr(torch, dtype), joined_projections=True).eval()
    pack_weights(model)
    apply_inference_kernels(model, mesh)
    return LLMEngine(model, mesh)


def loaded_theirs(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def bandwidth(rounds: int) -> float:
    """Bytes per second that a sum over 1 GB reads."""
    values = torch.ones(1 << 28)
    (took,) = best(rounds, values.sum)
    return values.nbytes / took


def products(model: Transformer) -> Callable[[], None]:
    """All matrix-vector products of one token, and nothing else."""
    weights = []
    for layer in model.layers.values():
        attention, mlp = layer.attention, layer.mlp
        weights += [attention.projections.weight, mlp.projections.weight]
        weights += [attention.o_proj.weight, mlp.down_proj.weight]
    weights.append(model.output_head.weight)
    inputs = [torch.ones(1, weight.shape[1], dtype=weight.dtype) for weight in weights]

    def run() -> None:
        with torch.no_grad():
            for x, weight in zip(inputs, weights, strict=True):
                F.linear(x, weight)

    return run


def ours_alone(engine: LLMEngine, prompt: Ids, new: int) -> Callable[[], object]:
    return lambda: generate_ids(engine, prompt, GenerationSettings(new))


def theirs_alone(model: Any, prompt: Ids, new: int, **options: Any) -> Callable[[], object]:
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    return lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )


def ours_together(
    engine: LLMEngine, prompts: list[Ids], new: list[int], batch_invariant: bool = False
) -> Callable[[], object]:
    settings = [GenerationSettings(one) for one in new]
    return lambda: generate_batch(engine, prompts, settings, batch_invariant=batch_invariant)


def theirs_together(model: Any, prompts: list[Ids], new: list[int]) -> Callable[[], object]:
    """One padded batch, as long as its longest text."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=max(new), do_sample=False, pad_token_id=0
    )


def row(name: str, value: str, *against: str) -> None:
    print(f"{name:44s} {value:>14s}  {'  '.join(against)}", flush=True)


def measure_alone(engine: LLMEngine, theirs: Any, with_invariant: bool, rounds: int, speed: float) -> None:
    """One text, batch-invariant too if that is wanted."""
    model = engine.model
    prompt = random.Random(0).choices(range(3, VOCAB), k=PROMPT_TOKENS)
    first, their_first = best(rounds, ours_alone(engine, prompt, 1), theirs_alone(theirs, prompt, 1))
    row(f"first token after {PROMPT_TOKENS}", f"{first:.3f} s", f"{their_first / first:.2f} x transformers")
    new = NEW_TOKENS + 1
    whole, their_whole, static, product = best(
        rounds,
        ours_alone(engine, prompt, new),
        theirs_alone(theirs, prompt, new),
        theirs_alone(theirs, prompt, new, cache_implementation="static", disable_compile=True),
        products(model),
    )
    step = (whole - first) / NEW_TOKENS
    read = sum(parameter.nbytes for name, parameter in model.named_parameters() if name != "embedding.weight")
    row(
        "one text, tokens per second",
        f"{1 / step:.2f}",
        f"{(their_whole - their_first) / (whole - first):.2f} x transformers,",
        f"{(static - their_first) / (whole - first):.2f} x with a static cache;",
        f"{read / speed / step:.0%} of the bandwidth limit, {product / step:.0%} of the matrix-vector limit",
    )
    if with_invariant:
        (invariant,) = best(rounds, ours_together(engine, [prompt], [new], True))
        row("  batch-invariant", "", f"whole generation takes {invariant / whole:.2f} x the time")


def measure_together(engine: LLMEngine, theirs: Any, rounds: int) -> None:
    draw = random.Random(1)
    prompts = [draw.choices(range(3, VOCAB), k=draw.randint(8, 2 * PROMPT_TOKENS)) for _ in range(BATCH)]
    for name, new in (
        ("unequal prompts", [NEW_TOKENS] * BATCH),
        ("unequal prompts and answers", [draw.randint(4, 2 * NEW_TOKENS) for _ in range(BATCH)]),
    ):
        whole, invariant, their_whole = best(
            rounds,
            ours_together(engine, prompts, new),
            ours_together(engine, prompts, new, True),
            theirs_together(theirs, prompts, new),
        )
        row(
            f"{BATCH} texts, {name}",
            f"{sum(new) / whole:.1f} tokens/s",
            f"{their_whole / whole:.2f} x transformers",
        )
        row("  batch-invariant", "", f"takes {invariant / whole:.2f} x the time")


def measure(size: str, dtype: str, rounds: int, speed: float) -> None:
    print(f"\n{size}, {dtype}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(size, dtype, folder)
        gc.collect()
        engine = loaded_ours(folder, dtype)
        theirs = loaded_theirs(folder, dtype)
        if size == LARGE:
            measure_alone(engine, theirs, False, rounds, speed)
        else:
            engine.check_batch_invariance()
            measure_alone(engine, theirs, True, rounds, speed)
            measure_together(engine, theirs, rounds)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--sizes", default=f"small,{LARGE}", help=f"some of {', '.join(SIZES)}")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="formats of the weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed = bandwidth(options.rounds)
    print(f"{options.threads} threads, best of {options.rounds}; memory reads {speed / 1e9:.1f} GB/s")
    for size in options.sizes.split(","):
        for dtype in options.dtypes.split(","):
            measure(size, dtype, 1 if size == LARGE else options.rounds, speed)
            gc.collect()
    print(f"\npeak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
