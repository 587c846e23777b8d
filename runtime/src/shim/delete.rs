//! `delete`: removes what is left of a container whose server is gone, or was never asked to make it.

use anyhow::Context as _;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;

use super::address::{Address, group};
use super::arguments::Arguments;
use super::server::state_root;
use crate::cli::delete_by_force;
use crate::host;
use crate::service::timestamp;
use crate::state::{Id, StateRoot};

/// Kills what runs of the container, and removes it; what containerd is told of that, serialised.
///
/// # Errors
/// When something of it cannot be removed.
pub fn delete(arguments: &Arguments) -> anyhow::Result<Vec<u8>> {
    let id: Id = arguments.id.parse()?;
    let root = StateRoot::open(state_root(&arguments.namespace))?;
    let pid = root.find(&id).map_or(0, |found| found.record.pid);
    delete_by_force(&root, &id)?;
    root.sweep()?;
    if let Some(bundle) = &arguments.bundle {
        let address = Address::of_bundle(bundle)
            .unwrap_or_else(|| Address::of(&arguments.address, &arguments.namespace, &group(bundle, &arguments.id)));
        if !address.answers() {
            address.remove().context("cannot remove the server's socket")?;
        }
    }
    let response = DeleteResponse {
        pid,
        exit_status: 128 + libc::SIGKILL.unsigned_abs(),
        exited_at: timestamp(host::now_ns()),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}
