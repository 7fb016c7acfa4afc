"""Which family a config is of: by `architectures`, by `model_type`, or a line that says what to write."""

import random
from typing import Any

import pytest

from ascendspeed_core.models.families import FAMILIES, family_of_hugging_face
from ascendspeed_data.errors import AscendSpeedError
from support.tables import ReportTables


@pytest.mark.parametrize(
    "absent", [{}, {"architectures": None}, {"architectures": []}], ids=["no key", "null", "[]"]
)
@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.name != "baichuan"])
def test_a_config_without_architectures_goes_by_its_type(
    family: Any, absent: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert family_of_hugging_face({"model_type": family.model_type, **absent}, "x/config.json") is family
    assert f"read as {family.architectures[0]} by its model_type" in capsys.readouterr().err


REFUSED = {
    "a type that leaves two models open": (
        {"model_type": "baichuan"},
        r'add "architectures": \["BaichuanForCausalLM"\] or "architectures": \["BaiChuanForCausalLM"\]',
    ),
    "nothing": ({}, r'add them, for a LLaMA "architectures": \["LlamaForCausalLM"\]'),
    "an unknown type": ({"model_type": "lllama"}, r"model_type='lllama' is of no family.*did you mean llama"),
    "another use of a known type": (
        {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
        "of model_type 'llama', LlamaForCausalLM and LLaMAForCausalLM are. If the weights are .*; otherwise load it in",
    ),
    "a model without its head": (
        {"architectures": ["LlamaModel"], "model_type": "llama"},
        r'It is the model without its head: .* write "architectures": \["LlamaForCausalLM"\]; otherwise save',
    ),
    "an unknown name": (
        {"architectures": ["GPT2LMHeadModel"]},
        "is not supported; supported are LlamaForCausalLM",
    ),
    "a name alone": ({"architectures": "LlamaForCausalLM"}, r'write "architectures": \["LlamaForCausalLM"\]'),
    "numbers": ({"architectures": [1]}, "is not a list of names"),
    "two models": (
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"], "model_type": "mistral"},
        r'which are different models; write "architectures": \["MistralForCausalLM"\]',
    ),
    "one that fits": (
        {"architectures": ["LlamaModel", "LlamaForCausalLM"], "model_type": "llama"},
        r'of which only one fits; write "architectures": \["LlamaForCausalLM"\]',
    ),
    "two of one family": (
        {"architectures": ["BaichuanForCausalLM", "BaiChuanForCausalLM"], "model_type": "baichuan"},
        "which baichuan tells apart; leave one of them",
    ),
    "a contradiction": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "mistral"},
        "whose model_type is 'llama', but model_type says 'mistral', which is MistralForCausalLM; correct",
    ),
    "a contradiction with what is not known": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "gpt_neox"},
        "but model_type says 'gpt_neox'; correct",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_leaves_open_or_contradicts_is_refused_in_one_line(case: str) -> None:
    config, complaint = REFUSED[case]
    with pytest.raises(AscendSpeedError, match=complaint) as raised:
        family_of_hugging_face(config, "x/config.json")
    assert "\n" not in str(raised.value)


def test_drawn_pairs_of_both_keys_agree_or_are_refused(report: ReportTables) -> None:
    """Whatever both keys say, a family is chosen only if each that speaks says it."""
    draw = random.Random(5)
    names = [name for family in FAMILIES.values() for name in family.architectures]
    types = [family.model_type for family in FAMILIES.values()]
    tried = chosen = 0
    for _ in range(400):
        named: Any = draw.choice([None, [], *([name] for name in names), draw.sample([*names, "X"], 2)])
        model_type = draw.choice([None, "other", *types])
        tried += 1
        try:
            family = family_of_hugging_face({"architectures": named, "model_type": model_type}, "x")
        except AscendSpeedError as error:
            assert "\n" not in str(error)
            continue
        chosen += 1
        assert model_type in (None, family.model_type)
        assert set(named or ()) <= set(family.architectures)
        assert named or model_type
    report.add(
        "Pairs of architectures and model_type", ("tried", "chosen", "disagreements"), tried, chosen, 0
    )
