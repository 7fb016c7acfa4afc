"""Gradients reduced beside the backward pass, and parameters gathered before the layers that need them.

Parameters are put into buckets in the order in which a backward pass reaches them (Li et al., 2020, PyTorch
Distributed, section 3.2.3). In the last backward of a step a bucket's message starts when its gradients are complete.
Buckets of a stage start in one order on all ranks: one whose parameters got no gradient, as those of an expert without
tokens, holds back those behind it, and starts with them when the backward is over.

The messages are the same, and so are the bits of the sums, whether they start early or late.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.gradient_sum import FinishSums, ParameterSlot, Replicas
from ascendspeed_core.parallel.timeline import Reduction


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients are summed in one message.

    Attributes:
        stage: index of the stage whose backward completes them; `None` for those that several stages of this rank use.
        replicas: the ranks over which they are summed.
        slots: the parameters.
        missing: how many gradients the running backward still owes.
        started: when the message started.
        finish: waits for the sums; `None` before the message has started.
        gather: waits for the new parameters of other ranks, and takes them over; `None` when they are there.
    """

    stage: int | None
    replicas: Replicas
    slots: list[ParameterSlot] = field(default_factory=list)
    missing: int = 0
    started: float = 0.0
    finish: FinishSums | None = None
    gather: Callable[[], None] | None = None

    @property
    def elements(self) -> int:
        """Numbers of its parameters on this rank."""
        return sum(slot.parameter.numel() for slot in self.slots)

    def start(self) -> None:
        """Start the message."""
        self.started = time.perf_counter()
        self.finish = self.replicas.start_sums(self.slots)

    def wait(self) -> None:
        """Wait for the new parameters."""
        gather, self.gather = self.gather, None
        if gather is not None:
            gather()


def make_buckets(model: Transformer, slots: Iterable[ParameterSlot], elements: int) -> list[Bucket]:
    """Put parameters into buckets, each in the order in which a backward reaches them.

    Args:
        model: this rank's stages.
        slots: its trained parameters.
        elements: of a bucket on this rank, which its last parameter may exceed.
    """
    used_by: dict[int, set[int]] = {}
    for stage in model.stages:
        for module in model.modules_of(stage):
            for parameter in module.parameters():
                used_by.setdefault(id(parameter), set()).add(stage.index)
    made: list[Bucket] = []
    open_ones: dict[tuple[int | None, tuple[str, ...]], Bucket] = {}
    for slot in reversed(list(slots)):
        users = used_by.get(id(slot.parameter), set())
        only_user = next(iter(users)) if len(users) == 1 else None
        key = only_user, slot.replicas.axes
        if key not in open_ones or open_ones[key].elements >= elements:
            open_ones[key] = Bucket(only_user, slot.replicas)
            made.append(open_ones[key])
        open_ones[key].slots.append(slot)
    return made


class BucketedReduction:
    """Starts and finishes the messages of all buckets of a rank.

    Args:
        model: this rank's stages.
        slots: its trained parameters.
        elements: of a bucket.
        is_early: messages start while the last backward of their stage runs, otherwise when their sums are asked for.
        gathers_late: new parameters are waited for by the modules that need them; otherwise at once.

    Attributes:
        buckets: all of them.
        noted: what was reduced for the last sums.
    """

    def __init__(
        self,
        model: Transformer,
        slots: Sequence[ParameterSlot],
        elements: int,
        is_early: bool = False,
        gathers_late: bool = False,
    ) -> None:
        self.buckets = make_buckets(model, slots, elements)
        self.noted: list[Reduction] = []
        self._order: list[Bucket] = []
        self._waits_for_gradients = is_early
        self._gathers_late = gathers_late
        if is_early:
            for bucket in self.buckets:
                if bucket.replicas.group is not None and bucket.stage is not None:
                    for slot in bucket.slots:
                        slot.parameter.register_post_accumulate_grad_hook(self._when_complete(bucket))
        if gathers_late:
            self._wait_in_modules(model)

    def begin_last_backward(self, stages: Iterable[Stage]) -> None:
        """Start each message of some stages once its gradients are complete: a backward that begins is their last."""
        if not self._waits_for_gradients:
            return
        self._order = [
            bucket
            for stage in stages
            for bucket in self.buckets
            if bucket.stage == stage.index and bucket.replicas.group is not None and bucket.finish is None
        ]
        for bucket in self._order:
            bucket.missing = len(bucket.slots)

    def end_last_backward(self) -> None:
        """Start what the backward that ended left: gradients that never came are zero."""
        order, self._order = self._order, []
        for bucket in order:
            bucket.start()

    def _when_complete(self, bucket: Bucket) -> Callable[[torch.Tensor], None]:
        # See `ParameterSlot.accumulate_wide`.
        reduction, own = weakref.ref(self), weakref.ref(bucket)

        def note(_: torch.Tensor) -> None:
            found, mine = reduction(), own()
            if found is None or mine is None or mine not in found._order:
                return
            mine.missing -= 1
            while found._order and found._order[0].missing <= 0:
                found._order.pop(0).start()

        return note

    def drop(self) -> None:
        """Forget messages that nobody waits for, once they have arrived."""
        self._order = []
        for bucket in self.buckets:
            finish, bucket.finish = bucket.finish, None
            if finish is not None:
                finish()

    def finish(self) -> dict[str, torch.Tensor]:
        """Return by name the sums over all replicas, of the rows that this rank updates."""
        before = time.perf_counter()
        self.end_last_backward()
        for bucket in self.buckets:
            if bucket.finish is None:
                bucket.start()
        self.noted = []
        sums: dict[str, torch.Tensor] = {}
        for bucket in sorted(self.buckets, key=lambda one: one.started):
            finish, bucket.finish = bucket.finish, None
            assert finish is not None
            sums |= zip((slot.name for slot in bucket.slots), finish(), strict=True)
            end = time.perf_counter()
            if bucket.replicas.group is not None:
                size = bucket.elements * bucket.slots[0].master.itemsize
                self.noted.append(Reduction(bucket.stage, bucket.started, end, end - before, size))
            before = end
        return sums

    def publish(self) -> None:
        """Give all ranks the parameters that each of them updated, first those that the next forward needs first."""
        for bucket in reversed(self.buckets):
            bucket.gather = bucket.replicas.start_publish(bucket.slots)
        if not self._gathers_late:
            self.wait_for_parameters()

    def wait_for_parameters(self) -> None:
        """Wait for all parameters."""
        for bucket in reversed(self.buckets):
            bucket.wait()

    def seconds_alone(self) -> float:
        """Return how long the messages take together, beside nothing else; gradients are dropped."""
        begun = time.perf_counter()
        sent = [bucket for bucket in self.buckets if bucket.replicas.group is not None]
        for finish in [bucket.replicas.start_sums(bucket.slots) for bucket in sent]:
            finish()
        return time.perf_counter() - begun

    def _wait_in_modules(self, model: Transformer) -> None:
        """Let each module of a stage wait for its parameters before it runs."""
        by_parameter = {id(slot.parameter): bucket for bucket in self.buckets for slot in bucket.slots}
        for stage in model.stages:
            modules = model.modules_of(stage)
            for module in modules:
                parameters = list(module.parameters())
                if module is model.final_norm and model.output_head is not None:
                    # The loss may read the head's weight without a call of the head.
                    parameters += model.output_head.parameters()
                needed = {by_parameter[id(p)] for p in parameters if id(p) in by_parameter}

                def wait(*_: object, needed: set[Bucket] = needed) -> None:
                    for bucket in needed:
                        bucket.wait()

                module.register_forward_pre_hook(wait)
