//! Root file systems of layers: an overlay of disks, with an upper layer that the host shares.

use std::sync::{Mutex, PoisonError};

use katavm_protocol::agent::{MountOverlayRequest, MountOverlayResponse};

use crate::error::Error;
use crate::file_system;

/// Held while one is mounted or unmounted: a request that the host has given up goes on.
static CHANGING: Mutex<()> = Mutex::new(());
/// Where they are mounted, each in a directory by the name of its container.
const MOUNTED: &str = "/run/katavm/overlays";

/// Mounts one.
///
/// # Errors
/// That the kernel does not.
pub fn attach(request: &MountOverlayRequest) -> Result<MountOverlayResponse, Error> {
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let mounted = format!("{MOUNTED}/{}", request.container_id);
    file_system::mount_at(&mounted, "overlay", "overlay", &options(request))?;
    Ok(MountOverlayResponse { mounted, ..Default::default() })
}

/// Unmounts that of a container, if it has one. What was written is in its upper layer then, unless some process has it still.
pub fn detach(container_id: &str) {
    let _changing = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    file_system::unmount(&format!("{MOUNTED}/{container_id}"));
}

fn options(request: &MountOverlayRequest) -> Vec<String> {
    let MountOverlayRequest { layers, upper, work, options, .. } = request;
    let mut all = options.clone();
    all.push(format!("lowerdir={}", layers.join(":")));
    if !upper.is_empty() {
        all.extend([format!("upperdir={upper}"), format!("workdir={work}")]);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_options() {
        let text = |all: [&str; 2]| all.map(String::from).to_vec();
        let mut request = MountOverlayRequest {
            layers: text(["/disks/1", "/disks/0"]),
            upper: "/shared/fs".into(),
            work: "/shared/work".into(),
            options: vec!["index=off".into()],
            ..Default::default()
        };
        let lower = "lowerdir=/disks/1:/disks/0";
        assert_eq!(options(&request), ["index=off", lower, "upperdir=/shared/fs", "workdir=/shared/work"]);
        request.upper.clear();
        assert_eq!(options(&request), ["index=off", lower]);
    }
}
