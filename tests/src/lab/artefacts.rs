//! What a lab boots from: kernel, modules, root file system and a QEMU, all from Debian 13, built once.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use katavm_guest_image::support::cache::{self, Inputs};
use katavm_guest_image::support::{packages, step};

const SUITE: &str = "trixie";
const PACKAGES: &str = include_str!("../../lab/packages.txt");
const BUILD: &str = include_str!("../../lab/build.sh");
const MEND_QEMU: &str = include_str!("../../lab/mend-qemu.py");

/// Takes Debian's current kernel package, whose name has a version in it.
const FETCH_KERNEL: &str = r#"cd "$1/katavm-lab" && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" &&
    apt-get download "$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)""#;

/// Takes the containerd of the Debian releases before and after, with apt's state of its own beside the packages.
const FETCH_CONTAINERDS: &str = include_str!("../../lab/fetch-containerds.sh");

/// The built artefacts' folder.
#[derive(Debug, Clone)]
pub struct Artefacts(PathBuf);

impl Artefacts {
    /// Finds them in the cache, or builds them (about two minutes).
    ///
    /// # Errors
    /// When a prerequisite cannot be installed or a step of the build fails.
    pub fn build() -> Result<Self> {
        let inputs = Inputs::new("lab 1")
            .text("suite", SUITE)
            .text("packages", PACKAGES)
            .text("build", BUILD)
            .text("mend-qemu", MEND_QEMU)
            .text("kernel", FETCH_KERNEL)
            .text("containerds", FETCH_CONTAINERDS);
        cache::artefact("lab", inputs, build).map(Self)
    }

    /// The kernel, an ELF file.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.0.join("vmlinux")
    }

    /// The root file system, an EROFS image.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.0.join("root.erofs")
    }

    /// The modules that the initrd loads, sorted by name into their order.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.0.join("modules")
    }

    /// The C library and loader for the initrd.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.0.join("lib")
    }

    /// QEMU with its libraries and firmware: `bin`, `lib` and `share`.
    #[must_use]
    pub fn qemu(&self) -> PathBuf {
        self.0.join("qemu")
    }

    /// Why QEMU could not be mended (`tests/lab/mend-qemu.py`), if so: then guests fail from time to time.
    #[must_use]
    pub fn flaw(&self) -> Option<String> {
        let text = fs::read_to_string(self.qemu().join("flaw")).ok()?;
        Some(text.trim().to_owned())
    }
}

fn build(folder: &Path) -> Result<()> {
    packages::ensure(&["mmdebstrap", "debian-archive-keyring", "apt"])?;
    let mut uploads = Vec::new();
    for (name, text) in [("build.sh", BUILD), ("mend-qemu.py", MEND_QEMU)] {
        let file = folder.join(name);
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        uploads.push(format!("--customize-hook=upload '{}' /katavm-lab/{name}", file.display()));
    }
    let include: Vec<&str> = PACKAGES.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let mut command = step::command("mmdebstrap", ["--variant=minbase", "--format=null"]);
    for excluded in ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"] {
        command.arg(format!("--dpkgopt=path-exclude={excluded}"));
    }
    command
        .args(["--dpkgopt=force-unsafe-io", "--aptopt=Acquire::Languages \"none\""])
        .arg(format!("--include={}", include.join(",")))
        .arg("--customize-hook=mkdir \"$1/katavm-lab\"")
        .args(uploads)
        .arg(format!("--customize-hook={FETCH_KERNEL}"))
        .arg(format!("--customize-hook={FETCH_CONTAINERDS}"))
        .arg("--customize-hook=chroot \"$1\" sh /katavm-lab/build.sh")
        .arg(format!("--customize-hook=sync-out /katavm-lab '{}'", folder.display()))
        .args([SUITE, "/dev/null"]);
    let log = folder.with_extension("log");
    let _ = fs::remove_file(&log);
    step::run("building the lab's Debian machine (about 2 minutes)", &mut command, &log)
}
