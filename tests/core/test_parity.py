"""`asd-core parity`: the user's own model and data under several layouts, one table."""

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.verification.parity import (
    OPTIONS,
    ParityRow,
    parse_layouts,
    reason_of,
    table,
    with_engines,
)
from ascendspeed_data.errors import ConfigError
from support.commands import RunningCommand, call, run_command
from support.corpus import write_dataset
from support.models import save_hugging_face, tiny_config


def test_layouts_are_read() -> None:
    two, alone, cut = parse_layouts("tp2dp3, 1,cp2+sharded")
    assert (cut.sizes, cut.world_size) == ({"cp": 2}, 2)
    assert (two.sizes, two.flags, two.world_size) == ({"tp": 2, "dp": 3}, (), 6)
    assert (alone.sizes, alone.flags, alone.world_size) == ({}, (), 1)
    for wrong in (
        "",
        "tp0",
        "tp2,,pp2",
        "xp2",
        "tp2tp2",
        "tp",
        "tp2x",
        "tp2+zero",
        "+sp",
        "1tp2",
        "pp2+vpp",
        "1+mbs4",
    ):
        with pytest.raises(ConfigError, match="is no layout; write for example"):
            parse_layouts(wrong)


def test_each_option_is_what_the_command_takes() -> None:
    known = call("asd-core", "pretrain", "--help").stdout
    assert [
        flag for flags in OPTIONS.values() for flag in flags if flag[:2] == "--" and flag not in known
    ] == []
    (zero,) = parse_layouts("tp2dp2+zero1")
    assert zero.flags == ("--zero-stage", "1")
    (candidate,) = parse_layouts("pp2dp2+vpp2-zb+block3+mbs1-2-4+mlp-fusion")
    assert " ".join(candidate.flags) == (
        "--num-layers-per-virtual-pipeline-stage 2 --pipeline-schedule interleaved-zb --checkpoint-activations "
        "--checkpoint-policy block --checkpoint-block-layer 3 --optimized-pipeline --manual-mbs 1,2,4 "
        "--mlp-layer-fusion"
    )


def test_a_table_of_layouts(tmp_path: Path, dataset: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400, tie_word_embeddings=True), tmp_path / "model")
    flags: list[object] = [
        "asd-core", "parity", "--load", tmp_path / "model", "--data-path", dataset, "--seq-length", 16, "--train-iters",
        3, "--layouts", "tp2+sp+selective,pp2cp2+sharded+triangle", "--device", "cpu", "--reset-attention-mask",
        "--reset-position-ids", "--eod-mask-loss",
    ]  # fmt: skip
    done = run_command(*flags)
    assert done.status == 0, done.stderr
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["layout", "loss", "gradient", "norm", "weights", "verdict"]
    assert first.startswith("tp2+sp+selective ")
    assert second.startswith("pp2cp2+sharded+triangle ")
    assert first.endswith("equal")
    assert second.endswith("equal")
    assert all(float(cell) < 1e-9 for row in (first, second) for cell in row.split()[-4:-1])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_deviation_is_a_verdict() -> None:
    row = ParityRow("tp2", loss=1e-8, grad_norm=0.0, weights=0.0)
    assert not row.within(1e-9)
    assert "DIFFERENT" in table([row], 1e-9)[1]
    assert row.within(1e-7)


def test_each_layout_under_each_engine() -> None:
    candidates = with_engines(parse_layouts("tp2"), "ascendspeed, deepspeed,megatron")
    assert [(one.name, one.flags, one.may_be_refused) for one in candidates] == [
        ("tp2 ascendspeed", (), False),
        ("tp2 deepspeed", ("--zero-stage", "1"), True),
        ("tp2 megatron", ("--engine", "megatron"), True),
    ]
    with pytest.raises(ConfigError, match=r"layouts=dp2\+zero3 names the engine DeepSpeed"):
        with_engines(parse_layouts("tp2,dp2+zero3"), "megatron")
    for wrong in ("vllm", "megatron,megatron", ""):
        with pytest.raises(ConfigError, match="give some of ascendspeed, deepspeed, megatron, each once"):
            with_engines(parse_layouts("tp2"), wrong)
    refused = ParityRow("pp2 deepspeed", math.nan, math.nan, math.nan, "zero_stage=1 with pipeline")
    _, row, reason = table([refused], 1e-3)
    assert row.split() == ["pp2", "deepspeed", "-", "-", "-", "refused"]
    assert reason == "pp2 deepspeed: zero_stage=1 with pipeline"
    assert refused.within(1e-3)


def test_bad_input(tmp_path: Path) -> None:
    from ascendspeed_core.models.families import find_family

    (tmp_path / "m.json").write_text(json.dumps(find_family("llama").write_config(tiny_config())))
    data = write_dataset(tmp_path / "data", 128)

    def complaint(*flags: object) -> str:
        done = call("asd-core", "parity", "--data-path", data, "--seq-length", 16, "--device", "cpu", *flags)
        assert done.status != 0
        return done.complaint

    assert "give either --load DIR or --model-config FILE" in complaint("--layouts", "tp2")
    model: list[object] = ["--model-config", tmp_path / "m.json"]
    assert "neither of --layouts and --engines given" in complaint(*model)
    assert "is no layout" in complaint(*model, "--layouts", "2tp")
    assert "is not a multiple of micro_batch_size x dp" in complaint(*model, "--layouts", "dp3")
    assert "dtype=int8 is unknown" in complaint(*model, "--layouts", "tp2", "--dtype", "int8")
    failed = complaint(*model, "--layouts", "tp3", "--train-iters", 1)
    assert "training as tp3 failed: tensor_model_parallel_size=3 does not divide" in failed


def test_a_process_that_ends_before_its_request_is_done_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are such processes; what broke here stood in place of a run's own message."""
    send = socket.send_fds

    def send_and_wait(*arguments: Any) -> int:
        sent = send(*arguments)
        time.sleep(0.5)
        return sent

    monkeypatch.setattr(socket, "send_fds", send_and_wait)
    program = tmp_path / "program.py"
    program.write_text("print('done')\n")
    assert RunningCommand(program).finish().stdout == "done\n"


def test_the_reason_is_the_error_not_what_a_library_says_after_it() -> None:
    said = "reading\nasd-core: error: no such layout\n[W socket.cpp] Broken pipe\n"
    assert reason_of(said) == "no such layout"
    assert reason_of("Traceback\nKeyError: 3\n") == "KeyError: 3"
    assert reason_of("") == "no output"
