//! Bringing a growing log to the API: each byte once, in order, whatever breaks in between.
//!
//! The API counts positions in the text that it has, and a log may hold bytes that are no text. So the text is made from
//! the bytes in one way only: the same bytes give the same text however they are cut into pieces, and a position that
//! the API names can be found again from the beginning of the text: where the log ended when the run was claimed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes that are read at once: as text they have at most three times as many, and 256 KiB are taken at once.
const PIECE: usize = 64 << 10;
/// What stands for bytes that are no text.
const REPLACEMENT: &str = "\u{fffd}";

/// How far a log has been brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tail {
    /// Where the text begins in the file.
    begin: u64,
    /// Bytes of the file that are done.
    offset: u64,
    /// Bytes of text that the API has.
    position: u64,
}

/// The next piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where its text begins.
    pub(super) start: u64,
    /// The text.
    pub(super) text: String,
    /// How far the log is brought with it.
    after: Tail,
}

impl Piece {
    /// Where its text ends.
    pub(super) fn end(&self) -> u64 {
        self.after.position
    }
}

impl Tail {
    /// Of a file whose first bytes are not part of the text.
    pub(super) fn behind(begin: u64) -> Self {
        Self {
            begin,
            offset: begin,
            position: 0,
        }
    }

    /// What comes next; nothing if there is nothing yet. `ended`: nothing will be added to the file any more, and a
    /// character that is cut off stays so.
    pub(super) fn next(&self, file: &File, ended: bool) -> io::Result<Option<Piece>> {
        let mut bytes = vec![0; PIECE];
        let mut length = 0;
        while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
            let at = self.offset.saturating_add(length as u64);
            match file.read_at(rest, at) {
                Ok(0) => break,
                Ok(count) => length = length.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(length);
        let (text, used) = text_of(&bytes, ended && length < PIECE);
        if used == 0 {
            return Ok(None);
        }
        let after = Tail {
            begin: self.begin,
            offset: self.offset.saturating_add(used as u64),
            position: self.position.saturating_add(text.len() as u64),
        };
        Ok(Some(Piece {
            start: self.position,
            text,
            after,
        }))
    }

    /// The API has the piece.
    pub(super) fn brought(&mut self, piece: &Piece) {
        *self = piece.after;
    }

    /// The API wants to go on at `position`: looks for it from the beginning.
    pub(super) fn go_to(&mut self, file: &File, position: u64) -> io::Result<()> {
        *self = Self::behind(self.begin);
        while self.position < position {
            let Some(piece) = self.next(file, true)? else {
                return Err(io::Error::other(
                    "the API has more of the log than there is",
                ));
            };
            if piece.after.position <= position {
                self.brought(&piece);
                continue;
            }
            // Within the piece: character by character, each with the bytes that it was made from.
            let wanted = usize::try_from(position.saturating_sub(self.position)).unwrap_or(0);
            let mut bytes = vec![0; PIECE];
            let count = file.read_at(&mut bytes, self.offset)?;
            bytes.truncate(count);
            let (mut offset, mut length) = (0_usize, 0_usize);
            while length < wanted {
                let rest = bytes.get(offset..).unwrap_or_default();
                let (text, used) = first_character(rest);
                if used == 0 {
                    break;
                }
                offset = offset.saturating_add(used);
                length = length.saturating_add(text);
            }
            if length != wanted {
                return Err(io::Error::other("the API's position is inside a character"));
            }
            self.offset = self.offset.saturating_add(offset as u64);
            self.position = position;
        }
        Ok(())
    }
}

/// The text of these bytes, and how many of them it was made from: a character that may still become whole is left.
fn text_of(bytes: &[u8], ended: bool) -> (String, usize) {
    let mut text = String::with_capacity(bytes.len());
    let mut used = 0_usize;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        used = used.saturating_add(chunk.valid().len());
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let at_end = used.saturating_add(invalid.len()) == bytes.len();
        let may_grow = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if at_end && may_grow && !ended {
            break;
        }
        text.push_str(REPLACEMENT);
        used = used.saturating_add(invalid.len());
    }
    (text, used)
}

/// Length of the first character's text, and of the bytes that it was made from.
fn first_character(bytes: &[u8]) -> (usize, usize) {
    let Some(chunk) = bytes.utf8_chunks().next() else {
        return (0, 0);
    };
    match chunk.valid().chars().next() {
        Some(character) => (character.len_utf8(), character.len_utf8()),
        None => (REPLACEMENT.len(), chunk.invalid().len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_character_in_two_halves_arrives_whole() {
        let euro = "€".as_bytes();
        let mut log = file(&[b"a", &euro[..2]].concat());
        let mut tail = Tail::default();
        let piece = tail.next(&log, false).unwrap().unwrap();
        assert_eq!((piece.start, piece.text.as_str()), (0, "a"));
        tail.brought(&piece);
        assert_eq!(tail.next(&log, false).unwrap(), None);
        log.write_all(&euro[2..]).unwrap();
        let piece = tail.next(&log, false).unwrap().unwrap();
        assert_eq!((piece.start, piece.text.as_str()), (1, "€"));
        tail.brought(&piece);
        assert_eq!(tail.next(&log, true).unwrap(), None);
    }

    #[test]
    fn half_a_character_at_the_end_is_not_lost() {
        let log = file(&[b'a', 0xe2, 0x82]);
        let piece = Tail::default().next(&log, true).unwrap().unwrap();
        assert_eq!(piece.text, "a\u{fffd}");
    }

    #[test]
    fn a_position_beyond_the_log_is_an_error() {
        let log = file(b"abc");
        assert!(Tail::default().go_to(&log, 4).is_err());
        let within = file("€".as_bytes());
        assert!(Tail::default().go_to(&within, 1).is_err());
    }

    proptest! {
        #[test]
        fn any_position_is_found_again(before in 0_usize..20, bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0_usize..300) {
            let log = file(&[&"€".as_bytes().repeat(before), bytes.as_slice()].concat());
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            let at = (0..=cut.min(whole.len())).rev().find(|at| whole.is_char_boundary(*at)).unwrap();
            let mut tail = Tail::behind(3 * before as u64);
            tail.go_to(&log, at as u64).unwrap();
            let mut rest = String::new();
            while let Some(piece) = tail.next(&log, true).unwrap() {
                prop_assert_eq!(piece.start, (at + rest.len()) as u64);
                rest.push_str(&piece.text);
                tail.brought(&piece);
            }
            prop_assert_eq!(rest.as_str(), &whole[at..]);
        }

        #[test]
        fn however_it_grows_the_text_is_the_same(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0_usize..200) {
            let cut = cut.min(bytes.len());
            let mut log = file(&bytes[..cut]);
            let mut tail = Tail::default();
            let mut text = String::new();
            for ended in [false, true] {
                while let Some(piece) = tail.next(&log, ended).unwrap() {
                    text.push_str(&piece.text);
                    tail.brought(&piece);
                }
                if !ended {
                    log.write_all(&bytes[cut..]).unwrap();
                }
            }
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
