"""Values of a rule's `headers` and `query`: text in which `${{ secrets.NAME }}` stands for a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_REFERENCE = re.compile(r"\$\{\{\s*secrets\.([A-Za-z_][A-Za-z0-9_]{0,99})\s*\}\}")
_PRINTABLE = re.compile(r"[ -~]*")


class TemplateError(ValueError):
    """A template that is none; the text itself is not repeated, since it may hold what it should not."""


@dataclass(frozen=True, slots=True)
class Template:
    """Text and names of secrets by turns, beginning and ending with text."""

    texts: tuple[str, ...]
    secrets: tuple[str, ...]

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with the secrets' values; KeyError if one is missing."""
        filled = [self.texts[0]]
        for name, text in zip(self.secrets, self.texts[1:], strict=True):
            filled += [values[name], text]
        return "".join(filled)


def parse_template(text: str) -> Template:
    if not _PRINTABLE.fullmatch(text):
        raise TemplateError("The value holds a character other than printable ASCII.")
    pieces = _REFERENCE.split(text)
    if any("${{" in piece for piece in pieces[::2]):
        raise TemplateError("The value holds a ${{ that is not ${{ secrets.NAME }}.")
    return Template(tuple(pieces[::2]), tuple(pieces[1::2]))
