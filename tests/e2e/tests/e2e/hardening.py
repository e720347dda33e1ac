"""What a process may do where it is: one line of JSON, each attempt with "ok" or the name of its error.

No attempt changes anything that outlasts it: what is made is removed, what is set is set to what it was.
"""

import ctypes
import errno
import json
import os
import stat
import sys

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    if function(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write(directory):
    path = f"{directory}/.probe-{os.getpid()}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.unlink(path)


def device():
    """A device that is neither one that everybody has nor one that a VM needs: the loop devices' control."""
    path = f"/dev/.probe-{os.getpid()}"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(10, 237))
    try:
        os.close(os.open(path, os.O_RDONLY))
    finally:
        os.unlink(path)


ATTEMPTS = {
    "write /usr": lambda: write("/usr"),
    "write /etc": lambda: write("/etc"),
    "write /boot": lambda: write("/boot"),
    "see /tmp": lambda: os.stat("/tmp/of-the-host"),  # noqa: S108 - the host's
    "open a device": device,
    "open /dev/net/tun": lambda: os.close(os.open("/dev/net/tun", os.O_RDWR)),
    # The host's own name again.
    "set the host's name": lambda: call(libc.sethostname, os.uname().nodename.encode(), len(os.uname().nodename)),
    # SYSLOG_ACTION_SIZE_BUFFER: how much the kernel's log holds.
    "ask for the kernel's log": lambda: call(libc.klogctl, 10, None, 0),
    # PER_LINUX32, of this process only.
    "change the personality": lambda: call(libc.personality, 8),
    # With a priority that there is none of: whoever asks is not scheduled so anywhere.
    "be scheduled in real time": lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(0)),
    # CAP_SYS_PACCT: with it, the file does not exist.
    "account processes": lambda: call(libc.acct, b"/nonexistent"),
}

found = {}
for name, attempt in ATTEMPTS.items():
    # Each in a process of its own: some change it.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
            said = "ok"
        except OSError as error:
            said = errno.errorcode[error.errno]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found[name] = pipe.read()
    os.waitpid(child, 0)
with open("/proc/self/status") as status:
    fields = dict(line.rstrip("\n").split(":\t", 1) for line in status)
found["NoNewPrivs"] = fields["NoNewPrivs"]
found["CapBnd"] = int(fields["CapBnd"], 16)
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
