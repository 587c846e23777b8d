//! Changing limits of a running container, by libcgroups as at its making.

use std::path::PathBuf;

use libcgroups::common::{CgroupManager as _, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::LinuxResources;

use super::{Cgroup, ROOT, devices};
use crate::error::Error;

pub(super) fn apply(cgroup: &Cgroup, resources: &[u8]) -> Result<(), Error> {
    let resources: LinuxResources =
        serde_json::from_slice(resources).map_err(|error| Error::Invalid(format!("the resources: {error}")))?;
    let failed = |error: &dyn std::fmt::Display| Error::Internal(format!("cannot update the limits: {error}"));
    let manager = Manager::new(PathBuf::from(ROOT), cgroup.path_in_tree()).map_err(|error| failed(&error))?;
    let options =
        ControllerOpt { resources: &resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
    manager.apply(&options).map_err(|error| failed(&error))?;
    if let Some(rules) = resources.devices() {
        devices::apply(cgroup, rules).map_err(|error| Error::io("cannot apply the device rules", error))?;
    }
    Ok(())
}
