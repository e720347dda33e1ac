//! The JSON lines of a run, as the real CLI's `stream-json` prints them.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The id of the one tool call the mock makes.
const TOOL_USE_ID: &str = "toolu_mock_001";

/// Every line of this run: what was printed, kept for the session history, and what is still to be printed.
pub(crate) struct Stream {
    session_id: String,
    cwd: PathBuf,
    /// The session's history before this run.
    earlier: Vec<u8>,
    lines: Vec<u8>,
    printed: usize,
}

impl Stream {
    /// A new session in the current directory.
    pub(crate) fn new() -> io::Result<Self> {
        let micros = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros());
        Ok(Self {
            session_id: format!("mock-{micros}"),
            cwd: std::env::current_dir()?,
            earlier: Vec::new(),
            lines: Vec::with_capacity(2048),
            printed: 0,
        })
    }

    /// Goes on with a session whose history is there.
    pub(crate) fn resume(session_id: &str) -> io::Result<Self> {
        let cwd = std::env::current_dir()?;
        Ok(Self {
            earlier: crate::history::load(&cwd, session_id)?,
            session_id: session_id.to_owned(),
            cwd,
            lines: Vec::with_capacity(2048),
            printed: 0,
        })
    }

    pub(crate) fn earlier(&self) -> &[u8] {
        &self.earlier
    }

    pub(crate) fn session_id(&self) -> &str {
        &self.session_id
    }

    pub(crate) fn cwd(&self) -> &Path {
        &self.cwd
    }

    /// All lines so far, each with its newline.
    pub(crate) fn lines(&self) -> &[u8] {
        &self.lines
    }

    /// Adds one line, to be printed by the next [`Stream::flush`].
    fn push(&mut self, event: &Event<'_>) {
        // Serialising strings and numbers into memory cannot fail; a partial line would still be ended.
        let _infallible = serde_json::to_writer(&mut self.lines, event);
        self.lines.push(b'\n');
    }

    /// Lines not yet printed, which now count as printed: for the scripts that print them in odd ways.
    pub(crate) fn take_unprinted(&mut self) -> Vec<u8> {
        let unprinted = self.lines.get(self.printed..).unwrap_or_default().to_vec();
        self.printed = self.lines.len();
        unprinted
    }

    /// Prints what has not been printed yet, in one write.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let mut stdout = crate::bash::stdout_unbuffered();
        stdout.write_all(self.lines.get(self.printed..).unwrap_or_default())?;
        self.printed = self.lines.len();
        Ok(())
    }
}

/// Lines 1 and 2: the session starts, the assistant says what it does. Between them, the message that is read.
pub(crate) fn opening_lines(stream: &mut Stream, message: Option<&str>) {
    let session_id = stream.session_id.clone();
    let cwd = stream.cwd.to_string_lossy().into_owned();
    stream.push(&Event::System {
        subtype: "init",
        cwd: &cwd,
        session_id: &session_id,
        tools: &["Bash"],
        model: "mock-claude",
    });
    if let Some(text) = message {
        read_line(stream, text);
    }
    stream.push(&Event::Assistant {
        session_id: &session_id,
        message: Message {
            role: "assistant",
            content: [Block::Text {
                text: "Executing command...",
            }],
        },
    });
}

/// Line 3: the assistant calls its one tool with the prompt.
pub(crate) fn command_lines(stream: &mut Stream, prompt: &[u8]) {
    tool_use(
        stream,
        "Bash",
        ToolInput {
            command: Some(&String::from_utf8_lossy(prompt)),
            url: None,
        },
    );
}

/// Line 3 of a run whose tool never comes back.
pub(crate) fn web_fetch_line(stream: &mut Stream) {
    tool_use(
        stream,
        "WebFetch",
        ToolInput {
            command: None,
            url: Some("http://192.0.2.1/"),
        },
    );
}

fn tool_use(stream: &mut Stream, name: &str, input: ToolInput<'_>) {
    let session_id = stream.session_id.clone();
    stream.push(&Event::Assistant {
        session_id: &session_id,
        message: Message {
            role: "assistant",
            content: [Block::ToolUse {
                id: TOOL_USE_ID,
                name,
                input,
            }],
        },
    });
}

/// Lines 4 and 5: what the command printed, and the run's result.
pub(crate) fn result_lines(stream: &mut Stream, output: &str, is_error: bool) {
    let session_id = stream.session_id.clone();
    stream.push(&Event::User {
        session_id: &session_id,
        message: Message {
            role: "user",
            content: [Block::ToolResult {
                tool_use_id: TOOL_USE_ID,
                content: output,
                is_error,
            }],
        },
    });
    stream.push(&Event::Result {
        subtype: if is_error { "error" } else { "success" },
        session_id: &session_id,
        is_error,
        duration_ms: 100,
        num_turns: 1,
        result: output,
        total_cost_usd: 0,
        usage: Usage {
            input_tokens: 0,
            output_tokens: 0,
        },
    });
}

/// A message of standard input is read now.
pub(crate) fn read_line(stream: &mut Stream, text: &str) {
    let session_id = stream.session_id.clone();
    stream.push(&Event::Replay {
        session_id: &session_id,
        message: Said {
            role: "user",
            content: text,
        },
        is_replay: true,
    });
}

/// An assistant line that says `text`.
pub(crate) fn text_line(stream: &mut Stream, text: &str) {
    let session_id = stream.session_id.clone();
    stream.push(&Event::Assistant {
        session_id: &session_id,
        message: Message {
            role: "assistant",
            content: [Block::Text { text }],
        },
    });
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event<'a> {
    System {
        subtype: &'a str,
        cwd: &'a str,
        session_id: &'a str,
        tools: &'a [&'a str],
        model: &'a str,
    },
    Assistant {
        session_id: &'a str,
        message: Message<'a>,
    },
    User {
        session_id: &'a str,
        message: Message<'a>,
    },
    #[serde(rename = "user")]
    Replay {
        session_id: &'a str,
        message: Said<'a>,
        #[serde(rename = "isReplay")]
        is_replay: bool,
    },
    Result {
        subtype: &'a str,
        session_id: &'a str,
        is_error: bool,
        duration_ms: u32,
        num_turns: u32,
        result: &'a str,
        total_cost_usd: u32,
        usage: Usage,
    },
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'a str,
    content: [Block<'a>; 1],
}

#[derive(Serialize)]
struct Said<'a> {
    role: &'a str,
    content: &'a str,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block<'a> {
    Text {
        text: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        input: ToolInput<'a>,
    },
    ToolResult {
        tool_use_id: &'a str,
        content: &'a str,
        is_error: bool,
    },
}

#[derive(Serialize)]
struct ToolInput<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<&'a str>,
}

#[derive(Serialize)]
struct Usage {
    input_tokens: u32,
    output_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn stream() -> Stream {
        Stream {
            session_id: "mock-1".into(),
            cwd: "/home/user/workspace".into(),
            earlier: Vec::new(),
            lines: Vec::new(),
            printed: 0,
        }
    }

    fn values(stream: &Stream) -> Vec<Value> {
        String::from_utf8(stream.lines.clone())
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn the_five_lines_are_these() {
        let mut stream = stream();
        opening_lines(&mut stream, None);
        command_lines(&mut stream, b"echo \"a\"\n");
        result_lines(&mut stream, "a\n", false);
        assert_eq!(
            values(&stream),
            [
                json!({"type":"system","subtype":"init","cwd":"/home/user/workspace","session_id":"mock-1","tools":["Bash"],"model":"mock-claude"}),
                json!({"type":"assistant","session_id":"mock-1","message":{"role":"assistant","content":[{"type":"text","text":"Executing command..."}]}}),
                json!({"type":"assistant","session_id":"mock-1","message":{"role":"assistant","content":[{"type":"tool_use","id":"toolu_mock_001","name":"Bash","input":{"command":"echo \"a\"\n"}}]}}),
                json!({"type":"user","session_id":"mock-1","message":{"role":"user","content":[{"type":"tool_result","tool_use_id":"toolu_mock_001","content":"a\n","is_error":false}]}}),
                json!({"type":"result","subtype":"success","session_id":"mock-1","is_error":false,"duration_ms":100,"num_turns":1,"result":"a\n","total_cost_usd":0,"usage":{"input_tokens":0,"output_tokens":0}}),
            ]
        );
    }

    #[test]
    fn a_failure_says_so_twice() {
        let mut stream = stream();
        result_lines(&mut stream, "boom", true);
        let lines = values(&stream);
        assert_eq!(lines[0]["message"]["content"][0]["is_error"], true);
        assert_eq!(lines[1]["subtype"], "error");
        assert_eq!(lines[1]["is_error"], true);
    }

    #[test]
    fn lines_are_compact_and_keep_any_text_on_one_line() {
        let mut stream = stream();
        result_lines(&mut stream, "two\nlines \u{1f600}\u{7}", false);
        let text = String::from_utf8(stream.lines.clone()).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(!text.contains(": "), "not compact: {text}");
    }
}
