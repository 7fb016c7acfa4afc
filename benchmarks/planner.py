"""How far `asd-core plan` is from published training rates, from steps measured here, and from counted memory.

    python benchmarks/planner.py [published] [measured PROFILE] [search PROFILE]

`published` needs nothing; the others need a profile of this machine, made with
`asd-core profile-device --nproc-per-node 2 --output PROFILE`.
"""

import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.planner.hardware import HardwareProfile, load_profile
from ascendspeed_core.planner.question import read_model
from ascendspeed_core.planner.search import Question, make_plans, search
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
FITTED_TO_UNKNOWN = "ascend-910b3"
SHARES = tuple(share / 100 for share in range(30, 100, 1))


@dataclass(frozen=True)
class Row:
    """A published rate with its settings."""

    source: str
    device: str
    name: str
    tokens_per_second: float
    question: Question
    layout: Layout
    micro_batch: int
    recompute: Mode
    note: str
    attention: float | None

    @property
    def setting(self) -> str:
        return f"{self.layout}, {self.question.seq_length}, {self.micro_batch}, {self.recompute}"

    def predicted(self, profile: HardwareProfile) -> float:
        """Tokens per second of a device."""
        if self.attention is not None:
            attention = profile.shares.attention.model_copy(update={"value": self.attention})
            profile = profile.model_copy(
                update={"shares": profile.shares.model_copy(update={"attention": attention})}
            )
        question = Question(**{**vars(self.question), "profile": profile})
        return make_plans(question, self.layout, self.micro_batch, [self.recompute])[0].tokens_per_second


def gpt_like(width: int, heads: int, layers: int, vocabulary: int, length: int) -> ModelConfig:
    return tiny_config(
        family="bloom", vocab_size=vocabulary, hidden_size=width, ffn_hidden_size=4 * width, num_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, max_position_embeddings=length,
        norm="layernorm", mlp="gelu", position="alibi", tie_word_embeddings=True,
    )  # fmt: skip


def model_of(name: str, length: int) -> ModelConfig:
    kind, _, size = name.partition("-")
    if kind == "mpt":
        return gpt_like(*MPT[size], 50368, length)
    return gpt_like(*GPT[size], 51200, length) if kind == "gpt" else read_model(name)[0]


def read_rows() -> list[Row]:
    found = []
    for row in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["row"]:
        model = model_of(row["model"], row["seq_length"])
        tp, pp = row.get("tp", 1), row.get("pp", 1)
        dp = row["devices"] // (tp * pp)
        stages = row.get("stages", 1)
        layout = Layout(
            tp=tp, pp=pp, dp=dp, sequence_parallel=row.get("sp", False), zero_stage=row.get("zero") if dp > 1 else None,
            schedule="interleaved" if stages > 1 else "1f1b",
            layers_per_stage=model.num_layers // (pp * stages) if stages > 1 else None,
            overlap_grad_reduce=True, overlap_param_gather=True,
        )  # fmt: skip
        profile = load_profile("ascend-910b1" if row["device"] == "unknown" else row["device"])
        question = Question(
            model, profile, row["devices"], row["seq_length"], row["global_batch"], row["dtype"]
        )
        found.append(
            Row(row["source"], row["device"], row["model"], row["tokens_per_second"], question, layout,
                row["micro_batch"], row["recompute"], row.get("note", ""), row.get("attention"))
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


def published(report: ReportTables) -> None:
    rows = read_rows()
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device]
        if device == "unknown":
            unknown_hardware(report, mine)
            continue
        profile = load_profile(device)
        table = errors_by_share(mine, profile)
        everything = range(len(mine))
        fitted = best_share(table, everything)
        names = [row.name for row in mine]
        errors = []
        for number, row in enumerate(mine):
            # Neither the row itself nor another row of the same model is fitted to.
            others = [other for other in everything if names[other] != row.name] or [number]
            share = best_share(table, others)
            error = exp(table[share][number]) - 1
            if others != [number]:
                errors.append(abs(error))
            report.add(
                f"Published rates on {device}, one calibration of it, without the rows of the same model",
                ("source", "model", "layout, length, micro-batch, recompute", "share of products", "predicted",
                 "published", "error"),
                row.source, row.name, row.setting, f"{SHARES[share]:.2f}",
                f"{row.tokens_per_second * exp(table[share][number]):,.0f}", f"{row.tokens_per_second:,.0f}",
                f"{error:+.1%}",
            )  # fmt: skip
        if errors:
            report.add(
                "Published rates: errors without the rows of the same model",
                ("device", "rows", "share fitted to all", "median error", "90 % below", "worst"),
                device, len(errors), f"{SHARES[fitted]:.2f}", f"{median(errors):.1%}",
                f"{sorted(errors)[int(0.9 * len(errors))]:.1%}", f"{max(errors):.1%}",
            )  # fmt: skip


def unknown_hardware(report: ReportTables, rows: Sequence[Row]) -> None:
    """Of rows whose hardware is not stated: what several profiles say, and one of them calibrated on the other rows."""
    devices = ("ascend-910a", "ascend-910b1", "ascend-910b3")
    table = errors_by_share(rows, load_profile(FITTED_TO_UNKNOWN))
    errors = []
    for number, row in enumerate(rows):
        cells = []
        for name in devices:
            profile = load_profile(name)
            if row.question.dtype not in profile.peak_tflops:
                cells.append("no bfloat16")
                continue
            predicted = row.predicted(profile)
            cells.append(f"{predicted:,.0f} ({predicted / row.tokens_per_second - 1:+.0%})")
        share = best_share(table, [other for other in range(len(rows)) if other != number])
        errors.append(exp(table[share][number]) - 1)
        report.add(
            "Published rates whose hardware is not stated, by profile, and calibrated on the other rows",
            ("source", "model", "layout, length, micro-batch, recompute", "published", *devices,
             f"{FITTED_TO_UNKNOWN}, share", "error"),
            row.source, row.name, row.setting, f"{row.tokens_per_second:,.0f}", *cells, f"{SHARES[share]:.2f}",
            f"{errors[-1]:+.1%}",
        )  # fmt: skip
    sizes = sorted(map(abs, errors))
    report.add(
        "Published rates: errors without the rows of the same model",
        ("device", "rows", "share fitted to all", "median error", "90 % below", "worst"),
        f"unknown, as {FITTED_TO_UNKNOWN}", len(rows), f"{SHARES[best_share(table, range(len(rows)))]:.2f}",
        f"{median(sizes):.1%}", f"{sizes[int(0.9 * len(sizes))]:.1%}", f"{sizes[-1]:.1%}",
    )  # fmt: skip


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
REPEATS = 4


def measured(report: ReportTables, profile: HardwareProfile) -> None:
    """Steps measured here beside what a profile of this machine says; the least of repeats."""
    from core.plan_steps import least_step_seconds
    from support.processes import WorkerPool

    workers, errors, of_processor = WorkerPool(), [], []
    for config, layout, dtype, rows, count, length, mode in STEPS:
        found = workers.run(
            least_step_seconds, layout.world_size, config, layout, dtype, rows, count, length, mode, REPEATS
        )
        print(layout, dtype, rows, count, length, mode, found, file=sys.stderr, flush=True)
        clock, processor = max(one for one, _ in found), max(one for _, one in found)
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


def searched(report: ReportTables, profile: HardwareProfile) -> None:
    """The winner of the search beside the best of all plans, each run here; the least of repeats."""
    from core.plan_steps import least_step_seconds
    from support.processes import WorkerPool

    workers = WorkerPool()
    for config, dtype, batch, length in PROBLEMS:
        question = Question(config, profile, 2, length, batch, dtype, is_fused=False)
        ran: dict[tuple[str, int, Mode], float] = {}
        found = search(question)
        for plan in (*found.fitting, *found.others):
            count = batch // (plan.layout.dp * plan.micro_batch)
            times = workers.run(
                least_step_seconds, 2, config, plan.layout, dtype, plan.micro_batch, count, length,
                plan.recompute, REPEATS,
            )  # fmt: skip
            ran[plan.key] = max(clock for clock, _ in times)
        best, winner = min(ran, key=lambda key: ran[key]), found.fitting[0]
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
            way(report, load_profile(arguments[arguments.index(name) + 1]))
    print("\n".join(report.render()))


if __name__ == "__main__":
    main(sys.argv[1:])
