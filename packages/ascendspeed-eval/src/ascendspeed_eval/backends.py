"""Find the backends that installed packages offer."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.model import Backend

ENTRY_POINT_GROUP = "ascendspeed_eval.backends"


@dataclass(frozen=True)
class Backends:
    """Installed backends.

    Attributes:
        found: backends by name.
        broken: for each backend that cannot be loaded, the reason.
    """

    found: Mapping[str, Backend]
    broken: Mapping[str, str]

    def choose(self, options: Mapping[str, Any]) -> tuple[Backend, dict[str, Any]]:
        """Return the backend that claims the options, and its own options.

        Raises:
            UsageError: no backend or several backends claim the options, or an option belongs to another backend.
        """
        claiming = [backend for backend in self.found.values() if backend.claims(options)]
        if len(claiming) != 1:
            listed = "; ".join(
                f"{b.name} ({b.summary}): {', '.join('--' + o.name.replace('_', '-') for o in b.options)}"
                for b in self.found.values()
            )
            broken = "".join(f"; {name} cannot be loaded: {reason}" for name, reason in self.broken.items())
            problem = (
                "the options name several models; keep one" if claiming else "no model is given; choose one"
            )
            raise UsageError(f"{problem}. Installed backends: {listed}{broken}")
        backend = claiming[0]
        own = {option.name for option in backend.options}
        for name in options:
            if name not in own:
                raise UsageError(
                    f"--{name.replace('_', '-')} is not an option of the backend {backend.name}; leave it out"
                )
        return backend, dict(options)


def find_backends() -> Backends:
    """Load the backends that packages offer as entry points; a backend imports its model library only in `open`."""
    found: dict[str, Backend] = {}
    broken: dict[str, str] = {}
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        try:
            found[point.name] = point.load()
        except ImportError as error:
            broken[point.name] = str(error)
    return Backends(found, broken)
