//! Parsers of values that several commands take.

use std::time::Duration;

/// A length of time: a number of seconds, or one with `s`, `m` or `h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.as_bytes().last() {
        Some(b's') => (text.strip_suffix('s'), 1),
        Some(b'm') => (text.strip_suffix('m'), 60),
        Some(b'h') => (text.strip_suffix('h'), 3600),
        _ => (Some(text), 1),
    };
    number
        .and_then(|number| number.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(unit))
        .filter(|secs| (1..=7 * 24 * 3600).contains(secs))
        .map(Duration::from_secs)
        .ok_or_else(|| "it is a number of seconds, or such as 90s, 5m, 2h; at most a week".into())
}

/// `NAME=VALUE`; the name has to be one a shell could set.
pub(crate) fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| "it is NAME=VALUE".to_owned())?;
    let fits = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        && !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if !fits {
        return Err(
            "the name is letters, digits and underscores and does not begin with a digit".into(),
        );
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in [
            "",
            "0",
            "-1",
            "1.5",
            "h",
            "999999999999h",
            "18446744073709551615h",
            "1d",
        ] {
            duration(bad).unwrap_err();
        }
    }

    #[test]
    fn variables() {
        assert_eq!(variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(variable("_a1="), Ok(("_a1".into(), String::new())));
        for bad in ["A", "=x", "1A=x", "A B=x", "A-B=x", ""] {
            variable(bad).unwrap_err();
        }
    }
}
