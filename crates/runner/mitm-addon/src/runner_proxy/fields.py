"""Reading JSON that somebody sent: every value becomes a typed one or a sentence that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast


class FieldError(ValueError):
    """What is wrong with a message; a sentence."""


class Fields:
    """An object whose members are taken one by one; what is left over is refused."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise FieldError(f"{what} is no object.")
        self._left = dict(cast("Mapping[str, object]", value))
        self._what = what

    def _take(self, name: str) -> object:
        if name not in self._left:
            raise FieldError(f"{self._what} has no {name!r}.")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        value = self._take(name)
        if not isinstance(value, str):
            raise FieldError(f"{name!r} of {self._what} is no text.")
        return value

    def optional_text(self, name: str) -> str | None:
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.text(name)

    def number(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise FieldError(f"{name!r} of {self._what} is no number from {low} to {high}.")
        return value

    def optional_number(self, name: str, low: int, high: int) -> int | None:
        if self._left.get(name) is None:
            self._left.pop(name, None)
            return None
        return self.number(name, low, high)

    def anything(self, name: str) -> object:
        return self._take(name)

    def choice(self, name: str, *choices: str) -> str:
        value = self.text(name)
        if value not in choices:
            raise FieldError(f"{name!r} of {self._what} is none of {', '.join(choices)}.")
        return value

    def items(self, name: str) -> list[object]:
        """A list; none is an empty one."""
        value = self._left.pop(name, [])
        if not isinstance(value, list):
            raise FieldError(f"{name!r} of {self._what} is no list.")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts; none is an empty one."""
        value = self._left.pop(name, {})
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            raise FieldError(f"{name!r} of {self._what} is no object of texts.")
        return cast("dict[str, str]", value)

    def end(self) -> None:
        if self._left:
            raise FieldError(f"{self._what} has {sorted(self._left)[0]!r}, which nobody knows here.")
