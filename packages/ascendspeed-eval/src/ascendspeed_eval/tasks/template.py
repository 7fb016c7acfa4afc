"""Prompts with the fields of a record in braces."""

import re
from collections.abc import Mapping
from typing import Any


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Put fields into a template; braces of unknown names, and those within fields, are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields[m[1]]) if m[1] in fields else m[0], template)
