//! Messages between the daemon and the proxy (`docs/network.md`): JSON, one a line.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize, Serializer};

use crate::log::Line;
use crate::policy::Policy;
use crate::secret::{Exposed, Secret};

/// Longest message, bytes, with its newline.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Longest sentence taken from the proxy.
const MAX_ERROR: usize = 4096;

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// What the proxy sent is none of its messages.
    #[error("the proxy sent something that is no message: {0}")]
    Received(String),
    /// What should be sent is too large.
    #[error("a message of {0} bytes is too large for the proxy, which takes {MAX_MESSAGE}")]
    TooLarge(usize),
}

/// What the daemon asks.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Request<'a> {
    /// From now on connections from this address are this run's.
    Register {
        /// The slot's address in the hub.
        address: Ipv4Addr,
        /// Which of the address's registrations.
        generation: u64,
        /// The run.
        run_id: &'a str,
        /// Its policy.
        policy: &'a Policy,
        /// Its secrets, with their values.
        #[serde(serialize_with = "exposed")]
        secrets: &'a [Secret],
    },
    /// The run's policy is now this one.
    Update {
        /// As registered.
        address: Ipv4Addr,
        /// As registered.
        generation: u64,
        /// The new policy.
        policy: &'a Policy,
    },
    /// The run is over: its flows are closed and their lines sent before the answer.
    Unregister {
        /// As registered.
        address: Ipv4Addr,
        /// As registered.
        generation: u64,
    },
    /// Is anybody there?
    Ping,
}

fn exposed<S: Serializer>(secrets: &[Secret], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(secrets.iter().map(Exposed))
}

impl Request<'_> {
    /// The message with its newline. It may hold secrets, so it is wiped when it is dropped.
    pub fn to_line(&self, id: u64) -> Result<zeroize::Zeroizing<Vec<u8>>, WireError> {
        #[derive(Serialize)]
        struct Numbered<'a> {
            id: u64,
            #[serde(flatten)]
            request: &'a Request<'a>,
        }
        let numbered = Numbered { id, request: self };
        // A buffer that grows leaves copies behind that nobody wipes, so its size is counted first.
        let mut length = Count(0);
        let counted = serde_json::to_writer(&mut length, &numbered);
        let mut line = zeroize::Zeroizing::new(Vec::with_capacity(length.0.saturating_add(1)));
        // Serialising strings, numbers and lists into memory cannot fail.
        counted
            .and_then(|()| serde_json::to_writer(&mut *line, &numbered))
            .map_err(|error| WireError::Received(error.to_string()))?;
        line.push(b'\n');
        if line.len() > MAX_MESSAGE {
            Err(WireError::TooLarge(line.len()))
        } else {
            Ok(line)
        }
    }
}

/// A writer that only counts.
struct Count(usize);

impl std::io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 = self.0.saturating_add(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the proxy sends.
#[derive(Clone, Debug, PartialEq)]
pub enum FromProxy {
    /// The answer to a request.
    Answer {
        /// The request's number.
        id: u64,
        /// What became of it: nothing to say, or a sentence.
        outcome: Result<(), String>,
    },
    /// A line for the network log of the run that had this registration.
    Log {
        /// The slot's address.
        address: Ipv4Addr,
        /// The registration.
        generation: u64,
        /// The line.
        line: Box<Line>,
    },
    /// It accepts connections.
    Listening {
        /// On this port.
        port: u16,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Received {
    id: Option<u64>,
    ok: Option<bool>,
    error: Option<String>,
    log: Option<ReceivedLog>,
    event: Option<String>,
    port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReceivedLog {
    address: Ipv4Addr,
    generation: u64,
    line: Box<Line>,
}

impl FromProxy {
    /// Reads a message, without its newline.
    pub fn parse(line: &[u8]) -> Result<Self, WireError> {
        let received: Received =
            serde_json::from_slice(line).map_err(|error| WireError::Received(error.to_string()))?;
        match received {
            Received {
                id: Some(id),
                ok: Some(true),
                error: None,
                log: None,
                event: None,
                port: None,
            } => Ok(Self::Answer {
                id,
                outcome: Ok(()),
            }),
            Received {
                id: Some(id),
                ok: None,
                error: Some(error),
                log: None,
                event: None,
                port: None,
            } => {
                let sentence = error.chars().take(MAX_ERROR).collect();
                Ok(Self::Answer {
                    id,
                    outcome: Err(sentence),
                })
            }
            Received {
                id: None,
                ok: None,
                error: None,
                log: Some(log),
                event: None,
                port: None,
            } => {
                let ReceivedLog {
                    address,
                    generation,
                    line,
                } = log;
                Ok(Self::Log {
                    address,
                    generation,
                    line,
                })
            }
            Received {
                id: None,
                ok: None,
                error: None,
                log: None,
                event: Some(event),
                port: Some(port),
            } if event == "listening" && port != 0 => Ok(Self::Listening { port }),
            _ => Err(WireError::Received(
                "its fields do not go together".to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{Placeholder, SecretValue};
    use serde_json::{Value, json};

    #[test]
    fn requests_are_what_the_contract_says() {
        let value = SecretValue::new("sk-very-secret".to_owned()).unwrap();
        let placeholder = Placeholder::generate(&value, [0; 16]);
        let shown = placeholder.as_str().to_owned();
        let secret = Secret::new(
            "API_KEY".parse().unwrap(),
            value,
            placeholder,
            vec!["*.example.com".parse().unwrap()],
        )
        .unwrap();
        let address = Ipv4Addr::new(100, 96, 0, 7);
        let policy = Policy::default();
        let canonical = json!({"version": 1, "default": "allow", "mode": "enforce", "rules": []});
        let line = |request: Request<'_>| -> Value {
            let line = request.to_line(9).unwrap();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            serde_json::from_slice(&line).unwrap()
        };
        assert_eq!(
            line(Request::Register {
                address,
                generation: 12,
                run_id: "r",
                policy: &policy,
                secrets: &[secret]
            }),
            json!({"id": 9, "op": "register", "address": "100.96.0.7", "generation": 12, "run_id": "r",
                "policy": canonical,
                "secrets": [{"name": "API_KEY", "value": "sk-very-secret", "placeholder": shown,
                    "hosts": ["*.example.com"]}]})
        );
        assert_eq!(
            line(Request::Update {
                address,
                generation: 12,
                policy: &policy
            }),
            json!({"id": 9, "op": "update", "address": "100.96.0.7", "generation": 12, "policy": canonical})
        );
        assert_eq!(
            line(Request::Unregister {
                address,
                generation: 12
            }),
            json!({"id": 9, "op": "unregister", "address": "100.96.0.7", "generation": 12})
        );
        assert_eq!(line(Request::Ping), json!({"id": 9, "op": "ping"}));
    }

    #[test]
    fn the_proxys_messages_are_read_and_mixtures_of_them_are_not() {
        let parse = |text: &str| FromProxy::parse(text.as_bytes());
        assert_eq!(
            parse(r#"{"id":1,"ok":true}"#).unwrap(),
            FromProxy::Answer {
                id: 1,
                outcome: Ok(())
            }
        );
        assert_eq!(
            parse(r#"{"id":1,"error":"no."}"#).unwrap(),
            FromProxy::Answer {
                id: 1,
                outcome: Err("no.".to_owned())
            }
        );
        assert_eq!(
            parse(r#"{"event":"listening","port":8080}"#).unwrap(),
            FromProxy::Listening { port: 8080 }
        );
        let log = r#"{"log":{"address":"100.96.0.7","generation":12,"line":{"timestamp":"2026-01-31T12:00:00.000Z","type":"tcp","action":"DENY","rule":null,"host":"a","port":443,"latency_ms":0,"request_size":0,"response_size":0,"error":null}}}"#;
        assert!(matches!(
            parse(log).unwrap(),
            FromProxy::Log { generation: 12, .. }
        ));
        for bad in [
            "",
            "{}",
            "[]",
            "null",
            r#"{"id":1,"ok":false}"#,
            r#"{"id":1}"#,
            r#"{"id":-1,"ok":true}"#,
            r#"{"id":1,"ok":true,"error":"x"}"#,
            r#"{"event":"listening","port":0}"#,
            r#"{"event":"gone","port":1}"#,
            r#"{"id":1,"ok":true,"op":"register"}"#,
            r#"{"log":{"address":"::1","generation":1,"line":{}}}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
