"""Recognise folders whose weights are quantised: by `quantization_config`, or by names and formats of their tensors.

Such weights are integers or narrow floats that mean something only together with scales, in one of many packings.
Those with block scales under a published rule are read, see `block_scales`. Of the others a user needs to hear which
method it is and how to get plain weights.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ascendspeed_core.weights.source import WEIGHT_DTYPES, CheckpointError, TensorInfo

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of a config.json under which quantisers describe what they did."""

CONFIG_FILES = MappingProxyType(
    {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
)
"""Files that older quantisers wrote beside the config.json, and whose they are."""

ORIGINAL = "load the folder that it was made from, whose weights are not quantised"
_LOADED = "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='bfloat16', quantization_config={}).save_pretrained(OUT)"
_DEQUANTIZE = (
    "or write plain weights with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).dequantize()"
    ".save_pretrained(OUT)"
)


@dataclass(frozen=True)
class QuantisationMethod:
    """A way of quantising weights that is recognised.

    Attributes:
        name: as `quant_method` says it.
        marks: ends of tensor names, as regular expressions, that this method writes; all must be there.
        remedy: what to do with such a folder.
    """

    name: str
    marks: tuple[str, ...]
    remedy: str


METHODS = (
    QuantisationMethod("gptq", (r"\.qweight", r"\.g_idx"), ORIGINAL),
    QuantisationMethod("awq", (r"\.qweight", r"\.qzeros"), ORIGINAL),
    QuantisationMethod(
        "fp8",
        (r"\.weight_scale_inv",),
        f"{ORIGINAL}, or write plain weights with transformers: "
        f"{_LOADED.format('FineGrainedFP8Config(dequantize=True)')}",
    ),
    QuantisationMethod("bitsandbytes", (r"\.(SCB|weight_format)",), f"{ORIGINAL}, {_DEQUANTIZE}"),
    QuantisationMethod(
        "bitsandbytes", (r"\.(absmax|quant_map|quant_state\..*)",), f"{ORIGINAL}, {_DEQUANTIZE}"
    ),
    QuantisationMethod("nvfp4", (r"\.weight_scale_2",), ORIGINAL),
    QuantisationMethod(
        "compressed-tensors",
        (r"\.weight_(packed|shape|zero_point|g_idx|global_scale|scale)",),
        f"{ORIGINAL}, or write plain weights with transformers: "
        f"{_LOADED.format('CompressedTensorsConfig(run_compressed=False)')}",
    ),
    QuantisationMethod(
        "mxfp4",
        (r"_blocks", r"_scales"),
        f"{ORIGINAL}, or write plain weights with transformers: {_LOADED.format('Mxfp4Config(dequantize=True)')}",
    ),
    QuantisationMethod("hqq", (r"\.W_q",), ORIGINAL),
    QuantisationMethod("aqlm", (r"\.codebooks", r"\.codes"), ORIGINAL),
    QuantisationMethod("vptq", (r"\.(res_)?centroids\.weight",), ORIGINAL),
    QuantisationMethod("spqr", (r"\.dense_weights", r"\.row_offsets"), ORIGINAL),
    QuantisationMethod("quip#", (r"\.Qidxs",), ORIGINAL),
    QuantisationMethod("exl2", (r"\.q_weight",), ORIGINAL),
    QuantisationMethod("quanto", (r"\.weight\._(data|scale|shift)",), f"{ORIGINAL}, {_DEQUANTIZE}"),
    QuantisationMethod("torchao", (), f"{ORIGINAL}, {_DEQUANTIZE}"),
    QuantisationMethod("fbgemm_fp8", (), ORIGINAL),
    QuantisationMethod("modelopt", (), ORIGINAL),
    QuantisationMethod("bitnet", (), ORIGINAL),
    QuantisationMethod("eetq", (), ORIGINAL),
    QuantisationMethod("higgs", (), ORIGINAL),
    QuantisationMethod("quark", (), ORIGINAL),
    QuantisationMethod("auto-round", (), ORIGINAL),
    QuantisationMethod("fp_quant", (), ORIGINAL),
    QuantisationMethod("sinq", (), ORIGINAL),
    QuantisationMethod("metal", (), ORIGINAL),
)
"""Methods by their marks, the more particular ones first; those without marks are known by the config alone."""


def refuse_quantised(folder: Path, hf_config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise unless the weights of a Hugging Face folder are plain numbers.

    Args:
        folder: for messages, and for what older quantisers wrote beside the config.
        hf_config: content of its config.json.
        tensors: shape and dtype by name, of all its files.

    Raises:
        CheckpointError: they are quantised, or config and weights contradict each other about it.
    """
    key = next((key for key in CONFIG_KEYS if hf_config.get(key)), None)
    marked, by_marks = _by_marks(tensors)
    odd = sorted(
        name
        for name, info in tensors.items()
        if name.endswith("weight") and info.dtype not in WEIGHT_DTYPES and info.dtype != torch.bool
    )
    if key is None and not marked and not odd:
        return
    if not marked and not odd:
        raise CheckpointError(
            f"{folder}: its config.json has {key} ({_said(hf_config[str(key)])}), but no tensor of its files is "
            f"quantised; remove {key} from config.json if the weights are plain, or copy the folder again"
        )
    method, source = _named_method(hf_config, folder, key, by_marks)
    example = (marked or odd)[0]
    shown = f"{example}, stored as {_name(tensors[example].dtype)}"
    name = method.name if method is not None else source
    raise CheckpointError(
        f"{folder} is quantised{f' with {name}' if name else ''} ({f'{key} in its config.json, ' if key else ''}"
        f"{len(marked) or len(odd)} tensors such as {shown}), which is not read; "
        f"{method.remedy if method is not None else ORIGINAL}"
    )


def method_of_config(value: Any) -> str | None:
    """Return the method that a `quantization_config` names, as far as it does."""
    if not isinstance(value, Mapping):
        return None
    if value.get("quant_method"):
        return str(value["quant_method"])
    return (
        "bitsandbytes"
        if any(value.get(name) for name in ("load_in_8bit", "load_in_4bit"))
        else "compressed-tensors"
        if "config_groups" in value
        else None
    )


def find_method(name: str) -> QuantisationMethod | None:
    """Return the method of that name, if it is recognised."""
    return next((method for method in METHODS if method.name == name.lower()), None)


def _named_method(
    hf_config: Mapping[str, Any], folder: Path, key: str | None, by_marks: QuantisationMethod | None
) -> tuple[QuantisationMethod | None, str | None]:
    """Return the method: as the config says, or a file beside it, or the tensors; and its name if it is unknown."""
    said = method_of_config(hf_config.get(key)) if key is not None else None
    if said is None and by_marks is None:
        said = next((name for file, name in CONFIG_FILES.items() if (folder / file).is_file()), None)
    return (find_method(said) if said is not None else by_marks), said


def _by_marks(names: Iterable[str]) -> tuple[Sequence[str], QuantisationMethod | None]:
    """Return tensors whose names only a quantiser gives, and the method."""
    names = sorted(names)
    for method in METHODS:
        if not method.marks:
            continue
        found = [[name for name in names if re.search(f"{mark}$", name)] for mark in method.marks]
        if all(found):
            return found[0], method
    return [], None


def _said(value: Any) -> str:
    """Return what a `quantization_config` says, in short."""
    method = method_of_config(value)
    return f"quant_method={method!r}" if method is not None else "without a method"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
