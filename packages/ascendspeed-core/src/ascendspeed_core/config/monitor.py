"""Options of watching a run: TensorBoard, MFU, profiles, and what happens when it hangs."""

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
        description="Peak of one device in TFLOP/s, from which the utilization (MFU) is computed. [default: by the "
        "device's name, for 16-bit formats]",
    )
    profile_steps: tuple[int, ...] = Field(
        (), description="FIRST LAST: iterations that torch's profiler records into the folder of --save."
    )
    profile_ranks: tuple[int, ...] = Field((0,), description="Ranks that are profiled.")
    hang_timeout_seconds: float = Field(
        600.0,
        ge=0,
        description="End the run and name the rank that hangs after this many seconds in which no layer began; 0 turns "
        "the watchdog off.",
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
