"""One training run on one rank: what it is made of, the loop, and what follows each step."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from signal import Signals
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, kernel_context, load_model
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.kernels.registry import table, update_choice
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.observability.metrics import (
    LOAD_PICTURE,
    PICTURE,
    MetricsFile,
    draw_expert_load,
    draw_loss,
    finite_or_none,
    format_iteration,
    load_metrics,
)
from ascendspeed_core.observability.monitor import Monitor
from ascendspeed_core.optim.build_engine import make_engine, zero_settings
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.schedule import Schedule
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.planner.auto import plan_micro_batches, plan_recompute
from ascendspeed_core.training.check_finite import check_evaluation, check_finite
from ascendspeed_core.training.checkpoint import (
    CheckpointWriter,
    Retention,
    TrainState,
    load_optimizer,
    load_random_state,
    what_is_kept,
)
from ascendspeed_core.training.eval_prompts import EvalPromptsWriter
from ascendspeed_core.training.signals import NAMES, StoppedError, StopSignal
from ascendspeed_core.training.step import StepResult, train_step
from ascendspeed_core.training.validate import RunPlan
from ascendspeed_core.weights import NativeSource, WeightSource
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, DataError


class Trainer:
    """One run on this rank, from its plan to its last checkpoint.

    Args:
        plan: what to do, checked.
        mesh: of this rank.
    """

    def __init__(self, plan: RunPlan, mesh: ParallelMesh) -> None:
        self.plan, self.mesh = plan, mesh
        self.config: PretrainConfig = plan.config
        config = self.config
        self.dtype: torch.dtype = getattr(torch, config.precision.dtype_name)
        torch.manual_seed(config.training.seed + mesh.rank)
        self.writer = self._checkpoint_writer()
        self._record_of_plan = plan.checkpoint_record() if self.writer and mesh.rank == 0 else {}
        self.metrics: MetricsFile | None = None

        settings = zero_settings(config, plan.model, plan.layout)
        fusion = config.compute.mlp_layer_fusion
        self.model = load_model(plan.source, mesh, self.dtype, fusion, settings)
        self.kernel_context = kernel_context(
            self.model,
            mesh,
            config.data.seq_length,
            config.batch,
            lengths_vary=config.data.lengths_vary,
            drops_attention=config.dropout.attention_dropout > 0,
        )
        kernels = apply_kernels(self.model, config.compute, self.kernel_context)
        train_routers(self.model, config.experts)
        apply_recompute(self.model, config.recompute, mesh.pp_rank)
        self.objective = plan.objective.make_loss(self.model, mesh, self._load_frozen)
        self.engine = make_engine(self.model, config, mesh, settings)
        self.sizes, lines = plan_micro_batches(self.model, self.engine, config, mesh)
        apply_dropout(self.model, config.dropout, config.training.seed, mesh)
        self._log(*lines)
        self._log(*table([*kernels, update_choice(config.optimizer.optimizer, self.kernel_context)]))
        self.loss_scale = LossScale.create(config.loss_scaling, is_fp16=self.dtype == torch.float16)
        self.schedule = Schedule(self.engine, config.optimizer, config.batch, config.training, mesh.layout.dp)
        self.data = plan.objective.open_data(
            config.data,
            config.training.seed,
            plan.num_samples,
            plan.model.vocab_size,
            mesh,
        )
        self._check_same_data()
        self._log(*plan_recompute(self.model, self.engine, config, mesh, self.data, self.sizes))
        self.iteration = plan.state.iteration
        self.monitor = Monitor(config, self.model, mesh, self.iteration, self._log)
        self.eval_prompts = None
        if plan.eval_prompts is not None:
            folder = config.checkpoint.save
            self.eval_prompts = EvalPromptsWriter(plan.eval_prompts, self.model, mesh, folder, self.iteration)
        if plan.checkpoint is not None and plan.resumes:
            self._resume(plan.checkpoint)

    def train(self) -> list[dict[str, Any]]:
        """Run until `train_iters`, until `exit_interval` says stop, or until SIGTERM or Ctrl-C does.

        Returns:
            The records of `metrics.jsonl`; empty on every rank but the first.

        Raises:
            StoppedError: SIGTERM or Ctrl-C came; everything was saved.
        """
        train_iters = self.config.training.train_iters
        with ExitStack() as stack:
            stop_signal = self._open_results(stack)
            while self.iteration < train_iters and not self._is_exit():
                started = time.perf_counter()
                rate, samples = self.engine.learning_rate, self.schedule.step_samples
                scale = self.loss_scale.scale if self.loss_scale else None
                with self.monitor.step(self.iteration + 1):
                    micro_batches = self.data.micro_batches(
                        self.schedule.consumed_samples, self._micro_batch_sizes()
                    )
                    result = train_step(
                        self.model, self.engine, micro_batches, self.mesh, self.loss_scale, self.objective
                    )
                    self.mesh.device.synchronize()
                seconds = time.perf_counter() - started
                self.iteration += 1
                self.schedule.advance(samples, samples if result.is_skipped else 0)
                self._check_finite(result, micro_batches)
                record = self._record(result, micro_batches, samples, rate, seconds)
                if scale is not None:
                    record["loss_scale"] = scale
                if scale is not None or result.is_empty:
                    record["skipped"] = result.is_skipped
                self._evaluate(record)
                self._test(record)
                self._report(record, result)
                if stop_signal is not None:
                    self._save_if_due(stop_signal)
            self.engine.wait_for_parameters()
            if self.iteration < train_iters:
                self._log(f"stopping at iteration {self.iteration} of {train_iters} (--exit-interval)")
        return self.metrics.records if self.metrics else []

    def _checkpoint_writer(self) -> CheckpointWriter | None:
        config = self.config.checkpoint
        if config.save is None:
            return None
        return CheckpointWriter(
            config.save,
            self.mesh,
            Retention(config.keep_checkpoints, config.save_retain_interval),
            config.async_save,
            on_saved=lambda saved: log(f"saved {saved}"),
            base=self.plan.source.path,
        )

    def _load_frozen(self, source: WeightSource) -> Transformer:
        """Load a second model under the layout and kernels of the run."""
        compute = self.config.compute
        model = load_model(source, self.mesh, self.dtype, compute.mlp_layer_fusion)
        apply_kernels(model, compute, self.kernel_context)
        return model

    def _check_same_data(self) -> None:
        """Machines may have their own copies of the data, but they must be copies."""
        digests = gather_objects(self.data.content_digest(self.plan.num_samples[0]), self.mesh)
        different = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if different is not None:
            raise DataError(
                f"the training samples of rank {different} are not those of rank 0; give all machines the same "
                "data files"
            )

    def _resume(self, source: NativeSource) -> None:
        """Take over optimizer, random state, data position and schedule from a checkpoint."""
        state = self.plan.state
        if self.config.start.load_optim:
            load_optimizer(source, self.engine, state.optimizer_steps)
        if self.config.start.load_rng:
            load_random_state(source, self.mesh)
        consumed = state.consumed_samples
        if self.data.order_digest(consumed) != source.description["order_digest"]:
            raise AscendSpeedError(
                f"{source.path}: its first {consumed} samples are not the first {consumed} of this run (other data "
                "files, or another number of epochs through a changed --train-iters); keep the data and "
                "--train-iters, stop early with --exit-interval, or give --finetune to start the data anew"
            )
        if self.loss_scale and source.description["loss_scale"]:
            self.loss_scale.load_state(source.description["loss_scale"])
        self.schedule.advance(consumed, state.skipped_samples)
        self._log(f"resumed at iteration {self.iteration} from {source.folder}")

    def _open_results(self, stack: ExitStack) -> StopSignal | None:
        """Open what the loop writes to, closed when the stack is; without --save SIGTERM ends the run at once."""
        stack.callback(self.monitor.close)
        if self.writer is None:
            return None
        if self.mesh.rank == 0:
            self.metrics = MetricsFile(self.writer.run_folder, self.iteration)
            stack.callback(self.metrics.close)
        stack.callback(self.writer.wait)
        return stack.enter_context(StopSignal(self.mesh, partial(what_is_kept, self.writer.run_folder)))

    def _is_exit(self) -> bool:
        """Whether `exit_interval` ends the run here."""
        interval = self.config.training.exit_interval
        return (
            interval is not None
            and self.iteration > self.plan.state.iteration
            and self.iteration % interval == 0
        )

    def _micro_batch_sizes(self) -> Sequence[int]:
        """Return the sizes of this rank's micro-batches in the next step."""
        return self.sizes or (self.config.batch.micro_batch_size,) * self.schedule.num_micro_batches

    def _check_finite(self, result: StepResult, micro_batches: Sequence[MicroBatch]) -> None:
        check_finite(
            result,
            self.iteration,
            self.model,
            self.engine,
            micro_batches,
            self.mesh,
            self.loss_scale,
            self.objective,
        )

    def _record(
        self,
        result: StepResult,
        micro_batches: Sequence[MicroBatch],
        samples: int,
        rate: float,
        seconds: float,
    ) -> dict[str, Any]:
        """Return what `metrics.jsonl` says of a step.

        Args:
            result: of the step.
            micro_batches: of this rank.
            samples: of the global batch.
            rate: learning rate of the step.
            seconds: that it took.
        """
        tokens = self.mesh.layout.replicas * sum(batch.tokens.numel() for batch in micro_batches)
        record: dict[str, Any] = {
            "iteration": self.iteration,
            **finite_or_none({"lm_loss": result.loss}),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "consumed_samples": self.schedule.consumed_samples,
            "global_batch_size": samples,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": result.tokens,
            "step_seconds": seconds,
            "peak_memory_bytes": self.mesh.device.peak_memory_bytes(),
        }
        auxiliary = {f"auxiliary_losses/{name}": loss for name, loss in result.auxiliary_losses.items()}
        record |= finite_or_none(auxiliary)
        if result.expert_loads is not None:
            record |= load_metrics(result.expert_loads.tolist(), self.plan.model)
        record |= finite_or_none(self.objective.metrics())
        return record | self.monitor.metrics(tokens / seconds)

    def _evaluate(self, record: dict[str, Any]) -> None:
        """Continue the prompts and measure the held-out loss, where this iteration is one of theirs."""
        prompts, evaluation = self.eval_prompts, self.config.evaluation
        if prompts is not None and self.iteration % prompts.plan.interval == 0:
            # A recorded pass does not ask for them.
            self.engine.wait_for_parameters()
            record["samples"] = prompts.write(self.iteration)
        if not self.plan.num_samples[1] or self.iteration % evaluation.eval_interval:
            return
        with self.monitor.watching(self.iteration, "validation"):
            # The samples belong to the iteration, so that a resumed run measures the same.
            size = self.schedule.global_batch_size
            evaluated = (self.iteration // evaluation.eval_interval - 1) * evaluation.eval_iters * size
            micro_batches = self.data.validation_batches(evaluated, self._evaluation_sizes())
            found = self._measured("validation", micro_batches)
        record |= {f"validation_{name}": value for name, value in found.items()}

    def _test(self, record: dict[str, Any]) -> None:
        """Measure the loss of the test data after the last step."""
        if not self.plan.num_samples[2] or self.iteration != self.config.training.train_iters:
            return
        with self.monitor.watching(self.iteration, "test"):
            micro_batches = self.data.test_batches(self._evaluation_sizes())
            found = self._measured("test", micro_batches)
        record |= {f"test_{name}": value for name, value in found.items()}

    def _measured(self, what: str, micro_batches: Sequence[MicroBatch]) -> dict[str, float | None]:
        measure = self.objective.evaluate
        values = measure(micro_batches)
        check_evaluation(what, self.iteration, values, micro_batches, self.mesh, measure)
        return finite_or_none(values)

    def _evaluation_sizes(self) -> tuple[int, ...]:
        """Return the sizes of this rank's micro-batches in one evaluation."""
        size = self.config.batch.micro_batch_size
        per_batch = self.schedule.global_batch_size // (size * self.mesh.layout.dp)
        return (size,) * (self.config.evaluation.eval_iters * per_batch)

    def _report(self, record: dict[str, Any], result: StepResult) -> None:
        """Write a record to the log, to TensorBoard and to `metrics.jsonl`."""
        train_iters = self.config.training.train_iters
        if result.is_empty:
            self._log(
                f"iteration {self.iteration}: no token of its batch counts in the loss, all are masked; the step was "
                "skipped"
            )
        elif self.iteration % self.config.logging.log_interval == 0 or self.iteration in (1, train_iters):
            self._log(format_iteration(record, train_iters, self.plan.objective.logged_metrics))
        self.monitor.write(record)
        if self.metrics:
            self.metrics.write(record)

    def _save_if_due(self, stop_signal: StopSignal) -> None:
        """Write a checkpoint where one is due, and end the run after it when a signal asked for that."""
        assert self.writer is not None
        train_iters, interval = self.config.training.train_iters, self.config.checkpoint.save_interval
        is_last = self.iteration == train_iters
        with self.monitor.watching(self.iteration, "after the step"):
            stopped_by = stop_signal.requested()
        if is_last or stopped_by or self._is_exit() or (interval and self.iteration % interval == 0):
            self._save(self.writer)
        if stopped_by and not is_last:
            self.writer.wait()
            raise StoppedError(
                f"stopped by {NAMES[Signals(stopped_by)]} at iteration {self.iteration} of {train_iters}, which was "
                f"saved in {self.writer.run_folder}; the same command with --auto-resume goes on from there",
                stopped_by,
            )

    def _save(self, writer: CheckpointWriter) -> None:
        state = TrainState(
            self.iteration,
            self.schedule.consumed_samples,
            self.schedule.skipped_samples,
            self.engine.num_steps,
            self.plan.state.data_order,
            self.data.order_digest(self.schedule.consumed_samples),
        )
        run_config = self.config.model_dump(mode="json") | self._record_of_plan
        writer.save(state, self.model, self.engine, run_config, self.loss_scale)
        if self.metrics:
            picture = self.metrics.path.with_name(PICTURE)
            entropy, unit = self.plan.unigram_entropy_nats, self.plan.objective.loss_unit
            draw_loss(self.metrics.records, picture, entropy, unit)
            draw_expert_load(self.metrics.records, picture.with_name(LOAD_PICTURE))

    def _log(self, *lines: str) -> None:
        """Write lines to the log, once for all ranks."""
        if self.mesh.rank == 0:
            for line in lines:
                log(line)
