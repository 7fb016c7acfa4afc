"""Read peft's `adapter_config.json` with peft's own class; each of its fields is honoured, or refused by name.

A field that this table does not know must have the value that changes nothing: what it means is then not guessed.
peft is imported when an adapter is read or written, not before: its import takes seconds.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.source import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"

_Word = Annotated[str, Field(min_length=1)]
_Words = list[_Word] | _Word | None
_MaybeWords = list[_Word] | str | None
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class HonouredField:
    """A field of `adapter_config.json` that is taken as peft takes it.

    Attributes:
        name: in the file.
        kind: which values it may have, as a type that pydantic checks.
        meaning: what it does here, in one line.
        remedy: what to do about another value.
    """

    name: str
    kind: Any
    meaning: str
    remedy: str = "correct the file, or make it again"


@dataclass(frozen=True)
class RefusedField:
    """A field of `adapter_config.json`, or a value of one, that is refused.

    Attributes:
        name: in the file; of `init_lora_weights` together with the value: `init_lora_weights=pissa`.
        reason: what it would change.
        remedy: what to do instead.
        neutral: values that change nothing, besides `None` and peft's default.
    """

    name: str
    reason: str
    remedy: str
    neutral: tuple[Any, ...] = ()


_HOW_MADE = "Nothing: how A and B were drawn before the training."
_MERGE_THERE = "merge it with peft (merge_and_unload, then save_pretrained), and load the merged model"
_AS_LORA = (
    "save it in peft with path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it, or "
    + _MERGE_THERE
)

HONOURED: Sequence[HonouredField] = (
    HonouredField(
        "peft_type",
        Literal["LORA"],
        "Must be `LORA`; other kinds of adapters are refused by name.",
        "only LoRA adapters are read here",
    ),
    HonouredField(
        "task_type",
        Literal["CAUSAL_LM"] | None,
        "Must be `CAUSAL_LM`, or absent.",
        "an adapter of a language model has CAUSAL_LM: write that if it is one, otherwise use peft with the model that "
        "it was trained for",
    ),
    HonouredField("r", _Rank, "Rank of A and B; tensors of another rank are refused."),
    HonouredField("lora_alpha", _Finite, "B A is scaled by `lora_alpha / r`."),
    HonouredField("use_rslora", bool | None, "B A is scaled by `lora_alpha / sqrt(r)`."),
    HonouredField(
        "rank_pattern", dict[str, _Rank] | None, "Rank of the modules whose name ends with a pattern."
    ),
    HonouredField("alpha_pattern", dict[str, _Finite] | None, "`lora_alpha` of such modules."),
    HonouredField(
        "target_modules",
        _Words,
        "Modules with an adapter: names or their ends, one regular expression, `all-linear`, or absent for those that "
        "peft takes for this architecture. Each must have its tensors.",
    ),
    HonouredField("exclude_modules", _MaybeWords, "Modules without one, as names or one regular expression."),
    HonouredField("layers_to_transform", list[int] | int | None, "Only these layers have adapters."),
    HonouredField(
        "layers_pattern",
        _MaybeWords,
        "Name of the list that `layers_to_transform` counts in; found by itself if empty.",
    ),
    HonouredField(
        "modules_to_save",
        list[_Word] | None,
        "Modules that the adapter replaces. Of a tied embedding and head only the one that is named; the model then "
        "has both.",
    ),
    HonouredField(
        "ensure_weight_tying",
        bool | None,
        "A tied embedding and head stay tied when `modules_to_save` or `target_modules` name one of them.",
    ),
    HonouredField("bias", Literal["none", "all", "lora_only"], "Which biases the adapter replaces, besides."),
    HonouredField("lora_dropout", Annotated[float, Field(ge=0, le=1)], "Dropout in further training."),
    HonouredField(
        "init_lora_weights",
        bool | str | None,
        "Nothing for `true`, `false`, `gaussian`, `orthogonal` and `eva`. Values that change the base are refused.",
    ),
    HonouredField("fan_in_fan_out", bool | None, "Nothing: no model here stores a linear layer transposed."),
    HonouredField("base_model_name_or_path", str | None, "A line says so if the model has another name."),
    HonouredField("revision", str | None, "Named in that line."),
    HonouredField("eva_config", dict[str, Any] | None, _HOW_MADE),
    HonouredField("loftq_config", dict[str, Any] | None, _HOW_MADE),
    HonouredField("corda_config", dict[str, Any] | None, _HOW_MADE),
    HonouredField("lora_ga_config", dict[str, Any] | None, _HOW_MADE),
    HonouredField("inference_mode", bool | None, "Nothing: the command says whether it trains."),
    HonouredField("peft_version", str | None, "Nothing."),
    HonouredField("auto_mapping", dict[str, Any] | None, "Nothing: the checkpoint says what the base is."),
    HonouredField("megatron_core", str | None, "Nothing without `megatron_config`."),
    HonouredField("qalora_group_size", int | None, "Nothing without `use_qalora`."),
    HonouredField("runtime_config", dict[str, Any] | None, "Nothing: where peft computes."),
)
"""Every field that is read, and what it means."""

_RATE = "Nothing: a learning rate of LoRA+, which an adapter that is loaded does not have."
_Number = _Finite | int | None

OF_OTHER_PROGRAMS: Sequence[HonouredField] = (
    HonouredField("lorap_lr_ratio", _Number, _RATE),
    HonouredField("lorap_emb_lr", _Number, _RATE),
    HonouredField("loraplus_lr_ratio", _Number, _RATE),
    HonouredField("loraplus_lr_embedding", _Number, _RATE),
    HonouredField("lora_dtype", str | None, "Nothing: the format of A and B, which their tensors have."),
    HonouredField("swift_type", Literal["LORA"] | None, "Must be `LORA`, or absent."),
)
"""Fields that peft does not have, but programs built on it write (ms-swift, LLaMA-Factory)."""

REFUSED: Sequence[RefusedField] = (
    RefusedField("use_dora", "DoRA divides by the norms of W + B A", _MERGE_THERE),
    RefusedField(
        "lora_bias", "B has a bias of its own, which a layer without bias cannot hold", _MERGE_THERE
    ),
    RefusedField(
        "layer_replication",
        "the model gets copies of its layers",
        "make the larger model first, with peft",
        ([],),
    ),
    RefusedField(
        "trainable_token_indices",
        "single rows of the embedding were trained, and are stored apart",
        _MERGE_THERE,
    ),
    RefusedField(
        "target_parameters", "single tensors of a module have adapters, not the module", _MERGE_THERE, ([],)
    ),
    RefusedField(
        "alora_invocation_tokens",
        "the adapter is active only behind certain tokens (aLoRA)",
        "use peft or vLLM for it",
    ),
    RefusedField(
        "megatron_config",
        "its layers are those of Megatron-LM, under other names",
        "export it for the Hugging Face model",
    ),
    RefusedField("use_qalora", "A works on groups of inputs of a quantised base (QA-LoRA)", _MERGE_THERE),
    RefusedField("arrow_config", "several adapters are routed for each token (Arrow)", "use peft for it"),
    RefusedField("kasa_config", "the base loses its smallest singular values (KaSA)", _MERGE_THERE),
    RefusedField(
        "velora_config", "its gradients are approximated in further training (VeLoRA)", _MERGE_THERE
    ),
    RefusedField("monteclora_config", "its weights are sampled in each pass (MonteCLoRA)", "use peft for it"),
    RefusedField("use_bdlora", "A or B is block-diagonal (BD-LoRA)", _MERGE_THERE),
    RefusedField(
        "init_lora_weights=pissa", "the base's largest singular values were taken out of it", _AS_LORA
    ),
    RefusedField("init_lora_weights=olora", "a part of the base's QR factors was taken out of it", _AS_LORA),
    RefusedField(
        "init_lora_weights=corda", "singular values found with data were taken out of the base", _AS_LORA
    ),
    RefusedField(
        "init_lora_weights=lora_ga", "a part found by gradients was taken out of the base", _AS_LORA
    ),
    RefusedField("init_lora_weights=loftq", "the base was quantised together with A and B", _MERGE_THERE),
    RefusedField("init_lora_weights=mica", "B stays frozen in further training (MiCA)", _MERGE_THERE),
)
"""Fields with any other than their neutral value, and what is said of them."""

_UNKNOWN = RefusedField("", "this version does not know it", _MERGE_THERE)
_NEUTRAL_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_NO_VALUES: tuple[Any, ...] = (None, False, [], {}, "")
"""Of a field that the installed peft does not know."""


def honoured_fields() -> Mapping[str, HonouredField]:
    """Return the honoured fields by name."""
    return MappingProxyType({field.name: field for field in (*HONOURED, *OF_OTHER_PROGRAMS)})


def refused_fields() -> Mapping[str, RefusedField]:
    """Return the refused fields by name."""
    return MappingProxyType({field.name: field for field in REFUSED})


def read_adapter_config(path: Path) -> "LoraConfig":
    """Read an `adapter_config.json`.

    Raises:
        CheckpointError: it is missing or damaged, is of another kind of adapter, or asks for something that is not
            done here.
    """
    given = read_json(path)
    if "peft_type" not in given:
        raise CheckpointError(
            f'{path} does not say peft_type; add "peft_type": "LORA" if it is a LoRA adapter'
        )
    from peft import LoraConfig

    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    honoured, refused = honoured_fields(), refused_fields()
    for name, value in given.items():
        if name in honoured:
            _check_honoured(honoured[name], value, path)
        elif name in fields:
            known = refused.get(name, _UNKNOWN)
            if not _is_neutral(value, (None, _default(fields[name]), *known.neutral)):
                raise _refusal(path, name, value, known)
        elif not _is_neutral(value, _NO_VALUES):
            raise _refusal(path, name, value, _UNKNOWN)
    _check_init(path, given.get("init_lora_weights", True), refused)
    settings = {name: value for name, value in given.items() if name in fields and name != "runtime_config"}
    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = settings.get(name) or {}
    try:
        with warnings.catch_warnings():
            # What they say is about starting a training with these fields.
            warnings.simplefilter("ignore")
            return LoraConfig(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None


def _check_honoured(field: HonouredField, value: Any, path: Path) -> None:
    try:
        TypeAdapter(field.kind).validate_python(value, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]["msg"]
        raise CheckpointError(
            f"{path}: {field.name}={value!r} is not supported: {detail[0].lower()}{detail[1:]}; "
            f"{field.remedy}"
        ) from None


def _check_init(path: Path, value: Any, refused: Mapping[str, RefusedField]) -> None:
    if _is_neutral(value.lower() if isinstance(value, str) else value, _NEUTRAL_INITS):
        return
    kind = str(value).lower().partition("_niter_")[0]
    raise _refusal(path, "init_lora_weights", value, refused.get(f"init_lora_weights={kind}", _UNKNOWN))


def _refusal(path: Path, name: str, value: Any, field: RefusedField) -> CheckpointError:
    return CheckpointError(f"{path}: {name}={value!r} is not supported: {field.reason}; {field.remedy}")


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    return any(type(value) is type(one) and value == one for one in neutral)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
