"""torch_npu's fused operators on the CPU: its own schemas, and arithmetic written from its documentation.

With them the calls of `ascendspeed_core.kernels.npu` run anywhere. They show that a call fits and what it asks for;
they say nothing of an NPU's rounding, limits or speed, and they are our reading of the documentation.
"""

from functools import cache
from typing import Any

import torch

from support.torch_npu_wheel import operators

Tensor = torch.Tensor


def npu_apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float,
    epsilon: float, grad: Tensor, max_grad_norm: Tensor | None, amsgrad: bool, maximize: bool, *, var: Tensor,
    m: Tensor, v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The powers are those before the step (CANN's ApplyAdamW)."""
    assert max_grad_norm is None
    assert not amsgrad
    assert not maximize
    assert var.dtype == torch.float32
    m.copy_(m * beta1 + grad * (1 - beta1))
    v.copy_(v * beta2 + grad * grad * (1 - beta2))
    denominator = (v / (1 - beta2_power * beta2)).sqrt() + epsilon
    var.copy_(var * (1 - lr * weight_decay) - lr * (m / (1 - beta1_power * beta1)) / denominator)
    return var, m, v


def npu_fusion_attention(*args: Any, **options: Any) -> tuple[Any, ...]:
    """`Softmax(Mask(scale * (pse + query key^T))) value`: what is added is scaled too."""
    return _attention(adds_first=True, **_by_name("npu_fusion_attention", args, options))


def npu_fusion_attention_v2(*args: Any, pse_type: int = 1, **options: Any) -> tuple[Any, ...]:
    """Type 1 adds and then scales, type 0 scales and then adds, type 2 makes what it adds from slopes."""
    assert pse_type in (0, 1, 2)
    given = _by_name("npu_fusion_attention_v2", args, options)
    for name in ("pre_tokens", "next_tokens"):
        if name in given:
            given[name.replace("tok", "tock")] = given.pop(name)
    return _attention(adds_first=pse_type == 1, is_slopes=pse_type == 2, **given)


def _by_name(operator: str, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Arguments that differ from the defaults of the schema, by name; torch may pass any by position."""
    parameters = getattr(torch.ops.npu, operator).default._schema.arguments
    given = {p.name: value for p, value in zip(parameters, args, strict=False)} | options
    defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
    return {
        name: value
        for name, value in given.items()
        if name not in defaults or isinstance(value, torch.Tensor) or value != defaults[name]
    }


def _attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *,
    actual_seq_qlen: list[int] | None = None, actual_seq_kvlen: list[int] | None = None, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """In layout TND tokens of several texts stand one after the other, with the ends of the texts."""
    if input_layout == "BNSD":
        assert actual_seq_qlen is actual_seq_kvlen is None
        attended = _rows(query, key, value, head_num, **options)
    else:
        assert input_layout == "TND"
        assert actual_seq_qlen == actual_seq_kvlen
        assert actual_seq_qlen is not None
        assert len(actual_seq_qlen) <= 1024
        assert actual_seq_qlen[-1] == len(query)
        sizes = [end - start for start, end in zip([0, *actual_seq_qlen], actual_seq_qlen, strict=False)]
        texts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (query, key, value)), strict=True)
        parts = [_rows(*(x.unsqueeze(0) for x in text), head_num, **options)[0] for text in texts]
        attended = torch.cat(parts, 1).transpose(0, 1)
    empty = attended.new_empty(0)
    return attended, empty, empty, empty, 0, 0, 0


def _rows(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, *, adds_first: bool, is_slopes: bool = False,
    pse: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0, sparse_mode: int = 0,
    pre_tockens: int = 2**31 - 1, next_tockens: int = 2**31 - 1,
) -> Tensor:  # fmt: skip
    """Attention of rows, [B, N, S, D]."""
    assert head_num == query.shape[1]
    assert query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert query.dtype == key.dtype == value.dtype
    assert head_num % key.shape[1] == 0
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    group = head_num // key.shape[1]
    scores = (query @ key.repeat_interleave(group, 1).transpose(-1, -2)).float()
    distance = torch.arange(keys) - torch.arange(queries).unsqueeze(1)
    if is_slopes:
        assert pse is not None
        assert pse.dtype == torch.float32
        assert pse.shape == (head_num,)
        assert queries == keys
        scores = scores * scale - pse[:, None, None] * distance.abs()
    elif pse is not None:
        assert pse.dtype == query.dtype
        assert pse.shape in ((batch, head_num, queries, keys), (1, head_num, queries, keys))
        scores = (scores + pse) * scale if adds_first else scores * scale + pse
    else:
        scores = scores * scale
    if atten_mask is not None:
        assert atten_mask.dtype == torch.bool
        if sparse_mode in (3, 4):
            # The compressed causal mask; its corner is that of the last query and the last key.
            assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
            distance = distance - (keys - queries)
            atten_mask = distance > 0
            if sparse_mode == 4:
                atten_mask = (distance > next_tockens) | (distance < -pre_tockens)
        else:
            assert sparse_mode == 0
            whole = (queries, keys)
            assert atten_mask.shape in (whole, (1, 1, *whole), (batch, 1, *whole), (batch, head_num, *whole))
        scores = scores.masked_fill(atten_mask, -torch.inf)
    attended: Tensor = scores.softmax(-1).to(value.dtype) @ value.repeat_interleave(group, 1)
    return attended


def npu_scaled_masked_softmax(
    x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False
) -> Tensor:
    """Heights and widths are multiples of 32 up to 4,096; True is masked."""
    assert not fixed_triu_mask
    assert mask.dtype == torch.bool
    assert all(32 <= side <= 4096 and side % 32 == 0 for side in x.shape[-2:])
    return (x.float() * scale).masked_fill(mask, -torch.inf).softmax(-1).to(x.dtype)


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert self.dtype == gamma.dtype
    wide = self.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * inverse * gamma).to(self.dtype), inverse


def npu_rotary_mul(
    self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Layout [B, S, N, D] with [B or 1, S, 1, D]."""
    assert rotary_mode == "half"
    assert rotate is None
    assert self.dtype == r1.dtype == r2.dtype
    assert r1.shape == r2.shape == (r1.shape[0], self.shape[1], 1, self.shape[3])
    assert r1.shape[0] in (1, self.shape[0])
    first, second = self.chunk(2, -1)
    return r1 * self + r2 * torch.cat([-second, first], -1)


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    a, b = self.chunk(2, dim)
    return a * torch.sigmoid(a) * b


def npu_cross_entropy_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100,
    label_smoothing: float = 0.0, lse_square_scale_for_zloss: float = 0.0, return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert reduction == "none"
    assert input.dim() == 2
    assert input.shape[0] <= 200_000
    assert target.dtype == torch.int64
    probabilities = input.log_softmax(-1)
    empty = input.new_empty(0)
    return -probabilities.gather(1, target.unsqueeze(1)).squeeze(1), probabilities, empty, empty


def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None, quant_offset: Tensor | None = None, bias: Tensor | None = None,
    antiquant_group_size: int = 0, inner_precise: int = 0, **more: Any,
) -> Tensor:  # fmt: skip
    """Of 16-bit activations [M, K] with a weight [K, N], most quickly a transposed one, and a scale for each column."""
    assert x.dtype in (torch.float16, torch.bfloat16)
    assert weight.dtype == torch.int8
    assert weight.dim() == x.dim() == 2
    assert all(1 <= side <= 65535 for side in weight.shape)
    assert weight.T.is_contiguous()
    assert antiquant_scale.dtype == x.dtype
    assert antiquant_scale.shape == weight.shape[1:]
    assert antiquant_offset is quant_scale is quant_offset is bias is None
    assert antiquant_group_size == inner_precise == 0
    assert not any(more.values())
    return (x.float() @ (weight.float() * antiquant_scale.float())).to(x.dtype)


def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor | None = None, split_item: int = 0,
    group_type: int | None = None, group_list_type: int = 0, **more: Any,
) -> list[Tensor]:  # fmt: skip
    """Rows of one tensor [N, I], cut at the ends of `group_list`, with the matrices [E, I, O] of one tensor."""
    assert (len(x), len(weight), split_item, group_type, group_list_type) == (1, 1, 3, 0, 0)
    assert x[0].dtype == weight[0].dtype
    assert group_list is not None
    assert group_list.dtype == torch.int64
    assert not any(value for value in more.values())
    ends = group_list.tolist()
    assert ends == sorted(ends)
    assert ends[-1] == len(x[0])
    rows = x[0].tensor_split(ends[:-1])
    return [torch.cat([part @ matrix for part, matrix in zip(rows, weight[0], strict=True)])]


def npu_moe_init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, H], numbers of their copies [T, K] counted by columns, experts [T, K]; sorted by experts, stably."""
    tokens, copies = expert_idx.shape
    assert row_idx.dtype == expert_idx.dtype == torch.int32
    assert torch.equal(row_idx, torch.arange(tokens * copies, dtype=torch.int32).view(copies, tokens).T)
    assert active_num == tokens
    experts, order = expert_idx.flatten().sort(stable=True)
    source = row_idx.flatten()[order]
    positions = torch.empty_like(source)
    positions[source.long()] = torch.arange(len(source), dtype=torch.int32)
    return x[source.long() % tokens], positions, experts


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor, skip1: Tensor | None, skip2: Tensor | None, bias: Tensor | None,
    scales: Tensor | None, expanded_src_to_dst_row: Tensor, export_for_source_row: Tensor | None, **more: Any,
) -> Tensor:  # fmt: skip
    """Sum over k of scale [t, k] x the row at position [k T + t]."""
    assert skip1 is skip2 is bias is export_for_source_row is None
    assert more.get("drop_pad_mode", 0) == 0
    assert scales is not None
    assert scales.dtype == expanded_permuted_rows.dtype
    assert expanded_src_to_dst_row.dtype == torch.int32
    tokens, copies = scales.shape
    total = torch.zeros(tokens, expanded_permuted_rows.shape[1])
    for k in range(copies):
        rows = expanded_permuted_rows[expanded_src_to_dst_row[k * tokens : (k + 1) * tokens].long()]
        total += scales[:, k, None].float() * rows.float()
    return total.to(expanded_permuted_rows.dtype)


KERNELS = {
    "npu_apply_adam_w.out": npu_apply_adam_w,
    **{
        kernel.__name__: kernel
        for kernel in (
            npu_fusion_attention, npu_fusion_attention_v2, npu_scaled_masked_softmax, npu_rms_norm, npu_rotary_mul,
            npu_swiglu, npu_cross_entropy_loss, npu_weight_quant_batchmatmul, npu_grouped_matmul,
            npu_moe_init_routing, npu_moe_finalize_routing,
        )
    },
}  # fmt: skip


@cache
def install() -> torch.library.Library:
    """Define the operators in torch; autograd goes through their arithmetic."""
    library = torch.library.Library("npu", "DEF")
    for name, kernel in KERNELS.items():
        library.define(operators()[name])
        library.impl(name, kernel, "CompositeImplicitAutograd")
    return library
