"""What one guest gets through its worker of the proxy while another guest floods another worker, in the same run.

    sudo PYTHONPATH=tests python bench/fairness.py [SECONDS [ROUNDS]]

Two workers stand in one hub, as on a host with `proxy_workers: 2`. The victim asks an HTTPS server for one thing after another
over one connection; the flooder's eight threads open a connection for each request and are denied, so all of the flood is its own
worker's work. Rounds with and without the flood take turns.

CPU is what they compete for on a small host, and which the scheduler shares out. So there are two figures: `apart`, the
victim's processes on one CPU and the flooder's on the other, which leaves what the workers themselves share (the hub, its
connection tracking, the kernel's locks); and `together`, everything on both CPUs with equal weights, as it comes. On a machine
that is busy with other work, run it with `nice -n -15`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from world.world import DECOY, DENY_ALL, Guest, World, build, policy, rule

_NAME = "h1.test.example"
_REQUEST = b"GET /hello HTTP/1.1\r\nHost: h1.test.example\r\nAccept: */*\r\n\r\n"
_THREADS = 8


def _connect(trusted: str) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=trusted)
    return context.wrap_socket(socket.create_connection((DECOY, 443)), server_hostname=_NAME)


def _ask(sock: ssl.SSLSocket, status: bytes) -> None:
    sock.sendall(_REQUEST)
    received = b""
    while b"\r\n\r\n" not in received:
        piece = sock.recv(65536)
        if not piece:
            raise ConnectionError(received)
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 " + status):
        raise ConnectionError(head)
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += sock.recv(65536)


def victim(trusted: str, seconds: float) -> None:
    """Runs inside a guest: prints the requests a second and the latencies' median and 99th percentile, milliseconds."""
    latencies = []
    with _connect(trusted) as sock:
        _ask(sock, b"200")
        end = time.monotonic() + seconds
        while (begin := time.monotonic()) < end:
            _ask(sock, b"200")
            latencies.append((time.monotonic() - begin) * 1000)
    percentiles = statistics.quantiles(latencies, n=100)
    print(json.dumps([len(latencies) / seconds, percentiles[49], percentiles[98]]))


def flooder(trusted: str) -> None:
    """Runs inside a guest until its input ends: says when it has begun, and at the end how many requests were denied."""
    over = threading.Event()
    counts = [0] * _THREADS
    begun = threading.Barrier(_THREADS, action=lambda: print("begun", flush=True))

    def flood(number: int) -> None:
        while not over.is_set():
            with _connect(trusted) as sock:
                _ask(sock, b"403")
            counts[number] += 1
            if counts[number] == 1:
                begun.wait()

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    print(sum(counts), flush=True)


def _pin(process: int, cpus: set[int]) -> None:
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)
    _raise(process)


def _raise(process: int) -> None:
    """Gives a process's session this one's niceness, which counts among sessions where the kernel groups by them."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/{process}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))


def _inside(guest: Guest, role: str, cpus: set[int], *args: str) -> subprocess.Popen[str]:
    command = guest.namespace.enter(sys.executable, __file__, role, str(guest.trusted), *args)
    process = subprocess.Popen(
        ["taskset", "--cpu-list", ",".join(map(str, sorted(cpus))), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # As VMs are, a party of its own for the scheduler.
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "tests")},
    )
    _raise(process.pid)
    return process


@contextlib.contextmanager
def _flood(guest: Guest, cpus: set[int], rates: list[float]) -> Iterator[None]:
    with _inside(guest, "--flooder", cpus) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        begin = time.monotonic()
        try:
            yield
        finally:
            process.stdin.close()
            rates.append(int(process.stdout.read()) / (time.monotonic() - begin))


def _measure(guest: Guest, cpus: set[int], seconds: float) -> list[float]:
    with _inside(guest, "--victim", cpus, str(seconds)) as process:
        output, _ = process.communicate()
        assert process.returncode == 0
    figures: list[float] = json.loads(output)
    return figures


def main(seconds: float, rounds: int) -> None:
    every = sorted(os.sched_getaffinity(0))
    assert len(every) >= 2, "two CPUs are needed"
    layouts = {"apart": ({every[0]}, {every[1]}), "together": (set(every), set(every))}
    with (
        tempfile.TemporaryDirectory(prefix="runner-proxy-") as scratch,
        build(Path(scratch)) as world,
        # The first guest's packets go to it.
        world.another_proxy("second.log") as first,
    ):
        _compare(first, world, layouts, seconds, rounds)


def _compare(first: World, world: World, layouts: dict[str, tuple[set[int], set[int]]], seconds: float, rounds: int) -> None:
    quiet_guest, loud_guest = world.guests
    first.register(policy(rule(_NAME)))
    world.register(DENY_ALL, guest=1)
    for layout, (for_victim, for_flooder) in layouts.items():
        _pin(first.daemon.process.pid, for_victim)
        _pin(world.internet.process.pid, for_victim)
        _pin(world.daemon.process.pid, for_flooder)
        # This process plays the daemon and takes both workers' log lines.
        _pin(os.getpid(), for_flooder)
        alone, flooded, rates = [], [], list[float]()
        for _ in range(rounds):
            alone.append(_measure(quiet_guest, for_victim, seconds))
            with _flood(loud_guest, for_flooder, rates):
                flooded.append(_measure(quiet_guest, for_victim, seconds))
        middle = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in (alone, flooded)]
        (rate, p50, p99), (flooded_rate, flooded_p50, flooded_p99) = middle
        # What others on the machine disturbed least.
        best, flooded_best = (statistics.quantiles([row[0] for row in rows], n=4)[2] for rows in (alone, flooded))
        print(
            f"{layout}: alone {rate:.0f}/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms; "
            f"beside a flood of {statistics.median(rates):.0f}/s: {flooded_rate:.0f}/s, p50 {flooded_p50:.2f} ms, "
            f"p99 {flooded_p99:.2f} ms; {1 - flooded_rate / rate:.1%} fewer requests, "
            f"by the upper quartiles ({best:.0f}/s, {flooded_best:.0f}/s) {1 - flooded_best / best:.1%}"
        )
        print(json.dumps({"layout": layout, "alone": alone, "flooded": flooded, "flood": rates}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--victim"]:
        victim(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1:2] == ["--flooder"]:
        flooder(sys.argv[2])
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0, int(sys.argv[2]) if len(sys.argv) > 2 else 15)
