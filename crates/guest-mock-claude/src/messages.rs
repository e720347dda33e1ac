//! Messages on standard input: the real CLI's `--input-format stream-json`.

use std::io::{self, BufRead as _, Read as _};

use serde::Deserialize;

/// Longest message, bytes: the largest prompt, every byte of it escaped.
const MAX_MESSAGE: u64 = 6 * (4 << 20) + 4096;

/// The text of the next message; `None` at the end.
pub(crate) fn next() -> io::Result<Option<String>> {
    let Some(line) = next_line()? else {
        return Ok(None);
    };
    text(&line).map(Some).ok_or_else(|| {
        let why = format!("cannot parse a line of streaming input: {line}");
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}

/// The next line as it is.
pub(crate) fn next_line() -> io::Result<Option<String>> {
    let mut line = String::new();
    // The process's one buffer: whoever reads standard input next goes on behind this line.
    let mut stdin = io::stdin().lock().take(MAX_MESSAGE);
    if stdin.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}

/// What a line says, if it is a user's message.
fn text(line: &str) -> Option<String> {
    let message: Message = serde_json::from_str(line).ok()?;
    (message.kind == "user" && message.message.role == "user").then(|| {
        match message.message.content {
            Content::Text(text) => text,
            Content::Blocks(blocks) => {
                let texts: Vec<_> = blocks.into_iter().filter_map(|block| block.text).collect();
                texts.join("\n")
            }
        }
    })
}

#[derive(Deserialize)]
struct Message {
    #[serde(rename = "type")]
    kind: String,
    message: Body,
}

#[derive(Deserialize)]
struct Body {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Blocks(Vec<Block>),
}

#[derive(Deserialize)]
struct Block {
    text: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_message_are_understood_and_nothing_else() {
        let plain = r#"{"type":"user","message":{"role":"user","content":"a\nb"}}"#;
        assert_eq!(text(plain).as_deref(), Some("a\nb"));
        let blocks = r#"{"type":"user","message":{"role":"user","content":[{"type":"text","text":"a"},{"type":"image"},{"type":"text","text":"b"}]}}"#;
        assert_eq!(text(blocks).as_deref(), Some("a\nb"));
        for other in [
            "",
            "echo hi",
            "{}",
            r#"{"type":"assistant","message":{"role":"user","content":"a"}}"#,
        ] {
            assert_eq!(text(other), None, "{other}");
        }
    }
}
