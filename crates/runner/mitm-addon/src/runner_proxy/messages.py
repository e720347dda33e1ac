"""What the daemon says, parsed once into types that cannot hold anything else (docs/network.md, "Daemon ⇄ proxy")."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass

from .fields import FieldError, Fields
from .policy import Policy, parse_policy
from .secrets import Vault, parse_secrets

MOST_BYTES = 4 * 1024 * 1024
_LARGEST = 2**63 - 1
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Register:
    address: str
    generation: int
    run_id: str
    policy: Policy
    vault: Vault


@dataclass(frozen=True, slots=True)
class Update:
    address: str
    generation: int
    policy: Policy


@dataclass(frozen=True, slots=True)
class Unregister:
    address: str
    generation: int


@dataclass(frozen=True, slots=True)
class Ping:
    pass


Order = Register | Update | Unregister | Ping


class MessageError(ValueError):
    """A message that is none, with its id if it has one."""

    def __init__(self, message_id: int | None, sentence: str) -> None:
        super().__init__(sentence)
        self.message_id = message_id


def parse_message(line: bytes) -> tuple[int, Order]:
    """One line of the socket: its id and what it orders."""
    message_id: int | None = None
    try:
        fields = Fields(json.loads(line), "The message")
        message_id = fields.number("id", 0, _LARGEST)
        order = _order(fields)
        fields.end()
    except FieldError as error:
        raise MessageError(message_id, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise MessageError(message_id, "The message is no JSON.") from error
    return message_id, order


def _order(fields: Fields) -> Order:
    match fields.choice("op", "register", "update", "unregister", "ping"):
        case "register":
            address, generation = _subject(fields)
            run_id = fields.text("run_id")
            if not _RUN_ID.fullmatch(run_id):
                raise FieldError("'run_id' has other characters than letters, digits, hyphens and underscores.")
            policy = parse_policy(fields.anything("policy"))
            vault = Vault(parse_secrets(fields.items("secrets")))
            if missing := policy.secrets() - vault.names:
                raise FieldError(f"The policy names the secret {min(missing)}, which the run does not have.")
            return Register(address, generation, run_id, policy, vault)
        case "update":
            address, generation = _subject(fields)
            return Update(address, generation, parse_policy(fields.anything("policy")))
        case "unregister":
            return Unregister(*_subject(fields))
        case _:
            return Ping()


def _subject(fields: Fields) -> tuple[str, int]:
    address = fields.text("address")
    try:
        parsed = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise FieldError("'address' is no IPv4 address.") from error
    return str(parsed), fields.number("generation", 0, _LARGEST)
