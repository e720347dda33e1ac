//! The network log as a table for people.
//!
//! Every exchange is one line, which fits the terminal: what is longer is cut with `…`. A second line, indented, says the
//! whole rule, where the column had no room for one that denied, and what went wrong.

use std::fmt::Write;

use policy::Action;
use policy::log::{Event, Line};

use crate::terminal;

/// Width where there is no terminal.
const WIDTH: usize = 100;
/// Narrowest table that still says something.
const NARROWEST: usize = 80;
/// A line that is longer was not written by a runner: it is shown in pieces, so that memory stays bounded.
const LONGEST: usize = 1 << 20;
/// Width of the column of rules.
const RULE: usize = 12;
/// Width of all columns before the last, with the blanks between them.
const BEFORE: usize = 12 + 6 + 6 + 6 + 4 + 5 + 5 + 5 + RULE + 9;

/// Makes the table, piece by piece.
#[derive(Debug)]
pub(super) struct Table {
    /// The beginning of a line whose end is still to come.
    held: Vec<u8>,
    begun: bool,
    width: usize,
    colour: bool,
}

impl Table {
    /// A table for a terminal of so many columns; without one, neither coloured nor wider than most.
    pub(super) fn new(columns: Option<u16>) -> Self {
        Self {
            held: Vec::new(),
            begun: false,
            width: columns.map_or(WIDTH, |columns| usize::from(columns).max(NARROWEST)),
            colour: columns.is_some(),
        }
    }

    /// The rows that a piece of the log completes.
    pub(super) fn push(&mut self, piece: &[u8]) -> String {
        let mut rows = String::new();
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.held.extend_from_slice(part);
            if part.ends_with(b"\n") || self.held.len() > LONGEST {
                self.take(&mut rows);
            }
        }
        rows
    }

    /// What is left at the end: a line that its writer could not finish.
    pub(super) fn finish(&mut self) -> String {
        let mut rows = String::new();
        self.take(&mut rows);
        rows
    }

    fn take(&mut self, rows: &mut String) {
        let held = std::mem::take(&mut self.held);
        let text = held.strip_suffix(b"\n").unwrap_or(&held);
        if text.is_empty() {
            return;
        }
        if !self.begun {
            self.begun = true;
            rows.push_str(&header());
        }
        let line = std::str::from_utf8(text)
            .ok()
            .and_then(|text| Line::parse(text).ok());
        match line {
            Some(line) => rows.push_str(&self.row(&line)),
            // Whole, so that nothing is lost.
            None => {
                let mut escaper = terminal::Escaper::default();
                let shown = escaper.push(text) + &escaper.finish();
                let _ = writeln!(rows, "not understood: {}", one_line(&shown));
            }
        }
    }

    fn row(&self, line: &Line) -> String {
        let Line {
            timestamp,
            action,
            rule,
            host,
            port,
            error,
            event,
        } = line;
        let host = one_line(host);
        let place = match port {
            0 => host.clone(),
            port => format!("{host}:{port}"),
        };
        let none = || "-".to_owned();
        let (kind, method, code, took, sizes, what) = match event {
            Event::Http {
                method,
                url,
                status,
                latency_ms,
                request_size,
                response_size,
            } => (
                "http",
                one_line(method),
                status.map_or_else(none, |status| status.to_string()),
                took(*latency_ms),
                (size(*request_size), size(*response_size)),
                place_of(url, &host, *port),
            ),
            Event::Tcp {
                latency_ms,
                request_size,
                response_size,
            } => (
                "tcp",
                none(),
                none(),
                took(*latency_ms),
                (size(*request_size), size(*response_size)),
                place,
            ),
            Event::Dns {
                query,
                answers,
                latency_ms,
            } => {
                let answers = one_line(&answers.join(" "));
                let what = match answers.as_str() {
                    "" => host,
                    answers => format!("{host} → {answers}"),
                };
                let sizes = (none(), none());
                (
                    "dns",
                    one_line(query),
                    none(),
                    took(*latency_ms),
                    sizes,
                    what,
                )
            }
            Event::Packet { protocol, count } => {
                let what = match count {
                    0 | 1 => place,
                    count => format!("{place} ×{count}"),
                };
                let sizes = (none(), none());
                ("packet", one_line(protocol), none(), none(), sizes, what)
            }
        };
        let rule = one_line(rule.as_deref().unwrap_or("-"));
        let (action_text, colour) = match action {
            Action::Allow => ("ALLOW", ""),
            Action::Deny => ("DENY", "\x1b[31m"),
            Action::Audit => ("AUDIT", "\x1b[33m"),
        };
        let (on, off) = match colour {
            "" => ("", ""),
            _ if !self.colour => ("", ""),
            colour => (colour, "\x1b[0m"),
        };
        let moment = timestamp.to_string();
        // The day is in the JSON lines; no job takes that long.
        let moment = moment.get(11..23).unwrap_or(&moment);
        let (sent, got) = sizes;
        let mut row = format!(
            "{moment:12} {on}{action_text:6}{off} {kind:6} {} {code:>4} {took:>5} {sent:>5} {got:>5} {} {}\n",
            padded(&method, 6),
            padded(&rule, RULE),
            cut(&what, self.width.saturating_sub(BEFORE)),
        );
        // What the column had no room for, where somebody will want to know it.
        let long_rule = *action != Action::Allow && rule.chars().count() > RULE;
        let more = [long_rule.then_some(rule), error.as_deref().map(one_line)];
        let more: Vec<String> = more.into_iter().flatten().collect();
        if !more.is_empty() {
            let _ = writeln!(row, "{:13}{on}↳{off} {}", "", more.join(": "));
        }
        row
    }
}

fn header() -> String {
    format!(
        "{:12} {:6} {:6} {:6} {:>4} {:>5} {:>5} {:>5} {:RULE$} WHAT\n",
        "TIME (UTC)", "ACTION", "TYPE", "METHOD", "CODE", "TOOK", "SENT", "GOT", "RULE"
    )
}

/// The URL without what goes without saying, but with the port where that is another than the scheme's.
fn place_of(url: &str, host: &str, port: u16) -> String {
    let url = one_line(url);
    match url.split_once("://") {
        Some(("https", rest)) if port == 443 => rest.to_owned(),
        Some(("http", _)) if port == 80 => url,
        Some((scheme, rest)) => match rest.strip_prefix(host) {
            Some(path) if path.is_empty() || path.starts_with(['/', '?']) => {
                format!("{scheme}://{host}:{port}{path}")
            }
            _ => url,
        },
        None => format!("{host}:{port} {url}"),
    }
}

/// Escaped for a terminal, and without line ends and tabs, which would break the table.
fn one_line(text: &str) -> String {
    terminal::escape(text)
        .replace('\n', "\\n")
        .replace('\t', "\\t")
}

/// Cut to so many characters, and filled up to them.
fn padded(text: &str, width: usize) -> String {
    let text = cut(text, width);
    format!("{text:width$}")
}

/// Cut to so many characters, with `…` for what is missing.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// A duration in at most five characters, for anything that lasts less than a day.
fn took(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..100_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        100_000..10_000_000 => format!("{}s", ms / 1000),
        _ => format!("{}h", ms / 3_600_000),
    }
}

/// Bytes in at most five characters, in powers of 1000.
fn size(bytes: u64) -> String {
    if bytes < 1000 {
        return bytes.to_string();
    }
    let (mut whole, mut tenths, mut unit) = (bytes, 0, "");
    for next in ["k", "M", "G", "T", "P", "E"] {
        if whole < 1000 {
            break;
        }
        (tenths, whole, unit) = (whole % 1000 / 100, whole / 1000, next);
    }
    if whole < 100 {
        format!("{whole}.{tenths}{unit}")
    } else {
        format!("{whole}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP: &str = r#"{"timestamp":"2026-01-31T12:00:00.123Z","type":"http","action":"ALLOW","rule":"github","host":"api.github.com","port":443,"method":"GET","url":"https://api.github.com/repos/a/b","status":200,"latency_ms":131,"request_size":0,"response_size":12345,"error":null}"#;
    const DENIED: &str = r#"{"timestamp":"2026-01-31T12:00:01.000Z","type":"http","action":"DENY","rule":"github/DELETE /{owner}","host":"api.github.com","port":80,"method":"DELETE","url":"http://api.github.com/a","status":403,"latency_ms":1500,"request_size":0,"response_size":1,"error":"no"}"#;
    const DNS: &str = r#"{"timestamp":"2026-01-31T12:00:02.000Z","type":"dns","action":"AUDIT","rule":"default","host":"a.example","port":53,"query":"AAAA","answers":["198.18.0.1","198.18.0.2"],"latency_ms":3,"error":null}"#;
    const PACKET: &str = r#"{"timestamp":"2026-01-31T12:00:03.000Z","type":"packet","action":"DENY","rule":"kernel:private","host":"10.0.0.1","port":22,"protocol":"tcp","count":7,"error":null}"#;
    const TCP: &str = r#"{"timestamp":"2026-01-31T12:00:04.000Z","type":"tcp","action":"ALLOW","rule":"git","host":"git.example.com","port":22,"latency_ms":123456,"request_size":999,"response_size":1500000000,"error":null}"#;

    fn table(text: &str) -> String {
        let mut table = Table::new(None);
        table.push(text.as_bytes()) + &table.finish()
    }

    #[test]
    fn every_type_has_its_row_and_columns_are_aligned() {
        let text = [HTTP, DENIED, DNS, PACKET, TCP].join("\n");
        assert_eq!(
            table(&text),
            "\
TIME (UTC)   ACTION TYPE   METHOD CODE  TOOK  SENT   GOT RULE         WHAT
12:00:00.123 ALLOW  http   GET     200 131ms     0 12.3k github       api.github.com/repos/a/b
12:00:01.000 DENY   http   DELETE  403  1.5s     0     1 github/DELE… http://api.github.com/a
             ↳ github/DELETE /{owner}: no
12:00:02.000 AUDIT  dns    AAAA      -   3ms     -     - default      a.example → 198.18.0.1 198.18…
12:00:03.000 DENY   packet tcp       -     -     -     - kernel:priv… 10.0.0.1:22 ×7
             ↳ kernel:private
12:00:04.000 ALLOW  tcp    -         -  123s   999  1.5G git          git.example.com:22
"
        );
    }

    #[test]
    fn no_row_is_wider_than_the_terminal_and_what_is_cut_says_so() {
        let long = HTTP.replace("/repos/a/b", &"/ä".repeat(200));
        for columns in [None, Some(80), Some(132)] {
            let mut table = Table::new(columns);
            let rows = table.push(format!("{long}\n").as_bytes());
            let row = rows.lines().nth(1).unwrap();
            let width = usize::from(columns.unwrap_or(100));
            assert_eq!(row.chars().count(), width, "{row}");
            assert!(row.ends_with('…'), "{row}");
        }
    }

    #[test]
    fn a_line_that_is_not_understood_is_shown_whole_and_escaped() {
        let rows = table("{\"type\":\"\u{1b}[31m\"}\n\u{202e}half");
        let mut rows = rows.lines().skip(1);
        assert_eq!(
            rows.next(),
            Some("not understood: {\"type\":\"\\u{1b}[31m\"}")
        );
        assert_eq!(rows.next(), Some("not understood: \\u{202e}half"));
        let mut table = Table::new(None);
        let rows = table.push(b"\xff\x1b\n");
        assert!(rows.ends_with("not understood: \\xff\\u{1b}\n"), "{rows}");
    }

    #[test]
    fn what_a_guest_chose_steers_no_terminal_and_breaks_no_row() {
        let hostile = HTTP
            .replace("\"GET\"", r#""G\u001b[2J\nT""#)
            .replace("/repos/a/b", r"/\u202ex\ty\nz");
        let rows = table(&hostile);
        assert_eq!(rows.lines().count(), 2, "{rows}");
        assert!(!rows.contains(['\u{1b}', '\u{202e}', '\t']), "{rows:?}");
        assert!(rows.contains(r"\u{202e}x\ty\nz"), "{rows}");
    }

    #[test]
    fn pieces_may_be_cut_anywhere() {
        let text = [HTTP, DENIED, DNS].join("\n");
        let whole = table(&text);
        let mut by_bytes = Table::new(None);
        let mut rows = String::new();
        for byte in text.as_bytes() {
            rows.push_str(&by_bytes.push(&[*byte]));
        }
        rows.push_str(&by_bytes.finish());
        assert_eq!(rows, whole);
    }

    #[test]
    fn colours_are_for_terminals_and_for_what_was_not_simply_allowed() {
        let mut table = Table::new(Some(100));
        let rows = table.push(format!("{HTTP}\n{DENIED}\n{DNS}\n").as_bytes());
        let coloured: Vec<bool> = rows.lines().map(|row| row.contains('\u{1b}')).collect();
        assert_eq!(coloured, [false, false, true, true, true]);
    }

    #[test]
    fn numbers_fit_their_columns() {
        for (bytes, shown) in [
            (0, "0"),
            (999, "999"),
            (1000, "1.0k"),
            (99_999, "99.9k"),
            (999_999, "999k"),
            (1_000_000, "1.0M"),
            (u64::MAX, "18.4E"),
        ] {
            assert_eq!(size(bytes), shown);
        }
        for (ms, shown) in [
            (999, "999ms"),
            (1000, "1.0s"),
            (99_999, "99.9s"),
            (100_000, "100s"),
            (86_400_000, "24h"),
        ] {
            assert_eq!(took(ms), shown);
        }
    }
}
