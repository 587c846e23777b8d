//! Names from the guest: hostile until they went through here.

use std::ffi::CStr;

use rustix::io::Errno;

/// Longest name of a directory entry in bytes (`FUSE_NAME_MAX` is 1024, no Linux file system has more than 255).
pub const NAME_MAX: usize = 255;
/// Longest target of a symbolic link in bytes, with its NUL.
pub const PATH_MAX: usize = 4096;

/// Takes a NUL-terminated string off the front of `bytes`; gives it and what follows.
///
/// # Errors
/// EINVAL without a NUL.
pub fn split_string(bytes: &[u8]) -> Result<(&CStr, &[u8]), Errno> {
    let string = CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::INVAL)?;
    let rest = bytes.get(string.count_bytes() + 1..).unwrap_or_default();
    Ok((string, rest))
}

/// Checks that `name` is one component that stays in its directory.
///
/// # Errors
/// EINVAL for an empty name, one with a slash, "." and ".."; ENAMETOOLONG.
pub fn check(name: &CStr) -> Result<&CStr, Errno> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(name),
    }
}

/// One checked name that fills `bytes`, its NUL included.
///
/// # Errors
/// As [`check`]; EINVAL as well when anything follows the NUL.
pub fn only(bytes: &[u8]) -> Result<&CStr, Errno> {
    let (name, rest) = split_string(bytes)?;
    if rest.is_empty() { check(name) } else { Err(Errno::INVAL) }
}

/// Two checked names that fill `bytes`, their NULs included.
///
/// # Errors
/// As [`only`].
pub fn two(bytes: &[u8]) -> Result<(&CStr, &CStr), Errno> {
    let (first, rest) = split_string(bytes)?;
    Ok((check(first)?, only(rest)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_component_only() {
        for bad in ["", ".", "..", "/", "a/b", "../x", "/etc"] {
            assert_eq!(only(format!("{bad}\0").as_bytes()), Err(Errno::INVAL), "{bad:?}");
        }
        for good in ["a", "...", ".a", "a b", "\u{fc}", &"x".repeat(NAME_MAX)] {
            assert!(only(format!("{good}\0").as_bytes()).is_ok(), "{good:?}");
        }
        assert_eq!(only(format!("{}\0", "x".repeat(NAME_MAX + 1)).as_bytes()), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn terminators_count() {
        assert_eq!(only(b"no end"), Err(Errno::INVAL));
        assert_eq!(only(b"a\0b\0"), Err(Errno::INVAL));
        assert_eq!(two(b"a\0b"), Err(Errno::INVAL));
        assert_eq!(two(b"a\0b\0"), Ok((c"a", c"b")));
    }
}
