//! Whether this host's KVM runs guests: found out by running one, once per boot of the host.

use std::fs;
use std::path::{Path, PathBuf};

use katavm_vmm::probe::{self, ProbeError};

use crate::state::StateRoot;

/// The KVM device.
pub const KVM: &str = "/dev/kvm";

/// Runs the probe, unless it has succeeded since the host was booted. Failures are never remembered.
///
/// # Errors
/// Why no guest can run.
pub fn ensure(root: &StateRoot) -> Result<(), ProbeError> {
    let memory = Memory::of(root);
    if memory.says_good() {
        return Ok(());
    }
    probe::check(Path::new(KVM))?;
    memory.remember();
    Ok(())
}

/// The name of the boot in which the probe succeeded. A file beside the sandboxes' directories, with a name that is
/// no id.
struct Memory {
    path: PathBuf,
    boot: Option<String>,
}

impl Memory {
    fn of(root: &StateRoot) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        Self { path: root.path().join(".kvm-works"), boot }
    }

    fn says_good(&self) -> bool {
        self.boot.is_some() && fs::read_to_string(&self.path).ok() == self.boot
    }

    fn remember(&self) {
        // Without it, the next command probes again.
        let _ = self.boot.as_ref().map(|boot| fs::write(&self.path, boot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_boots_success_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let root = StateRoot::open(dir.path().join("root")).unwrap();
        let memory = Memory::of(&root);
        assert!(!memory.says_good());
        memory.remember();
        assert!(Memory::of(&root).says_good());
        fs::write(&memory.path, "another boot").unwrap();
        assert!(!Memory::of(&root).says_good());
        assert_eq!(root.sweep().unwrap(), []);
    }
}
