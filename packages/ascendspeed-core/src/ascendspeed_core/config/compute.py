"""Options of how operators are computed; what they compute stays the same. Imports no torch."""

from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config


class ComputeConfig(Config):
    """How the model is computed; what is computed stays the same."""

    mlp_layer_fusion: bool = Field(
        False,
        description="One matrix product for gate and up, and one for queries, keys and values; checkpoints are as "
        "without.",
    )
    attention: Literal["auto", "npu", "sdpa", "triangle", "reference"] = Field(
        "auto",
        description="npu: torch_npu's fused one; sdpa: torch's scaled_dot_product_attention; triangle: by blocks, none "
        "above the diagonal; reference: all scores in memory; auto: npu on an NPU, sdpa elsewhere.",
    )
    triangle_attn: bool = Field(
        False, description="Short for --attention triangle.", json_schema_extra={"off": ""}
    )
    scaled_masked_softmax: Literal["auto", "npu", "reference"] = Field(
        "auto", description="The softmax of --attention reference."
    )
    rms_norm: Literal["auto", "npu", "liger", "torch", "reference"] = Field(
        "auto", description="RMSNorm; auto: npu on an NPU, torch on CUDA, reference on a CPU."
    )
    layer_norm: Literal["auto", "liger", "torch", "reference"] = Field(
        "auto", description="LayerNorm; auto: torch."
    )
    rotary: Literal["auto", "npu", "liger", "reference"] = Field(
        "auto", description="Rotary embedding; auto: the first of these that runs on the device."
    )
    swiglu: Literal["auto", "npu", "liger", "reference"] = Field(
        "auto", description="silu(gate) * up; auto: the first of these that runs on the device."
    )
    cross_entropy: Literal["auto", "npu", "liger", "torch", "reference"] = Field(
        "auto", description="Loss of a whole vocabulary; auto: npu on an NPU, torch elsewhere."
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
        others = ("scaled_masked_softmax", "rms_norm", "layer_norm", "rotary", "swiglu", "cross_entropy")
        return {"attention": self.attention_name} | {name: getattr(self, name) for name in others}
