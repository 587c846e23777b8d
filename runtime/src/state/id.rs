//! Container ids: names that are safe as file names, by the rules of runc.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest id in bytes: it becomes a file name with something added.
const LONGEST: usize = 200;

/// The id of a container: letters, digits, `_`, `+`, `-` and `.`, the last not first: such names are the state root's own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Id(String);

/// Why a text is no id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing.
    #[error("container id cannot be empty")]
    Empty,
    /// A character that is not allowed.
    #[error("invalid container id {0:?}: only letters, digits, _, +, - and . are allowed, and . not first")]
    Invalid(String),
    /// Too long.
    #[error("a container id of {0} bytes is too long: {LONGEST} at most")]
    TooLong(usize),
}

impl Id {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// An id that nobody has: from the kernel's random numbers.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn random() -> std::io::Result<Self> {
        let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        let digits = uuid.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        Ok(Self(digits))
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        if text.is_empty() {
            return Err(IdError::Empty);
        }
        if text.starts_with('.') || !text.chars().all(allowed) {
            return Err(IdError::Invalid(text.to_owned()));
        }
        if text.len() > LONGEST {
            return Err(IdError::TooLong(text.len()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Id {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_those_of_runc() {
        for good in ["a", "web-1.2_x+y", "a...", "-x", "0"] {
            assert!(good.parse::<Id>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", ".lock", "a/b", "a b", "ü", "a\n", "../x"] {
            assert!(bad.parse::<Id>().is_err(), "{bad}");
        }
        assert_eq!("a".repeat(201).parse::<Id>(), Err(IdError::TooLong(201)));
    }

    #[test]
    fn random_ids_differ() {
        let id = Id::random().unwrap();
        assert_ne!(id, Id::random().unwrap());
        assert_eq!(id.as_str().parse::<Id>().unwrap(), id);
    }
}
