"""Say what a search found: tables, reasons in words, JSON, and a recipe for `asd-core pretrain`. No torch."""

from collections.abc import Callable, Sequence
from typing import Any

from ascendspeed_core.config.migrate import FORMAT_VERSION, VERSION_KEY
from ascendspeed_core.planner.search import Found, Plan, Question

GIB = 1 << 30
JOULES_PER_MWH = 3.6e9
SECONDS_PER_DAY = 86_400

DIMENSIONS: dict[str, Callable[[Plan], object]] = {
    "tensor parallel": lambda plan: plan.layout.tp,
    "pipeline parallel": lambda plan: plan.layout.pp,
    "context parallel": lambda plan: plan.layout.cp,
    "expert parallel": lambda plan: plan.layout.ep,
    "schedule": lambda plan: plan.layout.schedule if plan.layout.pp > 1 else "",
    "sharding": lambda plan: _sharding(plan),
    "recompute": lambda plan: plan.recompute,
    "micro-batch": lambda plan: plan.micro_batch,
}
"""What plans differ in, each compared with the best plan that differs in it."""

PARTS = {
    "compute": "computing", "recompute": "recompute", "model_messages": "messages of tensor, context, expert and "
    "pipeline parallelism", "bubble": "the pipeline's bubble", "reduction": "sums of gradients and gathers of weights",
    "update": "the optimizer",
}  # fmt: skip


def _sharding(plan: Plan) -> str:
    if plan.layout.zero_stage:
        return f"zero{plan.layout.zero_stage}"
    return "optimizer" if plan.layout.sharded_optimizer else "none"


def plan_lines(question: Question, found: Found, top: int, tokens: float | None) -> list[str]:
    """Return the tables and the reasons as lines for the terminal.

    Args:
        question: that was asked.
        found: by `search`.
        top: plans to show.
        tokens: of the whole training, for time and energy.
    """
    profile = question.profile
    lines = [
        f"{question.model.num_parameters:,} parameters on {question.devices:,} x {profile.title}, sequences of "
        f"{question.seq_length:,}, global batch {question.global_batch_size:,}, {question.dtype}; "
        f"{question.budget / GIB:.1f} GiB for a step on each",
        f"{found.tried:,} plans tried, {len(found.fitting):,} fit",
    ]
    if not found.fitting:
        return [*lines, *_why_nothing_fits(question, found)]
    best = found.fitting[0]
    lines += ["", *_table(found.fitting[:top]), "", *_memory_table(best), "", *_why_best(found)]
    refused = _why_others_do_not_fit(question, found)
    if refused:
        lines += ["", *refused]
    if tokens is not None:
        lines += ["", budget_line(question, best, tokens)]
    return [*lines, "", *_notes(question)]


def _table(plans: Sequence[Plan]) -> list[str]:
    header = (
        "layout",
        "micro-batch",
        "recompute",
        "tokens/s/device",
        "MFU",
        "GiB",
        "bubble",
        "messages",
        "recompute",
    )
    rows = [header]
    for plan in plans:
        shares = plan.seconds.shares()
        rows.append(
            (
                str(plan.layout), str(plan.micro_batch), plan.recompute, f"{plan.tokens_per_second:,.0f}",
                f"{plan.utilization:.1%}", f"{plan.memory.total / GIB:.1f}", f"{shares['bubble']:.1%}",
                f"{shares['model_messages'] + shares['reduction']:.1%}", f"{shares['recompute']:.1%}",
            )
        )  # fmt: skip
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of equal width; the first column is text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _memory_table(plan: Plan) -> list[str]:
    rows = [(f"memory of pipeline rank {plan.rank}", "GiB")]
    rows += [(name, f"{size / GIB:.2f}") for name, size in vars(plan.memory).items()]
    return aligned([*rows, ("total", f"{plan.memory.total / GIB:.2f}")])


def _why_best(found: Found) -> list[str]:
    """Compare the best plan with the best of those that differ in one thing."""
    best = found.fitting[0]
    lines = [f"best: {best.layout}, micro-batch {best.micro_batch}, recompute {best.recompute}, because"]
    for name, value in DIMENSIONS.items():
        mine = value(best)
        other = next((plan for plan in found.fitting if value(plan) != mine), None)
        kept_out = next((plan for plan in found.others if value(plan) != mine), None)
        if other is not None:
            lines.append(f"- {name} {_named(mine)}: {_slower(best, other, name, value(other))}")
        elif kept_out is not None:
            lines.append(
                f"- {name} {_named(mine)}: nothing else fits; {_named(value(kept_out))} {_needs(kept_out)}"
            )
    return lines


def _named(value: object) -> str:
    return str(value) or "none"


def _slower(best: Plan, other: Plan, name: str, value: object) -> str:
    loss = other.seconds.total / best.seconds.total - 1
    if loss < -0.002:
        return f"with {_named(value)} {-loss:.1%} faster as planned, less than the plan can tell; the simpler is taken"
    if loss < 0.002:
        return f"{_named(value)} is as fast, with {other.memory.total / GIB:.1f} GiB"
    grown = max(PARTS, key=lambda part: getattr(other.seconds, part) - getattr(best.seconds, part))
    more = (getattr(other.seconds, grown) - getattr(best.seconds, grown)) / best.seconds.total
    return (
        f"with {_named(value)} at best {loss:.1%} slower, most of it {PARTS[grown]} (+{more:.1%} of the step)"
    )


def _needs(plan: Plan) -> str:
    largest = max(vars(plan.memory), key=lambda part: getattr(plan.memory, part))
    return (
        f"needs {plan.memory.total / GIB:.1f} GiB, of which {largest} {getattr(plan.memory, largest) / GIB:.1f}"
    )  # fmt: skip


REMEDIES = {
    "optimizer": "shard the optimizer over data-parallel ranks, or more tensor or pipeline parallelism",
    "weights": "more tensor or pipeline parallelism",
    "gradients": "more tensor or pipeline parallelism",
    "activations": "recompute, smaller micro-batches, or sequence and context parallelism",
    "messages": "more tensor or pipeline parallelism",
    "margin": "a smaller --allocator-margin, if yours leaves less",
}


def _why_others_do_not_fit(question: Question, found: Found) -> list[str]:
    best = found.fitting[0]
    faster = [plan for plan in found.others if plan.tokens_per_second > best.tokens_per_second]
    if not faster:
        return []
    return [
        f"faster, but too large for {question.budget / GIB:.1f} GiB:",
        *(
            f"- {plan.layout}, micro-batch {plan.micro_batch}, recompute {plan.recompute}: "
            f"{plan.tokens_per_second / best.tokens_per_second - 1:+.0%} tokens/s, {_needs(plan)}"
            for plan in faster[:3]
        ),
    ]


def _why_nothing_fits(question: Question, found: Found) -> list[str]:
    """Name what comes closest, and what would help it."""
    closest = min(found.others, key=lambda plan: plan.memory.total)
    largest = max(vars(closest.memory), key=lambda part: getattr(closest.memory, part))
    return [
        f"nothing fits into {question.budget / GIB:.1f} GiB: the smallest plan, {closest.layout}, micro-batch "
        f"{closest.micro_batch}, recompute {closest.recompute}, {_needs(closest)}; what helps: {REMEDIES[largest]}, or "
        "more devices"
    ]


def budget_line(question: Question, plan: Plan, tokens: float) -> str:
    """Say how long a training takes, and what it needs in energy."""
    seconds = tokens / (plan.tokens_per_second * question.devices)
    watts = question.profile.machine.watts.value * question.devices
    return (
        f"{tokens:,.0f} tokens take {seconds / SECONDS_PER_DAY:,.1f} days and {watts * seconds / JOULES_PER_MWH:,.1f} "
        f"MWh at the full power of the devices ({question.profile.machine.watts.value:,.0f} W each), without hosts, "
        "network and cooling, and without restarts"
    )


def _notes(question: Question) -> list[str]:
    shares = question.profile.shares
    basis = (
        "measured on this device"
        if question.profile.products
        else f"a product reaches {shares.products.value:.0%} of the data sheet ({shares.products.source})"
    )
    return [f"speed: {basis}; docs/planning.md says how far the plan is from published and measured rates"]


def plan_json(question: Question, found: Found, top: int, tokens: float | None) -> dict[str, Any]:
    """Return the same as JSON values."""
    best = found.fitting[0] if found.fitting else None
    report: dict[str, Any] = {
        "devices": question.devices,
        "device": question.profile.name,
        "parameters": question.model.num_parameters,
        "seq_length": question.seq_length,
        "global_batch_size": question.global_batch_size,
        "dtype": question.dtype,
        "budget_bytes": question.budget,
        "tried": found.tried,
        "fit": len(found.fitting),
        "plans": [_as_json(plan) for plan in found.fitting[:top]],
        "why": _why_best(found) if best else _why_nothing_fits(question, found),
        "too_large": [_as_json(plan) for plan in found.others[:top]],
    }
    if best is not None and tokens is not None:
        seconds = tokens / (best.tokens_per_second * question.devices)
        watts = question.profile.machine.watts.value * question.devices
        report |= {"tokens": tokens, "seconds": seconds, "joules": watts * seconds}
    return report


def _as_json(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "layout": str(layout),
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "data_parallel_size": layout.dp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "pipeline_schedule": layout.schedule if layout.pp > 1 else None,
        "sharding": _sharding(plan),
        "micro_batch_size": plan.micro_batch,
        "recompute": plan.recompute,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "mfu": plan.utilization,
        "step_seconds": vars(plan.seconds) | {"total": plan.seconds.total},
        "shares": plan.seconds.shares(),
        "memory_bytes": vars(plan.memory) | {"total": plan.memory.total, "pipeline_rank": plan.rank},
    }


def recipe_sections(question: Question, plan: Plan, tokens: float | None) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe that runs a plan; data, weights and learning rate are the user's."""
    layout = plan.layout
    parallel: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.sharded_optimizer,
    }
    if layout.ep > 1:
        parallel["expert_model_parallel_size"] = layout.ep
        if layout.etp is not None:
            parallel["expert_tensor_parallel_size"] = layout.etp
    if layout.zero_stage:
        parallel["zero_stage"] = layout.zero_stage
    if layout.pp > 1:
        parallel["pipeline_schedule"] = layout.schedule
    if layout.layers_per_stage:
        parallel["num_layers_per_virtual_pipeline_stage"] = layout.layers_per_stage
    sections: dict[str, dict[str, Any]] = {
        "parallel": parallel,
        "precision": {"dtype": question.dtype},
        "batch": {"micro_batch_size": plan.micro_batch, "global_batch_size": question.global_batch_size},
        "data": {"seq_length": question.seq_length},
    }
    if plan.recompute != "none":
        sections["recompute"] = {"checkpoint_activations": True, "checkpoint_policy": plan.recompute}
    if tokens is not None:
        step = question.global_batch_size * question.seq_length
        sections["training"] = {"train_iters": max(round(tokens / step), 1)}
    return sections


def recipe_text(sections: dict[str, dict[str, Any]], comments: Sequence[str]) -> str:
    """Return a recipe as TOML."""
    lines = [*(f"# {line}" for line in comments), f"{VERSION_KEY} = {FORMAT_VERSION}"]
    for name, values in sections.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
