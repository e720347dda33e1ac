//! Lines of the network log (`docs/network.md`): one type for who writes them, and a strict reader for those that
//! come from the proxy, which handles what VMs send.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::decide::Action;

/// Longest `url` in a line, bytes; longer ones are cut and end in `…`.
pub const MAX_URL: usize = 8192;
/// Longest of every other text.
pub const MAX_TEXT: usize = 1024;
/// Most addresses in one line.
pub const MAX_ANSWERS: usize = 64;

/// Why a line was refused.
#[derive(Debug, thiserror::Error)]
#[error("not a line of the network log: {0}")]
pub struct LineError(String);

/// A moment, in milliseconds, as RFC 3339 in UTC: `2026-01-31T12:00:00.000Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(jiff::Timestamp);

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        Self::from(jiff::Timestamp::now())
    }
}

impl From<jiff::Timestamp> for Timestamp {
    fn from(moment: jiff::Timestamp) -> Self {
        // Within a moment's bounds after it was one, so the fallback is never taken.
        Self(jiff::Timestamp::from_millisecond(moment.as_millisecond()).unwrap_or(moment))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.0)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.parse::<jiff::Timestamp>().map(Self::from).ok();
        // Only the one notation: lines are sorted and compared as text.
        parsed
            .filter(|moment| moment.to_string() == text)
            .ok_or_else(|| {
                serde::de::Error::custom(format_args!(
                    "timestamp {} is not like 2026-01-31T12:00:00.000Z",
                    crate::policy::shown(&text)
                ))
            })
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// When it was over.
    pub timestamp: Timestamp,
    /// What became of it.
    pub action: Action,
    /// What decided: a rule, `kernel:private`, `resolver:loopback`…
    pub rule: Option<String>,
    /// Name or address of the other side.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// What went wrong.
    pub error: Option<String>,
    /// What it was.
    pub event: Event,
}

/// What a line is about.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A request.
    Http {
        /// Its method.
        method: String,
        /// Its URL, without secrets.
        url: String,
        /// The answer's status, if one came.
        status: Option<u16>,
        /// From the request's first byte to the answer's last.
        latency_ms: u64,
        /// Bytes of its body.
        request_size: u64,
        /// Bytes of the answer's body.
        response_size: u64,
    },
    /// A connection that was not looked into, or became no request.
    Tcp {
        /// The connection's life.
        latency_ms: u64,
        /// Bytes from the VM.
        request_size: u64,
        /// Bytes to the VM.
        response_size: u64,
    },
    /// A query.
    Dns {
        /// Its type: `A`, `AAAA`…
        query: String,
        /// The addresses it was answered with.
        answers: Vec<String>,
        /// Until the answer.
        latency_ms: u64,
    },
    /// Packets that the kernel refused.
    Packet {
        /// `tcp`, `udp`, `icmp`…
        protocol: String,
        /// How many since the last line like it.
        count: u64,
    },
}

/// All fields of all types; the order is the one in which they are written.
#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    timestamp: Option<Timestamp>,
    #[serde(rename = "type")]
    kind: String,
    action: Option<Action>,
    rule: Option<String>,
    host: String,
    port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(
        default,
        deserialize_with = "present",
        skip_serializing_if = "Option::is_none"
    )]
    status: Option<Option<u16>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answers: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_size: Option<u64>,
    error: Option<String>,
}

/// Tells a `null` from a field that is not there.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<u16>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl Line {
    /// Reads a line, whoever wrote it: no field is missing, unknown or of another type's; long texts are cut.
    pub fn parse(text: &str) -> Result<Self, LineError> {
        serde_json::from_str(text).map_err(|error| LineError(error.to_string()))
    }

    /// The line as it stands in the file, with its newline.
    pub fn to_json_line(&self) -> String {
        // Serialising strings and numbers into memory cannot fail.
        let mut line = serde_json::to_string(self).unwrap_or_default();
        line.push('\n');
        line
    }
}

impl TryFrom<Fields> for Line {
    type Error = LineError;

    fn try_from(mut fields: Fields) -> Result<Self, LineError> {
        let kind = std::mem::take(&mut fields.kind);
        let missing =
            |name: &str| LineError(format!("{} has no `{name}`", crate::policy::shown(&kind)));
        let take_text = |field: &mut Option<String>, name: &str, longest: usize| {
            field
                .take()
                .map(|text| cut(text, longest))
                .ok_or_else(|| missing(name))
        };
        let take_number =
            |field: &mut Option<u64>, name: &str| field.take().ok_or_else(|| missing(name));
        let event = match kind.as_str() {
            "http" => Event::Http {
                method: take_text(&mut fields.method, "method", MAX_TEXT)?,
                url: take_text(&mut fields.url, "url", MAX_URL)?,
                status: fields.status.take().ok_or_else(|| missing("status"))?,
                latency_ms: take_number(&mut fields.latency_ms, "latency_ms")?,
                request_size: take_number(&mut fields.request_size, "request_size")?,
                response_size: take_number(&mut fields.response_size, "response_size")?,
            },
            "tcp" => Event::Tcp {
                latency_ms: take_number(&mut fields.latency_ms, "latency_ms")?,
                request_size: take_number(&mut fields.request_size, "request_size")?,
                response_size: take_number(&mut fields.response_size, "response_size")?,
            },
            "dns" => Event::Dns {
                query: take_text(&mut fields.query, "query", MAX_TEXT)?,
                answers: fields
                    .answers
                    .take()
                    .ok_or_else(|| missing("answers"))?
                    .into_iter()
                    .take(MAX_ANSWERS)
                    .map(|answer| cut(answer, MAX_TEXT))
                    .collect(),
                latency_ms: take_number(&mut fields.latency_ms, "latency_ms")?,
            },
            "packet" => Event::Packet {
                protocol: take_text(&mut fields.protocol, "protocol", MAX_TEXT)?,
                count: take_number(&mut fields.count, "count")?,
            },
            _ => {
                return Err(LineError(format!(
                    "type {} is unknown",
                    crate::policy::shown(&kind)
                )));
            }
        };
        let Fields {
            timestamp,
            kind: _,
            action,
            rule,
            host,
            port,
            method: None,
            url: None,
            status: None,
            query: None,
            answers: None,
            protocol: None,
            count: None,
            latency_ms: None,
            request_size: None,
            response_size: None,
            error,
        } = fields
        else {
            return Err(LineError(format!("`{kind}` has a field of another type")));
        };
        Ok(Self {
            timestamp: timestamp.ok_or_else(|| missing("timestamp"))?,
            action: action.ok_or_else(|| missing("action"))?,
            rule: rule.map(|rule| cut(rule, MAX_TEXT)),
            host: cut(host, MAX_TEXT),
            port,
            error: error.map(|error| cut(error, MAX_TEXT)),
            event,
        })
    }
}

/// Cuts a text that is longer than so many bytes, at a character's end, and marks the cut.
fn cut(mut text: String, longest: usize) -> String {
    if text.len() > longest {
        let room = longest.saturating_sub('…'.len_utf8());
        let end = text
            .char_indices()
            .map(|(at, _)| at)
            .take_while(|at| *at <= room)
            .last();
        text.truncate(end.unwrap_or_default());
        text.push('…');
    }
    text
}

impl<'de> Deserialize<'de> for Line {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Fields::deserialize(deserializer)?
            .try_into()
            .map_err(serde::de::Error::custom)
    }
}

impl Serialize for Line {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self {
            timestamp,
            action,
            rule,
            host,
            port,
            error,
            event,
        } = self.clone();
        let common = Fields {
            timestamp: Some(timestamp),
            action: Some(action),
            rule,
            host,
            port,
            error,
            ..Fields::default()
        };
        let fields = match event {
            Event::Http {
                method,
                url,
                status,
                latency_ms,
                request_size,
                response_size,
            } => Fields {
                kind: "http".to_owned(),
                method: Some(method),
                url: Some(url),
                status: Some(status),
                latency_ms: Some(latency_ms),
                request_size: Some(request_size),
                response_size: Some(response_size),
                ..common
            },
            Event::Tcp {
                latency_ms,
                request_size,
                response_size,
            } => Fields {
                kind: "tcp".to_owned(),
                latency_ms: Some(latency_ms),
                request_size: Some(request_size),
                response_size: Some(response_size),
                ..common
            },
            Event::Dns {
                query,
                answers,
                latency_ms,
            } => Fields {
                kind: "dns".to_owned(),
                query: Some(query),
                answers: Some(answers),
                latency_ms: Some(latency_ms),
                ..common
            },
            Event::Packet { protocol, count } => Fields {
                kind: "packet".to_owned(),
                protocol: Some(protocol),
                count: Some(count),
                ..common
            },
        };
        fields.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP: &str = r#"{"timestamp":"2026-01-31T12:00:00.000Z","type":"http","action":"ALLOW","rule":"github","host":"api.github.com","port":443,"method":"GET","url":"https://api.github.com/","status":null,"latency_ms":3,"request_size":0,"response_size":5,"error":null}"#;

    #[test]
    fn every_type_is_written_as_the_contract_says_and_read_back() {
        for text in [
            HTTP,
            r#"{"timestamp":"2026-01-31T12:00:00.999Z","type":"tcp","action":"DENY","rule":null,"host":"a.example","port":22,"latency_ms":3,"request_size":0,"response_size":5,"error":"reset"}"#,
            r#"{"timestamp":"2026-01-31T12:00:00.120Z","type":"dns","action":"AUDIT","rule":"default","host":"a.example","port":53,"query":"A","answers":["198.18.0.1"],"latency_ms":3,"error":null}"#,
            r#"{"timestamp":"2026-01-31T12:00:00.000Z","type":"packet","action":"DENY","rule":"kernel:private","host":"10.0.0.1","port":0,"protocol":"icmp","count":7,"error":null}"#,
        ] {
            let line = Line::parse(text).unwrap();
            assert_eq!(line.to_json_line(), format!("{text}\n"));
        }
    }

    #[test]
    fn lines_that_lack_a_field_or_have_one_too_many_are_refused() {
        for (from, to) in [
            (r#""status":null,"#, ""),
            (r#""latency_ms":3,"#, ""),
            (r#""timestamp":"2026-01-31T12:00:00.000Z","#, ""),
            (r#""port":443"#, r#""port":443,"count":1"#),
            (r#""port":443"#, r#""port":443,"answers":[]"#),
            (r#""port":443"#, r#""port":443,"colour":"red""#),
            (r#""port":443"#, r#""port":70000"#),
            (r#""port":443"#, r#""port":443,"port":443"#),
            (r#""ALLOW""#, r#""allow""#),
            (r#""http""#, r#""ftp""#),
            (r#""http""#, r#""tcp""#),
            ("12:00:00.000Z", "12:00:00Z"),
            ("12:00:00.000Z", "12:00:00.0000Z"),
            ("12:00:00.000Z", "12:00:00.000+00:00"),
        ] {
            let text = HTTP.replacen(from, to, 1);
            assert_ne!(text, HTTP, "{from}");
            assert!(Line::parse(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn long_texts_are_cut_at_a_characters_end_and_say_so() {
        let text = HTTP.replace("https://api.github.com/", &"ä".repeat(10_000));
        let Event::Http { url, .. } = Line::parse(&text).unwrap().event else {
            panic!("another type")
        };
        assert!(url.len() <= MAX_URL && url.ends_with("ä…"), "{}", url.len());
    }

    #[test]
    fn a_line_stays_a_line_whatever_stands_in_it() {
        let mut line = Line::parse(HTTP).unwrap();
        line.host = "a\nb\u{1b}[31m\"".to_owned();
        let text = line.to_json_line();
        assert_eq!(text.matches('\n').count(), 1);
        assert!(!text.contains('\u{1b}'));
        assert_eq!(Line::parse(text.trim_end()).unwrap(), line);
    }
}
