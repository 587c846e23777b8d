//! `katavm check`

use std::io::Write;
use std::path::Path;

use katavm_vmm::probe;

use super::arguments::{Check, Global};
use super::{FAILURE, state_root};
use crate::sandbox::image::GuestImage;
use crate::sandbox::probe::KVM;

/// Runs a guest program on this host's KVM and says what came of it; 0 if guests can run.
pub fn check(global: &Global, options: &Check) -> u8 {
    // It has nothing to do with the state, but each command sweeps up.
    if let Err(error) = state_root(global) {
        log::info!("{error:#}");
    }
    let say = |line: String| {
        if !options.quiet {
            // The exit code tells as well.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    };
    let code = match probe::check(Path::new(KVM)) {
        Ok(found) => {
            say(format!("{KVM}: runs guests (tried {})", found.executed.join(", ")));
            0
        }
        Err(error) => {
            say(format!("{KVM}: {error}"));
            FAILURE
        }
    };
    match GuestImage::find(None, None) {
        Ok(image) => say(format!("guest image: {} and {}", image.kernel.display(), image.initramfs.display())),
        Err(error) => say(format!("guest image: {error}")),
    }
    code
}
