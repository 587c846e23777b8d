//! Disks of one container: file systems and block devices of the host that the guest has by itself.
//!
//! Each is put into an empty place of the machine and found there by the agent, before the container is made; both let go
//! of it when the container's first process has ended. What the container wrote is on the disk then.

use std::sync::Arc;

use katavm_devices::block::{BlockConfig, BlockError};
use katavm_protocol::agent::{AttachDiskRequest, AttachDiskResponse, MountOverlayRequest};
use katavm_vmm::MicrovmError;
use serde_json::{Value, json};

use super::PodError;
use crate::host;
use crate::sandbox::agent::{Agent, AgentError};
use crate::sandbox::disk::{Disk, Part};
use crate::sandbox::vm::Machine;
use crate::sandbox::{Sandbox, blocking};

/// Places that layers of root file systems leave empty: a volume on a disk has no other way into the guest.
const FOR_VOLUMES: usize = 2;

/// Why a container does not get its disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("{part}: cannot open {path} for the guest: {error}")]
    Open {
        /// What of the container it is.
        part: Part,
        /// On the host.
        path: std::path::PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The machine does not take it.
    #[error("{part}: {error}")]
    Attach {
        /// What of the container it is.
        part: Part,
        /// Why not.
        error: MicrovmError,
    },
    /// The guest does not take it.
    #[error("{part}: the guest cannot use {path}: {error}")]
    Guest {
        /// What of the container it is.
        part: Part,
        /// On the host.
        path: std::path::PathBuf,
        /// What the agent said.
        error: AgentError,
    },
    /// The guest does not put layers together.
    #[error("the root file system: the guest cannot mount the overlay of its layers: {0}")]
    Overlay(AgentError),
    /// The configuration for the guest has no such mount.
    #[error("cannot write the guest's configuration: {0}")]
    Spec(#[from] serde_json::Error),
}

/// Disks that are attached.
#[derive(Default)]
pub struct Disks(Option<Attached>);

struct Attached {
    machine: Arc<dyn Machine>,
    agent: Agent,
    container_id: String,
    places: Vec<usize>,
    /// Some of them are layers of one root file system, which is mounted.
    is_overlaid: bool,
}

impl Disks {
    /// Attaches all of `disks` of a container, and mounts `overlay` of layers among them; its configuration with where they
    /// are. The upper layer is shared already.
    ///
    /// # Errors
    /// Which one cannot be; none is attached then.
    pub async fn attach(
        sandbox: &Sandbox,
        agent: &Agent,
        container_id: &str,
        disks: &[Disk],
        overlay: Option<MountOverlayRequest>,
        spec: Vec<u8>,
    ) -> Result<(Vec<u8>, Self), PodError> {
        if disks.is_empty() {
            return Ok((spec, Self(None)));
        }
        let mut json: Value = serde_json::from_slice(&spec).map_err(DiskError::from)?;
        let (machine, agent, container_id) = (sandbox.machine(), agent.clone(), container_id.to_owned());
        let places = Vec::new();
        let mut all = Self(Some(Attached { machine, agent, container_id, places, is_overlaid: false }));
        match all.add_all(disks, overlay, &mut json).await {
            Ok(()) => Ok((json.to_string().into(), all)),
            Err(error) => {
                all.detach().await;
                Err(error)
            }
        }
    }

    async fn add_all(
        &mut self,
        disks: &[Disk],
        overlay: Option<MountOverlayRequest>,
        spec: &mut Value,
    ) -> Result<(), PodError> {
        self.make_sure_of_places(disks)?;
        let mut layers = Vec::new();
        for disk in disks {
            let found = self.add(disk).await?;
            match disk.part {
                Part::Root => spec["root"]["path"] = json!(found.mounted),
                Part::Layer(_) => layers.push(found.mounted),
                Part::Mount(index) => describe(spec, index, disk, &found),
            }
        }
        let (Some(overlay), Some(attached)) = (overlay, &mut self.0) else { return Ok(()) };
        let mounted = attached.agent.mount_overlay(&MountOverlayRequest { layers, ..overlay }).await;
        attached.is_overlaid = true;
        spec["root"]["path"] = json!(mounted.map_err(DiskError::Overlay)?);
        Ok(())
    }

    /// Refuses layers for which there are not enough places, before some of them are attached.
    fn make_sure_of_places(&self, disks: &[Disk]) -> Result<(), DiskError> {
        let layers = disks.iter().filter(|disk| matches!(disk.part, Part::Layer(_))).count();
        let empty = self.0.as_ref().map_or(0, |attached| attached.machine.empty_places());
        if layers > 0 && layers + FOR_VOLUMES > empty {
            return Err(DiskError::Attach { part: Part::Layer(layers - 1), error: MicrovmError::NoPlace });
        }
        Ok(())
    }

    async fn add(&mut self, disk: &Disk) -> Result<AttachDiskResponse, PodError> {
        let part = disk.part;
        let Some(Attached { machine, agent, places, .. }) = &mut self.0 else {
            return Err(DiskError::Attach { part, error: MicrovmError::NoPlace }.into());
        };
        let (path, read_only, machine) = (disk.path.clone(), disk.read_only, Arc::clone(machine));
        let opened = blocking(move || host::open_disk(&path, read_only)).await;
        let file = opened.map_err(|error| DiskError::Open { part, path: disk.path.clone(), error })?;
        let serial = match part {
            Part::Root => "root".to_owned(),
            Part::Layer(index) => format!("layer-{index}"),
            Part::Mount(index) => format!("mount-{index}"),
        };
        let config = BlockConfig::new(file, read_only, &serial);
        let attached = tokio::task::spawn_blocking(move || machine.attach_disk(config)).await;
        let attached = attached.unwrap_or_else(|error| Err(BlockError::from(std::io::Error::other(error)).into()));
        let place = attached.map_err(|error| DiskError::Attach { part, error })?;
        places.push(place);
        let place = number(place);
        let (type_, options) = disk.file_system.clone().unwrap_or_default();
        let found = agent.attach_disk(&AttachDiskRequest { place, type_, options, ..Default::default() }).await;
        found.map_err(|error| DiskError::Guest { part, path: disk.path.clone(), error }.into())
    }

    /// Has guest and machine let go of them.
    pub async fn detach(&mut self) {
        let Some(Attached { machine, agent, mut container_id, places, is_overlaid }) = self.0.take() else { return };
        if is_overlaid {
            if let Err(error) = agent.unmount_overlay(&container_id).await {
                log::debug!("the guest does not unmount the root file system of {container_id}: {error}");
            }
            // Its processes have been waited for.
            container_id.clear();
        }
        for place in places {
            if let Err(error) = agent.detach_disk(number(place), &container_id).await {
                // The guest may be gone; if it is not, it gets errors from here on.
                log::debug!("the guest does not let go of the disk at place {place}: {error}");
            }
            let machine = Arc::clone(&machine);
            let _ = tokio::task::spawn_blocking(move || machine.detach_disk(place)).await;
        }
    }
}

fn number(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

/// Writes down where the file system or the block device of mount `index` is in the guest, and for a block device the right to
/// use it.
fn describe(spec: &mut Value, index: usize, disk: &Disk, found: &AttachDiskResponse) {
    let mount = &mut spec["mounts"][index];
    if disk.file_system.is_some() {
        mount["source"] = json!(found.mounted);
    } else {
        mount["source"] = json!(found.device);
        let access = if disk.read_only { "r" } else { "rw" };
        let rule = json!({ "allow": true, "type": "b", "major": found.major, "minor": found.minor, "access": access });
        match &mut spec["linux"]["resources"]["devices"] {
            Value::Array(rules) => rules.push(rule),
            none => *none = json!([rule]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_has_takes_the_place_of_the_hosts() {
        let disk = |mount, is_node: bool| {
            let file_system = (!is_node).then(|| ("ext4".to_owned(), Vec::new()));
            Disk { part: Part::Mount(mount), path: "/dev/sdz".into(), read_only: false, file_system }
        };
        let mounted = "/run/katavm/disks/7".to_owned();
        let found =
            AttachDiskResponse { device: "/dev/vdb".into(), major: 254, minor: 16, mounted, ..Default::default() };
        let mut spec = json!({ "mounts": [{ "source": "/x" }, { "source": "/dev/sdz" }], "linux": {} });
        describe(&mut spec, 1, &disk(1, false), &found);
        assert_eq!(spec["mounts"], json!([{ "source": "/x" }, { "source": "/run/katavm/disks/7" }]));
        describe(&mut spec, 0, &disk(0, true), &found);
        assert_eq!(spec["mounts"][0]["source"], "/dev/vdb");
        let rule = json!({ "allow": true, "type": "b", "major": 254, "minor": 16, "access": "rw" });
        assert_eq!(spec["linux"]["resources"]["devices"], json!([rule]));
        describe(&mut spec, 0, &disk(0, true), &found);
        assert_eq!(spec["linux"]["resources"]["devices"], json!([rule, rule]));
    }
}
