"""Options of watching a run: where its figures go, and what happens when it stands still."""

from pathlib import Path

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config


class MonitorConfig(Config):
    """What is watched while a run goes on."""

    tensorboard_dir: Path | None = Field(
        None, description="Folder for TensorBoard, beside metrics.jsonl; needs the extra [tensorboard]."
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="Most that one device computes, in 10^12 operations per second, for the share that is used (MFU). "
        "[default: by the device's name, for 16-bit formats]",
    )
    profile_steps: tuple[int, ...] = Field(
        (), description="FIRST LAST: iterations that torch's profiler records into the folder of --save."
    )
    profile_ranks: tuple[int, ...] = Field((0,), description="Processes that are profiled.")
    hang_timeout_seconds: float = Field(
        600.0,
        ge=0,
        description="End the run, and name the process that hangs, when no layer was begun for so long; 0 does not "
        "watch.",
    )

    @model_validator(mode="after")
    def _profile_is_a_range(self) -> "MonitorConfig":
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ValueError(
                f"profile_steps={' '.join(map(str, steps))} is not FIRST LAST; write for example --profile-steps 10 12"
            )
        if not steps and "profile_ranks" in self.model_fields_set:
            raise ValueError("profile_ranks means nothing without --profile-steps; give it too")
        return self
