"""Options of a training run: model, data, optimization, checkpoints."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.compute import ComputeConfig as ComputeConfig
from ascendspeed_core.config.data import DataConfig as DataConfig
from ascendspeed_core.config.eval_prompts import EvalPromptsConfig
from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ArchitectureFlags
from ascendspeed_core.config.monitor import MonitorConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.recipes import RecipeConfig
from ascendspeed_core.config.recompute import RecomputeConfig as RecomputeConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.device import DeviceChoice


class LaunchConfig(Config):
    """Device and number of ranks."""

    device: DeviceChoice = Field(
        "auto", description="Device; auto takes npu, then cuda, then cpu, and says which."
    )
    nproc_per_node: int = Field(
        1, ge=1, description="Processes to start on this machine; under torchrun leave it out."
    )


class PrecisionConfig(Config):
    """Number format of weights and arithmetic."""

    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Format of weights and arithmetic. [default: float32]"
    )
    fp16: bool = Field(False, description="Short for --dtype float16.")
    bf16: bool = Field(False, description="Short for --dtype bfloat16.")

    @model_validator(mode="after")
    def _one_format(self) -> "PrecisionConfig":
        chosen = [
            d for d in (self.dtype, "float16" if self.fp16 else None, "bfloat16" if self.bf16 else None) if d
        ]
        if len(set(chosen)) > 1:
            raise ValueError(
                f"{' and '.join(chosen)} were both asked for; give one of --dtype, --fp16, --bf16"
            )
        return self

    @property
    def dtype_name(self) -> str:
        """The format that was chosen, as torch names it."""
        return self.dtype or ("float16" if self.fp16 else "bfloat16" if self.bf16 else "float32")


class LossScaleConfig(Config):
    """Loss scaling in fp16 training; other formats need none."""

    loss_scale: float | None = Field(
        None, gt=0, description="Fixed loss scale. [default: dynamic, adapts to overflows]"
    )
    initial_loss_scale: float = Field(
        2.0**32, gt=0, description="First dynamic loss scale; halved on overflow until nothing overflows."
    )
    min_loss_scale: float = Field(
        1.0, gt=0, description="Lowest dynamic loss scale; an overflow there ends the run."
    )
    loss_scale_window: int = Field(
        1000, ge=1, description="Steps without an overflow before the scale doubles."
    )
    hysteresis: int = Field(2, ge=1, description="Overflows before the scale is halved.")

    @model_validator(mode="after")
    def _scales_in_order(self) -> "LossScaleConfig":
        if self.min_loss_scale > self.initial_loss_scale:
            raise ValueError(
                f"min_loss_scale={self.min_loss_scale} is above initial_loss_scale={self.initial_loss_scale}; choose a "
                "smaller one"
            )
        return self


class StartConfig(ModelSourceConfig):
    """Where a run starts: its weights, and what else it takes from a checkpoint."""

    finetune: bool = Field(
        False,
        description="Take only the weights of --load, and start a new run: iteration, optimizer state "
        "and data order begin at 0.",
    )
    auto_resume: bool = Field(
        False,
        description="Resume from the newest checkpoint in --save; if there is none, start a new run, and say so.",
    )
    load_optim: bool = Field(True, description="Resume with the optimizer state of the checkpoint.")
    load_rng: bool = Field(
        True, description="Resume with the state of the random number generators of the checkpoint."
    )


class CheckpointConfig(Config):
    """Where the results of a run go, and which checkpoints are kept."""

    save: Path | None = Field(None, description="Folder of the run: checkpoints, metrics.jsonl, loss.png.")
    save_interval: int | None = Field(
        None, ge=1, description="Save a checkpoint every N iterations; the last iteration is always saved."
    )
    async_save: bool = Field(
        False,
        description="Write checkpoints in the background while training goes on; needs host memory for a "
        "copy of what is saved.",
    )
    keep_checkpoints: int | None = Field(
        None,
        ge=1,
        description="Number of newest checkpoints to keep; older ones are deleted. [default: keep all]",
    )
    save_retain_interval: int | None = Field(
        None, ge=1, description="Never delete checkpoints whose iteration is a multiple of this."
    )


class TrainingConfig(Config):
    """How long the run is, and the seed of its random numbers."""

    train_iters: int = Field(
        0,
        ge=0,
        description="Optimizer steps of the whole run; 0: taken from --train-samples or --num-train-epochs.",
        validate_default=True,
    )
    train_samples: int | None = Field(
        None,
        ge=1,
        description="Samples of the whole run, in place of --train-iters; an incomplete last step is "
        "dropped.",
    )
    num_train_epochs: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Passes over the training data, in place of --train-iters; an incomplete last step is filled "
        "up from the next pass.",
    )
    exit_interval: int | None = Field(
        None,
        ge=1,
        description="Save and stop at the next iteration that is a multiple of this; --auto-resume goes on later.",
    )
    seed: int = Field(1234, description="Seed of random weights and of the order of samples.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        lengths = {
            "train_iters": self.train_iters or None,
            "train_samples": self.train_samples,
            "num_train_epochs": self.num_train_epochs,
        }
        given = [f"{name}={value}" for name, value in lengths.items() if value is not None]
        if not given:
            raise ValueError(
                "train_iters=0 or missing, and neither train_samples nor num_train_epochs; give --train-iters, "
                "--train-samples or --num-train-epochs"
            )
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were both given; give one")
        return self


class EvaluationConfig(Config):
    """When the loss of held-out data is measured."""

    eval_interval: int = Field(
        1000,
        ge=1,
        description="Steps between two evaluations of the held-out data. Given without --eval-iters, all of that data "
        "is measured each time.",
    )
    eval_iters: int = Field(
        0,
        ge=0,
        description="Batches of one evaluation, each of --global-batch-size samples; 0 evaluates nothing.",
    )

    @property
    def measures_all(self) -> bool:
        """Whether an evaluation takes all held-out data: it is asked for, without a number of batches."""
        return "eval_interval" in self.model_fields_set and "eval_iters" not in self.model_fields_set


class LoggingConfig(Config):
    """What a run prints."""

    log_interval: int = Field(10, ge=1, description="Steps between two lines on the terminal.")


class DropoutConfig(Config):
    """Dropout while training; the families here were trained without."""

    hidden_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the outputs of embedding, attention and MLP, before they are added to "
        "the residual stream.",
    )
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on attention weights; needs --attention auto or reference."
    )

    @property
    def is_any(self) -> bool:
        """Whether anything is dropped."""
        return bool(self.hidden_dropout or self.attention_dropout)


class PretrainConfig(Config):
    """Everything `asd-core pretrain` takes; the sections of a TOML recipe."""

    recipe: RecipeConfig = RecipeConfig()
    start: StartConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    model: ArchitectureFlags = ArchitectureFlags()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    compute: ComputeConfig = ComputeConfig()
    loss_scaling: LossScaleConfig = LossScaleConfig()
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    training: TrainingConfig
    recompute: RecomputeConfig = RecomputeConfig()
    experts: ExpertsConfig = ExpertsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    dropout: DropoutConfig = DropoutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    eval_prompts: EvalPromptsConfig = EvalPromptsConfig()
    logging: LoggingConfig = LoggingConfig()
    monitor: MonitorConfig = MonitorConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def objective(self) -> str:
        """Name of what the run trains for, see `objectives.registry`."""
        return "next_token"

    @property
    def takes_weights_only(self) -> bool:
        """Whether a --load outside --save gives only weights, and the run begins its own data and schedule."""
        return False

    @property
    def adapters(self) -> LoraConfig | None:
        """Options of the adapters that are trained in place of the weights, if any are."""
        return None

    @model_validator(mode="after")
    def _resume_needs_save(self) -> Self:
        if self.start.auto_resume and self.checkpoint.save is None:
            raise ValueError("auto_resume=true needs --save DIR, where the checkpoints are")
        return self

    @model_validator(mode="after")
    def _held_out_data_is_measured(self) -> Self:
        data, measured = self.data, self.evaluation.eval_iters
        if self.evaluation.measures_all and data.valid_data_path:
            return self
        for name, words in (
            ("valid_data_path", data.valid_data_path),
            ("test_data_path", data.test_data_path),
        ):
            if words and not measured:
                raise ValueError(
                    f"{name} is measured by nothing with eval_iters=0; give --eval-iters N, its number of batches"
                )
        if measured and data.has_own_paths and not data.valid_data_path and not data.test_data_path:
            raise ValueError(
                f"eval_iters={measured} has nothing to measure beside train_data_path; give --valid-data-path, or "
                "leave it out"
            )
        return self
