"""What a preflight finds wrong: one case for each thing that is checked, on inputs made on the spot."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ascendspeed_core.models.families import find_family
from ascendspeed_data.preprocess import PreprocessJob, preprocess_dataset
from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece
from support.commands import Finished, call
from support.corpus import make_texts, write_json_lines
from support.models import tiny_config


@dataclass(frozen=True)
class Case:
    """One run that cannot start.

    Attributes:
        kind: what is checked.
        wrong: what is wrong.
        flags: besides `BASE`; a flag of both is taken from here.
        without: flags of `BASE` that are left out.
    """

    kind: str
    wrong: str
    flags: Sequence[object]
    without: Sequence[str] = ()


BASE = {
    "--model-config": "model.json",
    "--data-path": "corpus_text_document",
    "--seq-length": "32",
    "--train-iters": "2",
    "--micro-batch-size": "1",
    "--device": "cpu",
    "--data-cache-path": "cache",
}

CASES = (
    Case("paths", "no data under the prefix", ["--data-path", "nowhere"]),
    Case("paths", "records that are not tokenized", ["--data-path", "corpus.jsonl"]),
    Case("paths", "no checkpoint", ["--load", "nowhere"], ["--model-config"]),
    Case("paths", "no model config", ["--model-config", "nowhere.json"]),
    Case("paths", "a misspelt size", ["--model-config", "llama2-7"]),
    Case("paths", "a misspelt recipe", ["llama-7"]),
    Case("paths", "no tokenizer", ["--tokenizer-name-or-path", "nowhere"]),
    Case("paths", "the folder of another run", ["--save", "other-run"]),
    Case("space", "no room for a checkpoint", ["--model-config", "qwen3-235b-a22b", "--save", "run"]),
    Case("divisibility", "heads that tp does not divide", ["--tensor-model-parallel-size", 3, "--nproc-per-node", 3]),
    Case("divisibility", "more stages than layers", ["--pipeline-model-parallel-size", 5, "--nproc-per-node", 5]),
    Case("divisibility", "an incomplete batch", ["--global-batch-size", 5, "--micro-batch-size", 2]),
    Case("divisibility", "a sequence that cp does not divide",
         ["--context-parallel-size", 2, "--nproc-per-node", 2, "--seq-length", 33]),
    Case("divisibility", "experts that are not there", ["--expert-model-parallel-size", 2, "--nproc-per-node", 2]),
    Case("devices", "too few processes", ["--tensor-model-parallel-size", 2]),
    Case("devices", "no such device", ["--device", "npu"]),
    Case("data and tokenizer", "more ids than the model has", ["--model-config", "small-vocabulary.json"]),
    Case("data and tokenizer", "another tokenizer than the data's", ["--tokenizer-name-or-path", "other-tokenizer"]),
    Case("data and tokenizer", "no documents to train on", ["--split", "0,100,0"]),
    Case("data and tokenizer", "nothing held out to measure", ["--split", "100,0,0", "--eval-interval", 1]),
    Case("lengths", "samples longer than the model reads", ["--seq-length", 4096]),
    Case("checkpoint and config", "another number of layers", ["--num-layers", 5]),
    Case("checkpoint and config", "another model than the recipe's", ["llama-7b", "--load", "other-run"],
         ["--model-config"]),
    Case("memory", "a model that this machine cannot hold", ["--model-config", "llama-65b"]),
    Case("memory", "activations that this machine cannot hold",
         ["--micro-batch-size", 65_536, "--model-config", "long.json", "--seq-length", 4096]),
    Case("several at once", "layout, length and data",
         ["--tensor-model-parallel-size", 3, "--nproc-per-node", 3, "--seq-length", 4096, "--data-path", "nowhere"]),
    Case("several at once", "two options out of range", ["--lr", -1, "--train-iters", 0]),
)  # fmt: skip


@contextmanager
def inputs(folder: Path) -> Iterator[None]:
    """Make the files that the cases name, and work in their folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_json_lines(Path("corpus.jsonl"), make_texts())
        tokenizer = train_sentencepiece(["corpus.jsonl"], "text", Path("tokenizer"), TokenizerTraining(400))
        train_sentencepiece(["corpus.jsonl"], "text", Path("other-tokenizer"), TokenizerTraining(380))
        preprocess_dataset(PreprocessJob(("corpus.jsonl",), Path("corpus"), tokenizer))
        for name, vocabulary, length in (
            ("model", 400, 64),
            ("small-vocabulary", 128, 64),
            ("long", 400, 4096),
        ):
            model = tiny_config(vocab_size=vocabulary, max_position_embeddings=length)
            config = find_family("llama").write_config(model)
            Path(f"{name}.json").write_text(json.dumps(config))
        done = run(Case("", "", ["--save", "other-run"]), preflight=False)
        assert done.status == 0, done.stderr
        yield
    finally:
        shutil.rmtree("cache", ignore_errors=True)
        os.chdir(before)


def run(case: Case, preflight: bool = True) -> Finished:
    """Start the run of a case in this process, which ends before anything is built."""
    words = [str(flag) for flag in case.flags]
    own = {word for word in words if word.startswith("--")} | set(case.without)
    base = [part for flag, value in BASE.items() if flag not in own for part in (flag, value)]
    recipe = [] if not words or words[0].startswith("--") else [words.pop(0)]
    # `call` would start the ranks of --nproc-per-node; here the launcher ends before it does.
    joined = [f"{words[at]}={words[at + 1]}" for at in range(0, len(words), 2)]
    return call("asd-core", "pretrain", *recipe, *base, *joined, *["--preflight-only"] * preflight)


def message(done: Finished) -> str:
    """The message, with what differs between machines and versions of SentencePiece left out."""
    text = done.complaint.removeprefix("asd-core: error: ")
    text = re.sub(r"and \S+ has [\d.]+ GB free", "and / has N GB free", text)
    text = re.sub(r"found [\w, ]+;", "found cpu;", re.sub(r"fingerprint \w+", "fingerprint F", text))
    return re.sub(r"this machine has [\d.]+ for", "this machine has N for", text)


def rows(folder: Path) -> list[tuple[str, str, str]]:
    """What is checked, what is wrong, and the message, of each case.

    Args:
        folder: empty, for the inputs.
    """
    found = []
    with inputs(folder):
        for case in CASES:
            done = run(case)
            assert done.status in (1, 2), (case, done.stderr)
            found.append((case.kind, case.wrong, message(done)))
    return found
