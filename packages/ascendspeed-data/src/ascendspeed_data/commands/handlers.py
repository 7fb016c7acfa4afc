"""`asd-data handlers`."""

import json
from typing import Annotated

import typer

from ascendspeed_data.handlers import all_handlers, kind_of


def handlers_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the handlers with their columns, what they make of a record, and an example."""
    rows = [
        {
            "name": handler.name,
            "makes": kind_of(handler),
            "columns": list(handler.columns) or ["those of --json-key"],
            "optional_columns": list(getattr(handler, "optional_columns", ())),
            "summary": getattr(handler, "summary", "")
            or (type(handler).__doc__ or "").strip().split("\n")[0],
            "from": origin,
            "template": getattr(handler, "template", ""),
            "example": getattr(handler, "example", {}),
        }
        for handler, origin in all_handlers()
    ]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for row in rows:
        optional = [f"[{column}]" for column in row["optional_columns"]]
        print(f"{row['name']} ({row['makes']}, {row['from']})")
        print(f"  {row['summary']}")
        print(f"  columns: {', '.join([*row['columns'], *optional])}")
        if row["example"]:
            print(f"  example: {json.dumps(row['example'], ensure_ascii=False)}")
