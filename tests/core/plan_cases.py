"""Cases that worker processes run: what `asd-core plan` says of a step, and what the step really takes."""

from contextlib import ExitStack

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.preference import PreferenceConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.config.training import DropoutConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.objectives.dpo import PreferenceLoss
from ascendspeed_core.optim.deepspeed import ZeroEngine
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import recomputed
from ascendspeed_core.planner.fit_memory import LiveBytes, layers_of
from ascendspeed_core.planner.part_work import Tuning
from ascendspeed_core.planner.rank_memory import MemoryPlanner
from ascendspeed_core.planner.workload import Workload
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, WeightSource
from ascendspeed_core.weights.adapters.lora import drawn_adapters, plan_adapters
from core.memory_cases import measured_peak, trainee
from core.zero_cases import number_afresh, settings_of

MODES: tuple[Mode, ...] = ("none", "selective", "full")


def formula_and_measured(
    config: ModelConfig, layout: Layout, dtype_name: str, rows: int, micro_batches: int, length: int
) -> list[tuple[Mode, int, int]]:
    """By what is recomputed: the peak of this rank by formula, and as counted."""
    model, engine, batches, mesh = trainee(config, layout, dtype_name, (rows,) * micro_batches, length)
    planner = MemoryPlanner(Workload(config, layout, rows, length, dtype_name), is_fused=False, margin=0.0)
    found: list[tuple[Mode, int, int]] = []
    for mode in MODES:
        if mode == "selective" and layout.schedule in ("interleaved-zb", "zbv", "dualpipev"):
            continue
        with ExitStack() as stack:
            for layer in layers_of(model):
                stack.enter_context(recomputed(layer, mode))
            planned = planner.rank(mesh.pp_rank, micro_batches, mode).total
            found.append((mode, planned, measured_peak(model, engine, batches, mesh)))
    return found


def tuned_formula_and_measured(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    rows: int,
    micro_batches: int,
    length: int,
    tuning: Tuning,
) -> list[tuple[Mode, int, int]]:
    """The same of adapters, and of pairs with a reference."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    dtype = getattr(torch, dtype_name)
    base = InitialWeights(config, seed=5)
    source: WeightSource = base
    if tuning.adapter_rank is not None:
        targets = ("all-linear",) if tuning.adapts_mlp else ("q_proj", "k_proj", "v_proj", "o_proj")
        lora = LoraConfig(
            lora_r=tuning.adapter_rank, lora_target_modules=targets, lora_dropout=0.1 * tuning.adapter_dropout
        )
        source = drawn_adapters(base, plan_adapters(lora, config, "the model"), seed=3)
    model = load_model(source, mesh, dtype)
    apply_dropout(model, DropoutConfig(), 7, mesh)
    work = Workload(config, layout, rows, length, dtype_name, tuning)
    planner = MemoryPlanner(work, is_fused=False, margin=0.0)
    sequences = work.sequences
    ids = torch.arange(sequences * (length + 1)).view(sequences, -1) % config.vocab_size
    ones, samples = torch.ones(sequences, length), torch.arange(sequences)
    batches = [
        MicroBatch(ids[:, :-1], ids[:, 1:], ones, samples=samples).part_of_sequence(mesh)
        for _ in range(micro_batches)
    ]
    reference = load_model(base, mesh, dtype) if tuning.has_reference_copy else None
    objective = PreferenceLoss(model, reference, PreferenceConfig(), mesh) if tuning.pairs else None
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    train_step(model, engine, batches, mesh, objective=objective)
    beside = [] if reference is None else list(reference.parameters())
    found: list[tuple[Mode, int, int]] = []
    for mode in MODES:
        with ExitStack() as stack:
            for layer in layers_of(model):
                stack.enter_context(recomputed(layer, mode))
            planned = planner.rank(mesh.pp_rank, micro_batches, mode).total
            found.append((mode, planned, measured_peak(model, engine, batches, mesh, objective, beside)))
    return found


def zero_formula_and_measured(
    config: ModelConfig, layout: Layout, dtype_name: str, rows: int, micro_batches: int, length: int
) -> list[tuple[Mode, int, int]]:
    """The same under DeepSpeed's stages, whose tensors are counted from the first one on."""
    number_afresh()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, dtype_name, largest_unit=config.vocab_size * config.hidden_size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    planner = MemoryPlanner(Workload(config, layout, rows, length, dtype_name), is_fused=False, margin=0.0)
    ids = torch.arange(rows * (length + 1)).view(rows, -1) % config.vocab_size
    batches = [MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length)) for _ in range(micro_batches)]
    found: list[tuple[Mode, int, int]] = []
    with LiveBytes() as live:
        weights = InitialWeights(config, seed=5)
        model = load_model(weights, mesh, getattr(torch, dtype_name), zero_settings=settings)
        engine = ZeroEngine(model, OptimizerConfig(), mesh, settings)
        train_step(model, engine, batches, mesh)
        for mode in ("none", "full"):
            with ExitStack() as stack:
                for layer in layers_of(model):
                    stack.enter_context(recomputed(layer, mode))
                train_step(model, engine, batches, mesh)
                live.peak = live.now
                train_step(model, engine, batches, mesh)
                found.append((mode, planner.rank(0, micro_batches, mode).total, live.peak))
    return found
