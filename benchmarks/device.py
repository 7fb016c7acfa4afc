"""Prove and measure everything on the accelerator that is here, in some minutes; on a CPU at small sizes.

First correctness: every kernel against the plain operator in float64, ten training steps and continued texts against
the host. Then what the device reaches, decoding against its bandwidth, training steps beside transformers with
torch.compile, and loading. What fails is named and the rest goes on. Nothing is fetched.

    python benchmarks/device.py [--minutes 10] [--json FILE] [--only correct train ...] [--match WORDS]
    python benchmarks/device.py --list        what it runs on a device, without running it
    python benchmarks/device.py --table FILE  the documentation's table from an earlier JSON
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from on_device.plan import SHAPES, TITLES, Item, Outcome, items
from on_device.report import markdown, one_line, summary
from on_device.runner import run_all


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it [default: 10]")
    parser.add_argument("--device", default="auto", help="auto, npu, cuda or cpu [default: auto]")
    parser.add_argument("--json", type=Path, help="where all figures and tracebacks go")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), help="groups to run [default: all]")
    parser.add_argument("--match", nargs="+", help="items to run, by parts of their names [default: all]")
    parser.add_argument("--profile", action="store_true", help="add to the JSON what keeps the device busy")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--list", action="store_true", help="say what would run on a device, and end")
    parser.add_argument("--table", type=Path, help="print the table of an earlier JSON, and end")
    given = parser.parse_args()
    if given.table:
        print(markdown(json.loads(given.table.read_text())))
        return 0
    chosen = [
        item
        for item in items()
        if (not given.only or item.group in given.only)
        and (not given.match or any(words in item.name for words in given.match))
    ]
    if given.list:
        print("\n".join(planned(chosen)))
        return 0

    options = {"with_profile": given.profile, "with_others": not given.alone}

    def tell(item: Item, outcome: Outcome) -> None:
        print(one_line(outcome.record(item)), flush=True)

    about, done = run_all(chosen, given.device, given.minutes, options, tell)
    report = {
        "about": {**about, "date": datetime.datetime.now(datetime.UTC).date().isoformat()},
        "items": [outcome.record(item) for item, outcome in done],
    }
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(summary(report)))
    if about["kind"] == "cpu":
        print("\nThis was a CPU, so every model was tiny. On a device it would have run:")
        print("\n".join(planned(chosen)))
    return int(any(outcome.status == "failed" for _, outcome in done))


def planned(chosen: list[Item]) -> list[str]:
    """Return what an accelerator would run."""
    lines = []
    for group, title in TITLES.items():
        mine = [item for item in chosen if item.group == group]
        if mine:
            seconds = sum(item.seconds for item in mine)
            lines.append(f"  {title}, about {seconds:.0f} s: " + "; ".join(item.name for item in mine))
    lines += [f"  {name}: {shape}" for name, shape in SHAPES.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
