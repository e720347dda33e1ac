from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from world.namespaces import why_not
from world.world import World, build


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Namespaces, servers and the real proxy; once for all tests, each of which registers anew."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="runner-proxy-") as scratch, build(Path(scratch)) as made:
        yield made
