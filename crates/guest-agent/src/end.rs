//! How a run ended.

use std::fmt;

/// Most of a reason, in characters: it is one line of an answer.
const MAX_REASON: usize = 500;

/// The exit code, and why it is not 0 where that is known in a line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) code: u8,
    pub(crate) reason: Option<String>,
}

impl End {
    /// A failure and its reason.
    pub(crate) fn failed(code: u8, reason: impl fmt::Display) -> Self {
        Self {
            code,
            reason: last_line(&reason.to_string()),
        }
    }
}

/// The last line of a text that says something: that is where programs say what went wrong.
pub(crate) fn last_line(text: &str) -> Option<String> {
    let line = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())?;
    Some(line.chars().take(MAX_REASON).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_line_that_says_something() {
        assert_eq!(last_line("a\n b \n\n \n"), Some("b".to_owned()));
        assert_eq!(last_line(" \n"), None);
        let long = "\u{1f600}".repeat(MAX_REASON + 1);
        assert_eq!(
            last_line(&long).map(|line| line.chars().count()),
            Some(MAX_REASON)
        );
    }
}
