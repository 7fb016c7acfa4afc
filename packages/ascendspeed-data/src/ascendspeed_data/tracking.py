"""Objects that note which of their keys were read, so that nothing in a record is dropped without a word."""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any


class TrackedObject(dict[str, Any]):
    """A JSON object that notes which keys were asked for; to iterate or print it asks for all.

    Templates see a mapping like any other: the sandbox of Jinja hides names that begin with an underscore.
    """

    __slots__ = ("_asked",)

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, and note the key."""
        self._asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._ask_for_all()
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """Return the keys, and note all."""
        self._ask_for_all()
        return super().keys()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return the values, and note all keys."""
        self._ask_for_all()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return keys and values, and note all keys."""
        self._ask_for_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Return a plain copy, and note all keys."""
        return dict(self.items())

    def __repr__(self) -> str:
        self._ask_for_all()
        return super().__repr__()

    def _ask_for_all(self) -> None:
        self._asked.update(dict.keys(self))


def unread_of(tracked: TrackedObject) -> dict[str, Any]:
    """Return the keys and values of an object that nothing asked for."""
    return {key: value for key, value in dict.items(tracked) if key not in tracked._asked}
