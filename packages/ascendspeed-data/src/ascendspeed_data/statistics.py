"""Statistics of sequence lengths."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.dataset import Dataset
from ascendspeed_data.errors import AscendSpeedError

BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthStatistics:
    """Statistics of sequence lengths, in tokens.

    Attributes:
        count: number of sequences.
        mean: mean length.
        percentiles: length at the percentiles 0, 25, 50, 75, 90, 99 and 100.
        edges: edges of the histogram, powers of two, [n + 1].
        counts: sequences in each bin, [n].
        trained_share: share of tokens with loss, between 0 and 1.
    """

    count: int
    mean: float
    percentiles: dict[int, float]
    edges: NDArray[np.int64]
    counts: NDArray[np.int64]
    trained_share: float


def length_statistics(dataset: Dataset) -> LengthStatistics:
    """Return the length statistics of a dataset."""
    lengths = np.asarray(dataset.ids.lengths)
    top = int(lengths.max(initial=1))
    edges = np.array([0, *(1 << n for n in range(top.bit_length() + 1))], np.int64)
    counts, _ = np.histogram(lengths, edges)
    shares = [0, 25, 50, 75, 90, 99, 100]
    values = np.percentile(lengths, shares) if len(lengths) else np.zeros(len(shares))
    total = int(lengths.sum(dtype=np.int64))
    trained = total
    if dataset.is_samples:
        trained = sum(int(dataset.trained(number).sum()) for number in range(len(lengths)))
    return LengthStatistics(
        len(lengths),
        float(lengths.mean()) if len(lengths) else 0.0,
        dict(zip(shares, map(float, values), strict=True)),
        edges,
        counts.astype(np.int64),
        trained / max(total, 1),
    )


def histogram_lines(statistics: LengthStatistics) -> list[str]:
    """Return the histogram as lines of text."""
    most = max(int(statistics.counts.max(initial=0)), 1)
    lines = [
        f"{statistics.count:,} sequences, {statistics.mean:,.1f} tokens on average, "
        f"{statistics.trained_share:.1%} of the tokens are trained",
        "  ".join(f"{share}%: {value:,.0f}" for share, value in statistics.percentiles.items()),
    ]
    for low, high, count in zip(statistics.edges, statistics.edges[1:], statistics.counts, strict=False):
        bar = "#" * round(BAR_WIDTH * int(count) / most)
        lines.append(f"{int(low):>9,} to {int(high) - 1:>9,} tokens {int(count):>12,} {bar}".rstrip())
    return lines


def draw_histogram(statistics: LengthStatistics, title: str, path: Path) -> None:
    """Write the histogram as a PNG.

    Raises:
        AscendSpeedError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise AscendSpeedError("--png needs matplotlib: pip install 'ascendspeed-data[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    positions: Any = np.arange(len(statistics.counts))
    axes.bar(positions, statistics.counts, width=0.9)
    axes.set_xticks(positions, [f"{int(edge):,}" for edge in statistics.edges[:-1]], rotation=60)
    axes.set_xlabel("minimum sequence length, tokens")
    axes.set_ylabel("sequences")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)
