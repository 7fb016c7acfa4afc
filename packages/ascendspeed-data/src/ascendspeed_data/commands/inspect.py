"""`asd-data inspect` and `asd-data verify`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import DatasetManifest, check_tokenizer, load_manifest
from ascendspeed_data.tokenizer import load_tokenizer

Prefix = Annotated[Path, typer.Argument(help="Prefix of a .bin/.idx pair.")]


def inspect_command(
    prefix: Prefix,
    documents: Annotated[int, typer.Option(min=0, help="Documents to show, from the first on.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to show of each document.")] = 64,
    tokenizer_name_or_path: Annotated[
        Path | None, typer.Option(help="Tokenizer that made the data; shows text beside the ids.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a dataset holds: its counts, what made it, its first documents."""
    dataset = IndexedDataset(prefix)
    manifest = load_manifest(prefix)
    tokenizer = None
    if tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer(tokenizer_name_or_path)
        if manifest is not None:
            check_tokenizer(manifest, tokenizer, str(prefix))
    shown: list[dict[str, Any]] = []
    for number in range(min(documents, len(dataset))):
        ids = dataset[number][:max_tokens].tolist()
        shown.append({"document": number, "num_tokens": int(dataset.lengths[number]), "ids": ids})
        if tokenizer is not None:
            shown[-1]["text"] = tokenizer.decode(ids)
    counts = vars(dataset.info)
    made = manifest.model_dump(mode="json") if manifest else None
    if as_json:
        print(json.dumps({**counts, "manifest": made, "documents": shown}, ensure_ascii=False))
        return
    for key, value in {**counts, **(made or {"manifest": "none"})}.items():
        print(f"{key}: {value}")
    for document in shown:
        print(f"document {document['document']} ({document['num_tokens']} tokens): {document['ids']}")
        if "text" in document:
            print(f"  {document['text']!r}")


def verify_command(prefix: Prefix) -> None:
    """Prove a dataset whole: index, pointers, ids within the vocabulary, and the manifest's counts."""
    dataset = IndexedDataset(prefix)
    manifest = load_manifest(prefix)
    if manifest is None:
        log(f"{prefix}: no manifest; counts and vocabulary cannot be compared")
    else:
        _compare(dataset, manifest)
    info = dataset.info
    print(f"{prefix}: whole; {info.num_documents:,} documents, {info.num_tokens:,} tokens, {info.format}")


def _compare(dataset: IndexedDataset, manifest: DatasetManifest) -> None:
    info = dataset.info
    for name in ("num_documents", "num_tokens"):
        have, said = getattr(info, name), getattr(manifest, name)
        if have != said:
            raise DataError(
                f"{dataset.prefix}: {name}={have}, its manifest says {said}; the files do not belong together"
            )
    limit = manifest.tokenizer.vocab_size
    for number in range(len(dataset)):
        ids = dataset[number]
        if len(ids) and int(ids.max()) >= limit:
            raise DataError(
                f"{dataset.prefix}: document {number} holds id {int(ids.max())}, vocab_size is {limit}"
            )
