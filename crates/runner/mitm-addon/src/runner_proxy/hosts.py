"""Host names of requests and the patterns of rules.

One spelling is left after parsing (lower case, no trailing dot, ASCII), so comparing is comparing strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What may follow "Host:" or stand in a server name: labels of 1 to 63 letters, digits, hyphens and underscores.
_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
# The one usual notation of an IPv4 address: four decimal numbers without leading zeros.
_NUMBER = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_ADDRESS = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{3}}")
# URL parsers take a host for an address when its last label looks like a number.
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_LONGEST_NAME = 253


class HostError(ValueError):
    """A host that is none; the text is a sentence for whoever sent it."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host somebody asks for: a name, or an IPv4 address."""

    text: str
    is_address: bool

    def __str__(self) -> str:
        return self.text


def parse_host(text: str) -> Host:
    """The host as clients send it in a Host header or a server name."""
    if not text.isascii():
        raise HostError("A host name travels in ASCII (punycode).")
    name = text.lower().removesuffix(".")
    if ":" in name:
        raise HostError("VMs have no IPv6, and no other host holds a colon.")
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        raise HostError("That is no host name: labels have 1 to 63 letters, digits, hyphens and underscores.")
    if not _ENDS_IN_A_NUMBER.fullmatch(name):
        return Host(name, is_address=False)
    if _ADDRESS.fullmatch(name):
        return Host(name, is_address=True)
    raise HostError("An address is written as four decimal numbers, such as 198.51.100.7.")


def parse_authority(text: str, port: int) -> Host:
    """The host of a Host header or :authority, whose port, if it has one, must be the connection's."""
    name, colon, written = text.partition(":")
    # "+443" and "0443" are numbers to a parser, but no port that a client writes.
    if colon and written != str(port):
        raise HostError(f"Its port is not {port}, to which the connection was made.")
    return parse_host(name)


@dataclass(frozen=True, slots=True)
class HostPattern:
    """`*`, `*.example.com` (any depth below, not example.com itself) or one host."""

    text: str
    # What a matching name ends with, dot included; None: not a pattern of that kind.
    suffix: str | None

    @property
    def is_any(self) -> bool:
        return self.text == "*"

    def matches(self, host: Host) -> bool:
        if self.is_any:
            return True
        if self.suffix is None:
            return host.text == self.text
        return not host.is_address and len(host.text) > len(self.suffix) and host.text.endswith(self.suffix)

    def names(self, host: Host) -> bool:
        """Whether it is this very host, not a pattern that happens to match."""
        return self.suffix is None and host.text == self.text


def parse_pattern(text: str) -> HostPattern:
    """A rule's or secret's host in its canonical form."""
    if text == "*":
        return HostPattern("*", None)
    if text.startswith("*."):
        parent = parse_host(text[2:])
        if parent.is_address:
            raise HostError("No names lie below an address.")
        return HostPattern(f"*.{parent}", f".{parent}")
    return HostPattern(parse_host(text).text, None)
