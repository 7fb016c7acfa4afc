"""Blends of datasets: training reads `--data-path WEIGHT PREFIX WEIGHT PREFIX ...`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ascendspeed_data.data_path import parse_blend
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError


@dataclass(frozen=True)
class BlendPart:
    """One dataset of a blend.

    Attributes:
        dataset: the opened dataset.
        share: its share of the training tokens, between 0 and 1.
        epochs: passes over this dataset while training reads as many tokens as the whole blend has.
    """

    dataset: Dataset
    share: float
    epochs: float


def open_blend(words: Sequence[str]) -> list[BlendPart]:
    """Open the datasets of a blend and check that they share one tokenizer.

    Raises:
        ConfigError: weights and prefixes do not alternate.
        DataError: a dataset is missing, damaged or empty, or differs from the first in tokenizer or kind.
    """
    prefixes, weights = parse_blend(words)
    datasets = [open_dataset(Path(prefix)) for prefix in prefixes]
    for dataset in datasets:
        check_same_tokenizer(datasets[0], dataset)
        if dataset.ids.info.num_tokens == 0:
            raise DataError(f"{dataset.prefix} has no tokens; leave it out of the blend")
    given = weights or [1.0]
    shares = [weight / sum(given) for weight in given]
    tokens = [dataset.ids.info.num_tokens for dataset in datasets]
    return [
        BlendPart(dataset, share, share * sum(tokens) / own)
        for dataset, share, own in zip(datasets, shares, tokens, strict=True)
    ]


def check_same_tokenizer(first: Dataset, other: Dataset) -> None:
    """Raise `DataError` unless two datasets have the same tokenizer, kind and `--append-eod`."""
    if first.is_samples != other.is_samples:
        raise DataError(
            f"{first.prefix} and {other.prefix}: one has samples with labels, the other plain text; give one kind"
        )
    one, two = first.manifest, other.manifest
    if one is None or two is None:
        return
    if one.kind != two.kind:
        raise DataError(
            f"{first.prefix} has {one.kind}, {other.prefix} has {two.kind}; give data of one kind"
        )
    if one.tokenizer.fingerprint != two.tokenizer.fingerprint:
        raise DataError(
            f"{other.prefix} and {first.prefix} were made with different tokenizers ({two.tokenizer.name} and "
            f"{one.tokenizer.name}); tokenize both with the same tokenizer"
        )
    if one.append_eod != two.append_eod:
        raise DataError(
            f"{other.prefix} and {first.prefix}: only one has an end-of-sequence id after each document; "
            "tokenize both with the same --append-eod"
        )
