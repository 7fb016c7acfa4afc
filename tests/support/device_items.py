"""What goes wrong on a device, for the script that must go on all the same."""

import os
import time
from typing import Any


def die(_: Any) -> dict[str, Any]:
    os._exit(3)


def hang(_: Any) -> dict[str, Any]:
    time.sleep(600)
    return {}


def fail(_: Any) -> dict[str, Any]:
    raise RuntimeError("the device said no\nand more")


def pass_(_: Any) -> dict[str, Any]:
    return {"answer": 42}
