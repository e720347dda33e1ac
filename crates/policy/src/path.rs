//! Paths of requests, compared so that two spellings of one path are one path.
//!
//! Servers differ in what they do with odd paths. Where their readings could differ, the path is
//! [`RequestPath::Ambiguous`]: it can make a rule deny, never allow. The request itself travels unchanged.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Longest path of a rule or pattern.
const MAX_PATH: usize = 2048;
/// Longest name of a placeholder in a pattern.
const MAX_PARAMETER: usize = 64;

/// Why a path was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("path {shown} is not valid: {rule}")]
pub struct PathError {
    shown: String,
    rule: &'static str,
}

fn refuse(text: &str, rule: &'static str) -> PathError {
    PathError {
        shown: crate::policy::shown(text),
        rule,
    }
}

/// A request's path after normalisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestPath {
    /// Its segments: none empty, `.` or `..`; a trailing slash makes no difference.
    Segments(Vec<String>),
    /// Two servers could read two paths in it.
    Ambiguous,
}

impl RequestPath {
    /// Reads the path of a request's target; a query is cut off.
    ///
    /// Percent-encoded characters that need no encoding in a segment are decoded, everything else is encoded with
    /// upper case digits; doubled slashes, `.` and `..` are resolved. Ambiguous is: no leading slash; an encoded slash,
    /// backslash or NUL, also encoded twice; a backslash, blank, control character or `#`; a `%` without two digits;
    /// bytes that are in no UTF-8 (old decoders make slashes of them); `..` after a doubled slash; `.` or `..` before
    /// a semicolon.
    pub fn parse(target: &str) -> Self {
        match normalise(target.split('?').next().unwrap_or_default()) {
            Some(segments) => Self::Segments(segments),
            None => Self::Ambiguous,
        }
    }
}

fn normalise(path: &str) -> Option<Vec<String>> {
    if path.is_empty() {
        return Some(Vec::new());
    }
    let mut segments: Vec<String> = Vec::new();
    let mut doubled = false;
    let mut pieces = path.strip_prefix('/')?.split('/').peekable();
    while let Some(piece) = pieces.next() {
        match normal_segment(piece)?.as_str() {
            "" => doubled |= pieces.peek().is_some(),
            "." => {}
            ".." if doubled => return None,
            ".." => drop(segments.pop()),
            odd if odd.starts_with(".;") || odd.starts_with("..;") => return None,
            segment => segments.push(segment.to_owned()),
        }
    }
    Some(segments)
}

/// One segment in its one spelling.
fn normal_segment(piece: &str) -> Option<String> {
    let mut normal = String::with_capacity(piece.len());
    let mut bytes = piece.as_bytes().iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'%' => {
                let decoded = hex_pair(*bytes.next()?, *bytes.next()?)?;
                match decoded {
                    b'/' | b'\\' | 0 | 0xc0 | 0xc1 | 0xf5.. => return None,
                    b'%' if encodes_again(bytes.as_slice()) => return None,
                    _ => push_normal(&mut normal, decoded),
                }
            }
            b'\\' | b'#' | 0..=b' ' | 0x7f => return None,
            _ => push_normal(&mut normal, byte),
        }
    }
    Some(normal)
}

/// What follows an encoded percent sign would, decoded once more, be a slash, backslash, NUL, dot or percent sign.
fn encodes_again(rest: &[u8]) -> bool {
    match rest {
        [high, low, ..] => matches!(hex_pair(*high, *low), Some(b'/' | b'\\' | 0 | b'.' | b'%')),
        _ => false,
    }
}

fn hex_pair(high: u8, low: u8) -> Option<u8> {
    let digit = |b: u8| {
        char::from(b)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    Some(digit(high)? << 4 | digit(low)?)
}

fn push_normal(text: &mut String, byte: u8) {
    use fmt::Write;
    // `pchar` of RFC 3986: what stands in a segment without being encoded.
    if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte) {
        text.push(char::from(byte));
    } else {
        // Writing to a string cannot fail.
        let _ = write!(text, "%{byte:02X}");
    }
}

/// The path prefix of a rule: whole segments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RulePath(Vec<String>);

impl RulePath {
    /// Whether it is no restriction.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The segments below it, if the path lies there.
    pub fn rest<'s>(&self, segments: &'s [String]) -> Option<&'s [String]> {
        segments.strip_prefix(self.0.as_slice())
    }
}

impl FromStr for RulePath {
    type Err = PathError;
    fn from_str(text: &str) -> Result<Self, PathError> {
        if text.len() > MAX_PATH {
            return Err(refuse(text, "it is longer than 2048 bytes"));
        }
        if text.contains(['?', '#']) {
            return Err(refuse(
                text,
                "rules look at paths only, not at queries and fragments",
            ));
        }
        if text.contains(['{', '}', '*']) {
            return Err(refuse(
                text,
                "only the paths of `allow` and `deny` take placeholders; `*` is written %2A",
            ));
        }
        normalise(text).map(Self).ok_or_else(|| refuse(text, RULE))
    }
}

const RULE: &str = "it begins with a slash and holds no encoded slash, backslash, blank or control character and no \
                    stray percent sign";

impl fmt::Display for RulePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A bare `*` would be refused when it is read again.
        self.0
            .iter()
            .try_for_each(|segment| write!(f, "/{}", segment.replace('*', "%2A")))
    }
}

impl Serialize for RulePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The path of an `allow` or `deny`, below its rule's: literal segments, `{x}` for one segment, last `{x+}` for one or
/// more and `{x*}` for none or more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PathPattern {
    segments: Vec<Segment>,
    tail: Option<Tail>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Segment {
    Literal(String),
    One(String),
}

/// What a pattern's last placeholder takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Tail {
    OneOrMore(String),
    NoneOrMore(String),
}

impl PathPattern {
    /// Whether it is `/{x*}`, which every path matches, also an ambiguous one.
    pub(crate) fn is_everything(&self) -> bool {
        self.segments.is_empty() && matches!(self.tail, Some(Tail::NoneOrMore(_)))
    }

    /// Whether the segments below the rule's path are as the pattern says.
    pub fn matches(&self, path: &[String]) -> bool {
        let Some((head, tail)) = path.split_at_checked(self.segments.len()) else {
            return false;
        };
        let head_matches = self
            .segments
            .iter()
            .zip(head)
            .all(|(segment, text)| match segment {
                Segment::Literal(literal) => literal == text,
                Segment::One(_) => true,
            });
        head_matches
            && match self.tail {
                None => tail.is_empty(),
                Some(Tail::OneOrMore(_)) => !tail.is_empty(),
                Some(Tail::NoneOrMore(_)) => true,
            }
    }
}

impl FromStr for PathPattern {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        if text.len() > MAX_PATH {
            return Err(refuse(text, "it is longer than 2048 bytes"));
        }
        let body = text
            .strip_prefix('/')
            .ok_or_else(|| refuse(text, "it begins with a slash"))?;
        let mut pattern = Self {
            segments: Vec::new(),
            tail: None,
        };
        let mut pieces = body.split('/').peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            if pattern.tail.is_some() && !(last && piece.is_empty()) {
                return Err(refuse(text, "`{x+}` and `{x*}` stand last"));
            }
            match piece
                .strip_prefix('{')
                .and_then(|inner| inner.strip_suffix('}'))
            {
                Some(inner) => pattern.push_parameter(text, inner)?,
                None if piece.is_empty() && last => {}
                None => pattern
                    .segments
                    .push(Segment::Literal(literal(text, piece)?)),
            }
        }
        Ok(pattern)
    }
}

impl PathPattern {
    fn push_parameter(&mut self, text: &str, inner: &str) -> Result<(), PathError> {
        let name = inner.strip_suffix(['+', '*']).unwrap_or(inner);
        let fits = (1..=MAX_PARAMETER).contains(&name.len())
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if !fits {
            return Err(refuse(
                text,
                "a placeholder is {name}, {name+} or {name*}, of letters, digits, `-` and `_`",
            ));
        }
        let name = name.to_owned();
        match inner.as_bytes().last() {
            Some(b'+') => self.tail = Some(Tail::OneOrMore(name)),
            Some(b'*') => self.tail = Some(Tail::NoneOrMore(name)),
            _ => self.segments.push(Segment::One(name)),
        }
        Ok(())
    }
}

fn literal(text: &str, piece: &str) -> Result<String, PathError> {
    if piece.contains(['{', '}']) {
        return Err(refuse(
            text,
            "a placeholder is a whole segment; a literal brace is written %7B or %7D",
        ));
    }
    if piece.contains('*') {
        return Err(refuse(
            text,
            "`*` is no wildcard here: write {x}, {x+} or {x*}, or %2A for a literal one",
        ));
    }
    if piece.contains('?') {
        return Err(refuse(text, "rules look at paths only, not at queries"));
    }
    match normal_segment(piece) {
        Some(normal)
            if !matches!(normal.as_str(), "" | "." | "..")
                && !normal.starts_with(".;")
                && !normal.starts_with("..;") =>
        {
            Ok(normal)
        }
        Some(_) => Err(refuse(
            text,
            "it has an empty segment, `.` or `..`, which no request's path has when compared",
        )),
        None => Err(refuse(text, RULE)),
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.segments.is_empty() && self.tail.is_none() {
            return f.write_str("/");
        }
        for segment in &self.segments {
            match segment {
                // Written back the way it is read: a bare `*` would be taken for a wildcard.
                Segment::Literal(literal) => write!(f, "/{}", literal.replace('*', "%2A"))?,
                Segment::One(name) => write!(f, "/{{{name}}}")?,
            }
        }
        match &self.tail {
            None => Ok(()),
            Some(Tail::OneOrMore(name)) => write!(f, "/{{{name}+}}"),
            Some(Tail::NoneOrMore(name)) => write!(f, "/{{{name}*}}"),
        }
    }
}

impl Serialize for PathPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
