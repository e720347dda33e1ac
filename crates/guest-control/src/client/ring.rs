//! The last mebibyte of a session's output, addressed by byte offset.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::types::Stream;

/// Bytes kept for readers that come late or are slow.
pub(crate) const RING: u64 = 1024 * 1024;
/// Longest piece handed to a reader at once.
const MAX_CHUNK: u64 = 64 * 1024;

/// A run of bytes from one stream.
#[derive(Debug)]
struct Segment {
    start: u64,
    stream: Stream,
}

/// Output by offset. Bytes are copied in and out, so a guest that sends single bytes pins no larger buffers.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    bytes: VecDeque<u8>,
    segments: VecDeque<Segment>,
    /// Offset after the newest byte.
    end: u64,
}

impl Ring {
    /// Offset of the oldest byte kept.
    pub(crate) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Offset after the newest byte.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Appends output and drops what is older than [`RING`] bytes, but nothing from `hold` on.
    pub(crate) fn push(&mut self, stream: Stream, data: &[u8], hold: Option<u64>) {
        if data.is_empty() {
            return;
        }
        if self
            .segments
            .back()
            .is_none_or(|last| last.stream != stream)
        {
            self.segments.push_back(Segment {
                start: self.end,
                stream,
            });
        }
        self.bytes.extend(data);
        self.end += data.len() as u64;
        self.trim(hold);
    }

    fn trim(&mut self, hold: Option<u64>) {
        let oldest = self.end.saturating_sub(RING);
        let oldest = hold.map_or(oldest, |hold| oldest.min(hold));
        let drop = usize::try_from(oldest.saturating_sub(self.start())).unwrap_or(usize::MAX);
        self.bytes.drain(..drop.min(self.bytes.len()));
        let start = self.start();
        // A segment is gone when the next one begins at or before the oldest byte.
        while self.segments.get(1).is_some_and(|next| next.start <= start) {
            self.segments.pop_front();
        }
    }

    /// A piece of one stream at `offset`, or at the oldest byte if that is later: where it starts, and the bytes.
    pub(crate) fn read(&self, offset: u64) -> Option<(Stream, u64, Bytes)> {
        let from = offset.max(self.start());
        if from >= self.end {
            return None;
        }
        let after = self
            .segments
            .partition_point(|segment| segment.start <= from);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        let until = self
            .segments
            .get(after)
            .map_or(self.end, |next| next.start)
            .min(from + MAX_CHUNK);
        let skip = usize::try_from(from - self.start()).ok()?;
        let length = usize::try_from(until - from).ok()?;
        let (front, back) = self.bytes.as_slices();
        let mut data = Vec::with_capacity(length);
        if let Some(front) = front.get(skip..) {
            data.extend(front.iter().take(length));
        }
        let back = back.get(skip.saturating_sub(front.len())..)?;
        data.extend(back.iter().take(length - data.len()));
        Some((segment.stream, from, Bytes::from(data)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keeps_the_newest_mebibyte() {
        let mut ring = Ring::default();
        for _ in 0..20 {
            ring.push(Stream::Stdout, &[b'x'; 100_000], None);
        }
        assert_eq!(ring.end(), 2_000_000);
        assert_eq!(ring.start(), 2_000_000 - RING);
        let (_, at, data) = ring.read(0).unwrap();
        assert_eq!(at, ring.start());
        assert_eq!(data.len() as u64, MAX_CHUNK);
    }

    #[test]
    fn holds_what_a_lossless_reader_has_not_seen() {
        let mut ring = Ring::default();
        for _ in 0..20 {
            ring.push(Stream::Stdout, &[b'x'; 100_000], Some(500_000));
        }
        assert_eq!(ring.start(), 500_000);
    }

    proptest! {
        /// Whatever is pushed, reading from any offset yields the pushed bytes with their streams.
        #[test]
        fn reads_back_what_was_pushed(
            pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..40),
            from in 0u64..800,
        ) {
            let mut ring = Ring::default();
            let mut model = Vec::new();
            for (err, data) in &pieces {
                let stream = if *err { Stream::Stderr } else { Stream::Stdout };
                ring.push(stream, data, None);
                model.extend(data.iter().map(|byte| (stream, *byte)));
            }
            let mut seen = Vec::new();
            let mut at = from.min(model.len() as u64);
            while let Some((stream, offset, data)) = ring.read(at) {
                prop_assert_eq!(offset, at);
                prop_assert!(!data.is_empty());
                at += data.len() as u64;
                seen.extend(data.iter().map(|byte| (stream, *byte)));
            }
            let skip = usize::try_from(from).unwrap().min(model.len());
            prop_assert_eq!(&seen[..], &model[skip..]);
        }
    }
}
