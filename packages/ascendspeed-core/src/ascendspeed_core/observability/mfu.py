"""Model FLOPs utilization (MFU): how much of what the devices can compute a run uses."""

from ascendspeed_core.config.model import ModelConfig


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Return the floating point operations that training spends on one token, as MFU counts them.

    Six for each weight in a matrix product, two forwards and four backwards, and for causal attention six for each
    layer, key seen on average (S / 2, twice: scores and values) and dimension of the heads (Chowdhery et al., 2022,
    PaLM, appendix B, which counts attention without the causal half). What recompute does twice counts once; of the
    experts those count that a token uses.

    Args:
        model: the architecture.
        seq_length: S.
    """
    queries, keys = (
        model.head_dim * heads for heads in (model.num_attention_heads, model.num_key_value_heads)
    )
    projections = 3 if model.mlp == "swiglu" else 2
    sparse = model.num_expert_layers
    widths = (model.num_layers - sparse) * projections * model.ffn_hidden_size + sparse * _expert_width(model)
    in_products = model.hidden_size * (model.num_layers * 2 * (queries + keys) + widths + model.vocab_size)
    window = model.sliding_window or seq_length
    # Twice the keys that a query sees on average: S when it sees all before it.
    seen = 2 * window - window**2 / seq_length if window < seq_length else seq_length
    return 6.0 * (in_products + model.num_layers * seen * queries)


def _expert_width(model: ModelConfig) -> int:
    """Return the rows and columns of width H in a layer's products of one token: router, its experts, shared expert."""
    experts = model.experts
    if experts is None:
        return 0
    inner = experts.per_token * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)
    return experts.count + 3 * inner + experts.shared_gate


def model_flops_utilization(
    flops_per_token: float, tokens_per_second: float, devices: int, peak_flops: float
) -> float:
    """Return the model FLOPs utilization (MFU): operations needed per second over those that the devices can do.

    Args:
        flops_per_token: of `training_flops_per_token`.
        tokens_per_second: of all devices together.
        devices: how many.
        peak_flops: operations per second of one of them.
    """
    return flops_per_token * tokens_per_second / (devices * peak_flops)
