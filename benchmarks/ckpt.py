"""What converting a checkpoint costs: HF -> AscendSpeed 2023 at tp 4, pp 2 -> HF, beside `cp` and transformers.

Made weights of a LLaMA shape, bf16; with `--experts` of Mixtral's, HF -> Megatron-LM at tp 2, ep 4 -> HF. Every way
runs in a process of its own, from a warm page cache, after the disk has taken what was written before; what it wrote is
removed afterwards. The better of two alternating rounds counts.
`written` is from the first read until the last byte was handed to the system, as `cp` counts; `on disk` adds the flush
that our conversions do before they rename, and `sync` after `cp`. Imports, and the verdict (checksums of input and
output, comparison of every bit), are apart.

    python benchmarks/ckpt.py [LAYERS] [--experts]

20 layers are 8.6 GB; of Mixtral's one is 3.4 GB, two are 6.3 GB; needs three times that on the disk.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights import BaseWeightSource, Index, TensorInfo
from ascendspeed_core.weights.load import parameter_shapes
from support.models import tiny_config
from support.tables import ReportTables

SMALL_LAYERS, LAYERS, MIXTRAL_LAYERS, ROUNDS = 4, 20, 1, 2
MIXTRAL = Experts(count=8, per_token=2, ffn_hidden_size=14336)
CP_HF, CP_THERE, BACK = "cp -r of the HF folder", "cp -r of that folder", "that -> HF (safetensors)"
THERE = {"ascendspeed": "HF -> 2023, tp4 x pp2 (.pt)", "megatron": "HF -> Megatron-LM, tp2 x ep4 (.pt)"}
HEADER = (
    "way", "written", "on disk", "written / cp", "on disk / cp + sync", "GB/s", "anonymous GB", "verdict", "imports",
)  # fmt: skip
LIMIT = "1 GiB + 2 x largest tensor"


def shape(num_layers: int, with_experts: bool) -> ModelConfig:
    """LLaMA 7B, or Mixtral 8x7B, with fewer layers."""
    if with_experts:
        return tiny_config(
            family="mixtral", vocab_size=32000, hidden_size=4096, ffn_hidden_size=14336, num_layers=num_layers,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
            experts=MIXTRAL,
        )  # fmt: skip
    return tiny_config(
        vocab_size=32000, hidden_size=4096, ffn_hidden_size=11008, num_layers=num_layers, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=2048,
    )  # fmt: skip


class MadeWeights(BaseWeightSource):
    """Weights that cost nothing to make: one block of random numbers, everywhere from another start."""

    kind, path = "made", None

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = parameter_shapes(config)
        generator = torch.Generator().manual_seed(0)
        self._block = (torch.randn(1 << 26, generator=generator) * 0.02).bfloat16()

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(shape, torch.bfloat16) for name, shape in self._shapes.items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        sizes = [part.stop - part.start for part in index] or list(self._shapes[name])
        count = 1
        for size in sizes:
            count *= size
        start = (hash(name) + (index[0].start if index else 0) * 4099) % (self._block.numel() - count)
        return self._block[start : start + count].view(sizes)


@contextmanager
def watched_memory(found: dict[str, Any]) -> Iterator[None]:
    """Keep the most anonymous memory of this process."""
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found["anonymous"] = peak[0]


def child_make(target: str, num_layers: str, kind: str) -> dict[str, Any]:
    from ascendspeed_ckpt.writers.huggingface import write_hugging_face

    Path(target).mkdir()
    config = shape(int(num_layers), kind == "megatron")
    write_hugging_face(MadeWeights(config), Path(target), None, 5_000_000_000, workers=2)
    return {}


def child_convert(source: str, target: str, to: str) -> dict[str, Any]:
    began = time.perf_counter()
    from ascendspeed_ckpt import Conversion, convert
    from ascendspeed_ckpt.writers.write_plan import WritePlan
    from ascendspeed_core.weights import open_weights
    from ascendspeed_core.weights.shard_layout import shard_layout

    found: dict[str, Any] = {"imports": time.perf_counter() - began}
    with watched_memory(found):
        began = time.perf_counter()
        opened = open_weights(Path(source))
        opening = time.perf_counter() - began
        write_plan = None
        if to == "ascendspeed":
            write_plan = WritePlan("ascendspeed", shard_layout(opened.config.num_layers, tp=4, pp=2))
        elif to == "megatron":
            write_plan = WritePlan("megatron", shard_layout(opened.config.num_layers, tp=2, ep=4))
        verdict = convert(Conversion(opened, Path(target), to, write_plan=write_plan, verify_logits=False))  # type: ignore[arg-type]
    return found | {
        "written": opening + verdict.seconds - verdict.flush_seconds,
        "on disk": opening + verdict.seconds,
        "verdict": verdict.check_seconds,
    }


def child_transformers(source: str, target: str) -> dict[str, Any]:
    began = time.perf_counter()
    from transformers import AutoModelForCausalLM

    found: dict[str, Any] = {"imports": time.perf_counter() - began}
    with watched_memory(found):
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.save_pretrained(target)
        found["written"] = time.perf_counter() - began
    subprocess.run(["sync"], check=True)
    return found | {"on disk": time.perf_counter() - began}


def child_cp(source: str, target: str) -> dict[str, Any]:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    found = {"written": time.perf_counter() - began}
    subprocess.run(["sync"], check=True)
    return found | {"on disk": time.perf_counter() - began}


CHILDREN = {"make": child_make, "convert": child_convert, "transformers": child_transformers, "cp": child_cp}


def run(name: str, *arguments: object) -> dict[str, Any]:
    """Run one way in a process of its own, after the disk is quiet and the source is in memory."""
    subprocess.run(["sync"], check=True)
    source = Path(str(arguments[0]))
    if source.exists():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(1 << 24):
                        pass
    command = [sys.executable, __file__, "child", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shortest times and the most memory."""
    return {key: (max if key == "anonymous" else min)(found[key] for found in rounds) for key in rounds[0]}


def measure(num_layers: int, kind: str, folder: Path, tables: ReportTables, with_others: bool) -> None:
    config = shape(num_layers, kind == "megatron")
    hf, there, back, copy = (folder / name for name in ("hf", "there", "back", "copy"))
    run("make", hf, num_layers, kind)
    size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    rounds: dict[str, list[dict[str, Any]]] = {}

    def once(way: str, name: str, *arguments: object) -> None:
        rounds.setdefault(way, []).append(run(name, *arguments))
        shutil.rmtree(copy, ignore_errors=True)

    for _ in range(ROUNDS):
        once(CP_HF, "cp", hf, copy)
        once(THERE[kind], "convert", hf, there, kind)
        once(CP_THERE, "cp", there, copy)
        once(BACK, "convert", there, back, "huggingface")
        shutil.rmtree(there)
        shutil.rmtree(back)
        if with_others:
            once("transformers, load and save", "transformers", hf, copy)
    shutil.rmtree(hf)
    ways = {way: best(found) for way, found in rounds.items()}
    beside = {CP_HF: None, CP_THERE: None, BACK: ways[CP_THERE]}
    rows = [(way, found, beside.get(way, ways[CP_HF])) for way, found in ways.items()]
    largest = max(
        2 * rows_ * (shape_[0] if shape_ else 1) for rows_, *shape_ in parameter_shapes(config).values()
    )
    limit = (1 << 30) + 2 * largest
    for name, found, cp in rows:
        tables.add(
            f"{num_layers} layers, {size / 1e9:.1f} GB in bf16; seconds; {LIMIT} = {limit / 1e9:.2f} GB",
            HEADER,
            name,
            *(f"{found[key]:.2f}" for key in ("written", "on disk")),
            *(f"{found[key] / cp[key]:.2f}" if cp else "-" for key in ("written", "on disk")),
            f"{size / 1e9 / found['written']:.2f}",
            *(
                f"{found[key] / scale:.2f}" if key in found else "-"
                for key, scale in (("anonymous", 1e9), ("verdict", 1), ("imports", 1))
            ),
        )  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
        return
    kind = "megatron" if "--experts" in sys.argv else "ascendspeed"
    given = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    num_layers = given[0] if given else MIXTRAL_LAYERS if kind == "megatron" else LAYERS
    tables = ReportTables()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-ckpt-") as folder:
        for layers in (num_layers,) if kind == "megatron" else (SMALL_LAYERS, num_layers):
            measure(layers, kind, Path(folder), tables, with_others=layers == num_layers)
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
