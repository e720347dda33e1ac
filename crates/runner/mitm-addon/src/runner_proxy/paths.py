"""Paths of requests, compared so that two spellings of one path are one path.

Servers differ in what they do with odd paths. Where their readings could differ, the path is ambiguous (None here): it can
make a rule deny, never allow. The request itself travels unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Segments = tuple[str, ...]

# `pchar` of RFC 3986: what stands in a segment without being encoded.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:@")
_SPELLED = tuple(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in range(256))
# Nearly every path is already in its one spelling: nothing encoded, nothing empty, no dot segments. A segment can end at a
# slash only, so that there is one way to read a path: with two, a path that does not match takes time without end.
_NORMAL_SEGMENT = r"[A-Za-z0-9_~!$&'()*+,;=:@-][A-Za-z0-9._~!$&'()*+,;=:@-]*"
_NORMAL = re.compile(rf"/(?:{_NORMAL_SEGMENT}(?:/{_NORMAL_SEGMENT})*)?")
_REFUSED = frozenset(b"\\#\x7f") | frozenset(range(0x21))
# Bytes that are in no UTF-8 (old decoders make slashes of the first two), and what no segment may hold.
_REFUSED_ENCODED = frozenset(b"/\\\x00\xc0\xc1") | frozenset(range(0xF5, 0x100))
_REFUSED_ENCODED_TWICE = frozenset(b"/\\\x00.%")


class PathError(ValueError):
    """A rule's path that is none."""


def request_path(target: str) -> Segments | None:
    """The segments of a request's target without its query; None where two servers could read two paths."""
    path = target.partition("?")[0]
    if _NORMAL.fullmatch(path):
        return tuple(path[1:].split("/")) if len(path) > 1 else ()
    return normalise(path)


def normalise(path: str) -> Segments | None:
    """The segments in their one spelling: none empty, `.` or `..`; a trailing slash makes no difference."""
    if not path:
        return ()
    if not path.startswith("/"):
        return None
    segments: list[str] = []
    doubled = False
    pieces = path[1:].split("/")
    for index, piece in enumerate(pieces):
        segment = normal_segment(piece)
        if segment is None:
            return None
        if segment == "":
            doubled = doubled or index + 1 < len(pieces)
        elif segment == "..":
            if doubled:
                return None
            if segments:
                segments.pop()
        elif segment.startswith((".;", "..;")):
            return None
        elif segment != ".":
            segments.append(segment)
    return tuple(segments)


def normal_segment(piece: str) -> str | None:
    """One segment in its one spelling; None if it is ambiguous."""
    raw = piece.encode("utf-8", "surrogateescape")
    spelled: list[str] = []
    index = 0
    while index < len(raw):
        byte = raw[index]
        index += 1
        if byte == 0x25:
            decoded = _hex_pair(raw, index)
            index += 2
            if decoded is None or decoded in _REFUSED_ENCODED:
                return None
            if decoded == 0x25 and _hex_pair(raw, index) in _REFUSED_ENCODED_TWICE:
                return None
            byte = decoded
        elif byte in _REFUSED:
            return None
        spelled.append(_SPELLED[byte])
    return "".join(spelled)


def _hex_pair(raw: bytes, index: int) -> int | None:
    pair = raw[index : index + 2]
    if len(pair) != 2 or not all(digit in b"0123456789abcdefABCDEF" for digit in pair):
        return None
    return int(pair, 16)


_PLACEHOLDER = re.compile(r"\{[A-Za-z0-9_-]{1,64}([+*]?)\}")


@dataclass(frozen=True, slots=True)
class PathPattern:
    """Literal segments, None for one of any, and what may follow: nothing, at least one (`{x+}`) or any (`{x*}`)."""

    text: str
    head: tuple[str | None, ...]
    tail: str

    @property
    def is_everything(self) -> bool:
        """Whether it is `/{x*}`, which every path matches, an ambiguous one too."""
        return not self.head and self.tail == "*"

    def matches(self, path: Segments) -> bool:
        """Whether the segments below the rule's path are as the pattern says."""
        extra = len(path) - len(self.head)
        if extra < 0 or (extra > 0 and self.tail == "") or (extra == 0 and self.tail == "+"):
            return False
        return all(wanted is None or wanted == found for wanted, found in zip(self.head, path, strict=False))


def parse_path_pattern(text: str) -> PathPattern:
    """The path of an allow or deny, below its rule's."""
    if not text.startswith("/"):
        raise PathError("It begins with a slash.")
    head: list[str | None] = []
    tail = ""
    pieces = text[1:].split("/")
    for index, piece in enumerate(pieces):
        last = index + 1 == len(pieces)
        if tail and not (last and piece == ""):
            raise PathError("{x+} and {x*} stand last.")
        if placeholder := _PLACEHOLDER.fullmatch(piece):
            tail = placeholder.group(1)
            if not tail:
                head.append(None)
        elif piece or not last:
            head.append(_literal(piece))
    return PathPattern(text, tuple(head), tail)


def _literal(piece: str) -> str:
    if any(mark in piece for mark in "{}*?"):
        raise PathError("A placeholder is a whole segment: {x}, {x+} or {x*}.")
    segment = normal_segment(piece)
    if segment in (None, "", ".", "..") or str(segment).startswith((".;", "..;")):
        raise PathError("It has a segment that no request's path has when it is compared.")
    return str(segment)


def parse_rule_path(text: str) -> Segments:
    """The path prefix of a rule: whole segments."""
    segments = None if any(mark in text for mark in "?#{}*") else normalise(text)
    if segments is None:
        raise PathError("It begins with a slash and holds no query, placeholder, encoded slash or control character.")
    return segments
