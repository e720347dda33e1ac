"""Network namespaces that end with whoever made them, however it ends."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why this machine cannot have the world, if it cannot."""
    if os.geteuid() != 0:
        return "namespaces want root"
    for program in ("nft", "ip", "unshare", "nsenter", "curl", "mount"):
        if shutil.which(program) is None and not Path("/usr/sbin", program).exists():
            return f"{program} is not installed"
    probe = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"this machine refuses namespaces: {probe.stderr.strip()}"


class Namespace:
    """A network and mount namespace, held by a process that ends when our end of its input is closed."""

    def __init__(self) -> None:
        command = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat >/dev/null"]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        self.pid = self._holder.pid
        self.run("ip", "link", "set", "lo", "up")

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command inside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *command]

    def run(self, *command: str, text: str | None = None) -> str:
        done = subprocess.run(self.enter(*command), input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def write_over(self, path: str, content: str, scratch: Path) -> None:
        """Shows another file under this path, inside only."""
        file = scratch / f"{self.pid}{path.replace('/', '-')}"
        file.write_text(content)
        file.chmod(0o644)
        self.run("mount", "--bind", str(file), path)

    def new_socket(self) -> socket.socket:
        """A TCP socket that lives inside; usable from here."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            # A thread of its own, since the namespace it enters is the thread's for good.
            try:
                with open(f"/proc/{self.pid}/ns/net") as file:
                    if _LIBC.setns(file.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), "setns")
                made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        (result,) = made
        if isinstance(result, OSError):
            raise result
        result.settimeout(20)
        return result

    def connect(self, host: str, port: int) -> socket.socket:
        sock = self.new_socket()
        sock.connect((host, port))
        return sock

    def close(self) -> None:
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait()


def link(one: Namespace, name: str, address: str, other: Namespace, other_name: str, other_address: str) -> None:
    """A cable between two namespaces."""
    ends: Sequence[str] = ("peer", "name", other_name, "netns", str(other.pid))
    command = ["ip", "link", "add", "name", name, "netns", str(one.pid), "type", "veth", *ends]
    subprocess.run(command, check=True)
    for namespace, end, end_address in ((one, name, address), (other, other_name, other_address)):
        namespace.run("ip", "address", "add", end_address, "dev", end)
        namespace.run("ip", "link", "set", "dev", end, "up")
