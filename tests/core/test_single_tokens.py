"""Attention of single new tokens in C++ gives what a call for each text gives, and says why where it cannot be made."""

import logging
import random
import shutil
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels import cpp_library
from ascendspeed_core.kernels.lengths import TextLengths, attend_text_by_text
from ascendspeed_core.kernels.single_tokens import SingleTokens, token_attention
from ascendspeed_core.models.cache import KeyValueCache, SequenceChunk
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from support.models import tiny_config
from support.tables import ReportTables

CPU = Device("cpu")

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, cpp_library.COMPILERS)), reason="there is no C++ compiler"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"),
    [(12, 3, 64), (8, 8, 32), (7, 1, 16), (6, 2, 128), (5, 5, 256), (20, 2, 80)],
)
def test_single_tokens(
    report: ReportTables, dtype: torch.dtype, heads: int, key_heads: int, size: int
) -> None:
    draw = random.Random(heads * size)
    torch.manual_seed(heads)
    attend = token_attention(CPU, dtype, size, changes_scores=False)
    assert attend is not None
    largest = 0.0
    for _ in range(6):
        counts = [
            draw.choice((1, 2, 15, 16, 17, 255, 256, 257, draw.randint(1, 700)))
            for _ in range(draw.randint(1, 9))
        ]
        firsts = [sum(counts[:number]) + 3 * number for number in range(len(counts))]
        tokens = sum(counts) + 3 * len(counts)
        # More rows than texts, in another order, and heads of a wider product, as joined projections leave them.
        rows = draw.sample(range(len(counts) + 3), len(counts))
        q = torch.randn(len(counts) + 3, heads + 2, size).to(dtype)[:, :heads]
        new = [torch.randn(len(q), key_heads, size).to(dtype) for _ in range(2)]
        cache = [torch.randn(key_heads, tokens, size).to(dtype) for _ in range(2)]
        before = [one.clone() for one in cache]
        out = torch.full((len(q), heads, size), 7.0, dtype=dtype)
        window = draw.choice((None, 1, 5, 300))
        places = SingleTokens(*(torch.tensor(numbers) for numbers in (rows, firsts, counts)))
        attend(q, tuple(new), tuple(cache), places, window, out)
        for whole, mine, old in zip(cache, new, before, strict=True):
            for row, first, count in zip(rows, firsts, counts, strict=True):
                old[:, first + count - 1] = mine[row]
            assert torch.equal(whole, old)
        lengths = TextLengths(
            torch.arange(len(rows) + 1), torch.tensor([*firsts, 0]), torch.tensor(counts), 1, max(counts)
        )
        wanted = attend_text_by_text(q[rows].double(), *(one.double() for one in cache), lengths, window)
        largest = max(largest, float((out[rows].double() - wanted).abs().max() / wanted.abs().max()))
        untouched = [row for row in range(len(q)) if row not in rows]
        assert bool((out[untouched] == 7).all())
    report.add(
        "Attention of single tokens in C++ against float64",
        ("format", "query heads", "key heads", "size", "largest relative difference"),
        str(dtype), heads, key_heads, size, largest,
    )  # fmt: skip
    # Sums of fp32, of which bf16 keeps 8 bits.
    assert largest < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize(
    "changes", [{}, {"family": "mistral", "sliding_window": 7}, {"num_key_value_heads": 8}], ids=str
)
def test_passes_of_prompts_and_single_tokens(changes: dict[str, object]) -> None:
    """As the engine runs them: some chunks are of one token, some of many, some texts have one token in all."""
    config = tiny_config(max_position_embeddings=256, head_dim=16, **changes)
    model = load_model(InitialWeights(config, 1), ParallelMesh(CPU, Layout()), torch.float32).eval()
    draw = random.Random(str(changes))
    attend = token_attention(CPU, torch.float32, 16, changes_scores=False)
    assert attend is not None
    caches = [
        KeyValueCache(model.layer_caches(1), 2048, torch.float32, CPU.torch, None, attention)
        for attention in (None, attend)
    ]
    slots = [[cache.reserve(160) for _ in range(5)] for cache in caches]
    ends = [0] * 5
    for _ in range(40):
        chosen = sorted(draw.sample(range(5), draw.randint(1, 5)))
        counts = [draw.choice((1, 1, draw.randint(2, 9))) for _ in chosen]
        if max(end + 9 for end in ends) > 160:
            ends = [0] * 5
        ids = torch.tensor([draw.choices(range(128), k=sum(counts))])
        found = []
        for cache, own in zip(caches, slots, strict=True):
            chunks = [
                SequenceChunk(own[text], ends[text], count)
                for text, count in zip(chosen, counts, strict=True)
            ]
            with torch.no_grad():
                found.append(model(ModelInput(ids, cache=CachedPass(cache, chunks))).logits)
        for text, count in zip(chosen, counts, strict=True):
            ends[text] += count
        # Sums in another order.
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "size", "device"),
    [(torch.float16, 64, "cpu"), (torch.float64, 64, "cpu"), (torch.float32, 8, "cpu"), (torch.float32, 512, "cpu"),
     (torch.float32, 64, "npu")],
)  # fmt: skip
def test_what_it_does_not_take(dtype: torch.dtype, size: int, device: str) -> None:
    assert token_attention(Device(device), dtype, size, changes_scores=False) is None
    assert token_attention(CPU, torch.float32, 64, changes_scores=True) is None


def forget() -> None:
    """Forget what was found and compiled in this process."""
    for cached in (cpp_library.compiled, cpp_library.find_compiler, cpp_library._folder):
        cached.cache_clear()


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("command", "said"),
    [("/no/such/compiler", "CXX=/no/such/compiler is no command"), ("", "CXX= is no command"),
     ("false", "false does not compile single_tokens.cpp")],
)  # fmt: skip
def test_without_a_compiler_the_reason_is_said(
    forgotten: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    command: str,
    said: str,
) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert token_attention(CPU, torch.float32, 64, changes_scores=False) is None
    assert said in caplog.text


def test_what_was_compiled_is_kept_for_this_user_alone(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_it = partial(cpp_library.compiled, "single_tokens.cpp", "-DHEAD_DIM=16")
    compile_it()
    folder = tmp_path / "ascendspeed" / "kernels"
    (made,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    changed = made.stat().st_mtime_ns
    forget()
    compile_it()
    assert made.stat().st_mtime_ns == changed
    # Somebody else could put a library there: it is not read.
    folder.chmod(0o777)
    forget()
    assert Path(compile_it()._name).parent != folder


@pytest.mark.parametrize("size", [0, 20, 3000])
def test_a_cut_library_is_made_again(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    """Loaded, it would end the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    whole = Path(cpp_library.compiled("single_tokens.cpp", "-DHEAD_DIM=32")._name)
    folder = tmp_path / "cut" / "ascendspeed" / "kernels"
    folder.mkdir(mode=0o700, parents=True)
    (folder / whole.name).write_bytes(whole.read_bytes()[:size])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cut"))
    forget()
    made = Path(cpp_library.compiled("single_tokens.cpp", "-DHEAD_DIM=32")._name)
    assert made == folder / whole.name
    assert len(made.read_bytes()) == len(whole.read_bytes())
