//! `katavm create`

use std::path::Path;

use super::arguments::{Create, Global};
use super::{background, launch_options, state_root};
use crate::config::Bundle;
use crate::launch::Launch;

/// Makes a container whose process waits to be started.
///
/// # Errors
/// Why it was not made.
pub fn create(global: &Global, options: Create) -> anyhow::Result<u8> {
    let Create { id, front, machine } = options;
    let bundle = front.bundle.as_deref().unwrap_or(Path::new("."));
    let (root, bundle) = (state_root(global)?, Bundle::load(bundle)?);
    let launch = Launch::plan(&root, id, bundle, launch_options(global, machine, false)?)?;
    background::make(global, &launch, &front)?;
    Ok(0)
}
