//! Builds what a katavm guest boots from: the kernel and the initramfs with the agent.
//!
//! [`image::build`] makes a folder with `vmlinux`, `bzImage`, `initramfs`, `config` and `kernel-release`; everything in
//! it comes out of a cache keyed by what it was built from. `docs/guest-image.md` has the reasons and the measurements.

pub mod config;
pub mod cpio;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod support;
