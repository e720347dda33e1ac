"""The proxy's resident memory over 20 000 requests and 1 GiB each way: it has to stay where it is.

sudo PYTHONPATH=tests python bench/memory.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from test_streams import MEBIBYTE, memory
from world.world import ALLOW_ALL, World, build, read_response

_STEP = 4000
_REQUEST = b"GET /echo HTTP/1.1\r\nHost: a.test\r\n\r\n"
_GIBIBYTE = 1024 * MEBIBYTE


def requests(world: World, count: int, on_one_connection: int) -> None:
    for _ in range(count // on_one_connection):
        with world.guest.tls("a.test") as sock:
            for _ in range(on_one_connection):
                sock.sendall(_REQUEST)
                read_response(sock)


def tell(world: World, what: str) -> None:
    print(f"{memory(world) / MEBIBYTE:6.1f} MiB after {what}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="runner-proxy-") as scratch, build(Path(scratch)) as world:
        world.register(ALLOW_ALL)
        tell(world, "the start")
        for done in range(_STEP, 5 * _STEP + 1, _STEP):
            requests(world, _STEP, on_one_connection=20)
            world.daemon.lines.clear()
            tell(world, f"{done} requests, 20 on a connection")
        big = world.scratch / "big"
        with big.open("wb") as file:
            file.truncate(_GIBIBYTE)
        for version in ("--http1.1", "--http2"):
            world.guest.curl(f"https://a.test/bytes/{_GIBIBYTE}", version, "--output", "/dev/null", seconds=300)
            tell(world, f"1 GiB down, {version}")
            world.guest.curl("https://a.test/upload", version, "--data-binary", f"@{big}", seconds=300)
            tell(world, f"1 GiB up, {version}")


if __name__ == "__main__":
    main()
