# shellcheck shell=bash
# A web site for the demo, on this host and nowhere else: an HTTPS server in a network namespace of its own, with a
# certificate of an authority made for it. Sourced by demo.sh.

demo_host=hello.example.com
demo_address=198.18.42.2 # of the range that nobody on the internet has (RFC 2544)

# start_upstream DIRECTORY: starts it and leaves there `hosts` and `trusted.crt` for the runner.
start_upstream() {
    local dir=$1
    demo_namespace=vm0-demo-$$
    as_root ip netns add "$demo_namespace"
    as_root ip link add "vm0demo$$" type veth peer name web0 netns "$demo_namespace"
    as_root ip address add 198.18.42.1/30 dev "vm0demo$$"
    as_root ip link set "vm0demo$$" up
    as_root ip -n "$demo_namespace" address add "$demo_address/30" dev web0
    as_root ip -n "$demo_namespace" link set web0 up
    (
        cd "$dir" || exit
        quietly openssl req -x509 -nodes -newkey rsa:2048 -days 2 -subj "/CN=demo" -keyout ca.key -out ca.crt
        quietly openssl req -nodes -newkey rsa:2048 -subj "/CN=$demo_host" -keyout server.key -out server.csr
        printf 'subjectAltName=DNS:%s\n' "$demo_host" >names
        quietly openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt
        cat /etc/ssl/certs/ca-certificates.crt ca.crt >trusted.crt
        {
            cat /etc/hosts
            printf '%s %s\n' "$demo_address" "$demo_host"
        } >hosts
        cat >server.py <<'PYTHON'
import http.server
import ssl
import sys


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"<h1>Hello through the proxy</h1>\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer((sys.argv[1], 443), Page)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("server.crt", "server.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
PYTHON
    )
    # In the namespace, by a process that root can find again: deleting the namespace does not end it.
    # shellcheck disable=SC2016 # expanded by the inner shell
    as_root ip netns exec "$demo_namespace" sh -c 'cd "$1" && echo $$ >upstream.pid && exec /usr/bin/python3 server.py "$2"' \
        sh "$dir" "$demo_address" >"$dir/upstream.log" 2>&1 &
}

# stop_upstream DIRECTORY
stop_upstream() {
    local pid
    if pid=$(cat "$1/upstream.pid" 2>/dev/null); then as_root kill "$pid" 2>/dev/null || true; fi
    # The link goes with it.
    [ -z "${demo_namespace-}" ] || as_root ip netns delete "$demo_namespace" 2>/dev/null || true
}
