"""Search layouts, schedules, sharding, recompute and micro-batches for what fits and is fastest. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ascendspeed_core.config.layout import (
    SPLIT_BACKWARD_SCHEDULES,
    Layout,
    PipelineSchedule,
    divisors,
)
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.observability.mfu import model_flops_utilization, training_flops_per_token
from ascendspeed_core.planner.hardware import HardwareProfile
from ascendspeed_core.planner.pipeline_order import stages_per_rank
from ascendspeed_core.planner.rank_memory import FIXED_BYTES, MemoryPlanner, RankMemory
from ascendspeed_core.planner.step_time import MOST_SIMULATED, NOT_SIMULATED, StepSeconds, StepTimer
from ascendspeed_core.planner.workload import Workload
from ascendspeed_data.errors import ConfigError

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples of a micro-batch that are tried."""

MODES: tuple[Mode, ...] = ("none", "selective", "full")
LONG_SEQUENCE = 8192
"""Tokens of a sequence from which on context parallelism is tried."""

MOST_SPLIT = 3
"""Best pipelines that are tried under schedules that split the backward, too."""

AS_FAST = 0.05
"""Share of a step that plans may differ by and still count as equally fast. Each piece of work of a pipeline costs a
fixed time that the plan does not know, as does each message beside computing (docs/planning.md)."""

FINALISTS = 24
"""Plans whose pipeline is walked through; the others are ranked in closed form."""


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
        model: the architecture.
        profile: of the devices.
        devices: how many.
        seq_length: tokens of a sample.
        global_batch_size: samples of a step.
        dtype: of weights and arithmetic.
        memory_bytes: of each device that a step may take; `None` is the profile's, less what its libraries take.
        fixed: sizes that are given, by their name in `Layout`, `micro_batch` or `recompute`.
        margin: share of memory for the allocator.
        is_fused: norms and MLP are fused operators.
    """

    model: ModelConfig
    profile: HardwareProfile
    devices: int
    seq_length: int
    global_batch_size: int
    dtype: str = "bfloat16"
    memory_bytes: int | None = None
    fixed: dict[str, object] = field(default_factory=dict)
    margin: float = 0.08
    is_fused: bool = True

    @property
    def budget(self) -> int:
        """Bytes that a step may take on each device."""
        return self.memory_bytes or self.profile.memory_bytes - FIXED_BYTES

    @property
    def slowdown(self) -> float:
        """How many ranks share what the profile calls a device: more than one only on one's own machine."""
        measured = bool(self.profile.products)
        return max(self.devices / self.profile.devices_per_node, 1.0) if measured else 1.0


@dataclass(frozen=True)
class Plan:
    """A layout with its micro-batches and its recompute, and what comes of it.

    Attributes:
        layout: of all ranks.
        micro_batch: samples of one forward.
        recompute: what is dropped, in all layers.
        memory: of the rank that needs most.
        rank: number of that rank in its pipeline.
        seconds: of a step.
        tokens_per_second: of one device.
        utilization: MFU.
        fits: into the memory of a device.
    """

    layout: Layout
    micro_batch: int
    recompute: Mode
    memory: RankMemory
    rank: int
    seconds: StepSeconds
    tokens_per_second: float
    utilization: float
    fits: bool

    @property
    def key(self) -> tuple[str, int, Mode]:
        """What tells plans apart."""
        return str(self.layout), self.micro_batch, self.recompute


def make_plans(
    question: Question, layout: Layout, micro_batch: int, modes: Sequence[Mode], walk: bool = True
) -> list[Plan]:
    """Return what comes of one layout, for each of some modes of all layers.

    Args:
        question: model, devices, batch.
        layout: of all devices.
        micro_batch: samples.
        modes: what is recomputed.
        walk: walk through the pipeline, not only its closed form.
    """
    work = Workload(question.model, layout, micro_batch, question.seq_length, question.dtype)
    count = question.global_batch_size // (layout.dp * micro_batch)
    planner = MemoryPlanner(work, question.is_fused, question.margin)
    timer = StepTimer(work, question.profile, question.slowdown, MOST_SIMULATED if walk else NOT_SIMULATED)
    found = []
    for mode in modes:
        rank, memory = planner.worst(count, mode)
        found.append(_plan(question, layout, micro_batch, mode, memory, rank, timer.step(count, mode)))
    return found


def _plan(
    question: Question,
    layout: Layout,
    micro_batch: int,
    mode: Mode,
    memory: RankMemory,
    rank: int,
    seconds: StepSeconds,
) -> Plan:
    tokens = question.global_batch_size * question.seq_length
    rate = tokens / seconds.total
    flops = training_flops_per_token(question.model, question.seq_length)
    peak = question.profile.peak_flops(question.dtype)
    return Plan(
        layout=layout,
        micro_batch=micro_batch,
        recompute=mode,
        memory=memory,
        rank=rank,
        seconds=seconds,
        tokens_per_second=rate / layout.world_size,
        utilization=model_flops_utilization(flops, rate, layout.world_size, peak),
        fits=memory.total <= question.budget,
    )


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        fitting: plans that fit, fastest first.
        others: plans that do not, fastest first.
        tried: how many layouts with micro-batches and recompute there were.
    """

    fitting: tuple[Plan, ...]
    others: tuple[Plan, ...]
    tried: int


def search(question: Question) -> Found:
    """Return all plans of a question, ranked by tokens per second.

    Raises:
        ConfigError: no layout divides the devices, the model and the batch.
    """
    plans: list[Plan] = []
    tried = 0
    known_least: dict[tuple[int | None, ...], float] = {}
    hopeless: list[tuple[float, Layout, int]] = []
    for layout, micro_batch in candidates(question):
        modes = modes_of(question, layout)
        tried += len(modes)
        same = (layout.tp, layout.pp, layout.cp, layout.ep, layout.sharded_optimizer, layout.zero_stage)
        if same not in known_least:
            work = Workload(question.model, layout, micro_batch, question.seq_length, question.dtype)
            known_least[same] = MemoryPlanner(work, question.is_fused).least()
        least = known_least[same]
        if least > question.budget:
            hopeless.append((least, layout, micro_batch))
            continue
        plans += make_plans(question, layout, micro_batch, modes, walk=False)
    if not tried:
        raise ConfigError(
            f"devices={question.devices}: no layout divides them, the model's heads and layers, and "
            f"global_batch_size={question.global_batch_size}; give a global batch that is a multiple of more "
            "numbers, or another number of devices"
        )
    for _, layout, micro_batch in sorted(hopeless, key=lambda one: one[0])[:FINALISTS]:
        # Those that come closest are named with what they need.
        plans += make_plans(question, layout, micro_batch, modes_of(question, layout)[-1:], walk=False)
    ranked = sorted(plans, key=_order)
    fitting = [plan for plan in ranked if plan.fits]
    finalists = fitting[:FINALISTS]
    walked = [one for p in finalists for one in make_plans(question, p.layout, p.micro_batch, [p.recompute])]
    more = _split_backward_plans(question, finalists)
    walked = _simplest_first(
        sorted((*walked, *(plan for plan in more if plan.fits)), key=_order), question.model.num_layers
    )
    others = sorted((*(p for p in ranked if not p.fits), *(p for p in more if not p.fits)), key=_order)
    return Found((*walked, *fitting[FINALISTS:]), tuple(others), tried + len(more))


def _simplest_first(plans: Sequence[Plan], num_layers: int) -> list[Plan]:
    """Put the simplest of those plans first that are as fast as the plan can tell: in schedule, then in sharding."""
    as_fast = [plan for plan in plans if plan.seconds.total <= plans[0].seconds.total * (1 + AS_FAST)]
    best = min(
        as_fast,
        key=lambda plan: (_pieces(plan, num_layers), plan.layout.sharded_optimizer, _order(plan)),
        default=None,
    )
    return [plan for plan in plans if plan is best] + [plan for plan in plans if plan is not best]


def _pieces(plan: Plan, num_layers: int) -> int:
    """Return how many pieces a schedule cuts the work of a micro-batch on a rank into."""
    layout = plan.layout
    if layout.pp == 1:
        return 1
    split = 3 if layout.schedule in SPLIT_BACKWARD_SCHEDULES else 2
    return split * stages_per_rank(layout, num_layers)


def _order(plan: Plan) -> tuple[float, int]:
    return -plan.tokens_per_second, plan.memory.total


def _split_backward_plans(question: Question, finalists: Sequence[Plan]) -> list[Plan]:
    """Return the best pipelines under schedules that take input and weight gradients apart, which torch plans."""
    if question.fixed.get("schedule") is not None or question.fixed.get("recompute") not in (None, "none"):
        return []
    best: dict[tuple[int, ...], Plan] = {}
    for plan in finalists:
        layout = plan.layout
        if layout.pp > 1 and layout.schedule == "1f1b":
            best.setdefault((layout.tp, layout.pp, layout.cp, layout.ep, plan.micro_batch), plan)
    found = []
    for plan in list(best.values())[:MOST_SPLIT]:
        for schedule, per_stage in _split_schedules(question.model.num_layers, plan.layout.pp):
            layout = replace(plan.layout, schedule=schedule, layers_per_stage=per_stage)
            if _divides(question, layout, plan.micro_batch):
                found += make_plans(question, layout, plan.micro_batch, ["none"])
    return found


def modes_of(question: Question, layout: Layout) -> Sequence[Mode]:
    """Return what may be recomputed under a layout; `selective` needs one backward pass."""
    wanted = question.fixed.get("recompute")
    modes = [mode for mode in MODES if wanted in (None, mode)]
    if layout.schedule in SPLIT_BACKWARD_SCHEDULES:
        return [mode for mode in modes if mode == "none"]
    return modes


def candidates(question: Question) -> Iterator[tuple[Layout, int]]:
    """Yield the layouts and micro-batches that divide devices, model and batch."""
    model, devices, fixed = question.model, question.devices, question.fixed
    for tp in _sizes(fixed, "tp", divisors(min(devices, 2 * question.profile.devices_per_node))):
        for pp in _sizes(fixed, "pp", [n for n in divisors_of(devices) if n <= model.num_layers]):
            for cp in _sizes(fixed, "cp", _context_sizes(question.seq_length)):
                if devices % (tp * pp * cp) or not _fits_model(question, tp, pp, cp):
                    continue
                dp = devices // (tp * pp * cp)
                for ep in _sizes(fixed, "ep", _expert_sizes(model, tp * cp * dp)):
                    base = Layout(
                        tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, etp=1 if ep > 1 and tp > 1 else None,
                        sequence_parallel=tp > 1 and question.seq_length % (tp * cp) == 0,
                        overlap_grad_reduce=True, overlap_param_gather=True,
                    )  # fmt: skip
                    for layout in _variants(question, base):
                        for micro_batch in _sizes(fixed, "micro_batch", MICRO_BATCHES):
                            if _divides(question, layout, micro_batch):
                                yield layout, micro_batch


def divisors_of(number: int) -> list[int]:
    """Return the divisors of a number that may be large."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _sizes(fixed: dict[str, object], name: str, sizes: Sequence[int]) -> Sequence[int]:
    given = fixed.get(name)
    return sizes if given is None else [int(str(given))]


def _context_sizes(seq_length: int) -> list[int]:
    return [1] if seq_length < LONG_SEQUENCE else [n for n in (1, 2, 4, 8, 16) if seq_length // n >= 2048]


def _expert_sizes(model: ModelConfig, ranks: int) -> list[int]:
    if model.experts is None:
        return [1]
    return [n for n in divisors(model.experts.count) if ranks % n == 0]


def _fits_model(question: Question, tp: int, pp: int, cp: int) -> bool:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    try:
        parallel.check_model(question.model)
        parallel.check_sequence(question.seq_length)
    except ConfigError:
        return False
    return True


def _variants(question: Question, base: Layout) -> Iterator[Layout]:
    """Yield a layout under all schedules and ways to cut optimizer, gradients and weights."""
    try:
        assert base.axes
    except ConfigError:
        return
    wanted, sharding = question.fixed.get("schedule"), question.fixed.get("sharding")
    schedules = list(_schedules(question.model.num_layers, base.pp))
    if wanted in SPLIT_BACKWARD_SCHEDULES and base.pp > 1:
        schedules = list(_split_schedules(question.model.num_layers, base.pp))
    for schedule, per_stage in schedules:
        if wanted in (None, schedule):
            layout = replace(base, schedule=schedule, layers_per_stage=per_stage)
            if sharding in (None, "none"):
                yield layout
            if layout.dp * layout.cp > 1 and sharding in (None, "optimizer"):
                yield replace(layout, sharded_optimizer=True)
    if base.pp == 1 and base.dp > 1 and base.cp == 1 and question.model.experts is None:
        for stage in (1, 2, 3):
            if sharding == f"zero{stage}" and base.tp <= question.model.num_key_value_heads:
                yield replace(base, zero_stage=stage, sequence_parallel=False)


def _schedules(num_layers: int, pp: int) -> Iterator[tuple[PipelineSchedule, int | None]]:
    """Yield schedules with layers of each stage; `gpipe` and `looped-bfs` keep more than 1F1B and are no faster."""
    yield "1f1b", None
    if pp == 1:
        return
    for stages in (2, 3, 4, 5, 6, 8):
        if num_layers % (pp * stages) == 0:
            yield "interleaved", num_layers // (pp * stages)


def _split_schedules(num_layers: int, pp: int) -> Iterator[tuple[PipelineSchedule, int | None]]:
    if num_layers % (2 * pp) == 0 and num_layers > pp:
        yield "interleaved-zb", num_layers // (2 * pp)
    if num_layers >= 2 * pp:
        yield "zbv", None
        yield "dualpipev", None


def _divides(question: Question, layout: Layout, micro_batch: int) -> bool:
    if question.global_batch_size % (layout.dp * micro_batch):
        return False
    count = question.global_batch_size // (layout.dp * micro_batch)
    try:
        layout.check_micro_batches(count)
    except ConfigError:
        return False
    # A pipeline of more stages than micro-batches is mostly idle.
    return layout.pp == 1 or count >= layout.pp


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other beats in both memory and tokens per second, least memory first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda one: (one.memory.total, -one.tokens_per_second)):
        if not found or plan.tokens_per_second > found[-1].tokens_per_second:
            found.append(plan)
    return found
