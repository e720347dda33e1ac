//! What a person's terminal is shown and does: escaping of what a guest printed, and raw mode for `exec -it`.

use std::io;
use std::os::fd::AsFd;

use guest_control::PtySize;
use rustix::termios::{OptionalActions, Termios};

/// Escapes everything in `text` that could steer a terminal or reorder what it shows: control characters other
/// than newline and tab, and Unicode's bidirectional and invisible formatting characters.
pub(crate) fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        push_escaped(&mut shown, c);
    }
    shown
}

fn push_escaped(shown: &mut String, c: char) {
    match c {
        '\n' | '\t' => shown.push(c),
        _ if c.is_control() || is_invisible_format(c) => shown.extend(c.escape_default()),
        _ => shown.push(c),
    }
}

/// Unicode "Cf" characters that change how others are shown without being seen themselves.
fn is_invisible_format(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Escapes a stream of bytes piece by piece: UTF-8 sequences may be split between pieces; invalid bytes are shown
/// as `\xNN`; a carriage return before a newline is dropped, as a terminal would.
#[derive(Debug, Default)]
pub(crate) struct Escaper {
    /// An incomplete UTF-8 sequence (at most 3 bytes) or a carriage return that waits for what follows.
    held: Vec<u8>,
}

impl Escaper {
    /// Escapes the next piece.
    pub(crate) fn push(&mut self, piece: &[u8]) -> String {
        let mut bytes = std::mem::take(&mut self.held);
        bytes.extend_from_slice(piece);
        let mut shown = String::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.push_text(&mut shown, text);
                    return shown;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    if !valid.is_empty() {
                        // Checked by the failed call up to exactly here.
                        self.push_text(&mut shown, &String::from_utf8_lossy(valid));
                        self.flush_return(&mut shown);
                    }
                    let Some(length) = error.error_len() else {
                        self.held = bad.to_vec();
                        return shown;
                    };
                    let (bad, after) = bad.split_at(length);
                    push_hex(&mut shown, bad);
                    rest = after;
                }
            }
        }
    }

    /// What is still held at the end of the stream.
    pub(crate) fn finish(&mut self) -> String {
        let mut shown = String::new();
        self.flush_return(&mut shown);
        push_hex(&mut shown, &std::mem::take(&mut self.held));
        shown
    }

    fn push_text(&mut self, shown: &mut String, text: &str) {
        let text = match text.strip_suffix('\r') {
            Some(text) => {
                self.held = vec![b'\r'];
                text
            }
            None => text,
        };
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == '\r' && chars.peek() == Some(&'\n') {
                continue;
            }
            push_escaped(shown, c);
        }
    }

    fn flush_return(&mut self, shown: &mut String) {
        if self.held == *b"\r" {
            self.held.clear();
            push_escaped(shown, '\r');
        }
    }
}

fn push_hex(shown: &mut String, bytes: &[u8]) {
    for byte in bytes {
        shown.push_str(&format!("\\x{byte:02x}"));
    }
}

/// Whether a descriptor is a terminal.
pub(crate) fn is_terminal(fd: impl AsFd) -> bool {
    rustix::termios::isatty(fd)
}

/// The size of the terminal behind a descriptor.
pub(crate) fn size(fd: impl AsFd) -> Option<PtySize> {
    let size = rustix::termios::tcgetwinsize(fd).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(PtySize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// The terminal on stdin in raw mode; dropping it restores what was before, on every path out, panics included.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches the terminal on stdin to raw mode.
    pub(crate) fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = rustix::termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Drain, not flush: what was typed while the command connected belongs to the guest.
        rustix::termios::tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing can be done when the terminal is gone.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(pieces: &[&[u8]]) -> String {
        let mut escaper = Escaper::default();
        let mut shown: String = pieces.iter().map(|piece| escaper.push(piece)).collect();
        shown.push_str(&escaper.finish());
        shown
    }

    #[test]
    fn nothing_that_steers_a_terminal_passes() {
        assert_eq!(escape("a\u{1b}[31mb\n\tc"), "a\\u{1b}[31mb\n\tc");
        assert_eq!(escape("\u{9b}31m"), "\\u{9b}31m");
        assert_eq!(escape("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(escape("\u{7f}\u{8}"), "\\u{7f}\\u{8}");
        assert_eq!(escape("émoji 🎉"), "émoji 🎉");
    }

    #[test]
    fn split_sequences_are_joined_and_invalid_bytes_shown() {
        assert_eq!(escaped(&[b"\xf0\x9f", b"\x8e\x89!"]), "🎉!");
        assert_eq!(escaped(&[b"a\xffb"]), "a\\xffb");
        assert_eq!(escaped(&[b"a\xc3"]), "a\\xc3");
        assert_eq!(escaped(&[b"x\r\ny", b"\r", b"\nz\rw\r"]), "x\ny\nz\\rw\\r");
        assert_eq!(escaped(&[b"\xc3", b"\xff"]), "\\xc3\\xff");
        assert_eq!(escaped(&[b"a\r\xff"]), "a\\r\\xff");
    }

    proptest::proptest! {
        #[test]
        fn however_it_is_cut_the_same_is_shown(
            bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
            cut in 0_usize..64,
        ) {
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let whole = escaped(&[&bytes]);
            assert_eq!(escaped(&[first, second]), whole);
            assert!(whole.chars().all(|c| !c.is_control() || c == '\n' || c == '\t'));
        }
    }
}
