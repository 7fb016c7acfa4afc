"""`asd-data inspect` and `asd-data verify`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ascendspeed_data.blend import open_blend
from ascendspeed_data.command_line import log
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.hub_files import local_path
from ascendspeed_data.manifest import check_tokenizer
from ascendspeed_data.statistics import draw_histogram, histogram_lines, length_statistics
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
from ascendspeed_data.verify import verify_dataset

PAIR = ("chosen", "rejected")
RESET = "\x1b[0m"
COLOURS = {
    (True, False): "\x1b[32m",
    (False, False): "\x1b[2m",
    (True, True): "\x1b[1;32m",
    (False, True): "\x1b[36m",
}
"""By whether a token is trained, and whether it is a special or added piece, as those of chat templates."""


def inspect_command(
    data_path: Annotated[
        list[str],
        typer.Argument(
            help="Prefix of a dataset, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...", metavar="PREFIX"
        ),
    ],
    documents: Annotated[int, typer.Option(min=0, help="Number of documents to show.")] = 2,
    first: Annotated[int, typer.Option(min=0, help="Index of the first document to show.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to show per sequence.")] = 64,
    tokenizer_name_or_path: Annotated[
        Path | None, typer.Option(help="Tokenizer of the dataset; shows the text of the ids.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show a histogram of sequence lengths.")] = False,
    png: Annotated[Path | None, typer.Option(help="Write the histogram to this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    color: Annotated[
        bool | None,
        typer.Option(
            "--color/--no-color",
            help="Show trained tokens in green, and the pieces of templates bold or blue. [default: only on a "
            "terminal]",
        ),
    ] = None,
) -> None:
    """Show the counts, the manifest and some documents of a dataset, with the trained tokens in colour."""
    if len(data_path) > 1:
        _show_blend(data_path, as_json)
        return
    dataset = open_dataset(Path(data_path[0]))
    tokenizer = None
    if tokenizer_name_or_path is not None:
        tokenizer = load_tokenizer(
            local_path(tokenizer_name_or_path, "tokenizer", "--tokenizer-name-or-path")
        )
        if dataset.manifest is not None:
            check_tokenizer(dataset.manifest, tokenizer, str(dataset.prefix))
    count = len(dataset.ids.documents) - 1
    if first and first >= count:
        raise ConfigError(
            f"first={first} is too large: the dataset has {count:,} documents; give at most {count - 1}"
        )
    shown = [
        _document(dataset, number, max_tokens, tokenizer)
        for number in range(first, min(first + documents, count))
    ]
    made = dataset.manifest.model_dump(mode="json") if dataset.manifest else None
    counts = vars(dataset.ids.info)
    statistics = length_statistics(dataset) if stats or png else None
    if statistics is not None and png is not None:
        draw_histogram(statistics, str(dataset.prefix), png)
        log(f"wrote {png}")
    if as_json:
        result = {**counts, "manifest": made, "documents": shown}
        if statistics is not None:
            values = vars(statistics)
            result["lengths"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        print(json.dumps(result, ensure_ascii=False))
        return
    for key, value in {**counts, **(made or {"manifest": "none"})}.items():
        print(f"{key}: {value}")
    if statistics is not None:
        print("\n".join(histogram_lines(statistics)))
    colored = sys.stdout.isatty() if color is None else color
    for document in shown:
        _print_document(document, dataset.is_samples, colored)


def _document(dataset: Dataset, number: int, max_tokens: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Describe a document; a document with one sequence has no list of sequences."""
    start, end = (int(edge) for edge in dataset.ids.documents[number : number + 2])
    sequences = []
    for sequence in range(start, end):
        ids = dataset.ids[sequence][:max_tokens].tolist()
        described: dict[str, Any] = {"num_tokens": int(dataset.ids.lengths[sequence]), "ids": ids}
        if dataset.is_samples:
            described["trained"] = dataset.trained(sequence)[:max_tokens].astype(int).tolist()
            described["attention_mask"] = dataset.attended(sequence)[:max_tokens].tolist()
        if tokenizer is not None:
            described["text"] = tokenizer.decode(ids)
            described["pieces"] = tokenizer.convert_ids_to_tokens(ids)
            control = {*tokenizer.special_ids.values(), *tokenizer.added_ids.values()}
            described["control"] = [token in control for token in ids]
        sequences.append(described)
    if dataset.is_pairs:
        return {"document": number, **dict(zip(PAIR, sequences, strict=True))}
    only = sequences[0] if len(sequences) == 1 else {"sequences": sequences}
    return {"document": number, **only}


def _print_document(document: dict[str, Any], has_labels: bool, colored: bool) -> None:
    is_pair = PAIR[0] in document
    sequences = [document[name] for name in PAIR] if is_pair else document.get("sequences", [document])
    for number, sequence in enumerate(sequences):
        part = f", sequence {number + 1} of {len(sequences)}" if len(sequences) > 1 else ""
        part = f", {PAIR[number]}" if is_pair else part
        print(f"document {document['document']}{part} ({sequence['num_tokens']} tokens): {sequence['ids']}")
        flags = sequence.get("trained", [1] * len(sequence["ids"]))
        if has_labels:
            print(f"  trained {sum(flags)}: {_spans(flags)}; attention {_spans(sequence['attention_mask'])}")
        if "pieces" not in sequence:
            continue
        if not has_labels:
            print(f"  {sequence['text']!r}")
        elif colored:
            control = sequence["control"]
            words = [
                f"{COLOURS[bool(trained), is_control]}{token}{RESET}"
                for token, trained, is_control in zip(sequence["pieces"], flags, control, strict=True)
            ]
            print("  " + "".join(words))
        else:
            words = [
                f"[{token}]" if trained else token
                for token, trained in zip(sequence["pieces"], flags, strict=True)
            ]
            print("  " + "".join(words))


def _spans(flags: list[int]) -> str:
    """Return the ranges of positions with a set flag, such as `3-7, 9-12`."""
    edges = np.flatnonzero(np.diff([0, *flags, 0]))
    return (
        ", ".join(f"{begin}-{end - 1}" for begin, end in zip(edges[::2], edges[1::2], strict=True)) or "none"
    )


def _show_blend(words: list[str], as_json: bool) -> None:
    parts = open_blend(words)
    rows = [
        {
            "prefix": str(part.dataset.prefix),
            "share": part.share,
            "num_tokens": part.dataset.ids.info.num_tokens,
            "num_documents": part.dataset.ids.info.num_documents,
            "epochs": part.epochs,
            "tokenizer": part.dataset.manifest.tokenizer.name if part.dataset.manifest else None,
        }
        for part in parts
    ]
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'share':>7} {'tokens':>15} {'documents':>12} {'epochs':>8}  dataset")
    for row in rows:
        print(
            f"{row['share']:>7.1%} {row['num_tokens']:>15,} {row['num_documents']:>12,} {row['epochs']:>8.2f}  "
            f"{row['prefix']}"
            + ("" if row["tokenizer"] else " (no manifest, so its tokenizer cannot be checked)")
        )
    print("epochs: passes over each dataset while training reads as many tokens as the whole blend has")


def verify_command(
    prefix: Annotated[Path, typer.Argument(help="Prefix of a dataset.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip the checks that read every byte: hashes and ids.")
    ] = False,
) -> None:
    """Check that a dataset is complete and undamaged: index, ids, labels, counts and hashes."""
    dataset = open_dataset(prefix)
    if dataset.manifest is None:
        log(f"{prefix} has no manifest, so counts, hashes and vocabulary cannot be checked")
    verify_dataset(dataset, quick)
    info = dataset.ids.info
    print(
        f"{prefix} is complete: {info.num_documents:,} documents, {info.num_tokens:,} tokens, {info.format}"
    )
