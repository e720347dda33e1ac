//! A resolver on loopback sockets, with clients on loopback addresses.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::{RData, RecordType};
use policy::log::Line;
use policy::ranges::Reach;
use policy::{Draft, Host, InternalAllow};
use resolver::{
    Client, Config, Directory, HostFiles, Hosts, Limits, ResolvConf, Resolver, Unusable, Vm,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::upstream::{Upstream, name};

/// One VM's address.
pub(crate) const VM: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Another VM's.
pub(crate) const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
/// The proxy's.
pub(crate) const PROXY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 4);
/// Nobody's.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 5);

/// Longer than anything takes that ends at all.
const LONG: Duration = Duration::from_secs(30);

/// What `on_answer` was called with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Opened {
    pub(crate) client: Option<Ipv4Addr>,
    pub(crate) name: String,
    pub(crate) addresses: Vec<Reach>,
    pub(crate) ttl: Duration,
}

#[derive(Default)]
pub(crate) struct TestDirectory {
    clients: Mutex<HashMap<Ipv4Addr, Client>>,
    opened: Mutex<Vec<Opened>>,
    fails: Mutex<Option<String>>,
    lines: watch::Sender<Vec<(String, Line)>>,
}

impl TestDirectory {
    pub(crate) fn register(&self, address: Ipv4Addr, generation: u64, policy: &str) {
        let policy = Draft::from_yaml(policy).unwrap().into_policy().unwrap();
        let run_id = format!("{address}#{generation}");
        let vm = Vm {
            address,
            generation,
            run_id,
            policy: Arc::new(policy),
        };
        self.clients
            .lock()
            .unwrap()
            .insert(address, Client::Vm(Arc::new(vm)));
    }

    pub(crate) fn unregister(&self, address: Ipv4Addr) {
        self.clients.lock().unwrap().remove(&address);
    }

    pub(crate) fn fail(&self, why: &str) {
        *self.fails.lock().unwrap() = Some(why.to_owned());
    }

    pub(crate) fn opened(&self) -> Vec<Opened> {
        self.opened.lock().unwrap().clone()
    }

    /// The lines that were logged, as JSON without what differs from run to run.
    pub(crate) fn lines(&self) -> Vec<(String, Line)> {
        self.lines.borrow().clone()
    }

    /// Waits for lines, and returns them.
    pub(crate) async fn wait_for_lines(&self, count: usize) -> Vec<(String, Line)> {
        let mut lines = self.lines.subscribe();
        timeout(LONG, lines.wait_for(|lines| lines.len() >= count))
            .await
            .unwrap()
            .unwrap()
            .clone()
    }
}

#[async_trait::async_trait]
impl Directory for TestDirectory {
    fn client(&self, address: Ipv4Addr) -> Option<Client> {
        self.clients.lock().unwrap().get(&address).cloned()
    }

    async fn on_answer(
        &self,
        client: &Client,
        name: &Host,
        addresses: &[Reach],
        ttl: Duration,
    ) -> Result<(), Unusable> {
        if let Some(why) = self.fails.lock().unwrap().clone() {
            return Err(Unusable(why));
        }
        let client = match client {
            Client::Vm(vm) => Some(vm.address),
            Client::Proxy => None,
        };
        let opened = Opened {
            client,
            name: name.to_string(),
            addresses: addresses.to_vec(),
            ttl,
        };
        self.opened.lock().unwrap().push(opened);
        Ok(())
    }

    fn log(&self, vm: &Vm, line: Line) {
        self.lines
            .send_modify(|lines| lines.push((vm.run_id.clone(), line)));
    }
}

/// How a fixture's resolver differs from the usual.
pub(crate) struct With {
    pub(crate) limits: Limits,
    pub(crate) hosts: &'static str,
    pub(crate) internal_allow: &'static [&'static str],
    pub(crate) before: Vec<SocketAddr>,
    pub(crate) timeout: Duration,
}

impl Default for With {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            hosts: "",
            internal_allow: &[],
            before: Vec::new(),
            timeout: Duration::from_secs(5),
        }
    }
}

/// A running resolver.
pub(crate) struct Fixture {
    pub(crate) upstream: Upstream,
    pub(crate) directory: Arc<TestDirectory>,
    pub(crate) address: SocketAddr,
    serving: JoinSet<std::io::Error>,
}

impl Fixture {
    pub(crate) async fn start() -> Self {
        Self::with(With::default()).await
    }

    /// With other limits.
    pub(crate) async fn limited(limits: Limits) -> Self {
        Self::with(With {
            limits,
            ..With::default()
        })
        .await
    }

    pub(crate) async fn with(with: With) -> Self {
        let upstream = Upstream::start().await;
        let mut servers = with.before;
        servers.push(upstream.address);
        let conf = ResolvConf {
            servers,
            timeout: with.timeout,
            attempts: 2,
        };
        let directory = Arc::new(TestDirectory::default());
        directory.register(VM, 1, "default: allow");
        directory
            .clients
            .lock()
            .unwrap()
            .insert(PROXY, Client::Proxy);
        let config = Config {
            files: HostFiles::fixed(conf, Hosts::parse(with.hosts)),
            internal_allow: InternalAllow::parse(with.internal_allow).unwrap(),
            limits: with.limits,
        };
        let resolver = Resolver::new(config, Arc::clone(&directory) as Arc<dyn Directory>);
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move { resolver.serve(udp, tcp).await });
        Self {
            upstream,
            directory,
            address,
            serving,
        }
    }

    /// Asks over UDP from an address.
    pub(crate) async fn ask(&self, from: Ipv4Addr, host: &str, kind: RecordType) -> Message {
        let socket = self.socket(from).await;
        socket.send(&question(host, kind)).await.unwrap();
        receive(&socket).await
    }

    /// The addresses that a client is told.
    pub(crate) async fn addresses(&self, from: Ipv4Addr, host: &str) -> Vec<String> {
        addresses(&self.ask(from, host, RecordType::A).await)
    }

    pub(crate) async fn socket(&self, from: Ipv4Addr) -> UdpSocket {
        let socket = UdpSocket::bind((from, 0)).await.unwrap();
        socket.connect(self.address).await.unwrap();
        socket
    }

    pub(crate) async fn connect(&self, from: Ipv4Addr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    /// Ends the resolver, and waits for its end.
    pub(crate) async fn stop(&mut self) {
        self.serving.shutdown().await;
    }
}

pub(crate) fn query(host: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4242, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name(host), kind));
    message.set_edns(Edns::new());
    message
}

pub(crate) fn question(host: &str, kind: RecordType) -> Vec<u8> {
    query(host, kind).to_vec().unwrap()
}

pub(crate) async fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = [0; 4096];
    let length = timeout(LONG, socket.recv(&mut buffer))
        .await
        .expect("an answer")
        .unwrap();
    let message = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(
        (message.metadata.id, message.metadata.message_type),
        (4242, MessageType::Response)
    );
    message
}

pub(crate) async fn send_framed(stream: &mut TcpStream, bytes: &[u8]) {
    stream
        .write_u16(bytes.len().try_into().unwrap())
        .await
        .unwrap();
    stream.write_all(bytes).await.unwrap();
}

/// The next message of a connection; nothing if the other side has closed it.
pub(crate) async fn receive_framed(stream: &mut TcpStream) -> Option<Message> {
    let length = timeout(LONG, stream.read_u16())
        .await
        .expect("an answer or an end")
        .ok()?;
    let mut bytes = vec![0; length.into()];
    stream.read_exact(&mut bytes).await.unwrap();
    Some(Message::from_vec(&bytes).unwrap())
}

pub(crate) fn addresses(message: &Message) -> Vec<String> {
    message
        .answers
        .iter()
        .filter_map(|record| match &record.data {
            RData::A(address) => Some(address.0.to_string()),
            _ => None,
        })
        .collect()
}
