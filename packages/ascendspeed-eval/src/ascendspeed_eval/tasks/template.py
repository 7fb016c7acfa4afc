"""Prompts with the fields of a record in braces."""

import re
from collections.abc import Mapping
from typing import Any


def fill_template(template: str, fields: Mapping[str, Any]) -> str:
    """Fill a template; braces around unknown names, and braces inside fields, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields[m[1]]) if m[1] in fields else m[0], template)
