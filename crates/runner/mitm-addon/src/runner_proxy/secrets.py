"""Secrets: the guest holds placeholders, the proxy puts the values in their place, and takes values out of what it tells.

A value goes out only through verified TLS, in header values and the query, to a host it is meant for. Whatever comes back in
response headers is turned into the placeholder again. Bodies are streamed and never looked at: a server that was trusted with a
secret can tell it to the guest in a body.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, quote_plus, unquote_to_bytes

from mitmproxy.http import Headers

from .fields import FieldError, Fields
from .hosts import Host, HostError, HostPattern, parse_pattern
from .policy import Action, Decision, Rule, Scheme
from .templates import Template

MASK = "***"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_PLACEHOLDER = re.compile(r"[A-Za-z0-9_-]{16,256}")
_VALUE_BYTES = range(4, 16 * 1024 + 1)
_MOST_SECRETS = 200
_MOST_HOSTS = 100
# A base64 core shorter than this says too little about a value to be looked for.
_SHORTEST_CORE = 6


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    name: str
    value: str
    placeholder: str
    hosts: tuple[HostPattern, ...]

    def is_for(self, host: Host, rule: Rule | None) -> bool:
        """Whether it may go to this host by the rule that allowed the request."""
        if self.hosts:
            return any(pattern.matches(host) for pattern in self.hosts)
        return rule is not None and self.name in rule.secrets


def parse_secrets(items: Iterable[object]) -> tuple[Secret, ...]:
    """The secrets of a registration; no message repeats a value."""
    secrets = tuple(_secret(item) for item in items)
    if len(secrets) > _MOST_SECRETS:
        raise FieldError(f"There are more than {_MOST_SECRETS} secrets.")
    if len({secret.name for secret in secrets}) < len(secrets):
        raise FieldError("Two secrets have the same name.")
    if len({secret.placeholder for secret in secrets}) < len(secrets):
        raise FieldError("Two secrets have the same placeholder.")
    return secrets


def _secret(value: object) -> Secret:
    fields = Fields(value, "A secret")
    name = fields.text("name")
    text = fields.text("value")
    placeholder = fields.text("placeholder")
    hosts = fields.items("hosts")
    fields.end()
    if not _NAME.fullmatch(name):
        raise FieldError("A secret's name is no variable's name.")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        length = 0
    if length not in _VALUE_BYTES or any(mark in text for mark in "\r\n\0"):
        raise FieldError(f"The value of secret {name} has not 4 to 16384 bytes, or a line break or NUL among them.")
    if not _PLACEHOLDER.fullmatch(placeholder):
        raise FieldError(f"The placeholder of secret {name} has not 16 to 256 letters, digits, hyphens and underscores.")
    if len(hosts) > _MOST_HOSTS:
        raise FieldError(f"Secret {name} names more than {_MOST_HOSTS} hosts.")
    try:
        patterns = tuple(parse_pattern(str(host)) for host in hosts)
    except HostError as error:
        raise FieldError(f"A host of secret {name} is not valid. {error}") from error
    return Secret(name, text, placeholder, patterns)


class Vault:
    """The secrets of one registration, ready for use."""

    def __init__(self, secrets: tuple[Secret, ...]) -> None:
        self._by_name = {secret.name: secret for secret in secrets}
        self._by_placeholder = {secret.placeholder.encode(): secret for secret in secrets}
        # Longest first, so that a placeholder that begins like another is not mistaken for it.
        self._placeholders = _alternatives(sorted(self._by_placeholder, key=len, reverse=True))
        self._spellings = _alternatives(spelling for secret in secrets for spelling in _spellings(secret.value))
        self._values = tuple(secret.value.encode() for secret in secrets)
        self._reflections = {
            spelling.lower(): secret.placeholder.encode() for secret in secrets for spelling in _spellings(secret.value)
        }

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._by_name)

    def inject(self, headers: Headers, target: str, scheme: Scheme, host: Host, decision: Decision) -> tuple[str, str | None]:
        """Puts values into a request's headers and target. Gives the new target, and what could not be filled in."""
        if decision.action is not Action.ALLOW:
            return target, None
        if scheme == "https" and self._placeholders is not None:
            self._replace_in_headers(headers, host, decision.rule)
            path, mark, query = target.partition("?")
            if mark and self._placeholders.search(query.encode("utf-8", "surrogateescape")):
                target = f"{path}?{self._replace_in_query(query, host, decision.rule)}"
        if decision.rule is not None and (decision.rule.headers or decision.rule.query):
            return self._fill_templates(headers, target, scheme, host, decision.rule)
        return target, None

    def _replace_in_headers(self, headers: Headers, host: Host, rule: Rule | None) -> None:
        assert self._placeholders is not None
        fields = list(headers.fields)
        changed = False
        for index, (name, value) in enumerate(fields):
            new = value
            if self._placeholders.search(value):
                new = self._replaced(value, host, rule)
            elif name.lower() == b"authorization" and value[:6].lower() == b"basic ":
                new = self._replaced_in_basic(value, host, rule)
            if new != value:
                fields[index] = (name, new)
                changed = True
        if changed:
            headers.fields = tuple(fields)

    def _replaced(self, value: bytes, host: Host, rule: Rule | None) -> bytes:
        assert self._placeholders is not None

        def replacement(match: re.Match[bytes]) -> bytes:
            secret = self._by_placeholder[match.group()]
            return secret.value.encode() if secret.is_for(host, rule) else match.group()

        return self._placeholders.sub(replacement, value)

    def _replaced_in_basic(self, value: bytes, host: Host, rule: Rule | None) -> bytes:
        try:
            pair = base64.b64decode(value[6:].strip(), validate=True)
        except binascii.Error:
            return value
        new = self._replaced(pair, host, rule)
        return value if new == pair else b"Basic " + base64.b64encode(new)

    def _replace_in_query(self, query: str, host: Host, rule: Rule | None) -> str:
        assert self._placeholders is not None

        def replacement(match: re.Match[bytes]) -> bytes:
            secret = self._by_placeholder[match.group()]
            return quote(secret.value, safe="").encode() if secret.is_for(host, rule) else match.group()

        raw = query.encode("utf-8", "surrogateescape")
        return self._placeholders.sub(replacement, raw).decode("utf-8", "surrogateescape")

    def _fill_templates(self, headers: Headers, target: str, scheme: Scheme, host: Host, rule: Rule) -> tuple[str, str | None]:
        left_out: list[str] = []
        for name, template in rule.headers:
            text = self._filled(template, scheme, host, rule)
            if text is None:
                # What the guest sent in its place would be taken for what the rule says.
                headers.pop(name, None)
                left_out.append(name)
            else:
                headers.set_all(name, [text])
        if rule.query:
            path, _, query = target.partition("?")
            names = {name for name, _ in rule.query}
            pairs = [pair for pair in query.split("&") if pair and _query_name(pair) not in names]
            for name, template in rule.query:
                text = self._filled(template, scheme, host, rule)
                if text is None:
                    left_out.append(name)
                else:
                    pairs.append(f"{quote(name, safe='')}={quote(text, safe='')}")
            target = f"{path}?{'&'.join(pairs)}" if pairs else path
        if not left_out:
            return target, None
        return target, f"Left out, since a secret in it may not go to {scheme}://{host}: {', '.join(left_out)}."

    def _filled(self, template: Template, scheme: Scheme, host: Host, rule: Rule) -> str | None:
        if not template.secrets:
            return template.texts[0]
        values: dict[str, str] = {}
        for name in template.secrets:
            secret = self._by_name.get(name)
            if secret is None or scheme != "https" or not secret.is_for(host, rule):
                return None
            values[name] = secret.value
        return template.fill(values)

    def hide_reflections(self, headers: Headers) -> None:
        """Turns values in a response's headers into their placeholders again."""
        if self._spellings is None:
            return
        for name, value in headers.fields:
            if self._spellings.search(value) or self._spellings.search(name):
                break
        else:
            return
        headers.fields = tuple(
            (self._spellings.sub(b"x", name), self._spellings.sub(self._reflection, value)) for name, value in headers.fields
        )

    def _reflection(self, match: re.Match[bytes]) -> bytes:
        return self._reflections.get(match.group().lower(), MASK.encode())

    def scrub(self, text: str) -> str:
        """The text for a log, with every value in it masked, however it is spelled."""
        if self._spellings is None:
            return text
        raw = text.encode("utf-8", "surrogateescape")
        masked = self._spellings.sub(MASK.encode(), raw)
        if b"%" in masked or b"+" in masked:
            # A server may spell any character of a reflected value as %XX.
            plain = unquote_to_bytes(masked.replace(b"+", b" "))
            literal = unquote_to_bytes(masked)
            if any(value in plain or value in literal for value in self._values):
                return MASK
        return masked.decode("utf-8", "replace") if masked != raw else text


def _query_name(pair: str) -> str:
    return unquote_to_bytes(pair.partition("=")[0].replace("+", " ")).decode("utf-8", "replace")


def _spellings(value: str) -> list[bytes]:
    """How a value may turn up: as it is, percent-encoded, in Python's notation, in base64 at any of its three alignments."""
    raw = value.encode()
    spellings = {
        raw,
        repr(raw)[2:-1].encode(),
        repr(value)[1:-1].encode(),
        quote(value, safe="").encode(),
        quote_plus(value).encode(),
        quote(value).encode(),
    }
    for lead in range(3):
        padded = base64.b64encode(bytes(lead) + raw)
        # The characters at the ends also hold bits of whatever stands beside the value.
        first = (lead * 8 + 5) // 6
        end = (lead + len(raw)) * 8 // 6
        core = padded[first:end]
        if len(core) >= _SHORTEST_CORE:
            spellings |= {core, core.translate(bytes.maketrans(b"+/", b"-_"))}
    return sorted(spellings, key=len, reverse=True)


def _alternatives(texts: Iterable[bytes]) -> re.Pattern[bytes] | None:
    unique = sorted(set(texts), key=len, reverse=True)
    if not unique:
        return None
    # The digits of %2f may have either case; the rest of a spelling is compared as it is.
    return re.compile(b"|".join(_either_case(re.escape(text)) for text in unique))


def _either_case(pattern: bytes) -> bytes:
    return re.sub(rb"%([0-9A-F]{2})", lambda found: b"%(?i:" + found.group(1) + b")", pattern)
