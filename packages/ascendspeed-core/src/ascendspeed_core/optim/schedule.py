"""Learning rate, by megatron-core's own scheduler, and samples of a step over a run, as Megatron-LM has them."""

from typing import Any

from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import TrainingConfig
from ascendspeed_core.megatron import megatron
from ascendspeed_core.optim.engine import Engine
from ascendspeed_data.errors import ConfigError


class Schedule:
    """What changes with the number of samples consumed.

    Args:
        engine: its learning rate and weight decay are set.
        optimizer: highest and lowest rate, warm-up, decay.
        batch: batch sizes, ramp-up.
        training: length of the run.
        dp: data-parallel ranks.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: OptimizerConfig,
        batch: BatchConfig,
        training: TrainingConfig,
        dp: int,
    ) -> None:
        self.global_batch_size = batch.resolve_global_batch_size(dp)
        self.consumed_samples = self.skipped_samples = 0
        self._batch, self._samples_of_micro_batches = batch, batch.micro_batch_size * dp
        self._rate = _rate_scheduler(engine, optimizer, training, self.global_batch_size)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank takes in the next step."""
        return self.step_samples // self._samples_of_micro_batches

    @property
    def step_samples(self) -> int:
        """Samples of the next step over all ranks."""
        return samples_of_step(self._batch, self.global_batch_size, self.consumed_samples)

    def advance(self, samples: int, skipped: int = 0) -> None:
        """Count consumed samples and set the rates of the next step, which those of skipped steps do not change."""
        self.consumed_samples += samples
        self.skipped_samples += skipped
        self._rate.step(samples - skipped)


def with_iterations(training: TrainingConfig, batch: BatchConfig, dp: int) -> TrainingConfig:
    """Return `training` with the steps that `train_samples` fills, as Megatron-LM counts them; as it is without.

    Raises:
        ConfigError: the samples do not fill one step.
    """
    if training.train_samples is None:
        return training
    size = batch.resolve_global_batch_size(dp)
    consumed = iterations = 0
    if batch.rampup_batch_size:
        while consumed <= batch.rampup_batch_size[2]:
            step = samples_of_step(batch, size, consumed)
            if consumed + step > training.train_samples:
                break
            consumed, iterations = consumed + step, iterations + 1
    if consumed == 0 or consumed > batch.rampup_batch_size[2]:
        iterations += (training.train_samples - consumed) // size
    if iterations == 0:
        first = batch.rampup_batch_size[0] if batch.rampup_batch_size else size
        raise ConfigError(
            f"train_samples={training.train_samples} does not fill the first step of {first} samples; give "
            f"{first} or more"
        )
    return training.model_copy(update={"train_iters": iterations})


def with_epochs(
    training: TrainingConfig, batch: BatchConfig, dp: int, samples: int
) -> tuple[TrainingConfig, int]:
    """Return `training` with the steps that take all of some samples, and how many samples these steps take.

    Args:
        training: length of the run.
        batch: batch sizes, ramp-up.
        dp: data-parallel ranks.
        samples: of all epochs.
    """
    size = batch.resolve_global_batch_size(dp)
    consumed = iterations = 0
    if batch.rampup_batch_size:
        while consumed < samples and consumed <= batch.rampup_batch_size[2]:
            consumed += samples_of_step(batch, size, consumed)
            iterations += 1
    full = max(-(-(samples - consumed) // size), 0)
    return training.model_copy(update={"train_iters": iterations + full}), consumed + full * size


def samples_of_run(training: TrainingConfig, batch: BatchConfig, dp: int) -> int:
    """Return how many samples all steps of a run consume, ramp-up included."""
    size = batch.resolve_global_batch_size(dp)
    if not batch.rampup_batch_size:
        return training.train_iters * size
    consumed = 0
    for _ in range(training.train_iters):
        consumed += samples_of_step(batch, size, consumed)
    return consumed


def samples_of_step(batch: BatchConfig, size: int, consumed: int) -> int:
    """Return how many samples the next step takes over all ranks.

    The rule is that of `RampupBatchsizeNumMicroBatchesCalculator`, which megatron-core had up to 0.17.

    Args:
        batch: batch sizes, ramp-up.
        size: of the global batch after it.
        consumed: samples of the steps before.
    """
    start, increment, samples = batch.rampup_batch_size or (size, 1, 0)
    if start == size or not samples or consumed > samples:
        return size
    samples_of_increment = samples / ((size - start) // increment)
    return start + int(consumed / samples_of_increment) * increment


def _rate_scheduler(
    engine: Engine, config: OptimizerConfig, training: TrainingConfig, global_batch_size: int
) -> Any:
    if training.train_samples is not None:
        decay_samples = config.lr_decay_samples or training.train_samples
        warmup_samples = config.lr_warmup_samples
    else:
        decay_samples = (config.lr_decay_iters or training.train_iters) * global_batch_size
        warmup_samples = config.lr_warmup_iters * global_batch_size
    warmup_samples = min(warmup_samples, decay_samples - 1)
    if config.lr_warmup_fraction is not None:
        warmup_samples = int(config.lr_warmup_fraction * decay_samples)
    return megatron("optimizer_param_scheduler").OptimizerParamScheduler(
        engine.rule,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_samples,
        lr_decay_steps=decay_samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=decay_samples,
        wd_incr_style="constant",
    )
