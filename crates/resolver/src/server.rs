//! The sockets: one task a query or connection, all of them ended with [`Resolver::serve`].

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use policy::log::{Event, Line, Timestamp};
use policy::{Action, InternalAllow};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::cache::Cache;
use crate::directory::{Client, Directory, Vm};
use crate::files::HostFiles;
use crate::limits::{Accounts, Limits, PROXY_SHARE, Place, TooMany};
use crate::lookup::{Lookup, Outcome};
use crate::message::{Question, Received, Reply, Transport};
use crate::upstream::Upstream;

/// Largest query over UDP that is read; what is longer is cut off and so malformed.
const MAX_QUERY: usize = 4096;
/// Pause when the system is short of something that is needed for the next packet or connection.
const SHORTAGE: Duration = Duration::from_millis(100);

/// What a resolver needs to know.
#[derive(Debug)]
pub struct Config {
    /// The host's files: whom to ask, and names that need no asking.
    pub files: HostFiles,
    /// The operator's exceptions from the refused ranges.
    pub internal_allow: InternalAllow,
    /// Bounds.
    pub limits: Limits,
}

/// A name server for the clients of a [`Directory`].
pub struct Resolver {
    shared: Arc<Shared>,
}

struct Shared {
    lookup: Lookup,
    accounts: Arc<Accounts>,
    limits: Limits,
}

impl Resolver {
    /// Makes one; nothing is opened yet.
    pub fn new(config: Config, directory: Arc<dyn Directory>) -> Self {
        let Config {
            files,
            internal_allow,
            limits,
        } = config;
        let lookup = Lookup {
            directory,
            files,
            internal_allow,
            upstream: Upstream::new(limits.upstream),
            cache: Cache::new(limits.cached),
        };
        let shared = Shared {
            lookup,
            accounts: Accounts::new(limits),
            limits,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Serves queries that arrive on these sockets, until it is dropped; then everything under way ends too. It returns
    /// only when a socket is broken. Several pairs of sockets can be served at once, within the same bounds.
    ///
    /// Queries to upstream servers leave from the network namespace of the threads that run this.
    pub async fn serve(&self, udp: UdpSocket, tcp: TcpListener) -> io::Error {
        tokio::select! {
            error = self.serve_udp(Arc::new(udp)) => error,
            error = self.serve_tcp(tcp) => error,
        }
    }

    async fn serve_udp(&self, socket: Arc<UdpSocket>) -> io::Error {
        let mut tasks = JoinSet::new();
        let mut buffer = vec![0; MAX_QUERY];
        loop {
            let (length, from) = tokio::select! {
                received = socket.recv_from(&mut buffer) => match received {
                    Ok(received) => received,
                    Err(error) => match survive(error).await {
                        Ok(()) => continue,
                        Err(error) => return error,
                    },
                },
                Some(_) = tasks.join_next() => continue,
            };
            let (Some(address), Some(bytes)) = (v4(from), buffer.get(..length)) else {
                continue;
            };
            let Some(client) = self.shared.lookup.directory.client(address) else {
                refuse(&socket, from, bytes);
                continue;
            };
            match self.shared.take(&client, address) {
                Ok(place) => {
                    let (shared, socket, bytes) = (
                        Arc::clone(&self.shared),
                        Arc::clone(&socket),
                        bytes.to_vec(),
                    );
                    tasks.spawn(async move {
                        if let Some(answer) = shared.answer(&client, &bytes, Transport::Udp).await {
                            // The client asks again if the packet is lost, here or on its way.
                            let _ = socket.send_to(&answer, from).await;
                        }
                        drop(place);
                    });
                }
                Err(too_many) => {
                    refuse(&socket, from, bytes);
                    self.shared.log_refused(&client, bytes, too_many);
                }
            }
        }
    }

    async fn serve_tcp(&self, listener: TcpListener) -> io::Error {
        let mut tasks = JoinSet::new();
        loop {
            let (stream, from) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => match survive(error).await {
                        Ok(()) => continue,
                        Err(error) => return error,
                    },
                },
                Some(_) = tasks.join_next() => continue,
            };
            let Some(address) = v4(from) else { continue };
            let Some(client) = self.shared.lookup.directory.client(address) else {
                continue;
            };
            if tasks.len() >= self.shared.limits.all_connections {
                continue;
            }
            if let Some(place) =
                self.shared
                    .accounts
                    .connection(address, share(&client), Instant::now())
            {
                let shared = Arc::clone(&self.shared);
                tasks.spawn(async move {
                    shared.serve_connection(stream, &client, address).await;
                    drop(place);
                });
            }
        }
    }
}

impl Shared {
    fn take(&self, client: &Client, address: Ipv4Addr) -> Result<Place, TooMany> {
        self.accounts.query(address, share(client), Instant::now())
    }

    /// Serves one connection, a query after the other, until the client is silent, or gone, or another's.
    async fn serve_connection(&self, mut stream: TcpStream, client: &Client, address: Ipv4Addr) {
        // A failed read or write ends the connection; there is nobody left to tell.
        while let Ok(Ok(bytes)) = timeout(self.limits.idle, read_message(&mut stream)).await {
            if !self.lookup.is_current(client) {
                return;
            }
            // With its policy as it is now, not as it was when the connection began.
            let Some(client) = self.lookup.directory.client(address) else {
                return;
            };
            let answer = match self.take(&client, address) {
                Ok(_place) => self.answer(&client, &bytes, Transport::Tcp).await,
                Err(too_many) => {
                    self.log_refused(&client, &bytes, too_many);
                    refusal(&bytes, Transport::Tcp)
                }
            };
            let Some(answer) = answer else { return };
            let Ok(length) = u16::try_from(answer.len()) else {
                return;
            };
            let framed = [&length.to_be_bytes(), answer.as_slice()].concat();
            if !matches!(
                timeout(self.limits.idle, stream.write_all(&framed)).await,
                Ok(Ok(()))
            ) {
                return;
            }
        }
    }

    /// The answer to a message, logged; nothing if it deserves none.
    async fn answer(&self, client: &Client, bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let begin = Instant::now();
        let question = match Received::parse(bytes) {
            Received::Question(question) => question,
            Received::Nonsense(answer) => {
                let outcome = Outcome {
                    reply: Reply::Failed,
                    action: Action::Deny,
                    rule: Some("invalid".to_owned()),
                    error: Some("the message is no query".to_owned()),
                };
                self.log(client, None, &outcome, begin);
                return Some(answer);
            }
            Received::Noise => return None,
        };
        let outcome = self.lookup.find(client, &question).await;
        // Who has the address now did not ask.
        if !self.lookup.is_current(client) {
            return None;
        }
        self.log(client, Some(&question), &outcome, begin);
        question.answer(&outcome.reply, transport)
    }

    fn log(&self, client: &Client, question: Option<&Question>, outcome: &Outcome, begin: Instant) {
        let Client::Vm(vm) = client else { return };
        let answers = match &outcome.reply {
            Reply::Addresses(addresses, _) => addresses.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        };
        let event = Event::Dns {
            query: question.map_or_else(|| "?".to_owned(), |question| question.kind().to_string()),
            answers,
            latency_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        };
        let host = question.map(Question::shown).unwrap_or_default();
        self.write(
            vm,
            outcome.action,
            outcome.rule.clone(),
            host,
            outcome.error.clone(),
            event,
        );
    }

    /// One line a second stands for all queries that were refused.
    fn log_refused(&self, client: &Client, bytes: &[u8], TooMany { report }: TooMany) {
        let (Client::Vm(vm), Some(count)) = (client, report) else {
            return;
        };
        let Limits {
            per_second,
            in_flight,
            ..
        } = self.limits;
        let error = format!(
            "{count} queries refused since the last such line: a VM may send {per_second} a second and have {in_flight} \
             under way"
        );
        let (host, query) = match Received::parse(bytes) {
            Received::Question(question) => (question.shown(), question.kind().to_string()),
            Received::Nonsense(_) | Received::Noise => (String::new(), "?".to_owned()),
        };
        let event = Event::Dns {
            query,
            answers: Vec::new(),
            latency_ms: 0,
        };
        self.write(
            vm,
            Action::Deny,
            Some("resolver:limit".to_owned()),
            host,
            Some(error),
            event,
        );
    }

    fn write(
        &self,
        vm: &Vm,
        action: Action,
        rule: Option<String>,
        host: String,
        error: Option<String>,
        event: Event,
    ) {
        self.lookup.directory.log(
            vm,
            Line {
                timestamp: Timestamp::now(),
                action,
                rule,
                host,
                port: 53,
                error,
                event,
            },
        );
    }
}

fn share(client: &Client) -> u32 {
    match client {
        Client::Vm(_) => 1,
        Client::Proxy => PROXY_SHARE,
    }
}

fn v4(from: SocketAddr) -> Option<Ipv4Addr> {
    match from.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(address) => address.to_ipv4_mapped(),
    }
}

async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    // Queries are short. A guest could otherwise make each of its connections hold 64 KiB.
    if usize::from(length) > MAX_QUERY {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// Says no without any work; if the socket is full, without saying it.
fn refuse(socket: &UdpSocket, to: SocketAddr, bytes: &[u8]) {
    if let Some(answer) = refusal(bytes, Transport::Udp) {
        let _ = socket.try_send_to(&answer, to);
    }
}

fn refusal(bytes: &[u8], transport: Transport) -> Option<Vec<u8>> {
    match Received::parse(bytes) {
        Received::Question(question) => question.answer(&Reply::TooMany, transport),
        Received::Nonsense(answer) => Some(answer),
        Received::Noise => None,
    }
}

/// Tells a fault of one packet or connection, or a passing shortage, from a broken socket.
async fn survive(error: io::Error) -> Result<(), io::Error> {
    // The system's numbers for "too many open files", in the process and in the system.
    const TOO_MANY_FILES: [Option<i32>; 2] = [Some(24), Some(23)];
    match error.kind() {
        // A client's refusal of an earlier answer, or a connection that ended before it was taken.
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::OutOfMemory => {
            tokio::time::sleep(SHORTAGE).await;
            Ok(())
        }
        _ if TOO_MANY_FILES.contains(&error.raw_os_error()) => {
            tracing::warn!("the resolver waits for file descriptors: {error}");
            tokio::time::sleep(SHORTAGE).await;
            Ok(())
        }
        _ => Err(error),
    }
}
