"""Every bound of the proxy in one place. Sizes are bytes."""

from dataclasses import dataclass

# Connections of one guest at a time; Chromium, the greediest client, opens at most 256.
CONNECTIONS_PER_SLOT = 256
# Requests of one guest that are under way at a time.
REQUESTS_PER_SLOT = 512
# Connections to servers, open or being opened, for one guest.
UPSTREAMS_PER_SLOT = 512
# Names of one guest that are resolved, or connected to, at the same time. Each takes one of RESOLVER_THREADS.
DIALS_PER_SLOT = 16
RESOLVER_THREADS = 64

# A request's head, a chunk's head, trailers, or what a guest sends ahead of its turn.
HEAD_BYTES = 64 * 1024
# What waits for a receiver that is slower than its sender, per stream; past this the sender is not read.
BACKLOG_BYTES = 256 * 1024
# What an HTTP/2 sender may send ahead, on a stream and on a connection with all its streams.
STREAM_WINDOW = 1024 * 1024
CONNECTION_WINDOW = 4 * 1024 * 1024

# Lines that wait for the daemon to read; past this, exchanges wait with their end.
WAITING_LINES = 4096
WAITING_BYTES = 8 * 1024 * 1024

# A connection on which nothing at all moves is closed after this: longer than an agent waits for a model's whole answer.
SILENCE_SECONDS = 3600
# Connections that wait to be accepted.
ACCEPT_BACKLOG = 1024

# Leaf certificates that are kept.
CERTIFICATES = 1024


@dataclass(slots=True)
class Patience:
    """How long the proxy waits, seconds. Each is an option of mitmdump, runner_<name>_seconds."""

    # For the next request's whole head, from the end of the last exchange: a guest that sends a byte a minute is gone after
    # this. Longer than most clients keep idle connections (Node 5 s, urllib3 and Go 90 s).
    idle: int = 120
    # For the first request, with the TLS handshake before it; software emulation makes handshakes slow.
    first_request: int = 60
    # From a request to the established connection (name, TCP, TLS) to its server.
    dial: int = 30
