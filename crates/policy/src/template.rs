//! Values of a rule's `headers` and `query`: text in which `${{ secrets.NAME }}` stands for a secret.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::secret::SecretName;

/// Longest value, bytes.
const MAX_VALUE: usize = 8192;

/// Why a template was refused. The text itself is not repeated: somebody may have written a secret into it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Too long.
    #[error("the value is longer than {MAX_VALUE} bytes")]
    TooLong,
    /// Control characters or Unicode.
    #[error("the value holds a character other than printable ASCII")]
    Character,
    /// `${{` without its end or with something else inside.
    #[error("the value holds a `${{{{` that is not `${{{{ secrets.NAME }}}}` with a secret's name")]
    Reference,
}

/// A value, parsed.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Template(Vec<Part>);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Part {
    Text(String),
    Secret(SecretName),
}

impl Template {
    /// The secrets it names.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        self.0.iter().filter_map(|part| match part {
            Part::Secret(name) => Some(name),
            Part::Text(_) => None,
        })
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        if text.len() > MAX_VALUE {
            return Err(TemplateError::TooLong);
        }
        if !text.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err(TemplateError::Character);
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${{") {
            let (inside, behind) = after.split_once("}}").ok_or(TemplateError::Reference)?;
            let name = inside
                .trim()
                .strip_prefix("secrets.")
                .and_then(|name| name.parse().ok())
                .ok_or(TemplateError::Reference)?;
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            parts.push(Part::Secret(name));
            rest = behind;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self(parts))
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Secret(name) => write!(f, "${{{{ secrets.{name} }}}}"),
        })
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Template").field(&self.to_string()).finish()
    }
}

impl Serialize for Template {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
