//! From a question to what its client is told.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, RecordType};
use policy::ranges::{InternalAllow, Range, Reach};
use policy::{Action, Host};

use crate::cache::{Cache, Known, MAX_TTL};
use crate::directory::{Client, Directory};
use crate::files::HostFiles;
use crate::message::{Question, Reply};
use crate::upstream::{Upstream, UpstreamError};

/// Longest that a name is remembered not to exist: somebody may be about to make it.
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(60);
/// How long an entry of the hosts file holds for a client.
const HOSTS_TTL: Duration = Duration::from_secs(60);
/// Most aliases that are followed.
const MAX_ALIASES: usize = 8;
/// Most records of other types than A that are passed on.
const MAX_RECORDS: usize = 64;

/// A reply, and what the log says about it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) reply: Reply,
    pub(crate) action: Action,
    pub(crate) rule: Option<String>,
    pub(crate) error: Option<String>,
}

/// Everything that answers come from.
pub(crate) struct Lookup {
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) files: HostFiles,
    pub(crate) internal_allow: InternalAllow,
    pub(crate) upstream: Upstream,
    pub(crate) cache: Cache,
}

impl Lookup {
    /// Finds the reply to a question. Afterwards the client may be another's: see [`Client::is_same`].
    pub(crate) async fn find(&self, client: &Client, question: &Question) -> Outcome {
        let (action, rule) = match (client, &question.host) {
            (Client::Proxy, _) => (Action::Allow, None),
            (Client::Vm(vm), Some(host @ Host::Name(_))) => {
                let decision = vm.policy.decide_name(host);
                (decision.action, Some(decision.by.to_string()))
            }
            (Client::Vm(_), _) => (Action::Deny, Some("invalid".to_owned())),
        };
        let outcome = |reply, error| Outcome {
            reply,
            action,
            rule: rule.clone(),
            error,
        };
        let Some(name) = question
            .host
            .as_ref()
            .and_then(Host::name)
            .filter(|_| question.is_internet())
        else {
            let rule = Some("invalid".to_owned());
            return Outcome {
                reply: Reply::NoName,
                action: Action::Deny,
                rule,
                error: Some("no host's name".to_owned()),
            };
        };
        if action == Action::Deny {
            let rule = rule.as_deref().unwrap_or_default();
            return outcome(
                Reply::Denied(format!(
                    "denied by the runner's network policy, rule {rule}"
                )),
                None,
            );
        }
        match question.kind() {
            RecordType::A => match self.addresses(name).await {
                Ok((Known::Addresses(addresses), ttl)) => {
                    let judged = self.judge(question.host.as_ref(), addresses);
                    match self.open(client, question, judged, ttl).await {
                        Ok((reply, error)) => outcome(reply, error),
                        Err(range) => Outcome {
                            reply: Reply::Denied(format!(
                                "all addresses of this name are refused: {}",
                                range.name()
                            )),
                            action: Action::Deny,
                            rule: Some(format!("resolver:{}", range.name())),
                            error: None,
                        },
                    }
                }
                Ok((Known::NoAddress, _)) => {
                    outcome(Reply::NoRecord, Some("no such record".to_owned()))
                }
                Ok((Known::NoName, _)) => outcome(Reply::NoName, Some("no such name".to_owned())),
                Err(error) => outcome(Reply::Failed, Some(error.to_string())),
            },
            kind @ (RecordType::TXT | RecordType::MX | RecordType::SRV) => {
                match self.records(name, kind).await {
                    Ok(reply @ Reply::NoName) => outcome(reply, Some("no such name".to_owned())),
                    Ok(reply) => outcome(reply, None),
                    Err(error) => outcome(Reply::Failed, Some(error.to_string())),
                }
            }
            _ => outcome(Reply::NoRecord, None),
        }
    }

    /// What is known about a name's addresses, and for how long.
    async fn addresses(&self, name: &str) -> Result<(Known, Duration), UpstreamError> {
        if let Some(addresses) = self.files.hosts().addresses(name) {
            return Ok((Known::Addresses(addresses.to_vec()), HOSTS_TTL));
        }
        if let Some(known) = self.cache.get(name, Instant::now()) {
            return Ok(known);
        }
        let (known, ttl) = self.ask_for_addresses(name).await?;
        self.cache.put(name, known.clone(), ttl, Instant::now());
        Ok((known, ttl))
    }

    /// Asks, and asks again for the alias where a server leaves the rest of the way to us.
    async fn ask_for_addresses(&self, name: &str) -> Result<(Known, Duration), UpstreamError> {
        let mut name = name.to_owned();
        let mut ttl = MAX_TTL;
        for _ in 0..MAX_ALIASES {
            let answer = self
                .upstream
                .query(&self.files.resolv_conf(), &name, RecordType::A)
                .await?;
            match follow(&name, &answer) {
                Step::Addresses(addresses, until) => {
                    return Ok((Known::Addresses(addresses), ttl.min(until)));
                }
                Step::Alias(alias, until) => {
                    name = alias;
                    ttl = ttl.min(until);
                }
                Step::Nothing(until) => {
                    let missing = answer.metadata.response_code == ResponseCode::NXDomain;
                    let known = if missing {
                        Known::NoName
                    } else {
                        Known::NoAddress
                    };
                    return Ok((known, ttl.min(until)));
                }
            }
        }
        // Aliases that lead in a circle lead nowhere.
        Ok((Known::NoAddress, MAX_NEGATIVE_TTL))
    }

    async fn records(&self, name: &str, kind: RecordType) -> Result<Reply, UpstreamError> {
        let answer = self
            .upstream
            .query(&self.files.resolv_conf(), name, kind)
            .await?;
        if answer.metadata.response_code == ResponseCode::NXDomain {
            return Ok(Reply::NoName);
        }
        // Aliases are left out, as they are of addresses.
        let records = answer
            .answers
            .into_iter()
            .filter(|record| record.record_type() == kind);
        let records: Vec<_> = records.take(MAX_RECORDS).collect();
        Ok(if records.is_empty() {
            Reply::NoRecord
        } else {
            Reply::Records(records)
        })
    }

    fn judge(&self, host: Option<&Host>, addresses: Vec<Ipv4Addr>) -> Vec<(Ipv4Addr, Reach)> {
        let judge = |address| {
            (
                address,
                self.internal_allow.judge(IpAddr::V4(address), host),
            )
        };
        addresses.into_iter().map(judge).collect()
    }

    /// Has the addresses that are not refused opened; an error if there is none.
    async fn open(
        &self,
        client: &Client,
        question: &Question,
        judged: Vec<(Ipv4Addr, Reach)>,
        ttl: Duration,
    ) -> Result<(Reply, Option<String>), Range> {
        let refused: Vec<String> = judged
            .iter()
            .filter_map(|(address, reach)| match reach {
                Reach::Refused(range) => Some(format!("{address} ({})", range.name())),
                Reach::Public(_) | Reach::Internal(_) => None,
            })
            .collect();
        let reachable = |reach: &Reach| !matches!(reach, Reach::Refused(_));
        let (usable, reaches): (Vec<Ipv4Addr>, Vec<Reach>) = judged
            .iter()
            .filter(|(_, reach)| reachable(reach))
            .copied()
            .unzip();
        let (Some(host), false) = (&question.host, usable.is_empty()) else {
            let ranges = judged.iter().filter_map(|(_, reach)| match reach {
                Reach::Refused(range) => Some(*range),
                Reach::Public(_) | Reach::Internal(_) => None,
            });
            return Err(ranges.into_iter().next().unwrap_or(Range::Unspecified));
        };
        if !self.is_current(client) {
            return Ok((Reply::Failed, Some("the client is gone".to_owned())));
        }
        if let Err(error) = self.directory.on_answer(client, host, &reaches, ttl).await {
            return Ok((Reply::Failed, Some(error.to_string())));
        }
        let left_out = (!refused.is_empty()).then(|| format!("left out: {}", refused.join(", ")));
        Ok((Reply::Addresses(usable, ttl), left_out))
    }

    /// Whether the client's registration still stands.
    pub(crate) fn is_current(&self, client: &Client) -> bool {
        let address = match client {
            Client::Vm(vm) => vm.address,
            Client::Proxy => return true,
        };
        self.directory
            .client(address)
            .is_some_and(|now| now.is_same(client))
    }
}

/// What an answer says about a name.
enum Step {
    Addresses(Vec<Ipv4Addr>, Duration),
    Alias(String, Duration),
    Nothing(Duration),
}

/// Follows the aliases inside an answer. Only records on the way from the name count: a server may send along what it
/// likes.
fn follow(name: &str, answer: &Message) -> Step {
    let seconds = |ttl: u32| Duration::from_secs(ttl.into()).min(MAX_TTL);
    let spelled = |name: &hickory_proto::rr::Name| {
        let text = name.to_ascii().to_ascii_lowercase();
        text.strip_suffix('.').map(str::to_owned).unwrap_or(text)
    };
    let mut current = name.to_owned();
    let mut ttl = MAX_TTL;
    for step in 0..=MAX_ALIASES {
        let here = || {
            answer
                .answers
                .iter()
                .filter(|record| spelled(&record.name) == current)
        };
        let addresses: Vec<(Ipv4Addr, u32)> = here()
            .filter_map(|record| match &record.data {
                RData::A(address) => Some((address.0, record.ttl)),
                _ => None,
            })
            .take(policy::log::MAX_ANSWERS)
            .collect();
        if !addresses.is_empty() {
            let shortest = addresses
                .iter()
                .map(|(_, ttl)| seconds(*ttl))
                .min()
                .unwrap_or_default();
            return Step::Addresses(
                addresses.into_iter().map(|(address, _)| address).collect(),
                ttl.min(shortest),
            );
        }
        let alias = here().find_map(|record| match &record.data {
            RData::CNAME(alias) => Some((spelled(&alias.0), record.ttl)),
            _ => None,
        });
        match alias {
            Some((alias, until)) => {
                current = alias;
                ttl = ttl.min(seconds(until));
            }
            None if step == 0 || answer.metadata.response_code == ResponseCode::NXDomain => break,
            None => return Step::Alias(current, ttl),
        }
    }
    let negative = answer
        .authorities
        .iter()
        .find_map(|record| match &record.data {
            RData::SOA(soa) => Some(seconds(soa.minimum.min(record.ttl))),
            _ => None,
        });
    Step::Nothing(negative.unwrap_or_default().min(MAX_NEGATIVE_TTL).min(ttl))
}
