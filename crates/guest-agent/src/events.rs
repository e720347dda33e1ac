//! What the agent needs to know of the CLI's `stream-json` lines.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};

/// One line of the CLI, reduced to what supervision acts on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// Tools that the assistant has called (assistant line).
    ToolCalls(Vec<ToolCall<'a>>),
    /// Ids of calls that have returned (user line).
    ToolResults(Vec<Cow<'a, str>>),
    /// The CLI reads messages of its standard input now (user line).
    Read,
    /// The run's result: what it says, and whether it is a failure.
    Result { text: Cow<'a, str>, is_error: bool },
    /// A session begins, or goes on with another turn, in this directory.
    Begin {
        session: Cow<'a, str>,
        cwd: Cow<'a, str>,
    },
    /// Some other event.
    Other,
}

/// A tool the assistant has called.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ToolCall<'a> {
    pub(crate) id: Cow<'a, str>,
    pub(crate) name: Cow<'a, str>,
}

/// Parses a line. `None` when it is no event at all but some other text.
pub(crate) fn parse(line: &str) -> Option<Event<'_>> {
    let raw: RawEvent<'_> = serde_json::from_str(line).ok()?;
    let blocks = raw.message.map(|message| message.content.0);
    let blocks = blocks.unwrap_or_default();
    Some(match raw.kind.as_ref() {
        "assistant" => Event::ToolCalls(blocks.into_iter().filter_map(RawBlock::call).collect()),
        "user" if raw.is_replay == Some(true) => Event::Read,
        "user" => Event::ToolResults(
            blocks
                .into_iter()
                .filter_map(|block| block.tool_use_id)
                .collect(),
        ),
        "result" => Event::Result {
            text: raw.result.unwrap_or_default(),
            is_error: raw.is_error.unwrap_or(false),
        },
        "system" => match (raw.subtype.as_deref(), raw.session_id, raw.cwd) {
            (Some("init"), Some(session), Some(cwd)) => Event::Begin { session, cwd },
            _ => Event::Other,
        },
        _ => Event::Other,
    })
}

#[derive(Deserialize)]
struct RawEvent<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    message: Option<RawMessage<'a>>,
    #[serde(borrow)]
    result: Option<Cow<'a, str>>,
    is_error: Option<bool>,
    #[serde(rename = "isReplay")]
    is_replay: Option<bool>,
    #[serde(borrow)]
    subtype: Option<Cow<'a, str>>,
    #[serde(borrow)]
    session_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    cwd: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct RawMessage<'a> {
    #[serde(borrow, default)]
    content: Blocks<'a>,
}

#[derive(Deserialize)]
struct RawBlock<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    name: Option<Cow<'a, str>>,
    #[serde(borrow)]
    tool_use_id: Option<Cow<'a, str>>,
}

impl<'a> RawBlock<'a> {
    fn call(self) -> Option<ToolCall<'a>> {
        Some(ToolCall {
            id: self.id?,
            name: self.name?,
        })
    }
}

/// A message's content: blocks, or plain text, which has none.
#[derive(Default)]
struct Blocks<'a>(Vec<RawBlock<'a>>);

impl<'de: 'a, 'a> Deserialize<'de> for Blocks<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BlocksVisitor;

        impl<'de> Visitor<'de> for BlocksVisitor {
            type Value = Blocks<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a list of content blocks or a text")
            }

            fn visit_str<E>(self, _text: &str) -> Result<Self::Value, E> {
                Ok(Blocks::default())
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Blocks::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut blocks = Vec::new();
                while let Some(block) = list.next_element()? {
                    blocks.push(block);
                }
                Ok(Blocks(blocks))
            }
        }

        deserializer.deserialize_any(BlocksVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_lines_that_matter_are_understood() {
        assert_eq!(
            parse(r#"{"type":"system","subtype":"init","session_id":"s"}"#),
            Some(Event::Other)
        );
        assert_eq!(
            parse(
                r#"{"message":{"content":[{"type":"text","text":"x"},{"type":"tool_use","id":"t1","name":"WebFetch","input":{"a":[1]}}]},"type":"assistant"}"#
            ),
            Some(Event::ToolCalls(vec![ToolCall {
                id: "t1".into(),
                name: "WebFetch".into()
            }]))
        );
        assert_eq!(
            parse(
                r#"{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"y"}]}]}}"#
            ),
            Some(Event::ToolResults(vec!["t1".into()]))
        );
        assert_eq!(
            parse(
                r#"{"type":"user","message":{"role":"user","content":"go on"},"session_id":"s","isReplay":true}"#
            ),
            Some(Event::Read)
        );
        assert_eq!(
            parse(r#"{"is_error":true,"result":"a\nb","type":"result"}"#),
            Some(Event::Result {
                text: "a\nb".into(),
                is_error: true
            })
        );
    }

    #[test]
    fn the_real_clis_streams_are_understood() {
        let tool_run = include_str!("../../guest-mock-claude/tests/fixtures/real-tool-run.jsonl");
        let events: Vec<_> = tool_run.lines().map(|line| parse(line).unwrap()).collect();
        let call = ToolCall {
            id: "toolu_1".into(),
            name: "Bash".into(),
        };
        assert_eq!(
            events,
            [
                Event::Begin {
                    session: "add44d27-639f-41a2-b872-386599708b5c".into(),
                    cwd: "/home/user/workspace".into()
                },
                Event::ToolCalls(vec![]),
                Event::ToolCalls(vec![call]),
                Event::ToolResults(vec!["toolu_1".into()]),
                Event::ToolCalls(vec![]),
                Event::Result {
                    text: "Done.".into(),
                    is_error: false
                },
            ]
        );
        let input = include_str!("../../guest-mock-claude/tests/fixtures/real-input.jsonl");
        let events: Vec<_> = input.lines().filter_map(parse).collect();
        let told = |event: &Event<'_>| match event {
            Event::Begin { .. } => Some("turn"),
            Event::Read => Some("read"),
            Event::Result { .. } => Some("result"),
            _ => None,
        };
        assert_eq!(
            events.iter().filter_map(told).collect::<Vec<_>>(),
            ["turn", "read", "result", "turn", "read", "result"]
        );
        let not_logged_in =
            include_str!("../../guest-mock-claude/tests/fixtures/real-not-logged-in.jsonl");
        assert_eq!(
            parse(not_logged_in.lines().last().unwrap()),
            Some(Event::Result {
                text: "Not logged in \u{b7} Please run /login".into(),
                is_error: true
            })
        );
    }

    #[test]
    fn odd_shapes_are_still_events() {
        assert_eq!(
            parse(r#"{"type":"user","message":{"role":"user","content":"plain"}}"#),
            Some(Event::ToolResults(vec![]))
        );
        assert_eq!(
            parse(r#"{"type":"assistant","message":{"content":null}}"#),
            Some(Event::ToolCalls(vec![]))
        );
        assert_eq!(
            parse(r#"{"type":"result","subtype":"error_max_turns","is_error":true}"#),
            Some(Event::Result {
                text: "".into(),
                is_error: true
            })
        );
        assert_eq!(parse(r#"{"type":"later-invention"}"#), Some(Event::Other));
    }

    #[test]
    fn other_text_is_no_event() {
        for text in ["", "warning: x", "{", "[]", "{}", "12", r#"{"type":1}"#] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            parse(&text);
        }
    }
}
