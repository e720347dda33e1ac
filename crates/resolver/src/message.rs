//! Clients' messages, which may be any bytes, and ours to them.

use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use policy::Host;

/// Largest answer over UDP: more may be cut into fragments on its way (the DNS community's flag day of 2020).
const MAX_UDP: u16 = 1232;
/// Extended error (RFC 8914): refused by the operator's policy.
const PROHIBITED: u16 = 18;
/// Code of the extended error's option.
const EXTENDED_ERROR: u16 = 15;
/// A message's header.
const HEADER: usize = 12;

/// How a message came, which bounds the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A query that can be looked at further.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    metadata: Metadata,
    query: Query,
    edns: Option<u16>,
    /// The name as a host, unless it can be none.
    pub(crate) host: Option<Host>,
}

/// What a message turned out to be.
#[derive(Debug)]
pub(crate) enum Received {
    /// A query.
    Question(Box<Question>),
    /// Something else that is answered, with these bytes.
    Nonsense(Vec<u8>),
    /// Something that must not be answered: an answer, or less than a header.
    Noise,
}

impl Received {
    /// Reads a message.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        // Answering an answer could begin a dispute with another server that never ends.
        let (Some([high, low, flags, ..]), true) =
            (bytes.first_chunk::<4>(), bytes.len() >= HEADER)
        else {
            return Self::Noise;
        };
        if flags & 0x80 != 0 {
            return Self::Noise;
        }
        let id = u16::from_be_bytes([*high, *low]);
        let nonsense = |op_code, code| {
            Message::error_msg(id, op_code, code)
                .to_vec()
                .map_or(Self::Noise, Self::Nonsense)
        };
        let Ok(mut message) = Message::from_vec(bytes) else {
            return nonsense(OpCode::Query, ResponseCode::FormErr);
        };
        if message.metadata.op_code != OpCode::Query {
            return nonsense(message.metadata.op_code, ResponseCode::NotImp);
        }
        let (Some(query), true) = (message.queries.pop(), message.queries.is_empty()) else {
            return nonsense(OpCode::Query, ResponseCode::FormErr);
        };
        Self::Question(Box::new(Question {
            metadata: message.metadata,
            edns: message.edns.as_ref().map(Edns::max_payload),
            host: host(query.name()),
            query,
        }))
    }
}

/// The name, if it is one that a host can have.
fn host(name: &Name) -> Option<Host> {
    let labels: Vec<&str> = name
        .iter()
        .map(std::str::from_utf8)
        .collect::<Result<_, _>>()
        .ok()?;
    // A dot inside a label would become one between labels.
    if labels.iter().any(|label| label.contains('.')) {
        return None;
    }
    Host::parse(&labels.join(".")).ok()
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reply {
    /// The addresses of the name it asked for; names on the way to them are left out.
    Addresses(Vec<std::net::Ipv4Addr>, Duration),
    /// Records of the type it asked for, as they came.
    Records(Vec<Record>),
    /// There is no such record.
    NoRecord,
    /// There is no such name.
    NoName,
    /// Policy forbids it, for this reason.
    Denied(String),
    /// It asks too much.
    TooMany,
    /// Nobody knows.
    Failed,
}

impl Question {
    pub(crate) fn kind(&self) -> RecordType {
        self.query.query_type()
    }

    pub(crate) fn is_internet(&self) -> bool {
        self.query.query_class() == DNSClass::IN
    }

    /// The name as it was asked, for logs.
    pub(crate) fn shown(&self) -> String {
        match &self.host {
            Some(host) => host.to_string(),
            None => self.query.name().to_ascii(),
        }
    }

    /// The bytes of an answer.
    pub(crate) fn answer(&self, reply: &Reply, transport: Transport) -> Option<Vec<u8>> {
        let mut message = Message::response(self.metadata.id, OpCode::Query);
        message.metadata = Metadata::response_from_request(&self.metadata);
        message.metadata.recursion_available = true;
        message.add_query(self.query.clone());
        let mut edns = self.edns.map(|_| {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            edns
        });
        let name = || self.query.name().clone();
        message.metadata.response_code = match reply {
            Reply::Addresses(addresses, ttl) => {
                let ttl = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
                message.add_answers(
                    addresses
                        .iter()
                        .map(|a| Record::from_rdata(name(), ttl, RData::A(A(*a)))),
                );
                ResponseCode::NoError
            }
            Reply::Records(records) => {
                message.add_answers(records.iter().map(|record| {
                    let mut record = record.clone();
                    record.name = name();
                    record
                }));
                ResponseCode::NoError
            }
            Reply::NoRecord => ResponseCode::NoError,
            Reply::NoName => ResponseCode::NXDomain,
            Reply::Denied(reason) => {
                if let Some(edns) = &mut edns {
                    let mut option = PROHIBITED.to_be_bytes().to_vec();
                    option.extend_from_slice(reason.as_bytes());
                    edns.options_mut()
                        .insert(EdnsOption::Unknown(EXTENDED_ERROR, option));
                }
                ResponseCode::NXDomain
            }
            Reply::TooMany => ResponseCode::Refused,
            Reply::Failed => ResponseCode::ServFail,
        };
        if let Some(edns) = edns {
            message.set_edns(edns);
        }
        let most = match (transport, self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => 512,
            (Transport::Udp, Some(payload)) => usize::from(payload.clamp(512, MAX_UDP)),
        };
        let bytes = message.to_vec().ok()?;
        if bytes.len() <= most {
            Some(bytes)
        } else {
            message.truncate().to_vec().ok()
        }
    }
}

/// The message that asks an upstream server.
pub(crate) fn ask(host: &str, kind: RecordType, edns: bool) -> Option<Message> {
    let mut name = Name::from_ascii(host).ok()?;
    name.set_fqdn(true);
    let mut message = Message::new(hickory_id(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    if edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP);
        message.set_edns(edns);
    }
    Some(message)
}

/// An unpredictable number: the library draws one from the operating system's generator for every query it makes.
fn hickory_id() -> u16 {
    Message::query().metadata.id
}

/// Reads the answer to `asked`; nothing if it is none to that.
pub(crate) fn read_answer(asked: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let same = answer.metadata.id == asked.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && answer.metadata.op_code == OpCode::Query
        && answer.queries.len() == asked.queries.len()
        && answer
            .queries
            .iter()
            .zip(&asked.queries)
            .all(|(got, sent)| {
                got.query_type() == sent.query_type()
                    && got.query_class() == sent.query_class()
                    && got.name() == sent.name()
            });
    same.then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(name: &str, kind: RecordType, edns: bool) -> Vec<u8> {
        ask(name, kind, edns).unwrap().to_vec().unwrap()
    }

    fn question(bytes: &[u8]) -> Question {
        match Received::parse(bytes) {
            Received::Question(question) => *question,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_query_is_answered_as_such_or_not_at_all() {
        let good = asked("a.example", RecordType::A, false);
        assert_eq!(
            question(&good).host,
            Some(Host::Name("a.example".to_owned()))
        );
        for noise in [&good[..0], &good[..11], &{
            let mut answer = good.clone();
            answer[2] |= 0x80;
            answer
        }] {
            assert!(
                matches!(Received::parse(noise), Received::Noise),
                "{noise:?}"
            );
        }
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        for (bytes, code) in [
            (good[..13].to_vec(), ResponseCode::FormErr),
            (changed(5, 0), ResponseCode::FormErr),
            (changed(5, 2), ResponseCode::FormErr),
            (changed(7, 200), ResponseCode::FormErr),
            (changed(2, 5 << 3), ResponseCode::NotImp),
            (changed(2, 2 << 3), ResponseCode::NotImp),
            // A name that is a pointer to itself.
            (
                [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(),
                ResponseCode::FormErr,
            ),
        ] {
            let Received::Nonsense(answer) = Received::parse(&bytes) else {
                panic!("{bytes:?}")
            };
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!(
                (answer.metadata.id, answer.metadata.response_code),
                (u16::from_be_bytes([good[0], good[1]]), code)
            );
        }
    }

    #[test]
    fn labels_that_no_host_has_make_no_host() {
        for labels in [
            &[b"a.b" as &[u8], b"example"][..],
            &[b"a\0", b"example"],
            &[b"\xc3\xa4"],
            &[b"a b"],
            &[b"*", b"example"],
            &[],
        ] {
            let name = Name::from_labels(labels.iter().copied()).unwrap();
            assert_eq!(host(&name), None, "{name:?}");
        }
        assert_eq!(
            host(&Name::from_ascii("_Sip._tcp.Example.").unwrap()),
            Some(Host::Name("_sip._tcp.example".to_owned()))
        );
    }

    #[test]
    fn answers_too_large_for_udp_say_so_and_come_whole_over_tcp() {
        let addresses: Vec<_> = (0..60)
            .map(|n| std::net::Ipv4Addr::new(198, 18, 0, n))
            .collect();
        let reply = Reply::Addresses(addresses, Duration::from_secs(60));
        let question = question(&asked("a.example", RecordType::A, false));
        let udp = question.answer(&reply, Transport::Udp).unwrap();
        assert!(udp.len() <= 512);
        let udp = Message::from_vec(&udp).unwrap();
        assert!(udp.metadata.truncation && udp.answers.is_empty());
        let tcp = Message::from_vec(&question.answer(&reply, Transport::Tcp).unwrap()).unwrap();
        assert!(!tcp.metadata.truncation);
        assert_eq!(tcp.answers.len(), 60);
    }

    #[test]
    fn denials_tell_their_reason_to_who_speaks_edns_and_are_cached_by_nobody() {
        let reply = Reply::Denied("denied by rule default".to_owned());
        for edns in [false, true] {
            let bytes = question(&asked("a.example", RecordType::A, edns))
                .answer(&reply, Transport::Udp)
                .unwrap();
            let message = Message::from_vec(&bytes).unwrap();
            assert_eq!(message.metadata.response_code, ResponseCode::NXDomain);
            assert!(message.authorities.is_empty());
            assert_eq!(
                bytes
                    .windows(22)
                    .any(|window| window == b"denied by rule default"),
                edns
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            drop(Received::parse(&bytes));
        }

        #[test]
        fn no_change_of_a_good_query_makes_reader_or_writer_panic(at in 0_usize..60, value: u8, cut in 0_usize..60) {
            let mut bytes = asked("host.example.com", RecordType::A, true);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            bytes.truncate(cut.max(12));
            if let Received::Question(question) = Received::parse(&bytes) {
                for reply in [Reply::NoName, Reply::Denied("why".to_owned()), Reply::Failed] {
                    drop(question.answer(&reply, Transport::Udp));
                }
            }
        }
    }
}
