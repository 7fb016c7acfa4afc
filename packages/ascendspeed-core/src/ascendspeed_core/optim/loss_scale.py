"""Loss scaling for fp16, whose smallest number is 6e-8: gradients below it would vanish (Micikevicius et al., 2018).

The loss is multiplied before the backward pass and the gradients are divided after it. A scale that is too large shows
as an infinite gradient; then the step is skipped, on every rank alike.
"""

from dataclasses import asdict, dataclass

from ascendspeed_core.config.training import LossScaleConfig

GROWTH, BACKOFF = 2.0, 0.5


@dataclass
class LossScale:
    """The factor of the loss, and when it changes: the rule of Megatron-LM's `DynamicGradScaler`.

    Attributes:
        config: limits; a static scale never changes.
        scale: factor of the next step.
        steps_without_overflow: since the last change; after `loss_scale_window` of them the scale doubles.
        overflows_left: how many overflows are passed over before the scale is halved.
    """

    config: LossScaleConfig
    scale: float
    steps_without_overflow: int
    overflows_left: int

    @classmethod
    def create(cls, config: LossScaleConfig, is_fp16: bool) -> "LossScale | None":
        """Return the scale of a new run; `None` where the number format needs none."""
        if not is_fp16:
            return None
        return cls(config, config.loss_scale or config.initial_loss_scale, 0, config.hysteresis)

    def update(self, overflow: bool) -> None:
        """Learn from a step."""
        if self.config.loss_scale is not None:
            return
        if overflow:
            self.steps_without_overflow = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale * BACKOFF, self.config.min_loss_scale)
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow == self.config.loss_scale_window:
            self.steps_without_overflow = 0
            self.overflows_left = self.config.hysteresis
            self.scale *= GROWTH

    @property
    def is_exhausted(self) -> bool:
        """Whether an overflow can no longer be answered by a smaller scale."""
        return self.config.loss_scale is not None or self.scale <= self.config.min_loss_scale

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {key: value for key, value in asdict(self).items() if key != "config"}

    def load_state(self, state: dict[str, float]) -> None:
        """Take over what a checkpoint kept; a static scale stays as given."""
        if self.config.loss_scale is None:
            self.scale = float(state["scale"])
            self.steps_without_overflow = int(state["steps_without_overflow"])
            self.overflows_left = int(state["overflows_left"])
