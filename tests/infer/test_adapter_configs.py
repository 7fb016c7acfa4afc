"""Adapters of every config give the logits of peft after a reload: merged, beside the weights, and in training."""

import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.weights import WeightSource, open_weights
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.lora import loaded_adapters
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_infer.language_model import LanguageModel
from core.test_sft_dataset import ALONE
from support.commands import call
from support.families import REFERENCES
from support.peft_adapters import TOKENS, make, reloaded, reloaded_logits, respell, unread
from support.tables import ReportTables

TOLERANCE = 2e-4
"""fp32 sums in another order; logits are of the order of 10."""

BASES = {"untied": "LLaMA with all biases", "tied": "Qwen 2", "packed": "Bloom"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    for kind, name in BASES.items():
        REFERENCES[name].save(folder / kind)
    return {kind: folder / kind for kind in BASES}


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of few pieces: the reference models have 125 ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "names": ("untied", {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]}),
    "all-linear, rank-stabilised": (
        "untied", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True}
    ),
    "patterns of rank and alpha": (
        "untied",
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "rank_pattern": {"down_proj": 2, r".*layers\.1\.self_attn\..*": 3},
            "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 40, "o_proj": 5},
        },
    ),
    "a regular expression": ("untied", {"target_modules": r".*layers\.[02]\.(mlp\.up_proj|self_attn\.[ko]_proj)"}),
    "exclusions and layers": (
        "untied",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"],
            "layers_to_transform": [0, 2], "layers_pattern": "layers",
        },
    ),
    "all biases": ("untied", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    "biases of adapted layers": ("untied", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "saved modules": (
        "untied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    ),
    "the default targets": ("tied", {"init_lora_weights": "orthogonal", "lora_dropout": 0.1}),
    "a head and an embedding": ("untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied, the embedding saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, the head saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, both saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied, the head adapted": ("tied", {"target_modules": ["k_proj", "lm_head"]}),
    "tied, the embedding adapted": ("tied", {"target_modules": ["embed_tokens", "o_proj"]}),
    "kept tied, saved": (
        "tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "kept tied, adapted": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "packed projections": ("packed", {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"]}),
}  # fmt: skip
ONLY_MERGED = ("a head and an embedding", "tied, the embedding adapted", "kept tied, adapted")
"""An adapter of an embedding is computed in no other way."""


@torch.no_grad()
def logits_of(source: WeightSource) -> torch.Tensor:
    return load_model(source, ALONE, torch.float32)(ModelInput(TOKENS)).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(
    bases: dict[str, Path], tmp_path: Path, small_tokenizer: Path, report: ReportTables, name: str
) -> None:
    kind, options = CONFIGS[name]
    base, adapter = bases[kind], tmp_path / "adapter"
    make(base, adapter, options)
    want = reloaded_logits(base, adapter)
    assert (logits_of(open_weights(base)) - want).abs().max() > 1e-2
    done = call(
        "asd-ckpt", "merge-lora", "--load", base, "--lora-load", adapter, "--save", tmp_path / "merged", "--to",
        "huggingface",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    merged = logits_of(open_weights(tmp_path / "merged"))

    def generating(merges: bool) -> torch.Tensor:
        model = LanguageModel.from_pretrained(
            base, tokenizer=small_tokenizer, device="cpu", adapter=adapter, merge_adapter=merges
        )
        return model.logits(TOKENS[0].tolist())

    found = {"merge-lora": merged, "generation": generating(True)}
    source = open_weights(base)
    if name in ONLY_MERGED:
        with pytest.raises(CheckpointError, match="which is no plain linear layer; merge the adapter"):
            loaded_adapters(source, open_adapter(adapter, source.config))
    else:
        found["beside"] = generating(False)
        found["training"] = logits_of(loaded_adapters(source, open_adapter(adapter, source.config)))
    far = {way: float((logits - want).abs().max()) for way, logits in found.items()}
    report.add(
        "Adapters against peft's reload, fp32: largest differences of logits",
        ("config", "merge-lora", "generation", "beside", "training"),
        name,
        *(far.get(way, "refused") for way in ("merge-lora", "generation", "beside", "training")),
    )
    assert max(far.values()) < TOLERANCE
    transformers_reads_what_was_merged(tmp_path / "merged", want)


def transformers_reads_what_was_merged(folder: Path, want: torch.Tensor) -> None:
    """A model whose head and embedding became two says so in its config."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert (model(TOKENS).logits[0] - want).abs().max() < TOLERANCE


WORDS = {
    "untied": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
               "model.layers.1.mlp.up_proj", "self_attn.v_proj", "fc1"],
    "packed": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings", "lm_head", "q_proj"],
}  # fmt: skip
WORDS["tied"] = WORDS["untied"]
PATTERNS = [
    "layers.1.self_attn.q_proj",
    r".*\.[02]\..*",
    "q_proj",
    "lm_head",
    "dense",
    "embed_tokens",
    r"(up|down)_proj",
    "x",
]
EXPRESSIONS = [
    "all-linear", "ALL-LINEAR", r".*(q|k)_proj", r".*\.1\..*dense.*", r".*mlp.*", r"model\.layers\.\d\.mlp\.\w+_proj",
    r".*(lm_head|o_proj|dense)", r".*embed.*",
]  # fmt: skip
SAVED = [
    "embed_tokens",
    "lm_head",
    "norm",
    "model.norm",
    "input_layernorm",
    "word_embeddings",
    "mlp",
    "ln_f",
    "head",
]


def drawn_options(draw: random.Random, kind: str) -> dict[str, Any]:
    """Draw fields of an adapter's config, those that contradict each other included."""

    def sometimes(chance: float, value: Callable[[], Any]) -> Any:
        return value() if draw.random() < chance else None

    def some(words: list[str], most: int = 3) -> list[str]:
        return draw.sample(words, draw.randint(1, most))

    words = WORDS[kind]
    listed = draw.random() < 0.65
    options = {
        "r": draw.choice((1, 2, 4, 6)),
        "lora_alpha": draw.choice((1, 4, 7.5, 16)),
        "use_rslora": sometimes(0.3, lambda: True),
        "target_modules": some(words, 4) if listed else draw.choice([*EXPRESSIONS, None]),
        "exclude_modules": sometimes(0.25, lambda: draw.choice([some(words), draw.choice(EXPRESSIONS[2:])])),
        "rank_pattern": sometimes(0.4, lambda: {name: draw.randint(1, 5) for name in some(PATTERNS)}),
        "alpha_pattern": sometimes(0.4, lambda: {name: draw.choice((1, 3, 9.5)) for name in some(PATTERNS)}),
        "modules_to_save": sometimes(0.3, lambda: some(SAVED, 2)),
        "bias": sometimes(0.3, lambda: draw.choice(("all", "lora_only"))),
        "init_lora_weights": sometimes(0.3, lambda: draw.choice((False, "gaussian", "eva", "orthogonal"))),
        "lora_dropout": sometimes(0.2, lambda: 0.1),
        "ensure_weight_tying": sometimes(0.3, lambda: True),
        "fan_in_fan_out": sometimes(0.1, lambda: True),
    }
    if listed:
        options["layers_to_transform"] = sometimes(0.3, lambda: draw.choice((0, [1, 2], [2], [])))
        if options["layers_to_transform"] is not None:
            options["layers_pattern"] = sometimes(0.4, lambda: draw.choice(("layers", ["h", "layers"], "h")))
    return {name: value for name, value in options.items() if value is not None}


ALLOWED = re.compile(
    r"is no plain linear layer; merge|packs several tensors; merge|adapted or replaced once more"
    r"|ensure_weight_tying is given, and other fields"
)
"""What is refused here although peft does it."""


def compare(bases: dict[str, Path], folder: Path, seed: int) -> tuple[str, float]:
    """Draw a config; return how it went, and the largest difference of logits."""
    draw = random.Random(seed)
    kind = draw.choice(list(BASES))
    base, options = bases[kind], drawn_options(draw, kind)
    source = open_weights(base)
    try:
        make(base, folder / "adapter", options, seed)
        theirs = reloaded(base, folder / "adapter")
        with torch.no_grad():
            want = theirs(TOKENS).logits[0]
    except Exception as error:  # noqa: BLE001 - peft refuses in many ways; then there is nothing to compare with
        if (folder / "adapter" / "adapter_config.json").is_file():
            with pytest.raises(CheckpointError):
                open_adapter(folder / "adapter", source.config)
        return f"peft refuses it: {type(error).__name__}", 0.0
    respell(folder / "adapter", folder / "respelt", options.get("target_modules"), draw)
    worst, outcome = 0.0, "equal"
    for spelling in ("adapter", "respelt"):
        try:
            adapter = open_adapter(folder / spelling, source.config)
            worst = max(worst, float((logits_of(MergedAdapter(source, adapter)) - want).abs().max()))
            worst = max(worst, float((logits_of(loaded_adapters(source, adapter)) - want).abs().max()))
        except CheckpointError as error:
            # With ensure_weight_tying peft writes a head that its own reload of the config does not find.
            is_unread = "target_modules does not mean" in str(error) and unread(theirs, folder / "adapter")
            assert is_unread or ALLOWED.search(str(error)), f"seed {seed}, {options}: {error}"
            outcome = "merged alone" if "merge the adapter" in str(error) else "refused by name"
    assert worst < TOLERANCE, f"seed {seed}, {kind}, {options}: {worst}"
    return outcome, worst


def compare_many(bases: dict[str, Path], folder: Path, report: ReportTables, seeds: range) -> None:
    outcomes: Counter[str] = Counter()
    worst = 0.0
    for seed in seeds:
        outcome, far = compare(bases, folder / str(seed), seed)
        shutil.rmtree(folder / str(seed), ignore_errors=True)
        outcomes[outcome] += 1
        worst = max(worst, far)
    title = "Adapters with configs drawn at random, against peft's reload"
    header = (
        "configs",
        "equal",
        "merged alone",
        "refused by name",
        "peft refuses",
        "disagreements",
        "largest difference",
    )
    named = [outcomes[name] for name in ("equal", "merged alone", "refused by name")]
    report.add(title, header, len(seeds), *named, len(seeds) - sum(named), 0, worst)
    assert outcomes["equal"] > len(seeds) // 4


def test_drawn_configs(bases: dict[str, Path], tmp_path: Path, report: ReportTables) -> None:
    compare_many(bases, tmp_path, report, range(30))


@pytest.mark.nightly
def test_many_drawn_configs(bases: dict[str, Path], tmp_path: Path, report: ReportTables) -> None:
    compare_many(bases, tmp_path, report, range(1000, 1400))
