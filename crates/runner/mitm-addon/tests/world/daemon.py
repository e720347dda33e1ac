"""Plays the daemon: starts the real mitmdump as the daemon does, and speaks its socket."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ADDON = Path(__file__).resolve().parents[2] / "src" / "mitm_addon.py"
ENTER_AS_IS: Callable[[Sequence[str]], list[str]] = list

_SET = {
    "connection_strategy": "lazy",
    "upstream_cert": "false",
    "websocket": "false",
    "termlog_verbosity": "warn",
    "flow_detail": "0",
}


def mitmdump() -> list[str]:
    """The program of the environment that the tests run in."""
    return [sys.executable, "-I", str(Path(sys.executable).parent / "mitmdump")]


def command_line(port: int, trusted: str, **options: object) -> list[str]:
    """What README.md says that the daemon runs."""
    command = [*mitmdump(), "--mode", "transparent", "--listen-host", "0.0.0.0", "--listen-port", str(port)]
    for name, value in {**_SET, "ssl_verify_upstream_trusted_ca": trusted, **options}.items():
        command += ["--set", f"{name}={value}"]
    return [*command, "-s", str(ADDON)]


class Daemon:
    def __init__(self, command: Sequence[str], ca: bytes, stderr: Path) -> None:
        ours, theirs = socket.socketpair()
        memfd = os.memfd_create("ca", 0)
        os.write(memfd, ca)
        # Descriptors 3 and 4, wherever ours are.
        shell = f'exec "$@" 3<&{theirs.fileno()} 4<&{memfd}'
        self.stderr = stderr
        with stderr.open("wb") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", shell, "proxy", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # The kernel shares CPU out by sessions first: each proxy counts for itself, as it does in its cgroup.
                start_new_session=True,
                pass_fds=(theirs.fileno(), memfd),
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"},
            )
        theirs.close()
        os.close(memfd)
        self._socket = ours
        self._ids = itertools.count(1)
        self.last_id = 0
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._news = threading.Condition()
        self.lines: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self._paused = threading.Event()
        self._paused.set()
        self._port: queue.Queue[int] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._socket.makefile("rb") as file:
            while self._paused.wait() and (line := file.readline()):
                message = json.loads(line)
                if "log" in message:
                    with self._news:
                        self.lines.append(message["log"])
                        self._news.notify_all()
                elif "event" in message:
                    self._port.put(message["port"])
                else:
                    self._answers[message["id"]].put(message)
        self.ended.set()
        self._port.put(0)

    def pause(self) -> None:
        """Stops reading, as a daemon does that has other things to do."""
        self._paused.clear()

    def go_on(self) -> None:
        self._paused.set()

    def wait_until_it_listens(self, timeout: float = 60) -> int:
        try:
            port = self._port.get(timeout=timeout)
        except queue.Empty:
            port = 0
        assert port, f"the proxy does not listen: {self.stderr.read_text()}"
        return port

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def begin(self, **order: Any) -> Callable[[], dict[str, Any]]:
        """Sends an order; gives what waits for its answer."""
        message_id = self.last_id = next(self._ids)
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers[message_id] = answers
        self.send_raw(json.dumps({"id": message_id, **order}).encode() + b"\n")
        return lambda: answers.get(timeout=30)

    def ask(self, **order: Any) -> dict[str, Any]:
        return self.begin(**order)()

    def expect_answer_without_id(self) -> queue.Queue[dict[str, Any]]:
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers[None] = answers  # type: ignore[index]
        return answers

    def wait_for_lines(self, wanted: Callable[[list[dict[str, Any]]], bool], generation: int) -> list[dict[str, Any]]:
        """The log lines of a generation, once they are as wanted."""

        def lines() -> list[dict[str, Any]]:
            return [entry["line"] for entry in self.lines if entry["generation"] == generation]

        with self._news:
            assert self._news.wait_for(lambda: wanted(lines()), timeout=30), f"log lines: {lines()}"
            return lines()

    def hang_up(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.go_on()
        with contextlib.suppress(OSError):
            self.hang_up()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self._socket.close()
