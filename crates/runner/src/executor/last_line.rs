//! What an agent said last.

/// Most of stderr's last line that goes into a result, bytes.
pub(super) const LAST_LINE: usize = 500;

/// The last line of stderr that says something: an agent that fails says there why.
#[derive(Debug, Default)]
pub(super) struct LastLine {
    complete: Vec<u8>,
    current: Vec<u8>,
}

impl LastLine {
    pub(super) fn push(&mut self, data: &[u8]) {
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            let room = LAST_LINE.saturating_sub(self.current.len());
            self.current.extend(piece.iter().take(room));
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.current);
                if !line.trim_ascii().is_empty() {
                    self.complete = line;
                }
            }
        }
    }

    pub(super) fn text(&self) -> String {
        let line = match self.current.trim_ascii() {
            b"" => self.complete.trim_ascii(),
            current => current,
        };
        String::from_utf8_lossy(line).into_owned()
    }
}
