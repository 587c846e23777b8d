//! Builds what a katavm guest boots from: the kernel and the initramfs with the agent.

pub mod support;
