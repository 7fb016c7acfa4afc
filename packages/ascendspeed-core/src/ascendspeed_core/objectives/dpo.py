"""Preference tuning without a reward model: DPO (Rafailov et al., 2023, section 4), and two losses of its kind.

With h the difference of two log-ratios, of model to reference for the chosen answer and for the rejected one:

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing (cDPO, Mitchell, 2023)
    ipo      (h - 1/(2 beta))^2, of log-probabilities per token (Azar et al., 2023, equation 17)
    hinge    max(0, 1 - beta h) (SLiC, Zhao et al., 2023)

An answer's log-probability is the sum over its tokens. The loss is the mean over the pairs of the global batch,
however they fall into micro-batches and ranks. The reference is a second model under the same layout, weights only
and forward only; its results are not kept from run to run, so that none can be stale. Of a model with adapters it is
the model itself without them, where that is the same.

Shapes: B pairs of a micro-batch, which has 2B rows (chosen and rejected in turn), S sequence length (S/cp under context
parallelism).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ascendspeed_core.config.preference import DpoConfig, PreferenceConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.padded_dataset import DatasetFormat
from ascendspeed_core.data.preference_dataset import PREFERENCE_FORMAT
from ascendspeed_core.models.lora import adapters_off
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.objective import LoadFrozen, MicroBatchLoss
from ascendspeed_core.objectives.padded import PaddedObjective
from ascendspeed_core.objectives.reference import REFERENCE_KEY, Reference, open_reference
from ascendspeed_core.parallel.collectives import sum_over_group
from ascendspeed_core.parallel.cross_entropy import losses_of
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.weights import NativeSource, WeightSource

METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "log_prob_chosen",
    "log_prob_rejected",
)
"""Means over the pairs of a step. A reward is beta times an answer's log-ratio of model to reference; accuracy is the
share of pairs whose chosen answer has the higher one, a tie counting for half."""


@dataclass(frozen=True)
class DirectPreferenceOptimization(PaddedObjective):
    """Prefer the chosen answer of each pair, without straying far from a reference.

    Attributes:
        config: kind of the loss.
        reference: what the model is compared with.
    """

    name: ClassVar[str] = "dpo"
    loss_unit: ClassVar[str] = "per pair"
    data_order: ClassVar[Mapping[str, Any]] = {"pairs": True}
    data_format: ClassVar[DatasetFormat] = PREFERENCE_FORMAT
    logged_metrics: ClassVar[Mapping[str, int]] = {"reward_margin": 4, "reward_accuracy": 3}

    config: PreferenceConfig
    reference: Reference

    @classmethod
    def plan(
        cls, config: PretrainConfig, source: WeightSource, checkpoint: NativeSource | None
    ) -> "DirectPreferenceOptimization":
        """Open the reference: the one given, that of the run that goes on, or the weights that it starts from."""
        assert isinstance(config, DpoConfig)
        return cls(config.preference, open_reference(config, source, checkpoint))

    def make_loss(self, model: Transformer, mesh: ParallelMesh, load_frozen: LoadFrozen) -> "PreferenceLoss":
        """Return the loss of pairs, with the reference beside the model unless that is the model's own base."""
        reference = None if self.reference.is_base else load_frozen(self.reference.source)
        return PreferenceLoss(model, reference, self.config, mesh)

    def describe(self) -> list[str]:
        """Say what the model is compared with."""
        how = "the model without its adapters" if self.reference.is_base else "a second model"
        return [f"reference: {self.reference.folder}, {how}"]

    def checkpoint_record(self) -> dict[str, Any]:
        """Return which reference it is, so that a run that goes on keeps it."""
        return {REFERENCE_KEY: self.reference.record()}


class PreferenceLoss:
    """The loss of pairs, and what is reported beside it.

    Args:
        model: what is trained, this rank's part.
        reference: what it is compared with, cut alike; `None` is the model without its adapters.
        config: kind of the loss.
        mesh: of this rank.
    """

    def __init__(
        self,
        model: Transformer,
        reference: Transformer | None,
        config: PreferenceConfig,
        mesh: ParallelMesh,
    ) -> None:
        self._model, self._config, self._mesh = model, config, mesh
        self._reference = reference.requires_grad_(False) if reference is not None else None
        self._pairs = 0
        self._sums = torch.zeros(len(METRICS), dtype=torch.float64, device=mesh.device.torch)

    def prepare(
        self, micro_batches: Sequence[MicroBatch], num_tokens: int | None = None
    ) -> tuple[int, MicroBatchLoss]:
        """Run the reference; return the pairs of the global batch, and the loss of a micro-batch's logits.

        The loss is a sum over pairs; tokens are not counted. Metrics begin anew.
        """
        expected = self._reference_log_probs(micro_batches)
        count = sum(len(micro_batch.tokens) // 2 for micro_batch in micro_batches)
        self._pairs = int(self._mesh.sum_over("dp", torch.tensor(count, device=self._mesh.device.torch)))
        self._sums.zero_()

        def loss_of(number: int, output: torch.Tensor) -> torch.Tensor:
            reference = expected[number]
            assert reference is not None
            return self._loss_sum(output, micro_batches[number], reference)

        return self._pairs, loss_of

    def metrics(self) -> dict[str, float]:
        """Return the means over the pairs of the last step, the same on every rank."""
        means = (self._total(self._sums) / self._pairs).tolist()
        return dict(zip(METRICS, means, strict=True))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Return `loss` and all metrics of the micro-batches of all data-parallel ranks."""
        pairs, loss_of = self.prepare(micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=self._mesh.device.torch)
        for number, micro_batch in enumerate(micro_batches):
            output = self._last_output(self._model, micro_batch)
            if output is not None:
                total += loss_of(number, output)
        return {"loss": float(self._total(total)) / pairs, **self.metrics()}

    def _total(self, mine: torch.Tensor) -> torch.Tensor:
        """Add up what each rank has of the sums over pairs."""
        return self._mesh.sum_over("replicas", self._mesh.sum_over("pp", mine.clone()))

    def _loss_sum(
        self, output: torch.Tensor, micro_batch: MicroBatch, reference: torch.Tensor
    ) -> torch.Tensor:
        config = self._config
        totals = answer_log_probs(self._model, output, micro_batch, self._mesh)
        lengths = _over_sequence(micro_batch.loss_mask.sum(dim=-1), self._mesh).view(-1, 2)
        divisor = lengths if config.dpo_loss == "ipo" else torch.ones_like(lengths)
        policy, compared = totals / divisor, reference / divisor
        loss = pair_losses(policy, compared, config).sum()
        if config.dpo_sft_weight:
            loss = loss - config.dpo_sft_weight * (totals / lengths)[:, 0].sum()
        if self._mesh.cp_rank:
            # Every cp rank has the loss of whole answers and adds its own tokens' gradient; the first has the value.
            return loss - loss.detach()
        self._add_metrics(policy.detach(), compared)
        return loss

    def _add_metrics(self, policy: torch.Tensor, reference: torch.Tensor) -> None:
        """Add the metrics of a micro-batch, from log-probabilities [B, 2]."""
        rewards = self._config.dpo_beta * (policy - reference).double()
        margin = rewards[:, 0] - rewards[:, 1]
        right = (margin > 0).double() + 0.5 * (margin == 0)
        of_pairs = torch.stack([*rewards.T, margin, right, *policy.double().T])
        self._sums += of_pairs.sum(dim=-1)

    @torch.no_grad()
    def _reference_log_probs(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor | None]:
        """Return the reference's log-probabilities of answers, [B, 2], where the last stage is."""
        model, found = self._reference or self._model, list[torch.Tensor | None]()
        with adapters_off(self._model) if self._reference is None else nullcontext():
            for micro_batch in micro_batches:
                output = self._last_output(model, micro_batch)
                found.append(
                    None if output is None else answer_log_probs(model, output, micro_batch, self._mesh)
                )
        return found

    def _last_output(self, model: Transformer, micro_batch: MicroBatch) -> torch.Tensor | None:
        given = micro_batch.input_for_loss._replace(samples=None)
        output = forward_through_stages(model, self._mesh, given, is_shared=False)
        return output if model.has_last else None


def answer_log_probs(
    model: Transformer, output: torch.Tensor, micro_batch: MicroBatch, mesh: ParallelMesh
) -> torch.Tensor:
    """Return the log-probability of each answer, chosen and rejected, [B, 2], in nats.

    Args:
        model: that gave the output.
        output: see `ModelInput.for_loss`; logits are this rank's, [2B, S, V/tp].
        micro_batch: of 2B rows.
        mesh: of this rank.
    """
    losses = losses_of(model, output, micro_batch.labels, mesh.group("tp"))
    return -_over_sequence((losses * micro_batch.loss_mask).sum(dim=-1), mesh).view(-1, 2)


def _over_sequence(sums: torch.Tensor, mesh: ParallelMesh) -> torch.Tensor:
    """Add up sums over the parts of sequences; each rank's gradient is that of its own part."""
    group = mesh.group("cp")
    return sums if group is None else sum_over_group(sums, group)


def pair_losses(policy: torch.Tensor, reference: torch.Tensor, config: PreferenceConfig) -> torch.Tensor:
    """Return the loss of each pair, [B], without the chosen answer's own.

    Args:
        policy: log-probabilities of chosen and rejected under the model, [B, 2]; for ipo per token.
        reference: the same under the reference.
        config: kind, beta, label smoothing.
    """
    log_ratios = policy - reference
    advantage = log_ratios[:, 0] - log_ratios[:, 1]
    if config.dpo_loss == "ipo":
        return (advantage - 1 / (2 * config.dpo_beta)).square()
    scaled = config.dpo_beta * advantage
    if config.dpo_loss == "hinge":
        return F.relu(1 - scaled)
    wrong = config.dpo_label_smoothing
    return -(1 - wrong) * F.logsigmoid(scaled) - wrong * F.logsigmoid(-scaled)
