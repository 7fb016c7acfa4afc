"""Standard errors, confidence intervals and significance tests of scores."""

from collections.abc import Sequence
from math import comb, fsum, sqrt

Z_95 = 1.959963984540054


def standard_error(share: float, samples: int) -> float:
    """Return the standard error of a share of right answers, with n - 1 as lm-evaluation-harness has it."""
    return sqrt(share * (1 - share) / (samples - 1)) if samples > 1 else 0.0


def wilson_interval(right: int, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927); unlike score ± 2 errors it stays within 0 and 1."""
    share, squared = right / samples, Z_95 * Z_95
    centre = (share + squared / (2 * samples)) / (1 + squared / samples)
    half = (
        Z_95
        / (1 + squared / samples)
        * sqrt(share * (1 - share) / samples + squared / (4 * samples * samples))
    )
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean, with n - 1; for shares of right answers the same as `standard_error`."""
    if len(values) < 2:
        return 0.0
    mean = fsum(values) / len(values)
    return sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean: Wilson's for right and wrong, normal otherwise."""
    if all(value in (0.0, 1.0) for value in values):
        return wilson_interval(round(sum(values)), len(values))
    mean, error = fsum(values) / len(values), mean_error(values)
    return max(mean - Z_95 * error, 0.0), min(mean + Z_95 * error, 1.0)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that one of k programs passes, from n of which c did: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. (2021), equation 1.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of the exact McNemar test: small if two runs differ by more than chance."""
    disagreements = only_first + only_second
    if disagreements == 0:
        return 1.0
    tail = sum(comb(disagreements, n) for n in range(min(only_first, only_second) + 1))
    return float(min(2 * tail / 2**disagreements, 1.0))
