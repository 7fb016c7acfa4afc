"""Where documents end inside the samples of pre-training, which join them: by the end-of-document token.

The token belongs to the document that it ends; the next one begins behind it. Masks and positions are those of
megatron-core's `_get_ltor_masks_and_position_ids`.

Shapes: B micro-batch size, S sequence length.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ascendspeed_core.config.data import DataConfig
from ascendspeed_core.launch import announce
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import load_manifest

PROBED_DOCUMENTS = 1000
"""Documents of a file whose last token is looked at."""


class DocumentPositions(NamedTuple):
    """Which document each token belongs to, and where in it.

    Attributes:
        positions: of each token in its document, or in the part of it that the sample holds, [B, S].
        segments: number of the document in its row, [B, S].
    """

    positions: torch.Tensor
    segments: torch.Tensor


def document_positions(tokens: torch.Tensor, end_of_document: int) -> DocumentPositions:
    """Return the documents of samples, found by the token that ends them.

    Args:
        tokens: ids of whole samples, [B, S].
        end_of_document: id of the token.
    """
    ends = tokens == end_of_document
    offsets = torch.arange(tokens.shape[1]).expand_as(tokens)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(ends[:, :-1], offsets[:, 1:], 0)
    return DocumentPositions(
        positions=offsets - begins.cummax(dim=1).values,
        segments=ends.cumsum(dim=1) - ends.to(torch.int64),
    )


def find_end_of_document(config: DataConfig, tokenizer: Path | None) -> int:
    """Return the id of the token that ends documents: of the tokenizer that made the data.

    Args:
        config: files, and options that need it.
        tokenizer: folder of the tokenizer, for data without a manifest.

    Raises:
        DataError: it is not known, or a file has it at the end of none of its documents.
    """
    asked = " and ".join(config.document_options)
    known: dict[str, int | None] = {}
    for prefix in config.prefixes():
        manifest = load_manifest(Path(prefix))
        if manifest is not None:
            known[prefix] = manifest.tokenizer.eos_id
    if not known and tokenizer is not None:
        from ascendspeed_data.tokenizer import load_tokenizer

        known[str(tokenizer)] = load_tokenizer(tokenizer).eos_id
        announce(f"{config.prefixes()[0]}: no manifest beside it; its documents end where {tokenizer} says")
    if not known:
        raise DataError(
            f"{asked}: which token ends a document is not known, as {config.prefixes()[0]} has no manifest; give its "
            "tokenizer with --tokenizer-name-or-path"
        )
    where, end = next(iter(known.items()))
    if end is None:
        raise DataError(
            f"{asked}: no token ends a document, as the tokenizer of {where} has no eos token; leave the option out, "
            "or tokenize with another tokenizer"
        )
    for prefix in config.prefixes():
        _refuse_without_ends(prefix, end, asked)
    return end


def _refuse_without_ends(prefix: str, end: int, asked: str) -> None:
    """Raise `DataError` when none of the documents that are looked at ends with the token."""
    dataset = IndexedDataset(Path(prefix))
    filled = np.flatnonzero(dataset.lengths)
    probed = filled[:: len(filled) // PROBED_DOCUMENTS + 1]
    if len(probed) and not any(int(dataset[int(number)][-1]) == end for number in probed):
        raise DataError(
            f"{asked}: none of {len(probed):,} documents of {prefix} ends with id {end}, so nothing tells them apart; "
            "preprocess again with --append-eod, or leave the option out"
        )
