"""How sure a score is."""

from math import sqrt

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
