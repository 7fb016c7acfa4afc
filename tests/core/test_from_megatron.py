"""`asd-core from-megatron`: argument lists of Megatron-LM's examples become command lines; nothing is dropped."""

import json
import shlex
from pathlib import Path

import pytest

from ascendspeed_core.commands.from_megatron import flags_of_script
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_data.errors import AscendSpeedError
from support.commands import call, run_command

LLAMA_3 = """#!/bin/bash
# Runs the "8B" model
export CUDA_DEVICE_MAX_CONNECTIONS=1
CHECKPOINT_PATH=${1:-"checkpoints/llama3_8b"}
TOKENIZER_ARG=$2
SEQ_LENGTH=8192
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes 1
)
MODEL_ARGS=(
    --use-mcore-models
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length $SEQ_LENGTH
    --max-position-embeddings ${SEQ_LENGTH}
    --normalization RMSNorm
    --position-embedding-type rope
    --rotary-base 500000
    --rotary-percent 1.0
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --init-method-std 0.0134
    --attention-backend fused
    --untie-embeddings-and-output-weights
    --disable-bias-linear)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 128
    --train-samples 1953125000
    --lr-decay-style cosine
    --lr 0.00015
    --min-lr 0.00001
    --clip-grad 1.0
    --weight-decay 0.1
    --adam-beta1 0.9
    --adam-beta2 0.95
    --bf16
    --cross-entropy-loss-fusion
    --manual-gc
)
DTYPE_ARGS="--fp8-format hybrid --fp8-amax-history-len 1024"
DATA_ARGS=(
    --data-path corpus_text_document
    --vocab-size 128256
    --tokenizer-model ${TOKENIZER_ARG}
    --split '99,1,0'
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \\
    ${MODEL_ARGS[@]} \\
    ${TRAINING_ARGS[@]} \\
    --tensor-model-parallel-size 2 --context-parallel-size 1 --sequence-parallel \\
    --use-distributed-optimizer --overlap-grad-reduce \\
    --save "$CHECKPOINT_PATH"
"""

GPT_3 = """
GPT_MODEL_ARGS=(
    --num-layers 96
    --hidden-size 12288
    --num-attention-heads 96
    --seq-length 2048
    --max-position-embeddings 2048
    --attention-backend auto
)
"""

MIXTRAL = """
MODEL_ARGS=(
    --use-mcore-models
    --disable-bias-linear
    --seq-length 4096
    --max-position-embeddings 32768
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --init-method-std 0.01
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --normalization RMSNorm
    --position-embedding-type rope
    --swiglu
    --untie-embeddings-and-output-weights
    --group-query-attention
    --num-query-groups 8
    --no-masked-softmax-fusion
    --no-position-embedding
    --rotary-base 1000000
)
MOE_ARGS=(
    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --overlap-param-gather
    --overlap-grad-reduce
)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size 256
    --lr 1e-4
    --train-iters 500000
    --lr-decay-iters 320000
    --lr-decay-style cosine
    --min-lr 1.0e-5
    --weight-decay 0.1
    --lr-warmup-iters 500
    --clip-grad 1.0
    --bf16
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 4
    --expert-model-parallel-size 8
    --use-distributed-optimizer
    --sequence-parallel
)
torchrun pretrain_gpt.py ${MODEL_ARGS[@]} ${MOE_ARGS[@]} --data-path DATA --split 99990,8,2
"""

DEEPSEEK = """
--num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --normalization RMSNorm --swiglu
--position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear --seq-length 32
--max-position-embeddings 64 --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 8
--qk-pos-emb-head-dim 4 --v-head-dim 8 --rope-type rope --num-experts 8 --moe-ffn-hidden-size 32 --moe-router-topk 4
--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-num-groups 4
--moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5 --moe-shared-expert-intermediate-size 32
--moe-layer-freq ([0]*1+[1]*3) --vocab-size 400 --qk-layernorm
"""


def translate(text: str, folder: Path, *more: object) -> tuple[ModelConfig, list[str], list[str]]:
    """The model, the words of the command line, and the comments above it."""
    (folder / "run.sh").write_text(text)
    done = call(
        "asd-core", "from-megatron", folder / "run.sh", "--model-config", folder / "model.json", *more
    )
    assert done.status == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    notes = [line for line in lines if line.startswith("#")]
    words = shlex.split("\n".join(line for line in lines if not line.startswith("#")))
    content = json.loads((folder / "model.json").read_text())
    (family,) = [content["model_type"]]
    return find_family(family).read_config(content), words, notes


def test_llama_3(tmp_path: Path) -> None:
    model, words, notes = translate(LLAMA_3, tmp_path)
    assert (model.family, model.num_layers, model.hidden_size, model.ffn_hidden_size) == (
        "llama",
        32,
        4096,
        14336,
    )
    assert (model.num_key_value_heads, model.head_dim, model.vocab_size) == (8, 128, 128256)
    assert (model.rotary_base, model.tie_word_embeddings, model.qkv_bias) == (500000, False, False)
    line = " ".join(words)
    for part in (
        "asd-core pretrain --model-config", "--nproc_per_node 8", "--seq-length 8192", "--global-batch-size 128",
        "--lr 0.00015", "--tensor-model-parallel-size 2", "--sequence-parallel", "--use-distributed-optimizer",
        "--split 99,1,0", "--save checkpoints/llama3_8b", "--bf16",
    ):  # fmt: skip
        assert part in line, part
    lacking = [note for note in notes if note.startswith("# has no answer: ")]
    for flag in ("--fp8-amax-history-len", "--tokenizer-model ${TOKENIZER_ARG}"):
        assert any(flag in note for note in lacking), flag
    # Each flag stands somewhere.
    everything = line + "\n" + "\n".join(notes)
    for flag, _ in flags_of_script(LLAMA_3, tmp_path):
        assert flag in everything or flag.replace("_", "-") in everything, flag


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(GPT_3)
    done = call("asd-core", "from-megatron", tmp_path / "run.sh", "--vocab-size", 50257)
    assert done.status == 1
    assert "position_embedding_type=learned_absolute (Megatron-LM's default)" in done.complaint


def test_mixtral(tmp_path: Path) -> None:
    model, words, notes = translate(MIXTRAL, tmp_path, "--vocab-size", 32000, "--engine", "megatron")
    assert model.family == "mixtral"
    assert model.experts is not None
    assert (model.experts.count, model.experts.per_token, model.experts.normalised) == (8, 2, True)
    line = " ".join(words)
    for part in (
        "--engine megatron", "--moe-aux-loss-coeff 1e-2", "--moe-router-load-balancing-type aux_loss",
        "--expert-model-parallel-size 8", "--pipeline-model-parallel-size 4", "--overlap-param-gather",
    ):  # fmt: skip
        assert part in line, part
    assert any("--moe-grouped-gemm" in note for note in notes if "means nothing here" in note)


def test_deepseek(tmp_path: Path) -> None:
    model, _, notes = translate(DEEPSEEK, tmp_path)
    assert model.family == "deepseek_v3"
    assert model.experts is not None
    assert (model.kv_latent_dim, model.q_latent_dim, model.head_dim, model.value_head_dim) == (16, 24, 12, 8)
    assert (model.experts.groups, model.experts.dense_layers, model.experts.scaling) == (4, (0,), 2.5)
    assert not [note for note in notes if "has no answer" in note]


def test_what_is_translated_trains(tmp_path: Path, dataset: Path) -> None:
    """The LLaMA-3 script, scaled down."""
    small = {
        "32\n": "2\n", "4096": "64", "14336": "96", "kv-channels 128": "kv-channels 16", "heads 2": "heads 4",
        "groups 8": "groups 2", "SEQ_LENGTH=8192": "SEQ_LENGTH=16", "128256": "400",
        "nproc_per_node 8": "nproc_per_node 2",
        "global-batch-size 128": "global-batch-size 4", "train-samples 1953125000": "train-samples 8",
        "corpus_text_document": str(dataset), "checkpoints/llama3_8b": str(tmp_path / "run"), "--bf16": "",
        "--fp8-format hybrid": "",
    }  # fmt: skip
    text = LLAMA_3
    for before, after in small.items():
        assert before in text, before
        text = text.replace(before, after)
    _, words, _ = translate(text, tmp_path)
    done = run_command(*words, "--device", "cpu")
    assert done.status == 0, done.stderr
    assert [record["iteration"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_scripts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AscendSpeedError, match="has no flags"):
        list(flags_of_script("echo hello", tmp_path))
    with pytest.raises(AscendSpeedError, match="correct the quotes"):
        list(flags_of_script("--save 'x", tmp_path))
    old = 'A="--lr 1e-4 --bf16"\npython pretrain_gpt.py $A --split 1,0,0'
    assert list(flags_of_script(old, tmp_path)) == [
        ("--lr", ["1e-4"]),
        ("--bf16", []),
        ("--split", ["1,0,0"]),
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("--num-layers 4", "--num-layers four", "num_layers=four is no whole number above zero"),
        ("--num-layers 4", "--num-layers -4", "num_layers=-4 is no whole number above zero"),
        ("--num-layers 4", "--num-layers 4 5", "is no whole number above zero"),
        ("--num-layers 4", "", "nothing says num_layers"),
        ("--vocab-size 400", "--vocab-size nan", "vocab_size=nan is no whole number above zero"),
    ],
)
def test_counts_that_are_none(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in DEEPSEEK
    (tmp_path / "run.sh").write_text(DEEPSEEK.replace(old, new))
    done = call("asd-core", "from-megatron", tmp_path / "run.sh", "--model-config", tmp_path / "model.json")
    assert done.status == 1
    assert words in done.stderr
    assert not (tmp_path / "model.json").exists()


def test_a_config_that_exists_is_kept(tmp_path: Path) -> None:
    translate(DEEPSEEK, tmp_path)
    translate(DEEPSEEK, tmp_path)  # The same once more.
    mine = tmp_path / "model.json"
    mine.write_text("{}")
    done = call("asd-core", "from-megatron", tmp_path / "run.sh", "--model-config", mine)
    assert (done.status, mine.read_text()) == (1, "{}")
    assert "model.json already exists and holds something else; name another file" in done.stderr
