"""Benchmarks against lm-evaluation-harness: MMLU, BoolQ and GSM8K on one made model, and the same scores.

The model has LLaMA's tokenizer, 4,096 positions and random weights. Both sides get the same prompts and the same ids;
both sides run at the best of several batch sizes. Needs the benchmark files and tokenizer in the
folder that ASCENDSPEED_SHARED_DATA names, and lm_eval==0.4.13.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_eval.evaluation import prepare_evaluation
from ascendspeed_eval.model import GenerateRequest, LoglikelihoodRequest
from ascendspeed_eval.tasks.registry import find_task, find_variant
from ascendspeed_infer.config import ScoringConfig
from ascendspeed_infer.eval_backend import ServedModel
from ascendspeed_infer.language_model import LanguageModel
from support.lm_eval_tasks import harness_model
from support.models import save_hugging_face, tiny_config
from support.shared_data import BENCHMARK_FOLDERS, SHARED_DATA, TOKENIZERS

OUR_BATCH_SIZES = (8, 24)
BATCH_SIZES = (1, 4, 16, 24)
SIZES = {
    "hidden_size": 256,
    "ffn_hidden_size": 688,
    "num_layers": 6,
    "num_attention_heads": 8,
    "head_dim": 32,
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def requests_of(name: str, subsets: tuple[str, ...], limit: int) -> tuple[list[Any], Any]:
    """Our requests of a task, in the harness's protocol."""
    task = find_task(name)
    variant = find_variant(task, "lm-eval")
    evaluation = prepare_evaluation(task, variant, str(BENCHMARK_FOLDERS[name]), subsets=subsets, limit=limit)
    if variant.choices is None:
        return [
            GenerateRequest(s.prompt, variant.max_new_tokens, variant.stop) for s in evaluation.samples
        ], evaluation
    return [
        LoglikelihoodRequest(s.prompt, choice, s.shared_characters)
        for s in evaluation.samples
        for choice in variant.choices(s.record)
    ], evaluation


def harness_instances(requests: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    if isinstance(requests[0], GenerateRequest):
        return [
            Instance(
                request_type="generate_until",
                doc={},
                idx=0,
                arguments=(
                    r.prompt,
                    {"until": list(r.stop), "max_gen_toks": r.max_new_tokens, "do_sample": False},
                ),
            )
            for r in requests
        ]
    return [
        Instance(request_type="loglikelihood", doc={}, idx=0, arguments=(r.context, r.continuation))
        for r in requests
    ]


def compare(name: str, folder: Path, subsets: tuple[str, ...], limit: int) -> None:
    requests, evaluation = requests_of(name, subsets, limit)
    generates = isinstance(requests[0], GenerateRequest)
    model = LanguageModel.from_pretrained(folder, device="cpu")
    seconds, mine, own_batch = float("inf"), [], 0
    for size in OUR_BATCH_SIZES:
        ours = ServedModel(model, "made", "", ScoringConfig(micro_batch_size=size))
        call = ours.generate if generates else ours.loglikelihood
        call(requests[:4])
        took, answers = timed(lambda call=call: call(requests))
        print(f"  {name}: ours, batch {size}: {took:.1f} s", file=sys.stderr, flush=True)
        if took < seconds:
            seconds, mine, own_batch = took, answers, size
    best, theirs, batch = float("inf"), None, 0
    for size in BATCH_SIZES:
        harness = harness_model(folder, size)
        ask = harness.generate_until if generates else harness.loglikelihood
        ask(harness_instances(requests[:4]))
        harness = harness_model(folder, size)
        ask = harness.generate_until if generates else harness.loglikelihood
        took, answer = timed(lambda ask=ask: ask(harness_instances(requests)))
        print(f"  {name}: harness, batch {size}: {took:.1f} s", file=sys.stderr, flush=True)
        if took < best:
            best, theirs, batch = took, answer, size
    assert theirs is not None
    if generates:
        # Its decoding of new ids alone drops the space that begins a text.
        same = sum(a.text.strip() == b.strip() for a, b in zip(mine, theirs, strict=True))
        agreement = f"{same} of {len(mine)} texts equal"
    else:
        width = len(requests) // len(evaluation.samples)
        difference = max(abs(a.logprob - b[0]) for a, b in zip(mine, theirs, strict=True))
        chosen = [_choices([a.logprob for a in mine], width), _choices([b[0] for b in theirs], width)]
        same = sum(a == b for a, b in zip(*chosen, strict=True))
        agreement = f"{same} of {len(chosen[0])} choices equal, log-likelihoods within {difference:.1e}"
    samples = len(evaluation.samples)
    print(
        f"| {name} | {samples} | {samples / seconds:.2f} (batch {own_batch}) | {samples / best:.2f} (batch {batch}) | "
        f"{best / seconds:.2f} | {agreement} |",
        flush=True,
    )


def _choices(values: list[float], width: int) -> list[int]:
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    return [row.index(max(row)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=24, help="samples of each subset")
    parser.add_argument("--tasks", nargs="+", default=["mmlu", "boolq", "gsm8k"])
    options = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"{SHARED_DATA} is not there; name it with ASCENDSPEED_SHARED_DATA")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, model {SIZES}, fp32\n")
    print("| task | samples | ours, samples/s | lm-eval 0.4.13, samples/s | ratio | agreement |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        config = tiny_config(vocab_size=32000, max_position_embeddings=4096, num_key_value_heads=8, **SIZES)
        save_hugging_face(config, Path(scratch), tokenizer=TOKENIZERS / "llama")
        subsets = {"mmlu": ("anatomy", "high_school_geography", "philosophy")}
        for name in options.tasks:
            compare(name, Path(scratch), subsets.get(name, ()), options.limit)


if __name__ == "__main__":
    main()
