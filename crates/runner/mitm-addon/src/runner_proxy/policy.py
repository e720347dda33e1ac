"""The canonical policy, compiled once, and its decisions (docs/network.md).

The runner's `policy` crate takes the same decisions; `crates/policy/vectors` hold both to one meaning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, cast

from .fields import FieldError, Fields
from .hosts import Host, HostError, HostPattern, parse_authority, parse_host, parse_pattern
from .paths import PathError, PathPattern, Segments, parse_path_pattern, parse_rule_path, request_path
from .templates import Template, TemplateError, parse_template

Scheme = Literal["http", "https"]
WEB_PORTS = (80, 443)

_RULE_NAME = re.compile(r"[A-Za-z0-9._*:-]{1,128}")
_METHOD = re.compile(r"[A-Za-z-]{1,32}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_MOST_RULES = 1000
_MOST_REQUESTS = 5000
# Candidates are remembered for this many hosts; a guest that asks for more makes us look again.
_REMEMBERED_HOSTS = 512


class Action(Enum):
    """What becomes of a request, spelled as in the log."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    # It passes, and would not if the policy were enforced. No secret goes with it.
    AUDIT = "AUDIT"


class RuleAction(Enum):
    ALLOW = "allow"
    DENY = "deny"
    PASSTHROUGH = "passthrough"


@dataclass(frozen=True, slots=True)
class ListedRequest:
    """A request that a rule lists."""

    allows: bool
    method: str | None
    path: PathPattern
    label: str


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    scheme: Scheme | None
    host: HostPattern
    port: int | None
    path: Segments
    action: RuleAction
    denials: tuple[ListedRequest, ...]
    permits: tuple[ListedRequest, ...]
    headers: tuple[tuple[str, Template], ...] = ()
    query: tuple[tuple[str, Template], ...] = ()
    secrets: frozenset[str] = frozenset()

    def is_about(self, host: Host, port: int) -> bool:
        if self.port is None:
            return (self.action is RuleAction.DENY or port in WEB_PORTS) and self.host.matches(host)
        return self.port == port and self.host.matches(host)

    def decide(self, method: str, path: Segments | None) -> tuple[bool, str] | None:
        """Whether a request to its host passes and by what; None leaves it to the next rule."""
        whole_host = not self.path
        below: Segments | None = None
        if path is not None:
            if path[: len(self.path)] != self.path:
                return None
            below = path[len(self.path) :]
        if self.action is RuleAction.DENY:
            return False, self.name
        if not self.denials and not self.permits:
            return (True, self.name) if below is not None or whole_host else None
        for request in self.denials:
            if request.method in (None, method) and (below is None or request.path.matches(below)):
                return False, request.label
        for request in self.permits:
            if request.method in (None, method) and (
                request.path.matches(below) if below is not None else whole_host and request.path.is_everything
            ):
                return True, request.label
        # A rule that lists what is allowed allows nothing else.
        return (False, self.name) if self.permits else None


@dataclass(frozen=True, slots=True)
class Decision:
    action: Action
    # As it is logged: the rule, rule/request, `default` or `invalid`.
    label: str
    # The rule that decided, if one did.
    rule: Rule | None

    @property
    def passes(self) -> bool:
        return self.action is not Action.DENY


INVALID = Decision(Action.DENY, "invalid", None)


@dataclass(slots=True)
class Policy:
    allows_by_default: bool
    audits: bool
    rules: tuple[Rule, ...]
    _candidates: dict[tuple[Scheme, str, int], tuple[Rule, ...]] = field(default_factory=dict, repr=False)

    def decide(self, scheme: Scheme, host: Host, port: int, method: str, path: str) -> Decision:
        """Decides about a request; `path` is the target as it was sent."""
        segments = request_path(path)
        method = method.upper()
        for rule in self._about(scheme, host, port):
            decided = rule.decide(method, segments)
            if decided is not None:
                return self._decision(decided[0], decided[1], rule)
        if port not in WEB_PORTS:
            # Opened by rules only: neither by default nor by audit.
            return Decision(Action.DENY, "default", None)
        return self._decision(self.allows_by_default, "default", None)

    def speaks_http_on(self, port: int) -> bool:
        """Whether requests on this port are decided here: on others only where a rule lists some, as the API's does."""
        return port in WEB_PORTS or any(rule.port == port and rule.permits for rule in self.rules)

    def decide_text(self, scheme: Scheme, host: str, port: int, method: str, path: str) -> Decision:
        """The same for a Host header as it was sent."""
        try:
            parsed = parse_authority(host, port)
        except HostError:
            return INVALID
        return self.decide(scheme, parsed, port, method, path)

    def passthrough(self, server_name: str | None, port: int) -> Rule | None:
        """The rule by which a TLS connection is forwarded untouched, if one says so.

        The first rule about the server decides: behind one that may deny some of its requests, nothing passes unseen.
        """
        try:
            host = parse_host(server_name or "")
        except HostError:
            return None
        for rule in self._about("https", host, port):
            return rule if rule.action is RuleAction.PASSTHROUGH else None
        return None

    def names_address(self, host: Host, port: int) -> bool:
        """Whether a rule is about this very address, so that a request without a name may be about it."""
        return any(rule.host.names(host) and rule.is_about(host, port) for rule in self.rules)

    def secrets(self) -> frozenset[str]:
        """The secrets that its rules name."""
        return frozenset().union(*(rule.secrets for rule in self.rules))

    def _about(self, scheme: Scheme, host: Host, port: int) -> tuple[Rule, ...]:
        key = (scheme, host.text, port)
        found = self._candidates.get(key)
        if found is None:
            found = tuple(rule for rule in self.rules if rule.scheme in (None, scheme) and rule.is_about(host, port))
            if len(self._candidates) >= _REMEMBERED_HOSTS:
                self._candidates.clear()
            self._candidates[key] = found
        return found

    def _decision(self, allowed: bool, label: str, rule: Rule | None) -> Decision:
        if allowed:
            return Decision(Action.ALLOW, label, rule)
        return Decision(Action.AUDIT if self.audits else Action.DENY, label, rule)


def parse_policy(value: object) -> Policy:
    """The canonical form; FieldError says what is wrong with it."""
    fields = Fields(value, "The policy")
    fields.number("version", 1, 1)
    default = fields.choice("default", "allow", "deny")
    mode = fields.choice("mode", "enforce", "audit")
    items = fields.items("rules")
    fields.end()
    if len(items) > _MOST_RULES:
        raise FieldError(f"The policy has more than {_MOST_RULES} rules.")
    rules = tuple(_rule(item, index) for index, item in enumerate(items))
    if sum(len(rule.denials) + len(rule.permits) for rule in rules) > _MOST_REQUESTS:
        raise FieldError(f"The policy's rules list more than {_MOST_REQUESTS} requests.")
    return Policy(default == "allow", mode == "audit", rules)


def _rule(value: object, index: int) -> Rule:
    fields = Fields(value, f"Rule {index + 1}")
    name = fields.text("name")
    if not _RULE_NAME.fullmatch(name):
        raise FieldError(f"The name of rule {index + 1} is not valid.")
    what = f"Rule {name!r}"
    scheme = fields.optional_text("scheme")
    if scheme not in (None, "http", "https"):
        raise FieldError(f"The scheme of rule {name!r} is neither http nor https.")
    try:
        host = parse_pattern(fields.text("host"))
        port = fields.optional_number("port", 1, 65535)
        path = parse_rule_path(fields.optional_text("path") or "")
        requests = [_request(item, name) for item in fields.items("requests")]
        headers = tuple((_header(key), parse_template(text)) for key, text in fields.texts("headers").items())
        query = tuple((key, parse_template(text)) for key, text in fields.texts("query").items())
    except (HostError, PathError, TemplateError) as error:
        raise FieldError(f"{what} is not valid. {error}") from error
    action = RuleAction(fields.choice("action", "allow", "deny", "passthrough"))
    fields.end()
    return Rule(
        name=name,
        scheme=cast("Scheme | None", scheme),
        host=host,
        port=port,
        path=path,
        action=action,
        denials=tuple(request for request in requests if not request.allows),
        permits=tuple(request for request in requests if request.allows),
        headers=headers,
        query=query,
        secrets=frozenset(secret for _, template in (*headers, *query) for secret in template.secrets),
    )


def _request(value: object, rule: str) -> ListedRequest:
    fields = Fields(value, f"A request of rule {rule!r}")
    action = fields.choice("action", "allow", "deny")
    method = fields.text("method")
    path = parse_path_pattern(fields.text("path"))
    fields.end()
    if not _METHOD.fullmatch(method):
        raise FieldError(f"A method of rule {rule!r} is not valid.")
    method = method.upper()
    label = f"{rule}/{method} {path.text}"
    return ListedRequest(action == "allow", None if method == "ANY" else method, path, label)


def _header(name: str) -> str:
    if not _HEADER_NAME.fullmatch(name):
        raise TemplateError("A header's name holds a character that none may hold.")
    return name
