"""Every kernel against the plain operator in float64 on the host, forward and backward, on drawn inputs.

The tolerances are of the length of the difference over the length of what is wanted: the round-off of each format
(6e-8, 4e-3, 5e-4) times the handful of roundings between input and output, in float32 times the sums over hundreds of
terms. Gradients have three times as much: those of norm weights are sums over all rows, which some kernels keep in
the format of the weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from ascendspeed_core.device import HOST
from ascendspeed_core.kernels.mask_rule import MaskRule, attention_mask
from ascendspeed_core.kernels.reference import Mask, reference_attention
from ascendspeed_core.kernels.registry import OPERATORS, UNPERMUTE, KernelContext, implementations
from ascendspeed_core.models.position import alibi_slopes
from on_device.setting import LeftOut, Setting, check_within, relative_error

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
Arguments = list[Any]


def check_operator(setting: Setting, operator: str, name: str) -> dict[str, Any]:
    """Compare one implementation; NaN where it leaves something unwritten is a disagreement."""
    (implementation,) = [one for one in OPERATORS[operator] if one.name == name]
    found: dict[str, float] = {}
    tried = 0
    for dtype_name in TOLERANCE:
        # Logits are never narrower than float32.
        if operator == "cross_entropy" and dtype_name != "float32":
            continue
        dtype = getattr(torch, dtype_name)
        context = KernelContext(setting.device, dtype, seq_length=64, micro_batch_tokens=64)
        if reason := implementation.unsupported(context):
            raise LeftOut(reason)
        for seed, arguments in enumerate(inputs(operator, dtype, is_brief=dtype_name != "float32")):
            wide = [_wide(one) for one in arguments]
            want, want_gradients = results(implementations(operator)["reference"], wide, seed)
            placed = [_placed(one, setting) for one in arguments]
            out, gradients = results(implementation.run, placed, seed)
            errors = [
                max(map(relative_error, ours, theirs))
                for ours, theirs in ((out, want), (gradients, want_gradients))
            ]
            for kind, error in zip(("", " gradients"), errors, strict=True):
                key = f"{dtype_name}{kind}"
                found[key] = max(found.get(key, 0.0), error) if error == error else error
            tried += 1
    check_within(found, TOLERANCE | {f"{name} gradients": 3 * limit for name, limit in TOLERANCE.items()})
    return {**found, "inputs": tried}


def inputs(operator: str, dtype: torch.dtype, is_brief: bool) -> Iterator[Arguments]:
    """Yield arguments of an operator, drawn on the host; the floating ones that want gradients are marked so.

    Args:
        operator: key of `OPERATORS`.
        dtype: of the floating ones.
        is_brief: few shapes: for each cuDNN makes a plan of attention, and Triton compiles norms.
    """
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    if operator == "attention":
        shapes = (
            (4, 2, 64, 64, 16), (8, 2, 300, 300, 128), (8, 2, 1, 77, 64), (4, 4, 33, 130, 64), (8, 8, 257, 257, 64)
        )  # fmt: skip
        for heads, groups, queries, keys, dim in shapes[: 2 if is_brief else None]:
            for mask in masks(heads, queries, keys, dtype):
                texts = mask.segments if isinstance(mask, MaskRule) else None
                batch = 2 if texts is None else len(texts)
                q, k, v = (
                    draw(batch, heads, queries, dim),
                    draw(batch, groups, keys, dim),
                    draw(batch, groups, keys, dim),
                )
                yield [q, k, v, mask]
    elif operator == "scaled_masked_softmax":
        yield [draw(2, 4, 64, 64), torch.ones(64, 64, dtype=torch.bool).tril(), 0.25]
    elif operator in ("rms_norm", "layer_norm"):
        for rows, size in ((130, 4096), (5, 1000), (9, 32))[: 1 if is_brief else None]:
            yield [draw(2, rows, size), *(draw(size) for _ in range(1 + (operator == "layer_norm"))), 1e-5]
    elif operator == "rotary":
        for heads, groups, dim in ((8, 8, 128), (4, 2, 16))[: 1 if is_brief else None]:
            angles = draw(2, 37, 1, dim // 2).detach().float().repeat(1, 1, 1, 2)
            yield [
                draw(2, 37, heads, dim),
                draw(2, 37, groups, dim),
                angles.cos().to(dtype),
                angles.sin().to(dtype),
            ]
    elif operator == "token_permutation":
        for tokens, size in ((11, 16), (300, 1024))[: 1 if is_brief else None]:
            chosen = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(tokens)])
            yield [draw(tokens, size), chosen, torch.rand(tokens, 2, generator=generator).requires_grad_()]
    elif operator == "grouped_product":
        # One expert has no rows.
        for counts, into, out in (([5, 0, 7, 1], 16, 24), ([130, 64, 0, 70], 512, 256))[
            : 1 if is_brief else None
        ]:
            yield [draw(sum(counts), into), [draw(out, into) for _ in counts], counts]
    elif operator == "swiglu":
        yield from ([draw(2, rows, size), draw(2, rows, size)] for rows, size in ((9, 32), (17, 11_008)))
    else:
        for tokens, vocab in ((18, 50), (33, 32_000), (7, 32_001)):
            yield [draw(tokens, vocab), torch.randint(0, vocab, (tokens,), generator=generator)]


def masks(heads: int, queries: int, keys: int, dtype: torch.dtype) -> Iterator[Mask]:
    """Yield what models have: nothing, windows, ALiBi, several texts in a row; rules where rows are whole."""
    host = HOST.torch
    slopes = torch.tensor(alibi_slopes(heads))
    texts = torch.arange(queries).div(23, rounding_mode="floor").repeat(3, 1)
    texts[1] //= 2
    for window, added in ((None, None), (20, None), (None, slopes)):
        yield attention_mask(queries, keys, window, added, dtype, host)
        if queries == keys:
            yield MaskRule(queries, host, None, added, dtype).within(window)
            yield MaskRule(queries, host, None, added, dtype, texts).within(window)


def there_and_back(
    permute: Callable[..., Any], tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens sorted by their experts, and the sums of what experts that take squares would give."""
    rows, order = permute(tokens, chosen, 8)
    return rows, UNPERMUTE[permute](rows.square(), weights.to(rows.dtype), order)


def results(
    run: Callable[..., Any], arguments: Arguments, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs and gradients."""
    flat = [one for value in arguments for one in (value if isinstance(value, list) else [value])]
    wanted = [value for value in flat if isinstance(value, torch.Tensor) and value.requires_grad]
    out = there_and_back(run, *arguments) if run in UNPERMUTE else run(*arguments)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(seed)
    weights = [
        # The same numbers in every format.
        torch.randn(one.shape, generator=generator).bfloat16().to(one.device, one.dtype)
        for one in outputs
    ]
    return [one.detach() for one in outputs], list(torch.autograd.grad(outputs, wanted, weights))


def check_changed_scores(setting: Setting, name: str) -> dict[str, Any]:
    """Compare attention with soft-capped scores, sinks and windows, packed and not."""
    (implementation,) = [one for one in OPERATORS["attention"] if one.name == name]
    found: dict[str, float] = {}
    tried = 0
    generator = torch.Generator().manual_seed(8)
    for dtype_name in TOLERANCE:
        dtype = getattr(torch, dtype_name)
        if reason := implementation.unsupported(KernelContext(setting.device, dtype)):
            raise LeftOut(reason)
        for rule in (rule for rule in masks(8, 300, 300, dtype) if isinstance(rule, MaskRule)):
            rows = 2 if rule.segments is None else len(rule.segments)
            drawn = [
                torch.randn(shape, generator=generator).to(dtype).requires_grad_()
                for shape in ((rows, 8, 300, 64), (rows, 2, 300, 64), (rows, 2, 300, 64), (8,))
            ]

            def run(attend: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
                *inputs, sinks = given[:-1]
                return attend(*inputs, given[-1], softcap=4.0, sinks=sinks)

            want, want_gradients = results(partial(run, reference_attention), [*map(_wide, drawn), rule], 1)
            placed = [_placed(one, setting) for one in (*drawn, rule)]
            out, gradients = results(partial(run, implementation.run), placed, 1)
            for kind, pairs in (("", (out, want)), (" gradients", (gradients, want_gradients))):
                error = max(map(relative_error, *pairs))
                found[f"{dtype_name}{kind}"] = max(found.get(f"{dtype_name}{kind}", 0.0), error)
            tried += 1
    check_within(found, TOLERANCE | {f"{name} gradients": 3 * limit for name, limit in TOLERANCE.items()})
    return {**found, "inputs": tried}


def check_loss_from_hidden(setting: Setting) -> dict[str, Any]:
    """Compare the loss that is made without logits with that of logits in float64 on the host."""
    from ascendspeed_core.parallel.cross_entropy import LogitsRule, cross_entropy, hidden_cross_entropy

    found: dict[str, float] = {}
    generator = torch.Generator().manual_seed(9)
    for dtype_name in ("float32", "bfloat16"):
        dtype = getattr(torch, dtype_name)
        hidden = torch.randn(2, 37, 64, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(5003, 64, generator=generator) / 8).to(dtype).requires_grad_()
        targets = torch.randint(5003, (2, 37), generator=generator)

        def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return cross_entropy(hidden @ weight.T, targets, len(weight), None)

        def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return hidden_cross_entropy(
                hidden, weight, None, targets, len(weight), None, LogitsRule(), 1 << 12
            )

        want, want_gradients = results(plain, [_wide(hidden), _wide(weight), targets], 2)
        placed = [_placed(one, setting) for one in (hidden, weight, targets)]
        out, gradients = results(ours, placed, 2)
        found[dtype_name] = max(map(relative_error, out, want))
        found[f"{dtype_name} gradients"] = max(map(relative_error, gradients, want_gradients))
    check_within(found, TOLERANCE | {f"{name} gradients": 3 * limit for name, limit in TOLERANCE.items()})
    return {**found, "inputs": 2}


def check_int8_linear(setting: Setting) -> dict[str, Any]:
    """Compare the product with int8 weights, for one row and many, sizes that suit kernels and that do not."""
    from ascendspeed_core.kernels.int8 import FORMATS, int8_linear
    from ascendspeed_core.kernels.reference import int8_linear as reference

    found: dict[str, float] = {}
    tried = 0
    generator = torch.Generator().manual_seed(3)
    for dtype in FORMATS[setting.device.kind]:
        name = str(dtype).removeprefix("torch.")
        for rows, into, out in (
            (1, 64, 96),
            (5, 4096, 4096),
            (16, 1024, 32_000),
            (130, 2048, 512),
            (3, 100, 70),
        ):
            x = torch.randn(rows, into, generator=generator).to(dtype)
            integers = torch.randint(-127, 128, (out, into), generator=generator, dtype=torch.int8)
            scale = (torch.rand(out, generator=generator) / 100).to(dtype)
            want = reference(x.double().float(), integers, scale.float())
            ours = int8_linear(*(one.to(setting.device.torch) for one in (x, integers, scale)))
            found[name] = max(found.get(name, 0.0), relative_error(ours, want))
            tried += 1
    check_within(found, TOLERANCE)
    return {**found, "inputs": tried}


def check_attention_by_lengths(setting: Setting) -> dict[str, Any]:
    """Compare attention of several texts in one call, with and without windows, to prompts and to single tokens."""
    from ascendspeed_core.kernels.lengths import TextLengths, attend_text_by_text, lengths_attention

    found: dict[str, float] = {}
    tried = 0
    generator = torch.Generator().manual_seed(6)
    for dtype_name in ("bfloat16", "float16"):
        dtype = getattr(torch, dtype_name)
        for heads, groups, dim in ((8, 8, 64), (8, 2, 128), (4, 1, 16), (6, 2, 80)):
            attend = lengths_attention(setting.device, dtype, dim, False)
            if attend is None:
                raise LeftOut("each text has a call of its own on this device")
            for counts in ((1, 1, 1), (1, 300, 7, 64), (1,)):
                slots = torch.randperm(len(counts), generator=generator)
                keys = [count + int(torch.randint(0, 400, (), generator=generator)) for count in counts]
                numbers = [
                    torch.tensor(one, dtype=torch.int32)
                    for one in ([0, *accumulate(counts)], [*(slots * 1024).tolist(), 0], keys)
                ]
                cache = torch.randn(2, groups, 1024 * len(counts), dim, generator=generator).to(dtype)
                q = torch.randn(sum(counts), heads, dim, generator=generator).to(dtype)
                for window in (None, 33):
                    own = TextLengths(*numbers, max(counts), max(keys))
                    want = attend_text_by_text(q.double(), *cache.double(), own, window)
                    placed = TextLengths(
                        *(one.to(setting.device.torch) for one in numbers), max(counts), 1024
                    )
                    out = attend(*(one.to(setting.device.torch) for one in (q, *cache)), placed, window)
                    found[dtype_name] = max(found.get(dtype_name, 0.0), relative_error(out, want))
                    tried += 1
    check_within(found, TOLERANCE)
    return {**found, "inputs": tried}


def check_adamw(setting: Setting) -> dict[str, Any]:
    """Compare ten updates with torch's plain ones in float64 on the host."""
    from ascendspeed_core.kernels.adamw import adamw_implementation

    found: dict[str, float] = {}
    for optimizer in ("adam", "fused_adam"):
        implementation = adamw_implementation(optimizer, setting.device, torch.float32)
        generator = torch.Generator().manual_seed(5)
        start = [torch.randn(shape, generator=generator) for shape in ((300, 17), (64,), (1, 1))]
        ours = [torch.nn.Parameter(one.clone().to(setting.device.torch)) for one in start]
        theirs = [torch.nn.Parameter(one.double()) for one in start]
        rule = implementation.make([{"params": ours, "weight_decay": 0.1}], 1e-2, (0.9, 0.99), 1e-8)
        other = torch.optim.AdamW(theirs, 1e-2, (0.9, 0.99), 1e-8, weight_decay=0.1, foreach=False)
        for _ in range(10):
            for one, two in zip(ours, theirs, strict=True):
                gradient = torch.randn(two.shape, generator=generator)
                one.grad, two.grad = gradient.to(setting.device.torch), gradient.double()
            rule.step()
            other.step()
        found[f"float32 {optimizer}"] = max(map(relative_error, ours, theirs))
    check_within(found, TOLERANCE)
    return {**found, "inputs": 20}


def _wide(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide(one) for one in value]
    if isinstance(value, MaskRule):
        return replace(value, dtype=torch.float64)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _placed(value: Any, setting: Setting) -> Any:
    if isinstance(value, list):
        return [_placed(one, setting) for one in value]
    if isinstance(value, MaskRule):
        device = setting.device.torch
        moved = {
            name: None if one is None else one.to(device)
            for name, one in (("slopes", value.slopes), ("segments", value.segments))
        }
        return replace(value, device=device, **moved)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(setting.device.torch).requires_grad_(value.requires_grad)
