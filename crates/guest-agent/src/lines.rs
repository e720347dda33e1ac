//! Cuts a byte stream into lines, with a bound on the memory any one line may take.

/// Longest line kept, in bytes. The CLI's result line repeats the output of a tool, so it must hold megabytes.
pub(crate) const MAX_LINE: usize = 32 * 1024 * 1024;

/// One line, or what is known of one that was too long.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// Without its newline (and carriage return).
    Whole(&'a [u8]),
    /// A line of this many bytes which was not kept.
    TooLong { bytes: u64 },
}

/// Collects bytes until a line is whole.
pub(crate) struct Lines {
    max: usize,
    partial: Vec<u8>,
    /// Bytes of the current line that were dropped because it is too long.
    dropped: u64,
}

impl Lines {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            partial: Vec::new(),
            dropped: 0,
        }
    }

    /// Takes the next bytes and hands every line that they complete to `emit`.
    pub(crate) fn push(&mut self, mut bytes: &[u8], mut emit: impl FnMut(Line<'_>)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            bytes = rest.get(1..).unwrap_or_default();
            if self.partial.is_empty() && self.dropped == 0 && line.len() <= self.max {
                // The common case: a whole line in one read is not copied.
                emit(Line::Whole(trim(line)));
            } else {
                self.keep(line);
                self.end(&mut emit);
            }
        }
        self.keep(bytes);
    }

    /// The stream is over: hands out a last line that has no newline.
    pub(crate) fn finish(&mut self, mut emit: impl FnMut(Line<'_>)) {
        if !self.partial.is_empty() || self.dropped > 0 {
            self.end(&mut emit);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.dropped == 0 && self.partial.len() + bytes.len() <= self.max {
            self.partial.extend_from_slice(bytes);
        } else {
            self.dropped += (self.partial.len() + bytes.len()) as u64;
            self.partial = Vec::new();
        }
    }

    fn end(&mut self, emit: &mut impl FnMut(Line<'_>)) {
        if self.dropped > 0 {
            emit(Line::TooLong {
                bytes: self.dropped,
            });
        } else {
            emit(Line::Whole(trim(&self.partial)));
        }
        self.dropped = 0;
        // A long line's memory is given back; a short one's is used again.
        if self.partial.capacity() > 1024 * 1024 {
            self.partial = Vec::new();
        } else {
            self.partial.clear();
        }
    }
}

fn trim(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(max: usize, pieces: &[&[u8]]) -> Vec<Result<Vec<u8>, u64>> {
        let mut out = Vec::new();
        let mut lines = Lines::new(max);
        let mut emit = |line: Line<'_>| {
            out.push(match line {
                Line::Whole(bytes) => Ok(bytes.to_vec()),
                Line::TooLong { bytes } => Err(bytes),
            });
        };
        for piece in pieces {
            lines.push(piece, &mut emit);
        }
        lines.finish(&mut emit);
        out
    }

    #[test]
    fn pieces_become_lines() {
        assert_eq!(
            cut(99, &[b"a", b"b\nc\r\n", b"\n", b"d"]),
            [
                Ok(b"ab".to_vec()),
                Ok(b"c".to_vec()),
                Ok(vec![]),
                Ok(b"d".to_vec())
            ]
        );
    }

    #[test]
    fn a_long_line_is_counted_and_the_next_is_whole() {
        assert_eq!(
            cut(4, &[b"1234\n123", b"456", b"\nabc\n12345"]),
            [Ok(b"1234".to_vec()), Err(6), Ok(b"abc".to_vec()), Err(5)]
        );
    }

    proptest! {
        #[test]
        fn cutting_the_stream_elsewhere_changes_nothing(
            stream in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), any::<u8>()], 0..200),
            cuts in proptest::collection::vec(0usize..200, 0..8),
            max in 1usize..20,
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(stream.len())).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut from = 0;
            for at in cuts.into_iter().chain([stream.len()]) {
                pieces.push(&stream[from..at]);
                from = at;
            }
            prop_assert_eq!(cut(max, &pieces), cut(max, &[&stream]));
        }
    }
}
