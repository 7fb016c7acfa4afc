"""Routers: choices, weights and losses as loops over tokens say; loads, biases and capacities."""

from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.experts import Experts, ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.experts import order_by_group, permute_tokens, unpermute_tokens
from ascendspeed_core.models.experts import ExpertsMLP
from ascendspeed_core.models.router import Router, RouterStep, TokenRows
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import ConfigError
from core.expert_cases import experts_config
from core.training_cases import micro_batches

CPU = ParallelMesh(Device("cpu"), Layout())
HIDDEN, SEQUENCES, LENGTH = 10, 3, 8

KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "softmax over the chosen": {"score_after_choice": True},
    "Qwen2-MoE": {"normalised": False},
    "DeepSeek-V2": {
        "normalised": False,
        "groups": 4,
        "groups_per_token": 2,
        "group_score": "max",
        "scaling": 16.0,
    },
    "DeepSeek-V3": {
        "score": "sigmoid",
        "score_bias": True,
        "groups": 4,
        "groups_per_token": 2,
        "scaling": 2.5,
    },
}


def make_router(kind: str, **training: Any) -> tuple[Router, TokenRows]:
    torch.manual_seed(4)
    experts = Experts(count=8, per_token=3, ffn_hidden_size=4, **KINDS[kind])
    router = Router(experts, HIDDEN).double()
    torch.nn.init.normal_(router.weight)
    if router.bias is not None:
        router.bias.copy_(torch.randn(8).double() * 0.1)
    router.training_config, router.step = ExpertsConfig(**training), RouterStep()
    index = torch.arange(SEQUENCES * LENGTH)
    tokens = torch.randn(SEQUENCES * LENGTH, HIDDEN, dtype=torch.float64)
    return router, TokenRows(tokens, index // LENGTH, index % LENGTH, SEQUENCES)


def by_hand(router: Router, token: torch.Tensor) -> tuple[list[float], dict[int, float]]:
    """Scores of all experts, and weights of those chosen, one number after the other."""
    experts = router.experts
    logits = [float(token @ row) for row in router.weight.detach()]
    total = sum(torch.tensor(logits).exp().tolist())
    scores = [
        1 / (1 + 2.718281828459045**-one) if experts.score == "sigmoid" else 2.718281828459045**one / total
        for one in logits
    ]
    bias = router.bias.tolist() if router.bias is not None else [0.0] * 8
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = 8 // experts.groups
    groups = [choice[start : start + size] for start in range(0, 8, size)]
    worth = [sum(sorted(group)[-(2 if experts.group_score == "top2" else 1) :]) for group in groups]
    open_groups = sorted(range(experts.groups), key=lambda g: -worth[g])[: experts.groups_per_token]
    allowed = [e for e in range(8) if experts.groups == 1 or e // size in open_groups]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:3]
    sums = sum(scores[e] for e in chosen)
    if experts.score_after_choice or experts.normalised:
        return scores, {e: scores[e] / sums * experts.scaling for e in chosen}
    return scores, {e: scores[e] * experts.scaling for e in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_choices_and_weights(kind: str) -> None:
    router, given = make_router(kind)
    routing = router(given)
    for number, token in enumerate(given.tokens):
        _, want = by_hand(router, token)
        assert routing.chosen[number].tolist() == list(want)
        # 1e-6: the sum of the exponentials above is rounded to fp32.
        assert routing.weights[number].tolist() == pytest.approx(list(want.values()), rel=1e-6)


@pytest.mark.parametrize("over", ["aux_loss", "seq_aux_loss"])
@pytest.mark.parametrize("kind", ["Mixtral", "DeepSeek-V3"])
def test_losses(kind: str, over: str) -> None:
    """E / K x sum over experts of load x mean score, of all tokens or each sequence; and the mean square of log Z."""
    router, given = make_router(
        kind, moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.25, moe_router_load_balancing_type=over
    )
    losses = router(given).losses
    rows = [by_hand(router, token) for token in given.tokens]
    parts = [range(24)] if over == "aux_loss" else [range(s * 8, s * 8 + 8) for s in range(3)]
    balance = 0.0
    for part in parts:
        load = [sum(e in rows[t][1] for t in part) / len(part) for e in range(8)]
        likely = [
            sum(rows[t][0][e] / (sum(rows[t][0]) if kind == "DeepSeek-V3" else 1.0) for t in part) / len(part)
            for e in range(8)
        ]
        balance += len(part) * 8 / 3 * sum(f * p for f, p in zip(load, likely, strict=True))
    assert float(losses["balance"]) == pytest.approx(0.5 * balance, rel=1e-6)
    log_z = (given.tokens @ router.weight.T).exp().sum(-1).log()
    assert float(losses["router_z"]) == pytest.approx(0.25 * float(log_z.square().sum()), rel=1e-12)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity(policy: str) -> None:
    """Of each sequence an expert takes ceil(0.75 x 8 tokens x 3 / 8 experts) = 3 tokens."""
    router, given = make_router("Mixtral", moe_expert_capacity_factor=0.75, moe_token_drop_policy=policy)
    free, free_given = make_router("Mixtral")
    all_chosen, weights = free(free_given).chosen, free(free_given).weights
    routing = router(given)
    refused = 0
    for sequence in range(3):
        for expert in range(8):
            wanting = [
                (float(weights[t][slot]), t, slot)
                for t in range(sequence * 8, sequence * 8 + 8)
                for slot in range(3)
                if all_chosen[t][slot] == expert
            ]
            if policy == "probs":
                wanting.sort(key=lambda one: (-one[0], one[1]))
            for place, (_, t, slot) in enumerate(wanting):
                assert int(routing.chosen[t][slot]) == (expert if place < 3 else 8)
                refused += place >= 3
    assert router.step is not None
    assert int(router.step.dropped) == refused > 0  # type: ignore[arg-type]


def test_experts_are_filled_up_to_their_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """ceil(0.75 x 8 tokens x 2 / 4 experts) = 3 of each of three sequences; results and gradients stay."""
    found = []
    for pad in (False, True):
        torch.manual_seed(2)
        layer = ExpertsMLP(experts_config(dense_layers=())).double()
        layer.router.training_config = ExpertsConfig(
            moe_expert_capacity_factor=0.75, moe_pad_expert_input_to_capacity=pad
        )
        layer.router.step = RouterStep()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        sizes: list[list[int]] = []
        apply = layer.apply_experts
        monkeypatch.setattr(
            layer,
            "apply_experts",
            lambda rows, counts, a=apply, s=sizes: s.append(list(counts)) or a(rows, counts),
        )
        x = torch.randn(3, 8, 32, dtype=torch.float64, requires_grad=True)
        out = layer(x)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in (x, *layer.parameters())]
        found.append((out.detach(), *(g for g in gradients if g is not None)))
        (counts,) = sizes
        assert counts == [9] * 4 if pad else sum(counts) < 36
    assert len(found[0]) == len(found[1]) > 10
    # float64: products of more rows may round otherwise.
    for plain, padded in zip(*found, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-12, atol=1e-9)


def test_padding_needs_a_capacity() -> None:
    with pytest.raises(ValueError, match="moe_pad_expert_input_to_capacity=true needs moe_expert_capacity"):
        ExpertsConfig(moe_pad_expert_input_to_capacity=True)


def test_permutation_and_back() -> None:
    torch.manual_seed(1)
    tokens = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(6)[:2] for _ in range(7)])
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    rows, order = permute_tokens(tokens, chosen, 6)
    assert order.counts.tolist() == [int((chosen == e).sum()) for e in range(6)]
    at = 0
    for expert in range(6):
        for token in (t for t in range(7) if expert in chosen[t].tolist()):
            assert torch.equal(rows[at], tokens[token])
            at += 1
    assert at == 14
    assert torch.autograd.gradcheck(lambda x: permute_tokens(x, chosen, 6)[0], tokens)
    back = unpermute_tokens(rows, weights, order)
    torch.testing.assert_close(back, tokens * weights.sum(1, keepdim=True), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, w: unpermute_tokens(x, w, order), (rows.detach().requires_grad_(), weights)
    )
    groups = order_by_group(torch.tensor([2, 0, 2, 1]), 4)
    assert (groups.order.tolist(), groups.counts.tolist()) == ([1, 3, 0, 2], [1, 1, 2, 0])


def test_biases_move_against_the_load() -> None:
    """DeepSeek-V3's update: by the rate, up where the load is below the mean; no gradient, and in fp32."""
    config = experts_config(score="sigmoid", score_bias=True)
    model = load_model(InitialWeights(config, 5), CPU, torch.bfloat16)
    train_routers(model, ExpertsConfig(moe_router_bias_update_rate=0.01))
    engine = NativeEngine(model, OptimizerConfig(lr=1e-4), CPU)
    batches = micro_batches(config.vocab_size, 0, CPU, 4, masked=True)
    biases = {number: router.bias for number, router in model.routers()}
    assert sorted(biases) == [1, 2, 3]
    want = {number: torch.zeros(4) for number in biases}
    for _ in range(3):
        loads = train_step(model, engine, batches, CPU).expert_loads
        assert loads is not None
        # No token is lost: each of 16 x 24 chose two experts, in each layer that has some.
        assert loads.sum(1).tolist() == [0, 768, 768, 768]
        for number in biases:
            want[number] += 0.01 * (loads[number].mean() - loads[number]).sign()
    for number, bias in biases.items():
        assert bias is not None
        assert (bias.dtype, bias.requires_grad) == (torch.float32, False)
        assert torch.equal(bias, want[number].float())


def test_balancing_makes_loads_equal() -> None:
    """What the loss is for: with it the largest load comes down."""

    def largest_load(coefficient: float) -> float:
        config = experts_config()
        model = load_model(InitialWeights(config, 5), CPU, torch.float32)
        train_routers(model, ExpertsConfig(moe_aux_loss_coeff=coefficient))
        engine = NativeEngine(model, OptimizerConfig(lr=3e-3), CPU)
        loads = None
        for step in range(15):
            batches = micro_batches(config.vocab_size, step, CPU, 4, masked=False)
            loads = train_step(model, engine, batches, CPU).expert_loads
        assert loads is not None
        return float((loads[1:].max(1).values / loads[1:].mean(1)).max())

    assert largest_load(1.0) < 0.9 * largest_load(0.0)


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="experts go with mlp=swiglu and mlp_bias=false"):
        from ascendspeed_core.config.load import validate
        from ascendspeed_core.config.model import ModelConfig

        validate(ModelConfig, experts_config().model_dump() | {"mlp_bias": True})
    with pytest.raises(ValueError, match="groups=3 does not divide count=8; choose a divisor"):
        Experts(count=8, per_token=2, ffn_hidden_size=4, groups=3)
    with pytest.raises(ValueError, match="score_after_choice=true is a softmax over the chosen logits"):
        Experts(count=8, per_token=2, ffn_hidden_size=4, score="sigmoid", score_after_choice=True)


def test_experts_without_tokens_have_gradients() -> None:
    model = load_model(InitialWeights(experts_config(), 5), CPU, torch.float64)
    mlp = model.get_submodule("layers.1.mlp")
    assert isinstance(mlp, ExpertsMLP)
    mlp(torch.randn(1, 1, 32, dtype=torch.float64)).sum().backward()
    zero = [bool((expert.up_proj.weight.grad == 0).all()) for expert in mlp.experts.values()]  # type: ignore[union-attr, operator]
    assert sorted(zero) == [False, False, True, True]
