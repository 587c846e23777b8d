//! `katavm gc`

use std::io::Write;

use super::arguments::Global;
use crate::state::{StateRoot, default_root};

/// Removes what dead sandboxes have left behind, and names it.
///
/// # Errors
/// When the state root cannot be read.
pub fn gc(global: &Global) -> anyhow::Result<u8> {
    let root = StateRoot::open(global.root.clone().unwrap_or_else(default_root))?;
    for id in root.sweep()? {
        writeln!(std::io::stdout(), "{id}")?;
    }
    Ok(0)
}
