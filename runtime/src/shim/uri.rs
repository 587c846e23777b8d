//! Where a stream leads, by its name: `SCHEME://PATH?QUERY` as containerd writes it (RFC 3986).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// The scheme of a name that is nothing but a path.
pub const FIFO: &str = "fifo";

/// A name's parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uri {
    /// [`FIFO`] where the name is nothing but a path.
    pub scheme: String,
    /// The path.
    pub path: PathBuf,
    /// Keys and values, in their order.
    pub query: Vec<(OsString, OsString)>,
}

impl Uri {
    /// Takes a name apart.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let Some((scheme, rest)) = name.split_once("://") else {
            return Self { scheme: FIFO.into(), path: name.into(), query: Vec::new() };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let query = pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(k, v)| (decoded(k), decoded(v)));
        Self { scheme: scheme.into(), path: decoded(path).into(), query: query.collect() }
    }
}

/// Undoes percent-encoding. What is none stays as it is.
fn decoded(text: &str) -> OsString {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| *first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let plain = Uri::of("/run/containerd/fifo/1/c1-stdout");
        assert_eq!((plain.scheme.as_str(), plain.path), ("fifo", "/run/containerd/fifo/1/c1-stdout".into()));
        let logger = Uri::of("binary:///usr/bin/a%20logger?id=c%311&verbose&x=1=2%");
        assert_eq!((logger.scheme.as_str(), logger.path), ("binary", "/usr/bin/a logger".into()));
        let pairs = [("id", "c11"), ("verbose", ""), ("x", "1=2%")];
        assert_eq!(logger.query, pairs.map(|(key, value)| (key.into(), value.into())));
    }
}
