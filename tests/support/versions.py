"""Skip what an old version of another package lacks, by a reason that names the version."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def skip_before(name: str, first: str, lacks: str) -> None:
    """Skip a test where an older version of a package is installed.

    Args:
        name: of the package.
        first: the version that has what the test needs.
        lacks: what older ones lack, after the version: "has no ...".
    """
    installed = version(name)
    if Version(installed) < Version(first):
        pytest.skip(f"{name} {installed} {lacks}; install {first} or newer")
