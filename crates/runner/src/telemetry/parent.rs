//! The submitter's place in a trace, in the format of W3C Trace Context (`traceparent`).

use std::fmt;
use std::str::FromStr;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use serde::{Deserialize, Serialize};

/// What stands in a valid `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct TraceParent {
    trace: TraceId,
    span: SpanId,
    sampled: bool,
}

/// It is no `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it is no W3C traceparent, which is like 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
)]
pub(crate) struct NotATraceParent;

impl TraceParent {
    /// As the parent of spans that are made here.
    pub(crate) fn context(self) -> SpanContext {
        let flags = TraceFlags::default().with_sampled(self.sampled);
        SpanContext::new(self.trace, self.span, flags, true, TraceState::NONE)
    }
}

/// `length` digits of lower-case hexadecimal.
fn hex(text: &str, length: usize) -> Option<&str> {
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (text.len() == length && text.bytes().all(digit)).then_some(text)
}

impl FromStr for TraceParent {
    type Err = NotATraceParent;
    fn from_str(text: &str) -> Result<Self, NotATraceParent> {
        let parse = || {
            let mut parts = text.split('-');
            let version = hex(parts.next()?, 2)?;
            let trace = TraceId::from_hex(hex(parts.next()?, 32)?).ok()?;
            let span = SpanId::from_hex(hex(parts.next()?, 16)?).ok()?;
            let flags = u8::from_str_radix(hex(parts.next()?, 2)?, 16).ok()?;
            // Later versions may add something; ff is none.
            let ends = match version {
                "00" => parts.next().is_none(),
                version => version != "ff",
            };
            let valid = ends && trace != TraceId::INVALID && span != SpanId::INVALID;
            valid.then_some(Self {
                trace,
                span,
                sampled: flags & TraceFlags::SAMPLED.to_u8() != 0,
            })
        };
        parse().ok_or(NotATraceParent)
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sampled = u8::from(self.sampled);
        write!(f, "00-{}-{}-{sampled:02x}", self.trace, self.span)
    }
}

impl TryFrom<String> for TraceParent {
    type Error = NotATraceParent;
    fn try_from(text: String) -> Result<Self, NotATraceParent> {
        text.parse()
    }
}

impl From<TraceParent> for String {
    fn from(parent: TraceParent) -> Self {
        parent.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn only_what_the_specification_allows_is_a_parent() {
        assert_eq!(GOOD.parse::<TraceParent>().unwrap().to_string(), GOOD);
        let later = GOOD.replacen("00", "cc", 1) + "-more";
        assert_eq!(later.parse::<TraceParent>().unwrap().to_string(), GOOD);
        for bad in [
            String::new(),
            GOOD.to_uppercase(),
            format!("{GOOD}-more"),
            format!(" {GOOD}"),
            GOOD.replacen("00", "ff", 1),
            GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            GOOD.replace("00f067aa0ba902b7", &"0".repeat(16)),
            GOOD.replace("00f067aa0ba902b7", "+0f067aa0ba902b7"),
            GOOD.replace("-01", "-1"),
        ] {
            assert_eq!(bad.parse::<TraceParent>(), Err(NotATraceParent), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_written_in_the_one_form(text in "[0-9a-f+ -]{0,60}|00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]") {
            if let Ok(parent) = text.parse::<TraceParent>() {
                prop_assert_eq!(parent.to_string().parse(), Ok(parent));
                prop_assert!(parent.context().is_valid());
            }
        }
    }
}
