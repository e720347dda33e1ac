//! Prompts that begin with `@`: ways in which an agent CLI can go wrong, played on purpose.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use crate::bash::stdout_unbuffered;
use crate::events::{
    Stream, command_lines, opening_lines, read_line, result_lines, text_line, web_fetch_line,
};
use crate::messages;

/// Longer than any line a supervisor should be willing to hold in memory (the agent's limit is 32 MiB).
const OVER_LIMIT: usize = 33 * 1024 * 1024;

/// Pause between an event and the next, long enough to be a separate read for whoever listens.
const BEAT: Duration = Duration::from_millis(50);

/// One way to misbehave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    /// Standard error and exit code 1, nothing on standard output.
    Fail { stderr: Vec<u8> },
    /// A line beyond every limit between the tool call and the result, or as the end of the stream.
    OverLimit { newline: bool },
    /// Bytes that are no UTF-8 in an event and in the result.
    InvalidUtf8,
    /// Five good lines cut into odd pieces, with blank lines and CRLF, the last without newline.
    RecordBoundaries,
    /// A WebFetch that never returns.
    StuckTool { deaf: bool, close_stdout: bool },
    /// Ends well, and leaves a child that holds standard output open.
    OrphanPipe,
    /// Does not exit after its result.
    HangAfterResult {
        is_error: bool,
        deaf: bool,
        then: ThenEvents,
    },
    /// Exits some time after its result, but does exit.
    ExitAfterResult,
    /// Writes its environment to a file as one JSON object.
    WriteEnv { path: Vec<u8> },
    /// Prints the given lines as they are.
    Echo { lines: Vec<u8>, hang: bool },
    /// Takes this many lines (or messages) from standard input, each answered by an event.
    ActiveInput { count: usize },
}

/// What follows a result that is not the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ThenEvents {
    None,
    One,
    Periodic,
}

impl Script {
    /// The script a prompt asks for; `None` when the prompt is an ordinary command.
    pub(crate) fn parse(prompt: &[u8]) -> Option<Self> {
        let hang = |is_error, deaf, then| Self::HangAfterResult {
            is_error,
            deaf,
            then,
        };
        let stuck = |deaf, close_stdout| Self::StuckTool { deaf, close_stdout };
        Some(match prompt {
            b"@fail-invalid-utf8" => Self::Fail {
                stderr: b"broken \xff\xfe bytes\n".to_vec(),
            },
            b"@fail-invalid-utf8-long" => Self::Fail {
                // 64 KiB, so that a multi-byte character straddles every buffer border somewhere.
                stderr: b"\xf0\x9f\x98\x80\xff\xe2\x82".repeat(64 * 1024 / 7),
            },
            b"@stdout-over-limit-newline" => Self::OverLimit { newline: true },
            b"@stdout-over-limit-no-newline" => Self::OverLimit { newline: false },
            b"@stdout-invalid-utf8" => Self::InvalidUtf8,
            b"@stdout-record-boundaries" => Self::RecordBoundaries,
            b"@stuck-tool" => stuck(false, false),
            b"@stuck-tool-deaf" => stuck(true, false),
            b"@stuck-tool-closed-stdout-deaf" => stuck(true, true),
            b"@orphan-pipe" => Self::OrphanPipe,
            b"@hang-after-result" => hang(false, false, ThenEvents::None),
            b"@hang-after-result-deaf" => hang(false, true, ThenEvents::None),
            b"@hang-after-result-then-event" => hang(false, false, ThenEvents::One),
            b"@hang-after-result-periodic-events" => hang(false, false, ThenEvents::Periodic),
            b"@hang-after-error-result" => hang(true, false, ThenEvents::None),
            b"@exit-after-result" => Self::ExitAfterResult,
            _ => return Self::parse_with_value(prompt),
        })
    }

    fn parse_with_value(prompt: &[u8]) -> Option<Self> {
        if let Some(message) = prompt.strip_prefix(b"@fail:") {
            let mut stderr = message.to_vec();
            stderr.push(b'\n');
            return Some(Self::Fail { stderr });
        }
        if let Some(message) = prompt.strip_prefix(b"@fail-no-newline:") {
            return Some(Self::Fail {
                stderr: message.to_vec(),
            });
        }
        if let Some(path) = prompt.strip_prefix(b"@write-env-json:") {
            return Some(Self::WriteEnv {
                path: path.to_vec(),
            });
        }
        if let Some(lines) = prompt.strip_prefix(b"@ECHO@") {
            let lines = lines.to_vec();
            return Some(Self::Echo { lines, hang: false });
        }
        if let Some(lines) = prompt.strip_prefix(b"@ECHO-HANG@") {
            let lines = lines.to_vec();
            return Some(Self::Echo { lines, hang: true });
        }
        let count = prompt.strip_prefix(b"@active-input-smoke:")?;
        let count = std::str::from_utf8(count).ok()?.parse().ok()?;
        Some(Self::ActiveInput { count })
    }

    /// Plays the script to its end, if it has one. `messages`: standard input holds messages.
    pub(crate) fn play(self, messages: bool) -> io::Result<ExitCode> {
        match self {
            Self::Fail { stderr } => {
                io::stderr().write_all(&stderr)?;
                return Ok(ExitCode::FAILURE);
            }
            Self::OverLimit { newline } => over_limit(newline)?,
            Self::InvalidUtf8 => invalid_utf8()?,
            Self::RecordBoundaries => record_boundaries()?,
            Self::StuckTool { deaf, close_stdout } => stuck_tool(deaf, close_stdout)?,
            Self::OrphanPipe => orphan_pipe()?,
            Self::HangAfterResult {
                is_error,
                deaf,
                then,
            } => hang_after_result(is_error, deaf, then)?,
            Self::ExitAfterResult => {
                started("@exit-after-result")?.finish("exits soon")?;
                std::thread::sleep(BEAT);
            }
            Self::WriteEnv { path } => write_env(&path)?,
            Self::Echo { lines, hang } => {
                let mut stdout = stdout_unbuffered();
                stdout.write_all(&lines)?;
                if !lines.ends_with(b"\n") {
                    stdout.write_all(b"\n")?;
                }
                if hang {
                    hang_forever();
                }
            }
            Self::ActiveInput { count } => return active_input(count, messages),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Lines 1 to 3 of a run, printed.
fn started(prompt: &str) -> io::Result<Stream> {
    let mut stream = Stream::new()?;
    opening_lines(&mut stream, None);
    command_lines(&mut stream, prompt.as_bytes());
    stream.flush()?;
    Ok(stream)
}

impl Stream {
    /// Lines 4 and 5 of a good run, printed.
    fn finish(mut self, output: &str) -> io::Result<Self> {
        result_lines(&mut self, output, false);
        self.flush()?;
        Ok(self)
    }
}

fn over_limit(newline: bool) -> io::Result<()> {
    let stream = started("over the limit")?;
    let mut line = vec![b'x'; OVER_LIMIT];
    if newline {
        line.push(b'\n');
    }
    stdout_unbuffered().write_all(&line)?;
    if newline {
        stream.finish("after the long line")?;
    }
    Ok(())
}

fn invalid_utf8() -> io::Result<()> {
    let mut stream = started("@stdout-invalid-utf8")?;
    text_line(&mut stream, "bad: ?");
    result_lines(&mut stream, "bad: ? end", false);
    let mut bytes = stream.take_unprinted();
    for byte in &mut bytes {
        if *byte == b'?' {
            *byte = 0xff;
        }
    }
    stdout_unbuffered().write_all(&bytes)
}

fn record_boundaries() -> io::Result<()> {
    let mut stream = Stream::new()?;
    opening_lines(&mut stream, None);
    command_lines(&mut stream, b"@stdout-record-boundaries");
    result_lines(&mut stream, "boundaries \u{1f600} kept", false);
    let text = String::from_utf8_lossy(&stream.take_unprinted()).replace('\n', "\r\n\n");
    let mut stdout = stdout_unbuffered();
    for piece in text.trim_end().as_bytes().chunks(7) {
        stdout.write_all(piece)?;
    }
    Ok(())
}

fn stuck_tool(deaf: bool, close_stdout: bool) -> io::Result<()> {
    if deaf {
        ignore_sigterm();
    }
    let mut stream = Stream::new()?;
    opening_lines(&mut stream, None);
    web_fetch_line(&mut stream);
    stream.flush()?;
    if close_stdout {
        let null = fs::File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&null)?;
    }
    hang_forever()
}

fn orphan_pipe() -> io::Result<()> {
    let stream = started("@orphan-pipe")?;
    // Not waited for: outliving its parent with our standard output is the point.
    Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()?;
    stream.finish("an orphan holds the pipe")?;
    Ok(())
}

fn hang_after_result(is_error: bool, deaf: bool, then: ThenEvents) -> io::Result<()> {
    if deaf {
        ignore_sigterm();
    }
    let mut stream = started("hang after the result")?;
    result_lines(&mut stream, "done, but still here", is_error);
    stream.flush()?;
    let events = match then {
        ThenEvents::None => 0,
        ThenEvents::One => 1,
        ThenEvents::Periodic => usize::MAX,
    };
    for _ in 0..events {
        std::thread::sleep(BEAT);
        text_line(&mut stream, "still busy");
        stream.flush()?;
    }
    hang_forever()
}

fn write_env(path: &[u8]) -> io::Result<()> {
    let stream = started("@write-env-json")?;
    let environment: std::collections::BTreeMap<String, String> = std::env::vars_os()
        .map(|(name, value)| {
            let text = |s: &OsStr| s.to_string_lossy().into_owned();
            (text(&name), text(&value))
        })
        .collect();
    let json = serde_json::to_vec(&environment)?;
    fs::write(OsStr::from_bytes(path), json)?;
    stream.finish("environment written")?;
    Ok(())
}

fn active_input(count: usize, messages: bool) -> io::Result<ExitCode> {
    let mut stream = started("@active-input-smoke")?;
    for number in 1..=count {
        let text = match messages {
            true => messages::next()?,
            false => messages::next_line()?,
        };
        let Some(text) = text else {
            let missing = format!("input ended before line {number} of {count}");
            result_lines(&mut stream, &missing, true);
            stream.flush()?;
            return Ok(ExitCode::FAILURE);
        };
        if messages {
            read_line(&mut stream, &text);
        }
        text_line(&mut stream, &format!("input {number}: {text}"));
        stream.flush()?;
    }
    stream.finish(&format!("{count} inputs taken"))?;
    Ok(ExitCode::SUCCESS)
}

fn ignore_sigterm() {
    // SAFETY: setting a signal to be ignored installs no handler and touches no memory of ours.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
}

fn hang_forever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_prompts_are_no_scripts() {
        for prompt in [
            "",
            "echo @fail:x",
            "@",
            "@unknown",
            "@fail",
            "@active-input-smoke:x",
            "@hang-after-result-else",
        ] {
            assert_eq!(Script::parse(prompt.as_bytes()), None, "{prompt}");
        }
    }

    #[test]
    fn values_are_taken_as_they_are() {
        assert_eq!(
            Script::parse(b"@fail:no\xff"),
            Some(Script::Fail {
                stderr: b"no\xff\n".to_vec()
            })
        );
        assert_eq!(
            Script::parse(b"@ECHO-HANG@{}\n{}"),
            Some(Script::Echo {
                lines: b"{}\n{}".to_vec(),
                hang: true
            })
        );
        assert_eq!(
            Script::parse(b"@active-input-smoke:12"),
            Some(Script::ActiveInput { count: 12 })
        );
    }

    #[test]
    fn the_long_failure_is_not_utf8_and_long() {
        let Some(Script::Fail { stderr }) = Script::parse(b"@fail-invalid-utf8-long") else {
            panic!("no script");
        };
        assert!(stderr.len() > 60_000);
        assert!(std::str::from_utf8(&stderr).is_err());
    }
}
