"""The training loop."""

import time
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, kernel_context, load_model
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.loader import open_run_data
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.kernels.registry import KernelContext, table, update_choice
from ascendspeed_core.objectives.dpo import PreferenceObjective
from ascendspeed_core.objectives.reference import RECORD
from ascendspeed_core.observability.metrics import PICTURE, MetricsFile, draw_loss
from ascendspeed_core.observability.monitor import Monitor
from ascendspeed_core.observability.nan_detector import where_not_finite
from ascendspeed_core.optim.build_engine import make_engine, zero_settings
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.optimizer import MasterOptimizer
from ascendspeed_core.optim.schedule import Schedule
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.planner.fit_memory import fit_recompute, full_step, memory_budget
from ascendspeed_core.planner.micro_batches import bubble_seconds
from ascendspeed_core.planner.profile_pipeline import chosen_sizes
from ascendspeed_core.training.checkpoint import (
    CheckpointWriter,
    Progress,
    Retention,
    load_optimizer,
    load_random_state,
)
from ascendspeed_core.training.eval_prompts import SampleWriter
from ascendspeed_core.training.signals import StoppedError, StopSignal
from ascendspeed_core.training.step import StepResult, evaluate, forward_backward, train_step
from ascendspeed_core.training.validate import RunPlan
from ascendspeed_core.weights import NativeSource
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, DataError


class Trainer:
    """One run on this process, from its plan to its last checkpoint.

    Args:
        plan: what to do, checked.
        mesh: this process's place.
    """

    def __init__(self, plan: RunPlan, mesh: ParallelMesh) -> None:
        self.plan, self.mesh = plan, mesh
        self.config: PretrainConfig = plan.config
        dtype: torch.dtype = getattr(torch, self.config.precision.dtype_name)
        torch.manual_seed(self.config.batch.seed + mesh.rank)
        self.writer = self._writer()

        settings = zero_settings(self.config, plan.model, plan.layout)
        self.model = load_model(plan.source, mesh, dtype, self.config.compute.mlp_layer_fusion, settings)
        setting = kernel_context(
            self.model,
            mesh,
            self.config.data.seq_length,
            self.config.batch,
            lengths_vary=self.config.data.lengths_vary,
            drops_attention=self.config.dropout.attention_dropout > 0,
        )
        kernels = apply_kernels(self.model, self.config.compute, setting)
        apply_recompute(self.model, self.config.recompute, mesh.pp_rank)
        self.objective = self._objective(dtype, setting)
        self.optimizer = make_engine(self.model, self.config, mesh, settings)
        self.sizes = self.config.batch.manual_sizes() or self._found_sizes()
        apply_dropout(self.model, self.config.dropout, self.config.batch.seed, mesh)
        for line in table([*kernels, update_choice(self.config.optimizer.optimizer, setting)]):
            self._say(line)
        self.loss_scale = LossScale.create(self.config.loss_scaling, is_fp16=dtype == torch.float16)
        self.schedule = Schedule(self.optimizer, self.config.optimizer, self.config.batch, mesh.layout.dp)
        self.data = open_run_data(
            self.config.data,
            self.config.batch.seed,
            plan.num_samples,
            plan.model.vocab_size,
            plan.manifest,
            mesh,
        )
        self._refuse_different_data()
        self._fit_recompute()
        self.monitor = Monitor(self.config, self.model, mesh, plan.start.iteration, self._say)
        self.iteration = plan.start.iteration
        self.samples = None
        if plan.samples is not None:
            folder = self.config.start.save
            self.samples = SampleWriter(plan.samples, self.model, mesh, folder, self.iteration)
        if plan.checkpoint is not None and plan.resumes:
            self._resume(plan.checkpoint)

    def _objective(self, dtype: torch.dtype, setting: KernelContext) -> PreferenceObjective | None:
        """Return the loss of preference tuning, with its reference beside the model."""
        reference, config = self.plan.reference, self.config
        if reference is None:
            return None
        assert isinstance(config, DpoConfig)
        model = None
        if not reference.is_base:
            model = load_model(reference.source, self.mesh, dtype, config.compute.mlp_layer_fusion)
            apply_kernels(model, config.compute, setting)
        return PreferenceObjective(self.model, model, config.preference, self.mesh)

    def _writer(self) -> CheckpointWriter | None:
        start = self.config.start
        if start.save is None:
            return None
        return CheckpointWriter(
            start.save,
            self.mesh,
            Retention(start.keep_checkpoints, start.save_retain_interval),
            start.async_save,
            on_saved=lambda saved: log(f"saved {saved}"),
            base=self.plan.source.path,
        )

    def _found_sizes(self) -> tuple[int, ...]:
        """Measure the pipeline and choose sizes of micro-batches, if that was asked for."""
        batch, layout = self.config.batch, self.mesh.layout
        if not batch.finds_sizes:
            return ()
        samples = batch.resolve_global_batch_size(layout.dp) // layout.dp
        assert isinstance(self.optimizer, MasterOptimizer)
        sizes, cost = chosen_sizes(
            self.model,
            self.mesh,
            self.config.data.seq_length,
            samples,
            batch.micro_batch_size,
            self.optimizer,
        )
        even = (batch.micro_batch_size,) * (samples // batch.micro_batch_size)
        before, after = (bubble_seconds(own, layout.pp, cost) * 1000 for own in (even, sizes))
        self._say(
            f"micro-batches: {','.join(map(str, sizes))}; planned idle time per step {after:.1f} ms, {before:.1f} ms "
            "with even ones; give them as --manual-mbs to use them again"
        )
        return sizes

    def _fit_recompute(self) -> None:
        """Choose how much is recomputed, if a budget decides that."""
        config, batch = self.config.recompute, self.config.batch
        if not config.is_fitted:
            return
        assert isinstance(self.optimizer, MasterOptimizer)
        per_device = batch.resolve_global_batch_size(self.mesh.layout.dp) // self.mesh.layout.dp
        sizes = self.sizes or (batch.micro_batch_size,) * (per_device // batch.micro_batch_size)
        (sample,) = self.data.micro_batches(0, (max(sizes),))
        budget = memory_budget(config.memory_budget_gib, self.mesh.device)
        step = full_step(sample, sizes, self.config.data.seq_length, self.mesh)
        for line in fit_recompute(self.model, self.optimizer, self.mesh, step, budget):
            self._say(line)

    def _refuse_different_data(self) -> None:
        """Machines may have their own copies of the data, but they must be copies."""
        digests = gather_objects(self.data.content_digest(self.plan.num_samples[0]), self.mesh)
        different = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if different is not None:
            raise DataError(
                f"the training samples of process {different} are not those of process 0; give all machines the same "
                "data files"
            )

    def _resume(self, source: NativeSource) -> None:
        if self.config.start.load_optim:
            load_optimizer(source, self.optimizer, self.plan.start.optimizer_steps)
        if self.config.start.load_rng:
            load_random_state(source, self.mesh)
        consumed = self.plan.start.consumed_samples
        if self.data.order_digest(consumed) != source.description["order_digest"]:
            raise AscendSpeedError(
                f"{source.path}: its first {consumed} samples are not the first {consumed} of this run (other data "
                "files, or another number of epochs through a changed --train-iters); keep the data and "
                "--train-iters, stop early with --exit-interval, or give --finetune to start the data anew"
            )
        if self.loss_scale and source.description["loss_scale"]:
            self.loss_scale.load_state(source.description["loss_scale"])
        self.schedule.advance(consumed, self.plan.start.skipped_samples)
        self._say(f"resumed at iteration {self.iteration} from {source.folder}")

    def train(self) -> list[dict[str, Any]]:
        """Run until `train_iters`, until `exit_interval` says stop, or until SIGTERM does.

        Returns:
            The records of `metrics.jsonl`; empty on every rank but the first.

        Raises:
            StoppedError: SIGTERM came; everything was saved.
        """
        try:
            return self._train()
        finally:
            self.monitor.close()

    def _train(self) -> list[dict[str, Any]]:
        writer = self.writer
        if writer is None:
            while self.iteration < self.config.batch.train_iters and not self._is_exit():
                self._iterate()
            self._say_exit()
            return []
        metrics = MetricsFile(writer.run_folder, self.iteration) if self.mesh.rank == 0 else None
        try:
            with StopSignal(self.mesh) as stop_signal:
                self._train_and_save(writer, metrics, stop_signal)
        finally:
            writer.wait()
            if metrics:
                metrics.close()
        return metrics.records if metrics else []

    def _train_and_save(
        self, writer: CheckpointWriter, metrics: MetricsFile | None, stop_signal: StopSignal
    ) -> None:
        batch, interval = self.config.batch, self.config.start.save_interval
        while self.iteration < batch.train_iters:
            record = self._iterate()
            if metrics:
                metrics.write(record)
            last = self.iteration == batch.train_iters
            with self.monitor.watching(self.iteration, "after the step"):
                stop = stop_signal.is_asked()
            if last or stop or self._is_exit() or (interval and self.iteration % interval == 0):
                self._save(writer, metrics)
            if stop and not last:
                writer.wait()
                raise StoppedError(
                    f"stopped by SIGTERM at iteration {self.iteration} of {batch.train_iters}, which was saved; "
                    "--auto-resume goes on from there"
                )
            if self._is_exit():
                self._say_exit()
                return

    def _is_exit(self) -> bool:
        """Whether `exit_interval` ends the run here."""
        interval = self.config.batch.exit_interval
        return (
            interval is not None
            and self.iteration > self.plan.start.iteration
            and self.iteration % interval == 0
        )

    def _say_exit(self) -> None:
        if self.iteration < self.config.batch.train_iters:
            self._say(
                f"stopping at iteration {self.iteration} of {self.config.batch.train_iters} (--exit-interval)"
            )

    def _iterate(self) -> dict[str, Any]:
        """Do one step and return its record."""
        batch, schedule = self.config.batch, self.schedule
        started = time.perf_counter()
        rate, samples = self.optimizer.learning_rate, schedule.step_samples
        sizes = self.sizes or (batch.micro_batch_size,) * schedule.num_micro_batches
        with self.monitor.step(self.iteration + 1):
            micro_batches = self.data.micro_batches(schedule.consumed_samples, sizes)
            scale = self.loss_scale.scale if self.loss_scale else None
            result = train_step(
                self.model, self.optimizer, micro_batches, self.mesh, self.loss_scale, self.objective
            )
            self.mesh.device.synchronize()
        seconds = time.perf_counter() - started
        tokens = self.mesh.layout.replicas * sum(batch.tokens.numel() for batch in micro_batches)
        self.iteration += 1
        schedule.advance(samples, samples if result.is_skipped else 0)
        self._refuse_not_a_number(result, micro_batches)
        record: dict[str, Any] = {
            "iteration": self.iteration,
            "lm_loss": result.loss if isfinite(result.loss) else None,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "consumed_samples": schedule.consumed_samples,
            "global_batch_size": samples,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": result.tokens,
            "step_seconds": seconds,
            "peak_memory_bytes": self.mesh.device.peak_memory_bytes(),
        }
        auxiliary = {f"auxiliary_losses/{name}": loss for name, loss in result.auxiliary_losses.items()}
        record |= finite_or_none(auxiliary)
        if self.objective is not None:
            record |= finite_or_none(self.objective.measures())
        record |= self.monitor.measures(tokens / seconds)
        if scale is not None:
            record["loss_scale"] = scale
        if scale is not None or result.is_empty:
            record["skipped"] = result.is_skipped
        if self.samples is not None and self.iteration % self.samples.plan.interval == 0:
            record["samples"] = self.samples.write(self.iteration)
        if batch.eval_iters and self.iteration % batch.eval_interval == 0:
            with self.monitor.watching(self.iteration, "validation"):
                record |= self._validation()
        if result.is_empty:
            self._say(
                f"iteration {self.iteration}: no token of its batch counts in the loss, all are masked; the step was "
                "skipped"
            )
        elif self.iteration % batch.log_interval == 0 or self.iteration in (1, batch.train_iters):
            self._report(record)
        self.monitor.write(record)
        return record

    def _validation(self) -> dict[str, float | None]:
        """Measure on the samples that belong to this iteration, so that a resumed run measures the same."""
        batch = self.config.batch
        size = self.schedule.global_batch_size
        measured = (self.iteration // batch.eval_interval - 1) * batch.eval_iters * size
        per_batch = size // (batch.micro_batch_size * self.mesh.layout.dp)
        micro_batches = self.data.validation_batches(
            measured, (batch.micro_batch_size,) * (batch.eval_iters * per_batch)
        )
        if self.objective is None:
            found = {"loss": evaluate(self.model, micro_batches, self.mesh)}
        else:
            found = self.objective.evaluate(micro_batches)
        return {f"validation_{name}": value for name, value in finite_or_none(found).items()}

    def _refuse_not_a_number(self, result: StepResult, micro_batches: Sequence[MicroBatch]) -> None:
        """End the run when the weights would be spoilt, or when no smaller loss scale is left to try."""

        def again(scale: float) -> None:
            count, loss_of = result.tokens, None
            if self.objective is not None:
                count, loss_of = self.objective.start(micro_batches)
            forward_backward(self.model, self.optimizer, micro_batches, self.mesh, count, scale, loss_of)

        def where(scale: float = 1.0) -> str:
            return where_not_finite(self.model, self.mesh, lambda: again(scale))

        if result.is_empty:
            return
        if result.is_skipped:
            if self.loss_scale and self.loss_scale.is_exhausted:
                raise AscendSpeedError(
                    f"iteration {self.iteration}: fp16 overflows at loss_scale={self.loss_scale.scale}, and it may not "
                    f"fall further; {where(self.loss_scale.scale)}; use --bf16, or go on from the last checkpoint "
                    "with a lower --lr or other data"
                )
            return
        assert result.grad_norm is not None
        if not (isfinite(result.loss) and isfinite(result.grad_norm)):
            raise AscendSpeedError(
                f"iteration {self.iteration}: loss={result.loss}, grad_norm={result.grad_norm}; {where()}; "
                "go on from the last checkpoint with a lower --lr or other data"
            )

    def _save(self, writer: CheckpointWriter, metrics: MetricsFile | None) -> None:
        progress = Progress(
            self.iteration,
            self.schedule.consumed_samples,
            self.schedule.skipped_samples,
            self.optimizer.num_steps,
            self.plan.start.data_order,
            self.data.order_digest(self.schedule.consumed_samples),
        )
        run = self.config.model_dump(mode="json")
        if self.plan.reference is not None:
            run[RECORD] = self.plan.reference.record()
        writer.save(progress, self.model, self.optimizer, run, self.loss_scale)
        if metrics:
            picture = metrics.path.with_name(PICTURE)
            draw_loss(metrics.records, picture, self.plan.unigram_entropy_nats, self.plan.loss_unit)

    def _report(self, record: dict[str, Any]) -> None:
        left = (self.config.batch.train_iters - self.iteration) * record["step_seconds"]
        validation = ""
        if "validation_loss" in record:
            measured = record["validation_loss"]
            validation = f" | validation {shown(measured, 4)}"
        if self.objective is not None:
            validation += f" | reward margin {shown(record['reward_margin'], 4)}"
            validation += f" | reward accuracy {shown(record['reward_accuracy'], 3)}"
        loss = shown(record["lm_loss"], 4)
        scale = f" | loss scale {record['loss_scale']:.0f}" if "loss_scale" in record else ""
        norm = "overflow, skipped" if record["grad_norm"] is None else f"grad norm {record['grad_norm']:.3f}"
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        speed += f" | MFU {record['mfu']:.1%}" if "mfu" in record else ""
        self._say(
            f"iteration {self.iteration}/{self.config.batch.train_iters} | loss {loss}{validation} | {norm}{scale}"
            f" | lr {record['learning_rate']:.2e} | {speed} | {left:,.0f} s left"
        )

    def _say(self, message: str) -> None:
        if self.mesh.rank == 0:
            log(message)


def finite_or_none(found: Mapping[str, float]) -> dict[str, float | None]:
    """Return values as JSON can hold them."""
    return {name: value if isfinite(value) else None for name, value in found.items()}


def shown(value: float | None, places: int) -> str:
    """Return a value for the log."""
    return "not finite" if value is None else f"{value:.{places}f}"
