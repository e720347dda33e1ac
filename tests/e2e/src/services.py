"""The services that clients inside a VM talk to, over TLS: a git server, package registries, a stand-in for a model's API.

What they get goes, a JSON object a line, to the file named by the second argument. The third is a directory with wheels.
"""

import base64
import gzip
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.parse

ADDRESS = "198.18.0.4"
WHEELS = pathlib.Path(sys.argv[3])
ANSWER = "An answer of the stand-in."

record_file = open(sys.argv[2], "a", buffering=1)  # noqa: SIM115 - as long as the process
record_lock = threading.Lock()


def record(**what):
    with record_lock:
        record_file.write(json.dumps(what) + "\n")


def archive(files):
    """A gzipped tar of these names and texts."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            entry.mode = 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
    return gzip.compress(plain.getvalue(), mtime=0)


def repository():
    """A bare repository with one commit, below a directory that git's own server serves."""
    root = pathlib.Path(tempfile.mkdtemp(dir="."))
    work = root / "work"
    git = ["git", "-c", "user.name=e2e", "-c", "user.email=e2e@example.com", "-c", "init.defaultBranch=main"]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}

    def run(*words):
        subprocess.run([*git, *words], env=environment, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own words

    run("init", "--quiet", work)
    (work / "README").write_text("cloned over https\n")
    run("-C", work, "add", "README")
    run("-C", work, "commit", "--quiet", "-m", "first")
    run("clone", "--quiet", "--bare", work, root / "repository.git")
    shutil.rmtree(work)
    return root.resolve()


REPOSITORIES = repository()

NPM_PACKAGE = archive(
    {
        "package/package.json": json.dumps({"name": "e2e-greeting", "version": "1.0.0", "main": "index.js"}),
        "package/index.js": "module.exports = 'a package of the registry';\n",
    }
)
CRATE = archive(
    {
        "e2e-greeting-1.0.0/Cargo.toml": '[package]\nname = "e2e-greeting"\nversion = "1.0.0"\nedition = "2021"\n',
        "e2e-greeting-1.0.0/src/lib.rs": "//! A crate of the registry.\n",
    }
)


may_answer = threading.Event()


class Services(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        self.request_body = self.read_body()
        host = self.headers.get("host", "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        record(at=host, method=self.command, path=self.path, headers=headers)
        path, _, self.query = self.path.partition("?")
        service = {
            "git.example.com": self.git,
            "wheels.example.com": self.wheels,
            "npm.example.com": self.npm,
            "crates.example.com": self.crates,
            "model.example.com": self.model,
        }.get(host)
        if service is None or not service(urllib.parse.unquote(path)):
            self.answer(404, "application/json", b'{"error":"not found"}')

    do_GET = do_POST = do_HEAD = handle_any  # noqa: N815 - names of http.server

    def read_body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def answer(self, status, kind, body):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def json(self, value):
        return self.answer(200, "application/json", json.dumps(value).encode())

    def git(self, path):
        """git's own server, behind CGI (RFC 3875)."""
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(REPOSITORIES),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": self.query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("content-type", ""),
            "GIT_PROTOCOL": self.headers.get("git-protocol", ""),
            # The tests may run as another user than the repository's.
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        # What it says of a request it refuses is the answer.
        command = ["git", "http-backend"]
        done = subprocess.run(command, input=self.request_body, env=environment, capture_output=True, check=False)  # noqa: S603
        head, _, body = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        status = int(headers.get("Status", "200").split()[0])
        return self.answer(status, headers["Content-Type"], body)

    def wheels(self, path):
        """A simple index (PEP 503)."""
        wheels = sorted(WHEELS.glob("*.whl"))

        def normal(name):
            return name.split("-")[0].replace("_", "-").lower()

        parts = path.strip("/").split("/")
        if parts[0] == "simple" and len(parts) == 2:
            fits = [wheel for wheel in wheels if normal(wheel.name) == parts[1]]
            links = [f'<a href="/files/{w.name}#sha256={hashlib.sha256(w.read_bytes()).hexdigest()}">{w.name}</a>' for w in fits]
            return bool(fits) and self.answer(200, "text/html", "".join(links).encode())
        fits = [wheel for wheel in wheels if parts == ["files", wheel.name]]
        return bool(fits) and self.answer(200, "application/octet-stream", fits[0].read_bytes())

    def npm(self, path):
        if path == "/e2e-greeting/-/e2e-greeting-1.0.0.tgz":
            return self.answer(200, "application/octet-stream", NPM_PACKAGE)
        if path != "/e2e-greeting":
            return False
        digest = base64.b64encode(hashlib.sha512(NPM_PACKAGE).digest()).decode()
        tarball = "https://npm.example.com/e2e-greeting/-/e2e-greeting-1.0.0.tgz"
        version = {
            "name": "e2e-greeting",
            "version": "1.0.0",
            "dist": {"tarball": tarball, "integrity": f"sha512-{digest}"},
        }
        return self.json({"name": "e2e-greeting", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}})

    def crates(self, path):
        """A sparse registry, and the program that reads it."""
        if path == "/index/config.json":
            return self.json({"dl": "https://crates.example.com/dl"})
        if path == "/index/e2/e-/e2e-greeting":
            entry = {"name": "e2e-greeting", "vers": "1.0.0", "deps": [], "features": {}, "yanked": False}
            return self.json(entry | {"cksum": hashlib.sha256(CRATE).hexdigest()})
        if path == "/dl/e2e-greeting/1.0.0/download":
            return self.answer(200, "application/octet-stream", CRATE)
        if path == "/cargo":
            return self.answer(200, "application/octet-stream", pathlib.Path(sys.argv[4]).read_bytes())
        return False

    def model(self, path):
        """A message (https://docs.anthropic.com/en/api/messages-streaming), one text block, streamed if asked for."""
        if path == "/answer":
            may_answer.set()
            return self.json({})
        if path != "/v1/messages" or self.command != "POST":
            return False
        asked = json.loads(self.request_body)
        # Until a test has looked at the VM that waits.
        may_answer.wait()
        message = {
            "id": "msg_e2e",
            "type": "message",
            "role": "assistant",
            "model": asked["model"],
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
        text = {"type": "text", "text": ANSWER}
        if not asked.get("stream"):
            return self.json(message | {"content": [text], "stop_reason": "end_turn"})
        events = [
            {"type": "message_start", "message": message},
            {"type": "content_block_start", "index": 0, "content_block": text | {"text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ANSWER}},
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": 6},
            },
            {"type": "message_stop"},
        ]
        body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        return self.answer(200, "text/event-stream", body.encode())

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # pip and cargo come with many connections at once.
    request_queue_size = 64

    def finish_request(self, request, client):
        try:
            request = TLS.wrap_socket(request, server_side=True)
        except OSError:
            return
        super().finish_request(request, client)

    def handle_error(self, *_):
        # A client that went away is its own affair; anything else is ours.
        if not isinstance(sys.exc_info()[1], OSError):
            record(at="broken", error=repr(sys.exc_info()[1]))


TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
TLS.load_cert_chain("services.pem", "server.key")
server = Server((ADDRESS, 443), Services)
print("ready", flush=True)
server.serve_forever()
