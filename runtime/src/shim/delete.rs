//! `delete`: removes what is left of a container whose server is gone, or was never asked to make it.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message as _, MessageField};

use super::address::{Address, group};
use super::arguments::Arguments;
use super::server::state_root;
use crate::cli::delete_by_force;
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
        let address = Address::of(&arguments.address, &arguments.namespace, &group(bundle, &arguments.id));
        if !address.answers() {
            address.remove().context("cannot remove the server's socket")?;
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let response = DeleteResponse {
        pid,
        exit_status: 128 + libc::SIGKILL.unsigned_abs(),
        exited_at: MessageField::some(Timestamp {
            seconds: now.as_secs().cast_signed(),
            nanos: now.subsec_nanos().cast_signed(),
            ..Default::default()
        }),
        ..Default::default()
    };
    Ok(response.write_to_bytes()?)
}
