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
    # Scores and values each count half.
    of_heads = model.num_attention_heads * (model.head_dim + (model.value_head_dim or model.head_dim)) / 2
    in_products = model.weights_in_products + model.hidden_size * model.vocab_size
    window = min(model.sliding_window or seq_length, seq_length)
    windowed = sum(model.has_window(layer) for layer in range(model.num_layers))
    # Twice the keys that a query sees on average: S when it sees all before it.
    seen = windowed * (2 * window - window**2 / seq_length) + (model.num_layers - windowed) * seq_length
    return 6.0 * (in_products + seen * of_heads)


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
