"""The reference of preference tuning: which checkpoint it is, and that a run that goes on keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.config.migrate import migrate_config
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.weights import NativeSource, WeightSource, open_weights
from ascendspeed_core.weights.adapters.lora import AdaptedWeights
from ascendspeed_core.weights.fingerprint import fingerprint
from ascendspeed_core.weights.native.source import DESCRIPTION
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.small_files import check_shape

REFERENCE_KEY = "reference"
"""Key in the `run` of a checkpoint's description."""


@dataclass(frozen=True)
class Reference:
    """What the model is compared with.

    Attributes:
        source: its weights.
        folder: where they are.
        fingerprint: tells other weights under the same path.
        is_base: it is what the adapters of the trained model lie beside, so that it needs no second model.
    """

    source: WeightSource
    folder: Path
    fingerprint: str
    is_base: bool = False

    def record(self) -> dict[str, str]:
        """Return what a checkpoint keeps of it."""
        return {"path": str(self.folder.resolve()), "fingerprint": self.fingerprint}


def open_reference(config: DpoConfig, source: WeightSource, checkpoint: NativeSource | None) -> Reference:
    """Open the reference of a run: the one given, that of the run that goes on, or the weights it starts from.

    Args:
        config: of the run.
        source: the weights it starts from.
        checkpoint: of the run that goes on, if it does.

    Raises:
        AscendSpeedError: a run that goes on would be compared with other weights than before, or the reference has
            another vocabulary or fewer positions than the run needs.
    """
    known: Mapping[str, Any] | None = None
    if checkpoint is not None:
        run, _ = migrate_config(checkpoint.description["run"], str(checkpoint.folder))
        stated = run.get(REFERENCE_KEY)
        where = f"{checkpoint.folder / DESCRIPTION}, run.{REFERENCE_KEY}"
        known = (
            None if stated is None else check_shape(stated, dict[str, str], where, "use another checkpoint")
        )
        if known is None:
            raise AscendSpeedError(
                f"{checkpoint.folder} was not written by preference tuning, and names no reference; give another --save"
            )
    given = config.preference.reference
    if given is None and known is not None:
        given = Path(known["path"])
        if checkpoint is not None and not given.exists():
            raise AscendSpeedError(
                f"{given}, the reference of the run in {checkpoint.path}, is gone; give --reference DIR with the same "
                "weights"
            )
    elif given is None and config.lora.lora_load is not None:
        raise AscendSpeedError(
            f"lora_load={config.lora.lora_load} starts from an adapter beside {source.path}; say with --reference what "
            f"to compare with: {source.path}, which is without it, or a folder that `asd-ckpt merge-lora` made"
        )
    base = source.base if isinstance(source, AdaptedWeights) else source
    opened = base if given is None else open_weights(given, fallback_config=lambda: base.config)
    assert opened.path is not None
    folder = opened.folder if isinstance(opened, NativeSource) else opened.path
    mark = fingerprint(opened)
    reference = Reference(opened, folder, mark, isinstance(source, AdaptedWeights) and _is_base(source, mark))
    if checkpoint is not None and known is not None and known["fingerprint"] != mark:
        raise AscendSpeedError(
            f"{folder} is not the reference that the run in {checkpoint.path} began with ({known['path']}); give those "
            "weights with --reference, or start anew with another --save"
        )
    _check_fits(config, source, reference)
    return reference


def _is_base(source: AdaptedWeights, mark: str) -> bool:
    """Whether the model without its adapters is the model with that fingerprint: nothing is trained whole."""
    return not source.adapters.trained and fingerprint(source.base) == mark


def _check_fits(config: DpoConfig, source: WeightSource, reference: Reference) -> None:
    ours, theirs = source.config, reference.source.config
    if ours.vocab_size != theirs.vocab_size:
        raise AscendSpeedError(
            f"reference {reference.folder} has vocab_size={theirs.vocab_size}, {source.path} {ours.vocab_size}; give a "
            "reference of the same tokenizer"
        )
    if config.data.seq_length > theirs.max_position_embeddings:
        raise AscendSpeedError(
            f"seq_length={config.data.seq_length} is more than max_position_embeddings="
            f"{theirs.max_position_embeddings} of reference {reference.folder}; choose that or less"
        )
    config.parallel.check_model(theirs)
