"""Adapters: peft's numbers, peft's files, every layout alike, nothing kept for what is frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import tensor_slice
from ascendspeed_core.config.training import DropoutConfig, RecomputeConfig
from ascendspeed_core.models.dropout import BEFORE_ADAPTER, DropoutMasks
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.linear import HALVES
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.optim.optimizer import MasterOptimizer
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.lora import (
    AdaptedWeights,
    drawn_adapters,
    loaded_adapters,
    plan_adapters,
)
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.adapters.write_peft import peft_form
from ascendspeed_data.errors import AscendSpeedError
from core.finetune_cases import data_config, tune, used_adapters
from core.test_sft_dataset import ALONE, config, distances, finetune
from core.training_cases import Trained, join_stages
from support.commands import call
from support.dense_families import DENSE_REFERENCES
from support.families import EXPERT_REFERENCES, REFERENCES
from support.instruction import LENGTH
from support.models import save_hugging_face, tiny_config
from support.peft_adapters import TOKENS, make, reloaded_logits
from support.processes import WorkerPool
from support.tables import ReportTables

TARGETS = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")
FP32 = 1e-5
"""Hugging Face's norms and peft's adapters are fp32 whatever the model's format."""
SAVED = ("word_embeddings", "lm_head.lm_head")


def lora(*targets: str, **changes: Any) -> LoraConfig:
    values: dict[str, Any] = {"lora_target_modules": targets or TARGETS, "lora_r": 3, "lora_alpha": 12}
    return LoraConfig(**(values | changes))


def layers_of(model: ModelConfig, *targets: str) -> list[str]:
    """What is meant in the first layer and outside of layers."""
    plan = plan_adapters(lora(*targets), model, "the model")
    return sorted(
        n.removeprefix("layers.0.") for n in plan.layers if n.startswith("layers.0.") or "layers" not in n
    )


def test_names_of_2023_and_of_hugging_face() -> None:
    llama, bloom = (
        tiny_config(),
        tiny_config(
            family="bloom",
            norm="layernorm",
            mlp="gelu",
            tie_word_embeddings=True,
            embedding_norm=True,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
        ),
    )
    attention = ["attention.k_proj", "attention.q_proj", "attention.v_proj"]
    assert layers_of(llama, "query_key_value") == layers_of(llama, "q_proj", "k_proj", "v_proj") == attention
    assert layers_of(bloom, "query_key_value") == attention
    assert (
        layers_of(bloom, "dense")
        == layers_of(llama, "o_proj")
        == layers_of(llama, "dense")
        == ["attention.o_proj"]
    )
    assert layers_of(bloom, "dense_4h_to_h") == layers_of(llama, "down_proj") == ["mlp.down_proj"]
    assert layers_of(llama, "proj") == ["mlp.gate_proj", "mlp.up_proj"]
    assert layers_of(llama, "lm_head") == ["output_head"]
    assert len(layers_of(llama, "all-linear")) == 7
    with pytest.raises(AscendSpeedError, match=r"the model has no module q_porj; did you mean q_proj\?"):
        layers_of(llama, "q_porj")
    with pytest.raises(
        AscendSpeedError, match="is that of the embedding, so an adapter beside it cannot be merged"
    ):
        layers_of(bloom, "lm_head")
    both = lora(lora_modules_to_save=SAVED)
    assert plan_adapters(both, llama, "").trained == {"embedding.weight", "output_head.weight"}
    assert plan_adapters(both, tiny_config(tie_word_embeddings=True), "").trained == {"embedding.weight"}


def test_experts_in_fused_tensors_get_no_adapter(tmp_path: Path) -> None:
    """As gpt-oss's; all-linear leaves them out, as peft does."""
    EXPERT_REFERENCES["gpt-oss"].save(tmp_path)
    config = open_weights(tmp_path).config
    layers = plan_adapters(lora("all-linear"), config, "").layers
    assert {name.split(".")[-1] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(AscendSpeedError, match=r"experts\.0\.down_proj is a part of a fused tensor"):
        plan_adapters(lora("down_proj"), config, "")


def opened(base: Path, adapter: Path) -> AdaptedWeights:
    """Return a model with an adapter beside its weights."""
    source = open_weights(base)
    return loaded_adapters(source, open_adapter(adapter, source.config))


def tokens_of(vocab_size: int, length: int = 20) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(4))


OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_TARGETS = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "o_proj")
FAMILIES = ["LLaMA with all biases", "Qwen 3", "InternLM", "Bloom", "Mistral", "Phi 3", "Command R+"]
FAMILIES += [
    pytest.param(name, marks=pytest.mark.nightly)
    for name in (
        *("Gemma 3", "GLM 4", "OLMo 3", "StableLM 2 12B", "DeepSeek-V3 without experts"),
        *("DeepSeek-V3", "GLM-4.5"),
    )
]
FAMILIES.append("gpt-oss")


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_reads_what_we_write_and_finds_our_logits_and_gradients(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    # peft takes every MLP of a DeepSeek model for experts, dense ones too.
    targets = LATENT_TARGETS if "DeepSeek" in name else ("all-linear",)
    targets = OF_ATTENTION if name in ("GLM-4.5", "gpt-oss") else targets
    base: Any = (REFERENCES | DENSE_REFERENCES | EXPERT_REFERENCES)[name].save(tmp_path / "base").double()
    # torch's grouped product knows no float64.
    base.config._experts_implementation = "eager"
    source = used_adapters(open_weights(tmp_path / "base"), lora(*targets, lora_modules_to_save=SAVED))
    model = load_model(source, ALONE, torch.float64)
    (tmp_path / "adapter").mkdir()
    peft_form(source.adapters, source.config, source.read).save(tmp_path / "adapter", None)
    theirs: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    tokens = tokens_of(source.config.vocab_size)
    want, got = theirs(input_ids=tokens).logits, model(ModelInput(tokens)).logits
    assert (got - want).abs().max() < FP32
    alone = load_model(source.base, ALONE, torch.float64)(ModelInput(tokens)).logits
    assert (got - alone).abs().max() > 1e-2
    want.square().mean().backward()
    got.square().mean().backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    theirs_by_name = {
        key.replace(".default", ""): p.grad for key, p in theirs.named_parameters() if p.requires_grad
    }
    for rule in find_family(source.config.family).weights(source.config):
        if rule.packed is not None:
            continue  # Packed there: other matrices, whose product is the same.
        layer = rule.ours.removesuffix(".weight")
        if layer in source.adapters.layers and rule.ours.endswith(".weight"):
            for half in HALVES:
                key = f"base_model.model.{rule.theirs.removesuffix('.weight')}.{half}.weight"
                found, wanted = ours[f"{layer}.{half}.weight"], theirs_by_name[key]
                assert (found - wanted).abs().max() < FP32 * wanted.abs().max()


def test_an_adapter_of_peft_with_a_larger_vocabulary_is_trained_further(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    save_hugging_face(tiny_config(), tmp_path / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    base.resize_token_embeddings(140)
    options = PeftConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM", rank_pattern={"down_proj": 2},
    )  # fmt: skip
    theirs: Any = get_peft_model(base, options)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter")
    source = opened(tmp_path / "base", tmp_path / "adapter")
    assert source.config.vocab_size == 140
    assert source.adapters.layers["layers.0.mlp.down_proj"].rank == 2
    model, tokens = load_model(source, ALONE, torch.float32), tokens_of(140)
    assert (model(ModelInput(tokens)).logits - theirs(input_ids=tokens).logits).abs().max() < FP32
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"embedding.weight", "output_head.weight"} < trained
    assert len(trained) == 2 + 4 * 4


def test_a_fused_adapter_becomes_one_for_each_projection(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = REFERENCES["Bloom"].save(tmp_path / "base")
    theirs: Any = get_peft_model(
        base,
        PeftConfig(r=4, lora_alpha=8, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM"),
    )  # type: ignore[arg-type]
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "adapter")
    source = opened(tmp_path / "base", tmp_path / "adapter")
    q, k = (source.read(f"layers.1.attention.{n}_proj.lora_A.weight") for n in "qk")
    assert torch.equal(q, k)
    tokens = tokens_of(source.config.vocab_size)
    got = load_model(source, ALONE, torch.float32)(ModelInput(tokens)).logits
    assert (got - theirs(input_ids=tokens).logits).abs().max() < FP32


LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "tp4 sp": Layout(tp=4, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "pp2 vpp1-zb": Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "tp2 pp2 vpp1": Layout(tp=2, pp=2, schedule="interleaved", layers_per_stage=1),
    "tp2 dp2 sharded": Layout(tp=2, dp=2, sharded_optimizer=True),
    "cp2 tp2 sp": Layout(cp=2, tp=2, sequence_parallel=True),
}
BIASED = {
    "position": "alibi",
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama, 2 key-value heads": {"num_key_value_heads": 2},
    "biases, ALiBi, tied": BIASED,
}
CASES = [
    (name, kind)
    for kind in KINDS
    for name in LAYOUTS
    if kind.startswith("llama") or name in ("tp2 sp", "tp2 pp2 vpp1")
]
"""With 2 key-value heads and tp 4 each head is on two devices."""
COVERED = ("tp2", "pp2", "tp2 sp")
"""Layouts that are part of others."""


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, sets: tuple[Path, Path]) -> dict[str, Trained]:
    """What one process computes."""
    data, options = data_config(sets[1], LENGTH), lora(lora_modules_to_save=SAVED)
    return {
        kind: workers.run(tune, 1, config(**changes), Layout(), data, lora=options)[0]
        for kind, changes in KINDS.items()
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=pytest.mark.nightly if case[0] in COVERED else ()) for case in CASES],
)
def test_layouts(
    workers: WorkerPool,
    report: ReportTables,
    sets: tuple[Path, Path],
    alone: dict[str, Trained],
    name: str,
    kind: str,
) -> None:
    layout, shape, data = LAYOUTS[name], config(**KINDS[kind]), data_config(sets[1], LENGTH)
    assert min(float(gradient.abs().max()) for gradient in alone[kind].gradients.values()) > 0
    options = lora(lora_modules_to_save=SAVED)
    got = join_stages(workers.run(tune, layout.world_size, shape, layout, data, lora=options), layout)
    found = distances(got, alone[kind])
    title = "LoRA against one process, float64: largest relative differences"
    report.add(title, ("layout", "model", "losses and norms", "gradients", "weights"), name, kind, *found)
    assert max(found) < 1e-9


def test_recompute_and_joined_projections(workers: WorkerPool, sets: tuple[Path, Path]) -> None:
    data = data_config(sets[0], LENGTH)
    (want,) = workers.run(tune, 1, config(), Layout(), data, lora=lora())
    full = RecomputeConfig(checkpoint_activations=True)
    got = workers.run(tune, 2, config(), Layout(tp=2), data, lora=lora(), joined=True, recompute=full)[0]
    assert max(distances(got, want)) < 1e-9


DROPPED = (
    ("tp2 sp", {}),
    ("tp2 pp2 vpp1", {}),
    ("tp2 dp2 sharded", {"joined": True, "recompute": RecomputeConfig(checkpoint_activations=True)}),
    ("cp2 tp2 sp", {}),
    ("pp2 zbv", {}),
)
"""Layouts, and what is done besides."""


def test_dropout_drops_the_same_under_every_layout(workers: WorkerPool, sets: tuple[Path, Path]) -> None:
    data, shape, options = data_config(sets[1], LENGTH), config(), lora(lora_dropout=0.25)
    (want,) = workers.run(tune, 1, shape, Layout(), data, lora=options)
    (without,) = workers.run(tune, 1, shape, Layout(), data, lora=lora())
    assert distances(without, want)[0] > 1e-4
    for name, besides in DROPPED:
        layout = LAYOUTS[name]
        ranks = workers.run(tune, layout.world_size, shape, layout, data, lora=options, **besides)
        assert max(distances(join_stages(ranks, layout), want)) < 1e-9, name


def test_dropout_is_where_peft_has_it(tmp_path: Path) -> None:
    """peft's own layers, with our masks in place of those that torch draws."""
    from peft import PeftModel

    base = REFERENCES["LLaMA with all biases"].save(tmp_path / "base").double()
    source = used_adapters(open_weights(tmp_path / "base"), lora("all-linear", lora_dropout=0.25))
    model = load_model(source, ALONE, torch.float64)
    apply_dropout(model, DropoutConfig(), 9, ALONE)
    peft_form(source.adapters, source.config, source.read).save(tmp_path, None)
    theirs: Any = PeftModel.from_pretrained(base, tmp_path).double()
    assert theirs.peft_config["default"].lora_dropout == 0.25
    tokens, samples = tokens_of(source.config.vocab_size), torch.tensor([4, 2**33])
    assert model.dropout is not None
    draws = model.dropout.masks(samples, model.positions.heads)
    plain = theirs(input_ids=tokens).logits
    with torch.no_grad():
        assert (model(ModelInput(tokens)).logits - plain).abs().max() < FP32
    for number, layer in enumerate(theirs.get_base_model().model.layers):
        for name, place in BEFORE_ADAPTER.items():
            part = layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp
            here = draws.in_layer(number)
            getattr(part, name).lora_dropout["default"] = OurMask(here, place)
    got, want = model(ModelInput(tokens, samples=samples)).logits, theirs(input_ids=tokens).logits
    assert (got - want).abs().max() < FP32
    assert (got - plain).abs().max() > 1e-3


class OurMask(torch.nn.Module):
    """Stands where peft has its dropout."""

    def __init__(self, draws: DropoutMasks, place: int) -> None:
        super().__init__()
        self._draws, self._place = draws, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._draws.adapter_input(x, self._place, 0.25, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_frozen_costs_nothing(dtype: str) -> None:
    source = drawn_adapters(InitialWeights(tiny_config(), 5), plan_adapters(lora(), tiny_config(), ""), 3)
    model = load_model(source, ALONE, getattr(torch, dtype))
    optimizer = MasterOptimizer(model, OptimizerConfig(), ALONE)
    model(ModelInput(tokens_of(128))).logits.float().square().mean().backward()
    optimizer.step()
    elements = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    kinds = 3 if dtype == "bfloat16" else 2
    assert sum(tensor.numel() for _, tensor in optimizer.state().values()) == kinds * elements
    assert all(p.grad is None for p in model.parameters())


def test_first_values_are_those_of_peft_in_spread_and_the_same_at_any_layout() -> None:
    plan = plan_adapters(lora(), tiny_config(), "")
    source = drawn_adapters(InitialWeights(tiny_config(), 5), plan, 3)
    a = source.read("layers.2.mlp.down_proj.lora_A.weight")
    reference = torch.nn.Linear(48, 3, bias=False)
    torch.nn.init.kaiming_uniform_(reference.weight, a=5**0.5)
    bound = 48**-0.5
    assert a.abs().max() <= bound
    assert reference.weight.abs().max() <= bound
    assert a.abs().max() > 0.9 * bound
    assert torch.equal(
        source.read("layers.2.mlp.down_proj.lora_A.weight", (slice(0, 3), slice(24, 48))), a[:, 24:]
    )
    assert not source.read("layers.2.mlp.down_proj.lora_B.weight").any()
    assert not torch.equal(a, source.read("layers.1.mlp.down_proj.lora_A.weight"))


def test_an_adapter_that_unties_is_trained_further_and_read_by_peft(
    sets: tuple[Path, Path], tmp_path: Path, tokenizer_folder: Path
) -> None:
    base = tmp_path / "base"
    save_hugging_face(config(tie_word_embeddings=True), base, tokenizer=tokenizer_folder)
    options = {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    make(base, tmp_path / "adapter", options)
    flags = ("--data-path", sets[1], "--lora-load", tmp_path / "adapter")
    for name, more in (("one", ()), ("two", ("--exit-interval", 2)), ("two", ("--auto-resume",))):
        done = finetune(tmp_path / name, base, *flags, *more, run=call)
        assert done.status == 0, done.stderr
    assert "resumed at iteration 2" in done.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["lm_loss"] for r in got] == pytest.approx([r["lm_loss"] for r in want], rel=1e-9)
    folder = tmp_path / "two" / "iter_0000004"
    ours = load_model(opened(base, folder), ALONE, torch.float32)(ModelInput(TOKENS)).logits[0]
    # Both in fp32, sums in another order; logits are of the order of 1.
    assert (ours - reloaded_logits(base, folder)).abs().max() < 1e-4
    assert (ours - reloaded_logits(base, tmp_path / "adapter")).abs().max() > 1e-3


def test_a_run_is_saved_resumed_merged_and_read_by_peft(
    sets: tuple[Path, Path],
    tmp_path: Path,
    tokenizer_folder: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    save_hugging_face(config(), base, tokenizer=tokenizer_folder)
    flags = (
        "--data-path", sets[1], "--lora-target-modules", *TARGETS, "--lora-r", 4, "--lora-alpha", 8,
        "--lora-modules-to-save", *SAVED, "--lora-register-forward-hook", "word_embeddings", "input_layernorm",
    )  # fmt: skip
    one = finetune(tmp_path / "one", base, *flags)
    assert one.status == 0, one.stderr
    assert "adapters: 28 layers of rank 4, and embedding.weight, output_head.weight" in one.stderr
    first = finetune(
        tmp_path / "two",
        base,
        *flags,
        "--exit-interval",
        2,
        "--nproc-per-node",
        2,
        "--tensor-model-parallel-size",
        2,
    )
    assert first.status == 0, first.stderr
    second = finetune(tmp_path / "two", base, *flags, "--auto-resume")
    assert second.status == 0, second.stderr
    assert "resumed at iteration 2" in second.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["lm_loss"] for r in got] == pytest.approx([r["lm_loss"] for r in want], rel=1e-9)

    folder = tmp_path / "one" / "iter_0000004"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("one/**/model*.safetensors"))
    theirs: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), folder
    ).double()
    tokens = tokens_of(400)
    adapter = open_adapter(tmp_path / "one", open_weights(base).config)
    source = opened(base, tmp_path / "one")
    assert isinstance(source, AdaptedWeights)
    ours = load_model(source, ALONE, torch.float64)(ModelInput(tokens)).logits
    assert (ours - theirs(input_ids=tokens).logits).abs().max() < FP32
    merged = load_model(MergedAdapter(open_weights(base), adapter), ALONE, torch.float32)(
        ModelInput(tokens)
    ).logits
    # The merged weights are in fp32, as the base is.
    assert (merged - ours).abs().max() < 1e-4

    files = []
    for name in ("one", "two"):
        done = call(
            "asd-ckpt",
            "merge-lora",
            "--load",
            base,
            "--lora-load",
            tmp_path / name,
            "--save",
            tmp_path / f"merged-{name}",
            "--to",
            "huggingface",
        )
        assert done.status == 0, done.stderr
        files.append(open_weights(tmp_path / f"merged-{name}"))
    worst = max(float((files[0].read(n) - files[1].read(n)).abs().max()) for n in files[0].tensors())
    assert worst < 1e-6
    whole = MergedAdapter(open_weights(base), adapter)
    for name, info in whole.tensors().items():
        for tp in (2, 4):
            for rank in range(tp):
                part = tensor_slice(name, info.shape, whole.config, Layout(tp=tp), rank)
                assert torch.equal(whole.read(name, part.index), whole.read(name)[part.index]), name
    refused = call("asd-ckpt", "inspect", tmp_path / "one")
    assert "holds an adapter only; give its base" in refused.complaint
    other = finetune(tmp_path / "two", base, *flags, "--lora-r", 2, "--auto-resume", run=call)
    assert other.status == 1
    assert "has adapters of other layers, ranks or scales" in other.complaint
    save_hugging_face(config(), tmp_path / "other", seed=1, tokenizer=tokenizer_folder)
    other = finetune(tmp_path / "two", tmp_path / "other", *flags, "--auto-resume", run=call)
    assert other.status == 1
    assert "holds other weights than the adapters in" in other.complaint


def test_options_that_mean_nothing_are_refused(sets: tuple[Path, Path], tmp_path: Path) -> None:
    save_hugging_face(config(), tmp_path / "base")
    done = finetune(tmp_path / "x", tmp_path / "base", "--data-path", sets[0], "--lora-r", 4, run=call)
    assert done.status == 2
    assert "lora_r means nothing without --lora-target-modules or --lora-load" in done.complaint
    dropping = ("--data-path", sets[0], "--lora-target-modules", "lm_head", "--lora-dropout", 0.1)
    done = finetune(tmp_path / "x", tmp_path / "base", *dropping, run=call)
    assert done.status == 1
    assert "nothing is dropped before the adapter of the head" in done.complaint
