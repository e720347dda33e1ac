//! Asking the host's name servers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::files::ResolvConf;
use crate::message::{ask, read_answer};

/// Longest that all attempts together may take: by then every client has given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Packets that are no answer to our question, after which a socket is given up: somebody is guessing.
const MAX_STRAYS: u32 = 32;

/// Why a query found no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("no name server answered in time")]
    Timeout,
    #[error("the name server {0} answered {1}")]
    Refused(SocketAddr, ResponseCode),
    #[error("the name server {0} cannot be reached: {1}")]
    Unreachable(SocketAddr, io::Error),
    #[error("the name server {0} sent answers to other questions")]
    Strays(SocketAddr),
    #[error("the name server {0} sent something that is no answer")]
    Garbled(SocketAddr),
    #[error("the name cannot be asked for")]
    Name,
    #[error("there is no name server")]
    NoServer,
}

/// The way to upstream servers.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// One permit a socket.
    sockets: Semaphore,
    /// The server that answered last is asked first, so that a dead one does not cost every query its timeout.
    last_good: AtomicUsize,
}

impl Upstream {
    pub(crate) fn new(sockets: usize) -> Self {
        Self {
            sockets: Semaphore::new(sockets),
            last_good: AtomicUsize::new(0),
        }
    }

    /// Asks for records; the answer is NoError or NXDomain.
    pub(crate) async fn query(
        &self,
        conf: &ResolvConf,
        host: &str,
        kind: RecordType,
    ) -> Result<Message, UpstreamError> {
        let asking = async {
            // It is closed by nobody.
            let _permit = self.sockets.acquire().await;
            self.attempts(conf, host, kind).await
        };
        timeout(PATIENCE, asking)
            .await
            .unwrap_or(Err(UpstreamError::Timeout))
    }

    async fn attempts(
        &self,
        conf: &ResolvConf,
        host: &str,
        kind: RecordType,
    ) -> Result<Message, UpstreamError> {
        let first = self.last_good.load(Ordering::Relaxed);
        let mut last_error = UpstreamError::NoServer;
        // Some old servers take EDNS for a mistake.
        let mut edns = true;
        for _ in 0..conf.attempts {
            for step in 0..conf.servers.len() {
                let number = (first.wrapping_add(step)) % conf.servers.len();
                let Some(server) = conf.servers.get(number) else {
                    continue;
                };
                match self.one(*server, host, kind, edns, conf.timeout).await {
                    Ok(answer) => match answer.metadata.response_code {
                        ResponseCode::NoError | ResponseCode::NXDomain => {
                            self.last_good.store(number, Ordering::Relaxed);
                            return Ok(answer);
                        }
                        code => {
                            edns &= code != ResponseCode::FormErr;
                            last_error = UpstreamError::Refused(*server, code);
                        }
                    },
                    Err(error) => last_error = error,
                }
            }
        }
        Err(last_error)
    }

    async fn one(
        &self,
        server: SocketAddr,
        host: &str,
        kind: RecordType,
        edns: bool,
        patience: Duration,
    ) -> Result<Message, UpstreamError> {
        let asked = ask(host, kind, edns).ok_or(UpstreamError::Name)?;
        let bytes = asked.to_vec().map_err(|_| UpstreamError::Name)?;
        let answer = timeout(patience, over_udp(server, &asked, &bytes))
            .await
            .unwrap_or(Err(UpstreamError::Timeout))?;
        if !answer.metadata.truncation {
            return Ok(answer);
        }
        timeout(patience, over_tcp(server, &asked, &bytes))
            .await
            .unwrap_or(Err(UpstreamError::Timeout))
    }
}

/// Each query has a socket, and so a port, of its own: a forger has to guess it beside the number. The socket is
/// connected, so the kernel drops what does not come from the server.
async fn over_udp(
    server: SocketAddr,
    asked: &Message,
    bytes: &[u8],
) -> Result<Message, UpstreamError> {
    let unreachable = |error| UpstreamError::Unreachable(server, error);
    let any = match server.ip() {
        IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).await.map_err(unreachable)?;
    socket.connect(server).await.map_err(unreachable)?;
    socket.send(bytes).await.map_err(unreachable)?;
    let mut buffer = [0; 4096];
    for _ in 0..MAX_STRAYS {
        let length = socket.recv(&mut buffer).await.map_err(unreachable)?;
        if let Some(answer) = buffer
            .get(..length)
            .and_then(|bytes| read_answer(asked, bytes))
        {
            return Ok(answer);
        }
    }
    Err(UpstreamError::Strays(server))
}

async fn over_tcp(
    server: SocketAddr,
    asked: &Message,
    bytes: &[u8],
) -> Result<Message, UpstreamError> {
    let unreachable = |error| UpstreamError::Unreachable(server, error);
    let length = u16::try_from(bytes.len()).map_err(|_| UpstreamError::Name)?;
    let mut stream = TcpStream::connect(server).await.map_err(unreachable)?;
    stream
        .write_all(&[&length.to_be_bytes(), bytes].concat())
        .await
        .map_err(unreachable)?;
    let length = stream.read_u16().await.map_err(unreachable)?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await.map_err(unreachable)?;
    read_answer(asked, &answer).ok_or(UpstreamError::Garbled(server))
}
