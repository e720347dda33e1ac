//! The part of the real CLI's command line that a launch uses.

use std::ffi::{OsStr, OsString};

/// Flags that are followed by a value which is not the prompt.
const VALUE_FLAGS: &[&str] = &[
    "--add-dir",
    "--allowed-tools",
    "--allowedTools",
    "--append-system-prompt",
    "--disallowed-tools",
    "--disallowedTools",
    "--fallback-model",
    "--max-turns",
    "--mcp-config",
    "--model",
    "--permission-mode",
    "--session-id",
    "--settings",
    "--system-prompt",
    "--tools",
];

/// What `--output-format` and `--input-format` ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    /// The command's own output, nothing else.
    #[default]
    Text,
    /// Five JSON lines.
    StreamJson,
}

/// A parsed command line. Unknown flags are ignored, as the mock must survive new flags of the real CLI.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) output_format: Format,
    /// Standard input holds `stream-json` messages, the prompt first.
    pub(crate) messages: bool,
    /// The session to go on with.
    pub(crate) resume: Option<OsString>,
    /// First positional argument that is not empty.
    pub(crate) prompt: Option<OsString>,
}

impl Args {
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Self {
        let mut parsed = Self::default();
        let mut arguments = arguments.into_iter();
        let mut flags_over = false;
        while let Some(argument) = arguments.next() {
            let flag = match argument.to_str() {
                Some("--") if !flags_over => {
                    flags_over = true;
                    continue;
                }
                Some(text) if !flags_over && text.len() > 1 && text.starts_with('-') => text,
                _ => {
                    if parsed.prompt.is_none() && !argument.is_empty() {
                        parsed.prompt = Some(argument);
                    }
                    continue;
                }
            };
            if flag == "--output-format" {
                parsed.output_format = format_of(&arguments.next().unwrap_or_default());
            } else if let Some(value) = flag.strip_prefix("--output-format=") {
                parsed.output_format = format_of(OsStr::new(value));
            } else if flag == "--input-format" {
                parsed.messages = format_of(&arguments.next().unwrap_or_default()).is_json();
            } else if let Some(value) = flag.strip_prefix("--input-format=") {
                parsed.messages = format_of(OsStr::new(value)).is_json();
            } else if matches!(flag, "--resume" | "-r") {
                parsed.resume = arguments.next();
            } else if VALUE_FLAGS.contains(&flag) {
                arguments.next();
            }
        }
        parsed
    }
}

impl Format {
    fn is_json(self) -> bool {
        self == Self::StreamJson
    }
}

fn format_of(value: &OsStr) -> Format {
    if value == "stream-json" {
        Format::StreamJson
    } else {
        Format::Text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Args {
        Args::parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn the_real_launch_is_understood() {
        let args = parse(&[
            "--print",
            "--verbose",
            "--output-format",
            "stream-json",
            "--dangerously-skip-permissions",
            "--resume",
            "not-the-prompt",
            "--append-system-prompt",
            "nor this",
            "--settings",
            "{}",
            "--",
            "echo hi",
        ]);
        assert_eq!(args.output_format, Format::StreamJson);
        assert_eq!(args.prompt, Some("echo hi".into()));
        assert_eq!(args.resume, Some("not-the-prompt".into()));
    }

    #[test]
    fn flags_with_an_equals_sign_consume_nothing() {
        let args = parse(&["--output-format=stream-json", "--model=x", "prompt"]);
        assert_eq!(args.output_format, Format::StreamJson);
        assert_eq!(args.prompt, Some("prompt".into()));
    }

    #[test]
    fn the_first_argument_that_is_not_empty_is_the_prompt() {
        assert_eq!(parse(&["", "a", "b"]).prompt, Some("a".into()));
        assert_eq!(parse(&["--print", ""]).prompt, None);
        assert_eq!(parse(&["--", "--print"]).prompt, Some("--print".into()));
        assert_eq!(parse(&["-"]).prompt, Some("-".into()));
    }

    #[test]
    fn messages_are_taken_from_standard_input_when_asked_for() {
        assert!(parse(&["--input-format", "stream-json"]).messages);
        assert!(parse(&["--input-format=stream-json"]).messages);
        let args = parse(&["--input-format", "text", "prompt"]);
        assert_eq!((args.messages, args.prompt), (false, Some("prompt".into())));
    }

    #[test]
    fn text_is_the_default_format() {
        assert_eq!(parse(&["x"]).output_format, Format::Text);
        assert_eq!(parse(&["--output-format"]).prompt, None);
    }

    #[test]
    fn a_prompt_need_not_be_utf8() {
        use std::os::unix::ffi::OsStringExt as _;
        let raw = OsString::from_vec(vec![b'e', 0xff]);
        assert_eq!(Args::parse([raw.clone()]).prompt, Some(raw));
    }
}
