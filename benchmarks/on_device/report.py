"""The JSON that a run leaves behind, and the tables that are made of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from on_device.plan import TITLES

Record = Mapping[str, Any]
COLUMNS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "limits": {},
    "train": {
        "layers": ("layers", "d"),
        "parameters": ("parameters", ",d"),
        "tokens": ("tokens", ",d"),
        "tokens/s": ("tokens/s", ",.0f"),
        "ratio": ("to transformers", ".2f"),
        "MFU": ("MFU", ".1%"),
        "MFU of one micro-batch": ("MFU of one micro-batch", ".1%"),
        "GB": ("GB", ".1f"),
    },
    "decode": {
        "ms/token": ("ms per pass", ".2f"),
        "tokens/s": ("tokens/s", ",.0f"),
        "GB/token": ("GB read", ".2f"),
        "limit ms/token": ("ms to read them", ".2f"),
        "of the bandwidth": ("share of the bandwidth", ".0%"),
        "GB": ("GB", ".1f"),
    },
    "load": {"GB": ("GB", ".1f"), "ours s": ("s", ".2f"), "transformers s": ("transformers s", ".2f")},
}
"""By group the figures that are shown, their heading and format."""


def one_line(record: Record) -> str:
    """Return an outcome as a line of the log."""
    shown = "  ".join(
        f"{name} {_brief(value)}" for name, value in record.get("figures", {}).items() if _fits(value)
    )
    error = record.get("error", "")
    return f"{record['status']:8s} {record['seconds']:6.1f} s  {record['name']}: {shown}{error}"


def summary(report: Mapping[str, Any]) -> list[str]:
    """Return all tables, aligned for a terminal."""
    lines = [about_line(report)]
    for group, title in TITLES.items():
        rows = table(report, group)
        if len(rows) > 1:
            widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
            lines += ["", title]
            lines += [
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables as the documentation has them."""
    lines = [about_line(report)]
    for group, title in TITLES.items():
        rows = table(report, group)
        if len(rows) > 1:
            lines += ["", f"**{title}**", "", _line(rows[0]), _line(["---"] * len(rows[0]))]
            lines += [_line(row) for row in rows[1:]]
    return "\n".join(lines)


def about_line(report: Mapping[str, Any]) -> str:
    """Return device, versions, how many items passed, and remarks that somebody added to the JSON."""
    about = report["about"]
    versions = ", ".join(
        f"{name} {about[name]}"
        for name in ("torch", "triton", "transformers", "liger-kernel")
        if about.get(name)
    )
    counts = {
        status: sum(one["status"] == status for one in report["items"])
        for status in ("passed", "failed", "left out")
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return " ".join(
        [f"{about['device']}, Python {about['python']}, {versions}: {said}.", *report.get("remarks", ())]
    )


def table(report: Mapping[str, Any], group: str) -> list[list[str]]:
    """Return header and rows of a group; correctness is counted, and what did not pass is named."""
    records = [one for one in report["items"] if one["group"] == group]
    if group == "correct":
        return _of_checks(records)
    if group == "limits":
        return [
            ["what", "figure"],
            *([name, _brief(value)] for one in records for name, value in figures(one).items()),
        ]
    columns = COLUMNS[group]
    rows = [["", *(heading for heading, _ in columns.values())]]
    rates = {one["name"]: figures(one).get("tokens/s") for one in records}
    for one in records:
        if one["status"] == "passed":
            theirs = rates.get(f"{one['name'].partition(':')[0]}: transformers")
            found = dict(figures(one))
            if group == "train" and theirs:
                found["ratio"] = found["tokens/s"] / theirs
            cells = [
                format(found[name], form) if found.get(name) is not None else "-"
                for name, (_, form) in columns.items()
            ]
        else:
            cells = [f"{one['status']}: {one['error'].partition('. ')[0]}", *[""] * (len(columns) - 1)]
        rows.append([one["name"], *cells])
    return rows


def figures(record: Record) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record.get("figures", {})
    return found


def _of_checks(records: Sequence[Record]) -> list[list[str]]:
    rows = [["what", "checked", "passed", "largest relative difference", "not passed"]]
    for kind in ("kernel", "ten steps", "continued texts"):
        mine = [one for one in records if one["name"].startswith(kind)]
        passed = [one for one in mine if one["status"] == "passed"]
        worst = [
            max((value for one in passed for name, value in figures(one).items() if _is_difference(name, dtype, one)),
                default=0.0)
            for dtype in ("float32", "bfloat16")
        ]  # fmt: skip
        failed = [f"{one['name']} failed ({one['error']})" for one in mine if one["status"] == "failed"]
        reasons = Counter(one["error"] for one in mine if one["status"] == "left out")
        left_out = [f"{count} left out ({reason})" for reason, count in reasons.items()]
        others = "; ".join([*failed, *left_out])
        if mine:
            shown = f"{worst[0]:.0e} in float32, {worst[1]:.0e} in bfloat16"
            rows.append([kind, str(len(mine)), str(len(passed)), shown, others])
    return rows


def _is_difference(name: str, dtype: str, record: Record) -> bool:
    """Whether a figure is a difference in a format, which kernels name there and others in the record's name."""
    if record["name"].startswith("kernel"):
        return name.startswith(dtype)
    return dtype in record["name"].split() and name in ("loss", "distance")


def _fits(value: Any) -> bool:
    return isinstance(value, int | float)


def _brief(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.4g}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
