"""The vectors that this code and the runner's `policy` crate must both follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner_proxy.fields import FieldError
from runner_proxy.hosts import HostError, parse_authority, parse_host, parse_pattern
from runner_proxy.paths import parse_path_pattern, parse_rule_path, request_path
from runner_proxy.policy import parse_policy

VECTORS = Path(__file__).resolve().parents[3] / "policy" / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def shown(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items() if key not in ("canonical", "yaml"))[:120]


DECIDE, NAMES, PATHS, CANONICAL = (load(name) for name in ("decide.json", "names.json", "paths.json", "canonical.json"))


@pytest.mark.parametrize("case", DECIDE["requests"], ids=shown)
def test_requests_are_decided_as_the_vectors_say(case: dict[str, Any]) -> None:
    policy = parse_policy(DECIDE["policies"][case["policy"]])
    decision = policy.decide_text(case["scheme"], case["host"], case["port"], case["method"], case["path"])
    assert (decision.action.value, decision.label) == (case["action"], case["rule"])


@pytest.mark.parametrize("case", DECIDE["tls"], ids=shown)
def test_tls_is_relayed_or_ended_as_the_vectors_say(case: dict[str, Any]) -> None:
    rule = parse_policy(DECIDE["policies"][case["policy"]]).passthrough(case["server_name"], case["port"])
    assert (rule.name if rule else None) == case["passthrough"]


@pytest.mark.parametrize("case", NAMES["hosts"], ids=shown)
def test_hosts_are_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    try:
        host: str | None = parse_authority(case["host"], case["port"]).text
    except HostError:
        host = None
    assert host == case["canonical"]


@pytest.mark.parametrize("case", NAMES["matches"], ids=shown)
def test_host_patterns_match_as_the_vectors_say(case: dict[str, Any]) -> None:
    assert parse_pattern(case["pattern"]).matches(parse_host(case["host"])) == case["matches"]


@pytest.mark.parametrize("case", PATHS["normal"], ids=shown)
def test_paths_are_normalised_as_the_vectors_say(case: dict[str, Any]) -> None:
    segments = request_path(case["path"])
    assert (None if segments is None else "/" + "/".join(segments)) == case["normal"]


@pytest.mark.parametrize("case", PATHS["patterns"], ids=shown)
def test_path_patterns_match_as_the_vectors_say(case: dict[str, Any]) -> None:
    segments = request_path(case["path"])
    assert (segments is not None and parse_path_pattern(case["pattern"]).matches(segments)) == case["matches"]


@pytest.mark.parametrize("case", PATHS["prefixes"], ids=shown)
def test_path_prefixes_leave_what_the_vectors_say(case: dict[str, Any]) -> None:
    prefix, segments = parse_rule_path(case["prefix"]), request_path(case["path"])
    assert segments is not None
    rest = "/" + "/".join(segments[len(prefix) :]) if segments[: len(prefix)] == prefix else None
    assert rest == case["rest"]


@pytest.mark.parametrize("text", PATHS["bad_patterns"])
def test_bad_path_patterns_are_refused(text: str) -> None:
    rule = {"name": "r", "host": "*", "action": "allow", "requests": [{"action": "allow", "method": "GET", "path": text}]}
    with pytest.raises(FieldError):
        parse_policy({"version": 1, "default": "deny", "mode": "enforce", "rules": [rule]})


@pytest.mark.parametrize("case", [case for case in CANONICAL["files"] if "canonical" in case], ids=lambda case: case["yaml"][:60])
def test_every_canonical_policy_is_understood(case: dict[str, Any]) -> None:
    policy = parse_policy(case["canonical"])
    assert len(policy.rules) == len(case["canonical"]["rules"])
