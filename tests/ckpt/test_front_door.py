"""`from ascendspeed_ckpt import ...` gives every public name; importing the package alone stays light."""

import subprocess
import sys

import ascendspeed_ckpt
from support.commands import environment


def test_every_public_name_is_there() -> None:
    for name in ascendspeed_ckpt.__all__:
        assert getattr(ascendspeed_ckpt, name).__name__ == name
        assert name in dir(ascendspeed_ckpt)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import ascendspeed_ckpt, sys; print(*sorted({'torch', 'pydantic', 'ascendspeed_core'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ascendspeed_ckpt, "no_such_name")
