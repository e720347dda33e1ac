//! A name server that answers as a test says, over UDP and TCP, on a loopback port of its own.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, CNAME, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// What the server does with a question.
#[derive(Clone, Debug)]
pub(crate) enum Does {
    /// Answers with these records.
    Answers(Vec<Record>),
    /// Answers with a code, and with an SOA that says how long that holds.
    Says(ResponseCode, u32),
    /// Over UDP, says that the answer is too long; over TCP, answers.
    Truncates(Vec<Record>),
    /// Sends these instead, made from the right answer, then the right answer.
    Forges(fn(&Message) -> Vec<Vec<u8>>, Vec<Record>),
    /// Answers once a permit is there.
    Waits(Arc<Semaphore>, Vec<Record>),
    /// Nothing.
    IsSilent,
    /// Takes EDNS for a mistake.
    IsOld(Vec<Record>),
}

#[derive(Default)]
struct State {
    zone: HashMap<(String, RecordType), Does>,
    asked: HashMap<String, u32>,
}

/// The server; it ends when dropped.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
    asked: watch::Receiver<u32>,
    _tasks: JoinSet<()>,
}

impl Upstream {
    pub(crate) async fn start() -> Self {
        // A UDP port whose number is free for TCP too.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (Arc::new(udp), tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let state = Arc::<Mutex<State>>::default();
        let (count, asked) = watch::channel(0);
        let count = Arc::new(count);
        let mut tasks = JoinSet::new();
        let (over_udp, counted) = (Arc::clone(&state), Arc::clone(&count));
        tasks.spawn(async move {
            let mut tasks = JoinSet::new();
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = udp.recv_from(&mut buffer).await.unwrap();
                let (does, asked) = take(&over_udp, &counted, &buffer[..length]);
                let udp = Arc::clone(&udp);
                tasks.spawn(async move {
                    for bytes in answers(does, &asked, true).await {
                        udp.send_to(&bytes, from).await.unwrap();
                    }
                });
            }
        });
        let over_tcp = Arc::clone(&state);
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let length = stream.read_u16().await.unwrap();
                let mut bytes = vec![0; length.into()];
                stream.read_exact(&mut bytes).await.unwrap();
                let (does, asked) = take(&over_tcp, &count, &bytes);
                for bytes in answers(does, &asked, false).await {
                    stream
                        .write_u16(bytes.len().try_into().unwrap())
                        .await
                        .unwrap();
                    stream.write_all(&bytes).await.unwrap();
                }
            }
        });
        Self {
            address,
            state,
            asked,
            _tasks: tasks,
        }
    }

    /// What it does with the question from now on. What it was not told it does not know: NXDOMAIN.
    pub(crate) fn on(&self, name: &str, kind: RecordType, does: Does) {
        self.state
            .lock()
            .unwrap()
            .zone
            .insert((name.to_owned(), kind), does);
    }

    /// Answers with these addresses.
    pub(crate) fn has(&self, name: &str, addresses: &[&str]) {
        self.on(
            name,
            RecordType::A,
            Does::Answers(
                addresses
                    .iter()
                    .map(|address| a(name, address, 60))
                    .collect(),
            ),
        );
    }

    /// Answers with this address, once for every permit that is given.
    pub(crate) fn holds(&self, name: &str, address: &str) -> Arc<Semaphore> {
        let permits = Arc::new(Semaphore::new(0));
        let does = Does::Waits(Arc::clone(&permits), vec![a(name, address, 60)]);
        self.on(name, RecordType::A, does);
        permits
    }

    /// How often it was asked for a name.
    pub(crate) fn asked(&self, name: &str) -> u32 {
        self.state
            .lock()
            .unwrap()
            .asked
            .get(name)
            .copied()
            .unwrap_or_default()
    }

    /// Waits until it was asked so often altogether.
    pub(crate) async fn wait_for_questions(&self, count: u32) {
        self.asked
            .clone()
            .wait_for(|asked| *asked >= count)
            .await
            .unwrap();
    }
}

pub(crate) fn name(text: &str) -> Name {
    let mut name = Name::from_ascii(text).unwrap();
    name.set_fqdn(true);
    name
}

pub(crate) fn a(owner: &str, address: &str, ttl: u32) -> Record {
    Record::from_rdata(
        name(owner),
        ttl,
        RData::A(A(address.parse::<Ipv4Addr>().unwrap())),
    )
}

pub(crate) fn cname(owner: &str, alias: &str, ttl: u32) -> Record {
    Record::from_rdata(name(owner), ttl, RData::CNAME(CNAME(name(alias))))
}

pub(crate) fn txt(owner: &str, text: &str) -> Record {
    Record::from_rdata(name(owner), 60, RData::TXT(TXT::new(vec![text.to_owned()])))
}

fn take(state: &Mutex<State>, count: &watch::Sender<u32>, bytes: &[u8]) -> (Does, Message) {
    let message = Message::from_vec(bytes).unwrap();
    let query = &message.queries[0];
    let asked = query
        .name()
        .to_ascii()
        .trim_end_matches('.')
        .to_ascii_lowercase();
    let mut state = state.lock().unwrap();
    *state.asked.entry(asked.clone()).or_default() += 1;
    count.send_modify(|count| *count += 1);
    let does = state.zone.get(&(asked, query.query_type())).cloned();
    (
        does.unwrap_or(Does::Says(ResponseCode::NXDomain, 0)),
        message,
    )
}

fn reply(asked: &Message, records: &[Record]) -> Message {
    let mut message = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    message.metadata.recursion_available = true;
    message.add_queries(asked.queries.iter().cloned());
    message.add_answers(records.iter().cloned());
    message
}

async fn answers(does: Does, asked: &Message, udp: bool) -> Vec<Vec<u8>> {
    let message = match does {
        Does::Answers(records) => reply(asked, &records),
        Does::Says(code, ttl) => {
            let mut message = reply(asked, &[]);
            message.metadata.response_code = code;
            let soa = SOA::new(name("ns.example"), name("root.example"), 1, 1, 1, 1, ttl);
            message.add_authority(Record::from_rdata(name("example"), ttl, RData::SOA(soa)));
            message
        }
        Does::Truncates(records) if !udp => reply(asked, &records),
        Does::Truncates(_) => reply(asked, &[]).truncate(),
        Does::Forges(forge, records) => {
            let right = reply(asked, &records);
            let mut all = forge(&right);
            all.push(right.to_vec().unwrap());
            return all;
        }
        Does::Waits(permits, records) => {
            permits.acquire().await.unwrap().forget();
            reply(asked, &records)
        }
        Does::IsSilent => return Vec::new(),
        Does::IsOld(records) if asked.edns.is_none() => reply(asked, &records),
        Does::IsOld(_) => {
            let mut message = reply(asked, &[]);
            message.metadata.response_code = ResponseCode::FormErr;
            message
        }
    };
    vec![message.to_vec().unwrap()]
}

/// Answers that are not to the question: forged ones.
pub(crate) fn wrong(right: &Message) -> Vec<Vec<u8>> {
    let poison = |message: &mut Message| {
        message.answers = vec![a("a.example", "198.18.66.66", 60)];
    };
    let mut other_id = right.clone();
    other_id.metadata.id = right.metadata.id.wrapping_add(1);
    poison(&mut other_id);
    let mut other_name = right.clone();
    other_name.queries = vec![Query::query(name("b.example"), RecordType::A)];
    poison(&mut other_name);
    let mut no_question = right.clone();
    no_question.queries.clear();
    poison(&mut no_question);
    let mut no_answer = right.clone();
    no_answer.metadata.message_type = MessageType::Query;
    poison(&mut no_answer);
    let mut all: Vec<Vec<u8>> = [other_id, other_name, no_question, no_answer]
        .iter()
        .map(|message| message.to_vec().unwrap())
        .collect();
    all.push(vec![0; 3]);
    all.push(vec![0xff; 600]);
    all
}
