//! Web servers of a release: one with TLS, one that stops in the middle.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use super::release::{Release, run};

/// A process of ours that is killed and reaped however the test ends.
pub(super) struct Reaped(pub(super) Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A web server of a directory with TLS, and a certificate that nobody else believes.
pub(super) struct TlsMirror {
    _server: Reaped,
    pub(super) url: String,
    pub(super) certificate: PathBuf,
}

impl TlsMirror {
    const SERVER: &str = "
import functools, http.server, ssl, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
";

    pub(super) fn of(release: &Release) -> Self {
        let directory = release.directory.path();
        run(
            "openssl",
            &[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=mirror.example.com",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
                "-keyout",
                "key.pem",
                "-out",
                "certificate.pem",
            ],
            directory,
        );
        let mut server = Command::new("python3")
            .args(["-I", "-c", Self::SERVER])
            .arg(release.files())
            .args([directory.join("certificate.pem"), directory.join("key.pem")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 is installed");
        let mut port = String::new();
        BufReader::new(server.stdout.take().expect("a pipe"))
            .read_line(&mut port)
            .expect("it says its port");
        Self {
            _server: Reaped(server),
            url: format!("https://127.0.0.1:{}", port.trim()),
            certificate: directory.join("certificate.pem"),
        }
    }
}

/// A server on loopback of one release, whose first answer about the kernel ends in the middle: nothing more comes until
/// the client hangs up.
pub(super) struct Stalling {
    address: SocketAddr,
    /// A path and what its `Range` said, for each request.
    pub(super) requests: mpsc::Receiver<(String, Option<String>)>,
}

impl Stalling {
    pub(super) fn of(release: &Release) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let (files, kernel) = (release.files(), release.kernel.clone());
        let (seen, requests) = mpsc::channel();
        std::thread::spawn(move || {
            let mut stalled = false;
            while let Ok((mut stream, _)) = listener.accept() {
                let Some((path, range)) = request(&stream) else {
                    continue;
                };
                let content = fs::read(files.join(&path)).expect("a file of the release");
                let first = path == kernel && !stalled;
                stalled |= first;
                // The test may be over.
                let _ = seen.send((path, range.clone()));
                let from = range.map_or(0, |range| {
                    let from = range.trim_start_matches("bytes=").trim_end_matches('-');
                    from.parse().expect("a number")
                });
                let last = content.len();
                let status = match from {
                    0 => "200 OK",
                    _ => "206 Partial Content",
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{last}\r\nConnection: close\r\n\r\n",
                    last - from,
                    last - 1,
                );
                let end = if first {
                    content.len() / 2
                } else {
                    content.len()
                };
                let _ = stream.write_all(head.as_bytes());
                let _ = stream.write_all(&content[from..end]);
                if first {
                    let _ = stream.read(&mut [0]);
                }
            }
        });
        Self { address, requests }
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

/// Path and `Range` of one request.
fn request(stream: &TcpStream) -> Option<(String, Option<String>)> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.trim_start_matches('/').to_owned();
    let mut range = None;
    for line in lines {
        let line = line.ok()?.to_lowercase();
        if line.is_empty() {
            break;
        }
        range = line.strip_prefix("range: ").map(str::to_owned).or(range);
    }
    Some((path, range))
}
