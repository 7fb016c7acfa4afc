"""Which kernels there are, and options of how a model is computed; what is computed stays the same. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config

EVERYWHERE = ("cpu", "cuda", "npu")
"""All kinds of devices."""

_FUSED_NPU = "torch_npu's fused operator"
_DEVICES = {"npu": "an NPU", "cuda": "CUDA", "cpu": "a CPU"}


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operator; `kernels.registry` attaches the function.

    Attributes:
        description: what it is, in a few words: for the help of the option, and the table that a run prints.
        auto_on: kinds of devices on which `auto` takes it, if it is the first of the operator that can run.
        is_optional: it needs a package that may not be installed.
        only_where: what a run must be like that `auto` takes it.
    """

    description: str
    auto_on: tuple[str, ...] = ()
    is_optional: bool = False
    only_where: str | None = None


_LIGER_ASKED = Kernel("Liger-Kernel", is_optional=True)
_NPU = Kernel(_FUSED_NPU, ("npu",))
_LIGER = Kernel("Liger-Kernel", ("cuda",), is_optional=True)
_NATIVE = Kernel("C++, compiled for a CPU when it is first needed", ("cpu",), is_optional=True)
_COMPILED = Kernel("plain torch, fused by torch.compile", ("cuda",), is_optional=True)
_PLAIN = Kernel("plain torch", EVERYWHERE)

KERNELS: Mapping[str, Mapping[str, Kernel]] = MappingProxyType(
    {
        "attention": {
            "npu": Kernel(f"{_FUSED_NPU} npu_fusion_attention", ("npu",)),
            "native": _NATIVE,
            "sdpa": Kernel(
                "torch's fused kernels, of packed texts by their lengths, by blocks where a mask is large",
                EVERYWHERE,
            ),
            "triangle": Kernel("by blocks, leaving out those that no query sees", EVERYWHERE),
            "flex": Kernel("torch's flex_attention, compiled", is_optional=True),
            "reference": Kernel("plain torch, all scores in memory", EVERYWHERE),
        },
        "scaled_masked_softmax": {"npu": _NPU, "reference": _PLAIN},
        "rms_norm": {
            "npu": _NPU,
            "native": _NATIVE,
            "liger": _LIGER_ASKED,
            "torch": Kernel("torch's fused rms_norm", ("cuda",)),
            "reference": _PLAIN,
        },
        "layer_norm": {
            "liger": _LIGER_ASKED,
            "torch": Kernel("torch's layer_norm, fused on every device", EVERYWHERE),
            "reference": Kernel("plain torch"),
        },
        "rotary": {
            "npu": Kernel(f"{_FUSED_NPU} npu_rotary_mul", ("npu",)),
            "native": _NATIVE,
            "compiled": _COMPILED,
            "liger": _LIGER,
            "reference": _PLAIN,
        },
        "swiglu": {
            "npu": _NPU,
            "native": _NATIVE,
            "compiled": _COMPILED,
            "liger": _LIGER,
            "reference": _PLAIN,
        },
        "token_permutation": {
            "npu": Kernel(f"{_FUSED_NPU}s npu_moe_init_routing and npu_moe_finalize_routing", ("npu",)),
            "reference": _PLAIN,
        },
        "grouped_product": {
            "npu": Kernel(f"{_FUSED_NPU} npu_grouped_matmul", ("npu",)),
            "grouped_mm": Kernel("torch's grouped_mm, one kernel for all experts", ("cuda",)),
            "reference": Kernel("plain torch, one expert after the other", EVERYWHERE),
        },
        "cross_entropy": {
            "hidden": Kernel(
                "from hidden states, a part of the vocabulary at a time",
                EVERYWHERE,
                only_where="a micro-batch's logits take a GiB",
            ),
            "npu": _NPU,
            "liger": _LIGER_ASKED,
            "compiled": _COMPILED,
            "torch": Kernel("torch's cross_entropy", EVERYWHERE),
            "reference": Kernel("plain torch"),
        },
    }
)
"""By operator its implementations, by the name under which each is asked for; `auto` tries them in this order."""

if TYPE_CHECKING:
    from typing import Annotated as KernelName
else:

    class KernelName:
        """`KernelName[str, operator]` is the type of the operator's option: `auto` or a name of `KERNELS`."""

        def __class_getitem__(cls, item: tuple[type, str]) -> Any:
            """Return the literal type of the names."""
            return Literal[("auto", *KERNELS[item[1]])]


def _kernel(operator: str, what: str) -> Any:
    """Return the field of an operator's option; its help says what each name stands for, and what `auto` takes."""
    kernels = KERNELS[operator]
    names = "; ".join(f"{name}: {kernel.description}" for name, kernel in kernels.items())
    return Field("auto", description=f"{what}. {names}; auto: {_auto_rule(kernels)}.")


def _auto_rule(kernels: Mapping[str, Kernel]) -> str:
    """Say what `auto` takes: `npu on an NPU, torch elsewhere`."""
    for name, kernel in kernels.items():
        if kernel.only_where is not None:
            rest = {other: one for other, one in kernels.items() if other != name}
            return f"{name} where {kernel.only_where}, else {_auto_rule(rest)}"
    taken = {}
    for device in _DEVICES:
        meant = [name for name, kernel in kernels.items() if device in kernel.auto_on]
        is_certain = not kernels[meant[0]].is_optional
        taken[device] = meant[0] if is_certain else f"{meant[0]} (if not installed: {meant[1]})"
    if len(set(taken.values())) == 1:
        return taken["cpu"]
    if taken["cuda"] == taken["cpu"]:
        return f"{taken['npu']} on an NPU, {taken['cpu']} elsewhere"
    return ", ".join(f"{name} on {_DEVICES[device]}" for device, name in taken.items())


class ComputeConfig(Config):
    """How the model is computed; what is computed stays the same."""

    mlp_layer_fusion: bool = Field(
        False,
        description="One matrix product for gate and up, and one for queries, keys and values; checkpoints are as "
        "without.",
    )
    attention: KernelName[str, "attention"] = _kernel("attention", "Causal attention")
    triangle_attn: bool = Field(
        False, description="Short for --attention triangle.", json_schema_extra={"off": ""}
    )
    scaled_masked_softmax: KernelName[str, "scaled_masked_softmax"] = _kernel(
        "scaled_masked_softmax", "The softmax of --attention reference"
    )
    rms_norm: KernelName[str, "rms_norm"] = _kernel("rms_norm", "RMSNorm")
    layer_norm: KernelName[str, "layer_norm"] = _kernel("layer_norm", "LayerNorm")
    rotary: KernelName[str, "rotary"] = _kernel("rotary", "Rotary position embedding")
    swiglu: KernelName[str, "swiglu"] = _kernel("swiglu", "silu(gate) * up")
    token_permutation: KernelName[str, "token_permutation"] = _kernel(
        "token_permutation", "Tokens sorted by their experts, and back"
    )
    grouped_product: KernelName[str, "grouped_product"] = _kernel(
        "grouped_product", "Products with the weights of experts"
    )
    cross_entropy: KernelName[str, "cross_entropy"] = _kernel(
        "cross_entropy",
        "Cross-entropy loss; but for hidden and torch, if the vocabulary is not split over devices",
    )

    use_flash_attn: bool = Field(
        False,
        description="Accepted for old scripts: --attention auto takes the fused one.",
        json_schema_extra={"off": ""},
    )
    use_fused_rotary_pos_emb: bool = Field(
        False,
        description="Accepted for old scripts: --rotary auto takes the fused one.",
        json_schema_extra={"off": ""},
    )
    use_fused_rmsnorm: bool = Field(
        False,
        description="Accepted for old scripts: --rms-norm auto takes the fused one.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _one_attention(self) -> "ComputeConfig":
        if self.triangle_attn and self.attention not in ("auto", "triangle"):
            raise ValueError(f"triangle_attn and attention={self.attention} were both given; give one")
        fused = {
            "use_flash_attn": "attention",
            "use_fused_rotary_pos_emb": "rotary",
            "use_fused_rmsnorm": "rms_norm",
        }
        for flag, operator in fused.items():
            asked = self.kernel_names()[operator]
            if getattr(self, flag) and asked in ("reference", "triangle"):
                raise ValueError(f"{flag} and {operator}={asked} were both given; give one")
        return self

    @property
    def attention_name(self) -> str:
        """The implementation of attention that was asked for, or `auto`."""
        return "triangle" if self.triangle_attn else self.attention

    def kernel_names(self) -> dict[str, str]:
        """Return what was asked for, by operator."""
        return {name: getattr(self, name) for name in KERNELS} | {"attention": self.attention_name}
