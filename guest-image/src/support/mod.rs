//! What every builder of artefacts needs: a cache keyed by inputs, commands with progress, Debian packages.

pub mod cache;
pub mod packages;
pub mod step;
