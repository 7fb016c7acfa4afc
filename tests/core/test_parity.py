"""`asd-core parity`: the user's own model and data under several layouts, one table."""

import json
from pathlib import Path

import pytest

from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.training.parity import ParityRow, parse_layouts, table
from ascendspeed_data.errors import ConfigError
from support.commands import call, run_command
from support.corpus import write_dataset
from support.models import save_hugging_face, tiny_config


def test_layouts_are_read() -> None:
    assert parse_layouts("tp2, pp2,dp2pp3") == [Layout(tp=2), Layout(pp=2), Layout(pp=3, dp=2)]
    assert parse_layouts("pp2+zbv,pp2+vpp1-zb,pp2dp2+vpp2+aiao") == [
        Layout(pp=2, schedule="zbv"),
        Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1),
        Layout(pp=2, dp=2, schedule="looped-bfs", layers_per_stage=2, early_reduction=True),
    ]
    assert parse_layouts("tp2+sp,tp2dp2+sp+sharded") == [
        Layout(tp=2, sequence_parallel=True),
        Layout(tp=2, dp=2, sequence_parallel=True, sharded_optimizer=True),
    ]
    for wrong in ("", "tp0", "tp2,,pp2", "cp2", "tp2tp2", "tp", "tp2x", "tp2+zero", "+sp"):
        with pytest.raises(ConfigError, match="is no layout; write for example"):
            parse_layouts(wrong)


def test_a_table_of_layouts(tmp_path: Path) -> None:
    save_hugging_face(tiny_config(tie_word_embeddings=True), tmp_path / "model")
    data = write_dataset(tmp_path / "data", 128)
    flags: list[object] = [
        "asd-core", "parity", "--load", tmp_path / "model", "--data-path", data, "--seq-length", 16, "--train-iters", 3,
        "--layouts", "tp2+sp,pp2dp2+sharded", "--device", "cpu",
    ]  # fmt: skip
    done = run_command(*flags)
    assert done.status == 0, done.stderr
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["layout", "loss", "gradient", "norm", "weights", "verdict"]
    assert first.startswith("tp2 x pp1 x dp1 + sp ")
    assert second.startswith("tp1 x pp2 x dp2 + sharded optimizer ")
    assert first.endswith("equal")
    assert second.endswith("equal")
    assert all(float(cell) < 1e-9 for row in (first, second) for cell in row.split()[-4:-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.bin", "data.idx", "model"]


def test_a_deviation_is_a_verdict() -> None:
    row = ParityRow(Layout(tp=2), loss=1e-8, grad_norm=0.0, weights=0.0)
    assert not row.within(1e-9)
    assert "DIFFERENT" in table([row], 1e-9)[1]
    assert row.within(1e-7)


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
    assert "is no layout" in complaint(*model, "--layouts", "2tp")
    assert "is not a multiple of micro_batch_size x dp" in complaint(*model, "--layouts", "dp3")
    assert "dtype=int8 is unknown" in complaint(*model, "--layouts", "tp2", "--dtype", "int8")
    failed = complaint(*model, "--layouts", "tp3", "--train-iters", 1)
    assert "training under tp3 x pp1 x dp1 failed: tensor_model_parallel_size=3 does not divide" in failed
