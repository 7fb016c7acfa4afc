"""How far `asd-core plan` is from published training rates, from steps measured here, and from counted memory.

    python benchmarks/planner.py [published] [measured PROFILE-OF-1 PROFILE-OF-2] [search PROFILE-OF-2]

`published` needs nothing; the others need profiles of this machine with one and with two processes at once, made with
`asd-core profile-device --nproc-per-node N --output PROFILE-OF-N`.
"""

import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, inf, log
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.planner.hardware import HardwareProfile, load_profile
from ascendspeed_core.planner.question import read_model
from ascendspeed_core.planner.search import Plan, Question, make_plans, search
from ascendspeed_core.planner.step_time import StepTimer
from ascendspeed_core.planner.workload import Workload
from support.models import tiny_config
from support.tables import ReportTables

PUBLISHED = Path(__file__).parent / "published_rates.toml"
MPT = {
    "760m": (1536, 12, 24), "1b": (2048, 16, 24), "3b": (2560, 20, 32), "7b": (4096, 32, 32), "13b": (5120, 40, 40),
    "30b": (7168, 56, 48), "70b": (8192, 64, 80),
}  # fmt: skip
"""Width, heads, layers of MPT (llm-foundry, scripts/train/yamls)."""
GPT = {"22b": (6144, 64, 48), "175b": (12288, 96, 96), "530b": (20480, 128, 105), "1t": (25600, 160, 128)}
"""The same of the models of Korthikanti et al., 2022, table 3."""
MEGATRON = {
    "1.7b": (2048, 16, 24), "7.1b": (4096, 32, 30), "16b": (6144, 48, 32), "32b": (7168, 56, 48),
    "70b": (8192, 64, 84), "119b": (10240, 80, 92), "177b": (12288, 96, 96), "314b": (16384, 128, 96),
    "462b": (18432, 144, 112),
}  # fmt: skip
"""The same of Megatron-LM's model table; their sizes are right with a head of its own."""
NOT_STATED = ("ascend-910a", "ascend-910b2", "ascend-910b3")
"""Profiles beside rates whose devices, or whose grade, the source does not state."""
SHARES = tuple(share / 100 for share in range(30, 100, 1))
ERRORS = "Published rates: errors without the rows of the same model"
ERROR_COLUMNS = ("device", "rows", "share fitted to all", "median error", "90 % below", "worst")


@dataclass(frozen=True)
class Row:
    """A published rate with its settings; with several where the source leaves one out."""

    source: str
    device: str
    name: str
    tokens_per_second: float
    question: Question
    layouts: Sequence[Layout]
    micro_batches: Sequence[int]
    modes: Sequence[Mode]
    attention: float | None
    is_device_stated: bool

    @property
    def is_open(self) -> bool:
        """The source leaves a setting out."""
        return len(self.layouts) * len(self.micro_batches) * len(self.modes) > 1

    @cached_property
    def choice(self) -> tuple[Layout, int, Mode]:
        """The settings; of those that are left out the fastest that fit, by the device's profile."""
        if not self.is_open:
            return self.layouts[0], self.micro_batches[0], self.modes[0]
        plans = [
            plan
            for layout in self.layouts
            for micro_batch in self.micro_batches
            for plan in make_plans(self.question, layout, micro_batch, self.modes, walk=False)
        ]
        best = max((plan for plan in plans if plan.fits), key=lambda plan: plan.tokens_per_second)
        return best.layout, best.micro_batch, best.recompute

    @property
    def setting(self) -> str:
        layout, micro_batch, mode = self.choice
        return f"{layout}, {self.question.seq_length}, {micro_batch}, {mode}"

    def predicted(self, profile: HardwareProfile) -> float:
        """Tokens per second of a device."""
        if self.attention is not None:
            attention = profile.shares.attention.model_copy(update={"value": self.attention})
            profile = profile.model_copy(
                update={"shares": profile.shares.model_copy(update={"attention": attention})}
            )
        layout, micro_batch, mode = self.choice
        question = Question(**{**vars(self.question), "profile": profile})
        return make_plans(question, layout, micro_batch, [mode])[0].tokens_per_second


def gpt_like(
    width: int, heads: int, layers: int, vocabulary: int, length: int, is_tied: bool = True
) -> ModelConfig:
    return tiny_config(
        family="bloom", vocab_size=vocabulary, hidden_size=width, ffn_hidden_size=4 * width, num_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, max_position_embeddings=length,
        norm="layernorm", mlp="gelu", position="alibi", tie_word_embeddings=is_tied,
    )  # fmt: skip


def model_of(name: str, length: int) -> ModelConfig:
    kind, _, size = name.partition("-")
    if kind == "mpt":
        return gpt_like(*MPT[size], 50368, length)
    if kind == "gpt":
        return gpt_like(*GPT[size], 51200, length)
    if kind == "megatron":
        return gpt_like(*MEGATRON[size], 131072, length, is_tied=False)
    if name == "kempner-13b":  # mfu_bench.sh; its 14.84 billion parameters tell the width of the MLP
        return read_model("llama3.1-8b")[0].model_copy(
            update={
                "hidden_size": 5120,
                "num_layers": 40,
                "num_attention_heads": 40,
                "ffn_hidden_size": 17920,
            }
        )
    return read_model(name)[0]


def read_profile(name: str, devices: dict[str, dict[str, Any]]) -> HardwareProfile:
    """The profile of a row's device: one that comes along, or one of the file's after one that comes along."""
    if name not in devices:
        return load_profile(name)
    own = devices[name]
    values = load_profile(own["profile"]).model_dump()
    for part, key in (
        ("memory", "gb_per_second"), ("memory", "gib"), ("machine", "devices_per_node"),
    ):  # fmt: skip
        given = own.get(f"{part}_{key}", own.get(key))
        if given is not None:
            values[part][key] = {"value": given, "kind": "published", "source": PUBLISHED.name}
    return HardwareProfile(**{**values, "name": name, "title": own["title"]})


def layouts_of(row: dict[str, Any], model: ModelConfig) -> list[Layout]:
    tp, pp = row.get("tp", 1), row.get("pp", 1)
    dp, stages = row["devices"] // (tp * pp), row.get("stages", 1)
    of_a_rank = model.num_layers // pp
    choices = [n for n in range(1, of_a_rank + 1) if of_a_rank % n == 0] if stages == "any" else [stages]
    return [
        Layout(
            tp=tp, pp=pp, dp=dp, sequence_parallel=row.get("sp", False), zero_stage=row.get("zero") if dp > 1 else None,
            sharded_optimizer=row.get("sharded", False) and dp > 1,
            schedule="interleaved" if count > 1 else "1f1b",
            layers_per_stage=of_a_rank // count if count > 1 else None,
            overlap_grad_reduce=row.get("overlap", True), overlap_param_gather=row.get("overlap", True),
        )
        for count in choices
    ]  # fmt: skip


def read_rows() -> list[Row]:
    content = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))
    found = []
    for row in ({**table, **row} for table in content["table"] for row in table["rows"]):
        model = model_of(row["model"], row["seq_length"])
        question = Question(
            model, read_profile(row["device"], content["device"]), row["devices"], row["seq_length"],
            row["global_batch"], row["dtype"], is_fused=row.get("fused", True),
        )  # fmt: skip
        micro_batches, modes = (
            value if isinstance(value, list) else [value] for value in (row["micro_batch"], row["recompute"])
        )
        found.append(
            Row(row["source"], row["device"], row["model"], row["tokens_per_second"], question,
                layouts_of(row, model), micro_batches, modes, row.get("attention"),
                content["device"].get(row["device"], {}).get("is_stated", True))
        )  # fmt: skip
    return found


def calibrated(profile: HardwareProfile, share: float) -> HardwareProfile:
    """The profile with one number changed: what share of the data sheet products reach."""
    products = profile.shares.products.model_copy(update={"value": share})
    return profile.model_copy(update={"shares": profile.shares.model_copy(update={"products": products})})


def errors_by_share(rows: Sequence[Row], profile: HardwareProfile) -> list[list[float]]:
    """Logarithm of predicted over published, for each share and row."""
    return [
        [log(row.predicted(calibrated(profile, s)) / row.tokens_per_second) for row in rows] for s in SHARES
    ]


def best_share(table: list[list[float]], use: Sequence[int]) -> int:
    """Number of the share whose error has the median nearest to none."""
    return min(range(len(SHARES)), key=lambda s: abs(median(table[s][row] for row in use)))


def add_errors(report: ReportTables, title: str, share: str, errors: Sequence[float]) -> None:
    sizes = sorted(map(abs, errors))
    report.add(
        ERRORS, ERROR_COLUMNS, title, len(sizes), share, f"{median(sizes):.1%}",
        f"{sizes[int(0.9 * len(sizes))]:.1%}", f"{sizes[-1]:.1%}",
    )  # fmt: skip


def published(report: ReportTables) -> None:
    """Each row beside what its device's profile says, with a share that no row of the same model was fitted to."""
    rows = read_rows()
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device]
        profile = mine[0].question.profile
        table = errors_by_share(mine, profile)
        stated = [number for number, row in enumerate(mine) if not row.is_open]
        fitted = f"{SHARES[best_share(table, stated)]:.2f}"
        is_stated = mine[0].is_device_stated
        errors: dict[str, dict[str, list[float]]] = {"": {}, ", settings partly not stated": {}}
        for number, row in enumerate(mine):
            others = [other for other in stated if mine[other].name != row.name]
            share = best_share(table, others)
            error = exp(table[share][number]) - 1
            kind = ", settings partly not stated" if row.is_open else ""
            errors[kind].setdefault(row.source, []).append(error)
            report.add(
                f"Published rates: {profile.title}{kind}",
                ("source", "model", "layout, length, micro-batch, recompute", "share of products", "predicted",
                 "published", "error", *(() if is_stated else NOT_STATED)),
                row.source, row.name, row.setting, f"{SHARES[share]:.2f}",
                f"{row.tokens_per_second * (1 + error):,.0f}", f"{row.tokens_per_second:,.0f}", f"{error:+.1%}",
                *(() if is_stated else of_profiles(row)),
            )  # fmt: skip
        for kind, by_source in errors.items():
            if by_source:
                add_errors(
                    report, profile.title + kind, fitted, [one for some in by_source.values() for one in some]
                )
            for source, some in by_source.items():
                report.add(
                    "Published rates: errors by source",
                    ("source", "device", "rows", "median of predicted over published", "median error", "worst"),
                    source, profile.title, len(some), f"{median(some):+.1%}", f"{median(map(abs, some)):.1%}",
                    f"{max(map(abs, some)):.1%}",
                )  # fmt: skip


def of_profiles(row: Row) -> Iterator[str]:
    """What several profiles say of a row, as they come."""
    for name in NOT_STATED:
        profile = load_profile(name)
        if row.question.dtype not in profile.peak_tflops:
            yield "no bfloat16"
            continue
        predicted = row.predicted(profile)
        yield f"{predicted:,.0f} ({predicted / row.tokens_per_second - 1:+.0%})"


def llama_like(width: int, layers: int, vocabulary: int = 2048) -> ModelConfig:
    return tiny_config(
        hidden_size=width, ffn_hidden_size=width * 8 // 3 // 16 * 16, num_layers=layers, vocab_size=vocabulary,
        num_attention_heads=width // 64, num_key_value_heads=max(width // 128, 1), head_dim=64,
        max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip


SMALL, MIDDLE, WIDE = llama_like(256, 4), llama_like(512, 4), llama_like(768, 2, 4096)
STEPS: list[tuple[ModelConfig, Layout, str, int, int, int, Mode]] = [
    (SMALL, Layout(), "float32", 1, 1, 256, "none"),
    (SMALL, Layout(), "float32", 4, 1, 512, "none"),
    (SMALL, Layout(), "float32", 2, 2, 256, "full"),
    (SMALL, Layout(), "bfloat16", 2, 2, 256, "none"),
    (MIDDLE, Layout(), "float32", 1, 1, 512, "none"),
    (MIDDLE, Layout(), "float32", 1, 2, 256, "full"),
    (MIDDLE, Layout(), "float32", 2, 1, 256, "selective"),
    (MIDDLE, Layout(), "bfloat16", 2, 1, 256, "none"),
    (MIDDLE, Layout(), "bfloat16", 1, 2, 256, "full"),
    (WIDE, Layout(), "float32", 1, 1, 256, "none"),
    (WIDE, Layout(), "bfloat16", 1, 1, 512, "none"),
    (SMALL, Layout(tp=2), "float32", 2, 1, 512, "none"),
    (MIDDLE, Layout(tp=2), "float32", 1, 2, 256, "full"),
    (MIDDLE, Layout(tp=2, sequence_parallel=True), "float32", 2, 1, 256, "none"),
    (MIDDLE, Layout(tp=2, sequence_parallel=True), "bfloat16", 2, 1, 256, "none"),
    (MIDDLE, Layout(pp=2), "float32", 1, 4, 256, "none"),
    (SMALL, Layout(pp=2), "float32", 2, 4, 256, "full"),
    (SMALL, Layout(pp=2, schedule="interleaved", layers_per_stage=1), "float32", 2, 4, 256, "none"),
    (MIDDLE, Layout(dp=2), "float32", 1, 1, 512, "none"),
    (MIDDLE, Layout(dp=2, sharded_optimizer=True), "float32", 1, 1, 512, "none"),
    (MIDDLE, Layout(dp=2, sharded_optimizer=True), "bfloat16", 1, 1, 512, "none"),
    (SMALL, Layout(cp=2), "float32", 2, 1, 512, "none"),
    (WIDE, Layout(tp=2), "float32", 1, 1, 512, "none"),
]
"""Models, layouts, formats, rows and number of micro-batches, lengths, recompute: all on at most two processes."""
REPEATS, ROUNDS = 4, 3


def measured(report: ReportTables, profiles: Sequence[HardwareProfile]) -> None:
    """Steps measured here beside what a profile of as many processes says; the least of repeats in several rounds."""
    from core.plan_steps import least_step_seconds
    from support.processes import WorkerPool

    workers, errors, of_processor = WorkerPool(), [], []
    by_size = {profile.devices_per_node: profile for profile in profiles}
    least: dict[int, tuple[float, float]] = {}
    for number in [*range(len(STEPS))] * ROUNDS:
        config, layout, dtype, rows, count, length, mode = STEPS[number]
        found = workers.run(
            least_step_seconds, layout.world_size, config, layout, dtype, rows, count, length, mode, REPEATS
        )
        print(layout, dtype, rows, count, length, mode, found, file=sys.stderr, flush=True)
        before = least.get(number, (inf, inf))
        least[number] = (
            min(before[0], max(one for one, _ in found)), min(before[1], max(one for _, one in found))
        )  # fmt: skip
    for number, (config, layout, dtype, rows, count, length, mode) in enumerate(STEPS):
        clock, processor = least[number]
        profile = by_size[layout.world_size]
        timer = StepTimer(Workload(config, layout, rows, length, dtype), profile)
        seconds = timer.step(count, mode)
        working = seconds.total - seconds.bubble
        errors.append(abs(seconds.total / clock - 1))
        of_processor.append(abs(working / processor - 1))
        report.add(
            "Steps measured on this machine, and predicted with its profile",
            ("model", "layout", "format", "rows x count x length", "recompute", "predicted ms", "clock ms", "error",
             "without bubble ms", "processor ms", "error "),
            f"{config.hidden_size} x {config.num_layers}", str(layout), dtype, f"{rows} x {count} x {length}", mode,
            f"{seconds.total * 1e3:.1f}", f"{clock * 1e3:.1f}", f"{seconds.total / clock - 1:+.1%}",
            f"{working * 1e3:.1f}", f"{processor * 1e3:.1f}", f"{working / processor - 1:+.1%}",
        )  # fmt: skip
    for name, values in (("clock", errors), ("processor time, bubble left out", of_processor)):
        report.add(
            "Steps measured on this machine: errors",
            ("against", "steps", "median", "worst"),
            name, len(values), f"{median(values):.1%}", f"{max(values):.1%}",
        )  # fmt: skip
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report.add("Load of the machine at the end", ("1, 5, 15 minutes", "processors"), load, os.cpu_count())
    workers.close()


PROBLEMS: list[tuple[ModelConfig, str, int, int]] = [
    (llama_like(128, 2, 512), "float32", 4, 128),
    (llama_like(128, 4, 512), "float32", 8, 64),
    (llama_like(128, 2, 4096), "float32", 4, 128),
    (llama_like(256, 2, 512), "float32", 4, 128),
    (llama_like(256, 2, 512), "bfloat16", 4, 128),
    (llama_like(256, 4, 1024), "float32", 2, 256),
    (llama_like(256, 4, 1024), "float32", 8, 64),
    (llama_like(384, 2, 1024), "float32", 4, 128),
    (llama_like(384, 2, 1024), "bfloat16", 4, 128),
    (llama_like(512, 2, 1024), "float32", 2, 128),
]
"""Models, formats, global batches, lengths: small enough to run every layout of two processes."""


NEAR, NEAR_REPEATS = 1.5, 10
"""Times the best that a plan took, up to which it is run again; and how often."""


def searched(report: ReportTables, profiles: Sequence[HardwareProfile]) -> None:
    """The winner of the search beside the best of all plans, each run here; the least of repeats.

    Plans that came near the best are run again in turn, as single runs on a machine that others share differ by more.
    """
    from core.plan_steps import least_step_seconds
    from support.processes import WorkerPool

    workers = WorkerPool()
    for config, dtype, batch, length in PROBLEMS:
        question = Question(config, profiles[-1], 2, length, batch, dtype, is_fused=False)
        ran: dict[tuple[str, int, Mode], float] = {}
        tried: dict[tuple[str, int, Mode], tuple[Plan, int]] = {}
        found = search(question)
        for plan in (*found.fitting, *found.others):
            count = batch // (plan.layout.dp * plan.micro_batch)
            times = workers.run(
                least_step_seconds, 2, config, plan.layout, dtype, plan.micro_batch, count, length,
                plan.recompute, REPEATS,
            )  # fmt: skip
            ran[plan.key] = max(clock for clock, _ in times)
            tried[plan.key] = plan, count
        winner = found.fitting[0]
        near = [key for key in ran if key == winner.key or ran[key] < NEAR * min(ran.values())]
        for _ in range(ROUNDS):
            for key in near:
                plan, count = tried[key]
                times = workers.run(
                    least_step_seconds, 2, config, plan.layout, dtype, plan.micro_batch, count, length,
                    plan.recompute, NEAR_REPEATS,
                )  # fmt: skip
                ran[key] = min(ran[key], max(clock for clock, _ in times))
        best = min(near, key=lambda key: ran[key])
        print(best, winner.key, ran[best], ran[winner.key], file=sys.stderr, flush=True)
        report.add(
            "The search's winner beside the best of all plans that were run",
            ("model", "format", "batch x length", "plans", "winner", "ms", "best", "ms ", "slower"),
            f"{config.hidden_size} x {config.num_layers}", dtype, f"{batch} x {length}", len(ran),
            f"{winner.layout}, {winner.micro_batch}, {winner.recompute}", f"{ran[winner.key] * 1e3:.1f}",
            f"{best[0]}, {best[1]}, {best[2]}", f"{ran[best] * 1e3:.1f}", f"{ran[winner.key] / ran[best] - 1:+.1%}",
        )  # fmt: skip
    workers.close()


def main(arguments: Sequence[str]) -> None:
    report = ReportTables()
    if not arguments or "published" in arguments:
        published(report)
    for name, way in (("measured", measured), ("search", searched)):
        if name in arguments:
            at = arguments.index(name) + 1
            way(report, [load_profile(one) for one in arguments[at:] if one.endswith(".toml")])
    print("\n".join(report.render()))


if __name__ == "__main__":
    main(sys.argv[1:])
