"""Choose the family of a Hugging Face config: by `architectures`, or by `model_type` where that names one model."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.launch import announce
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.registry import known_families
from ascendspeed_data.errors import AscendSpeedError, did_you_mean

ARCHITECTURES, MODEL_TYPE = "architectures", "model_type"


def family_of_hugging_face(hf_config: Mapping[str, Any], where: str) -> Family:
    """Return the family that a Hugging Face config names in `architectures`, or else in `model_type`.

    Code that the config names is never imported; one line says so.

    Args:
        hf_config: content of the config.json.
        where: its path, for messages.

    Raises:
        AscendSpeedError: no family claims it, it names several, or its two keys contradict each other.
    """
    families = list(known_families().values())
    named = _named(hf_config.get(ARCHITECTURES), where)
    model_type = hf_config.get(MODEL_TYPE)
    if named:
        found = _by_architectures(named, model_type, families, where)
    else:
        found = _by_model_type(model_type, families, where)
        announce(
            f"{where}: no {ARCHITECTURES}, read as {found.architectures[0]} by its {MODEL_TYPE} {model_type!r}"
        )
    asked = [key for key in ("auto_map", "trust_remote_code") if hf_config.get(key)]
    if asked:
        announce(
            f"{where}: {' and '.join(asked)} not followed, no code of a model is run; read as {found.name}"
        )
    return found


def _named(value: Any, where: str) -> list[str]:
    """Return the architectures that a config names, each once."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        example = value if isinstance(value, str) else "LlamaForCausalLM"
        raise AscendSpeedError(
            f'{where}: {ARCHITECTURES}={value!r} is not a list of names; write "{ARCHITECTURES}": ["{example}"]'
        )
    return list(dict.fromkeys(value))


def _by_architectures(
    named: Sequence[str], model_type: Any, families: Sequence[Family], where: str
) -> Family:
    claims = {name: family for family in families for name in family.architectures}
    known = [name for name in named if name in claims]
    found = claims[known[0]] if known else None
    if found is not None and any(claims.get(name) is not found for name in named):
        others = "of which only one fits" if len(known) == 1 else "which are different models"
        raise AscendSpeedError(
            f"{where}: {ARCHITECTURES} names {' and '.join(named)}, {others}; "
            f"{_what_to_write(model_type, families, known)}"
        )
    if found is not None and len(named) > 1 and _needs_its_name(found):
        raise AscendSpeedError(
            f"{where}: {ARCHITECTURES} names {' and '.join(named)}, which {found.name} tells apart; leave one of them"
        )
    if found is None:
        fitting = _of_model_type(model_type, families)
        if fitting:
            names = [name for family in fitting for name in family.architectures]
            raise AscendSpeedError(
                f"{where}: {ARCHITECTURES}={list(named)!r} is not supported; of {MODEL_TYPE} {model_type!r}, "
                f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}. {_whole_model(named, names)}"
            )
        raise AscendSpeedError(
            f"{where}: {ARCHITECTURES}={list(named)!r} is not supported; supported are {', '.join(claims)}"
            f"{did_you_mean(named[0], claims)}"
        )
    if model_type is not None and model_type not in (found.model_type, *found.other_model_types):
        raise AscendSpeedError(
            f"{where}: {ARCHITECTURES} says {known[0]}, whose {MODEL_TYPE} is {found.model_type!r}, but {MODEL_TYPE} "
            f"says {model_type!r}{_known_as(model_type, families)}; correct the one that is wrong"
        )
    return found


def _whole_model(named: Sequence[str], names: Sequence[str]) -> str:
    """Say how a model without a head, or with another one, becomes one that answers."""
    if all(name.endswith("Model") for name in named):
        return (
            "It is the model without its head: if the files hold the head too, or it is the embedding "
            f'(tie_word_embeddings), write "{ARCHITECTURES}": ["{names[0]}"]; otherwise save the whole model again'
        )
    return (
        f'If the weights are those of a plain language model, write "{ARCHITECTURES}": ["{names[0]}"]; otherwise load '
        "it in transformers, and save its language model"
    )


def _by_model_type(model_type: Any, families: Sequence[Family], where: str) -> Family:
    fitting = _of_model_type(model_type, families)
    if len(fitting) == 1 and not _needs_its_name(fitting[0]):
        return fitting[0]
    types = sorted({family.model_type for family in families})
    if fitting:
        names = [name for family in fitting for name in family.architectures]
        choices = " or ".join(f'"{ARCHITECTURES}": ["{name}"]' for name in names)
        raise AscendSpeedError(
            f"{where} names no {ARCHITECTURES}, and {MODEL_TYPE} {model_type!r} leaves open which of "
            f"{len(names)} models it is; add {choices}"
        )
    if model_type is None:
        raise AscendSpeedError(
            f"{where} names neither {ARCHITECTURES} nor {MODEL_TYPE}, so nothing says which model it is; add them, "
            f'for a LLaMA "{ARCHITECTURES}": ["LlamaForCausalLM"] and "{MODEL_TYPE}": "llama" (known are '
            f"{', '.join(types)})"
        )
    raise AscendSpeedError(
        f"{where} names no {ARCHITECTURES}, and {MODEL_TYPE}={model_type!r} is of no family; known are "
        f"{', '.join(types)}{did_you_mean(str(model_type), types)}"
    )


def _of_model_type(model_type: Any, families: Sequence[Family]) -> list[Family]:
    return [family for family in families if model_type in (family.model_type, *family.other_model_types)]


def _needs_its_name(family: Family) -> bool:
    """Tell whether a family reads from `architectures` which of its models a config is of."""
    return any(ARCHITECTURES in rule.keys for rule in family.config)


def _what_to_write(model_type: Any, families: Sequence[Family], known: Sequence[str]) -> str:
    fitting = _of_model_type(model_type, families)
    name = fitting[0].architectures[0] if len(fitting) == 1 else known[0] if len(known) == 1 else None
    if name is None:
        return "leave the one that it is"
    return f'write "{ARCHITECTURES}": ["{name}"] if that is what it is'


def _known_as(model_type: Any, families: Sequence[Family]) -> str:
    fitting = _of_model_type(model_type, families)
    return f", which is {fitting[0].architectures[0]}" if fitting else ""
