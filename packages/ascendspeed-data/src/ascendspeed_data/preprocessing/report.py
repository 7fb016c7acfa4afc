"""What a preprocessing run says of its datasets."""

from collections.abc import Mapping

from ascendspeed_data.command_line import log
from ascendspeed_data.fields import unused_summary
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.preprocessing.job import PreprocessJob

SKIPPED = {
    "text": "empty documents",
    "samples": "records with nothing to learn",
    "pairs": "pairs with equal answers",
}
"""What a handler leaves out, by kind of dataset."""


def report(job: PreprocessJob, manifests: Mapping[str, DatasetManifest]) -> None:
    """Log what a run made, what it did not use and what it split."""
    unused = next(iter(manifests.values())).unused_columns
    if unused:
        log(unused_summary(unused))
    for reason, count in next(iter(manifests.values())).split_conversations.items():
        log(f"{count:,} conversations are several samples each: {reason}")
    others = next(iter(manifests.values())).num_other_prompts
    if others:
        log(
            f"{others:,} records have answers without thoughts, which a chat asks for with a prompt that opens them; "
            "the ids before them are not those of training: give --chat-template-kwargs "
            "'{\"enable_thinking\": false}' if the chat template reads it, or records with thoughts"
        )
    spelling = next(iter(manifests.values())).num_spelling_records
    if spelling:
        log(
            f"{spelling:,} records spell special pieces, which are read as text; give --parse-special if control is "
            "meant"
        )
    for key, manifest in manifests.items():
        prefix = job.column_prefix(key) if key else job.packed_prefix("*")
        log(f"wrote {prefix}.bin: {summary(manifest)}")


def summary(manifest: DatasetManifest) -> str:
    """Return the counts of a dataset in one line."""
    text = (
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
        f"{manifest.num_text_bytes / max(manifest.num_tokens, 1):.2f} bytes per token, unigram entropy "
        f"{manifest.unigram_entropy_nats:.3f} nats"
    )
    if manifest.kind != "text":
        samples = "chosen and rejected" if manifest.kind == "pairs" else f"{manifest.num_sequences:,} samples"
        text += f"; {samples}, {manifest.num_trained_tokens:,} tokens trained"
    if manifest.num_empty_documents:
        text += f"; {manifest.num_empty_documents:,} {SKIPPED[manifest.kind]} skipped"
    if manifest.pack is not None:
        pack = manifest.pack
        text += (
            f"; packed to {pack.seq_length}: {pack.padding_share:.1%} padding instead of "
            f"{pack.padding_share_unpacked:.1%}"
        )
        if pack.num_cut_samples or pack.num_dropped_samples:
            text += (
                f"; {pack.num_cut_samples:,} longer samples truncated, {pack.num_dropped_samples:,} dropped because no "
                "trained token was left"
            )
    elif manifest.seq_length is not None:
        text += f"; {manifest.num_tokens // manifest.seq_length:,} sequences of {manifest.seq_length}"
    return text
