//! `katavm config`

use std::io::Write as _;

use super::arguments::Global;
use crate::settings::Settings;

/// Prints the configuration in effect, which can be read as one.
///
/// # Errors
/// What is wrong with it.
pub fn show(global: &Global) -> anyhow::Result<u8> {
    write!(std::io::stdout(), "{}", Settings::load(global.config.as_deref())?)?;
    Ok(0)
}
