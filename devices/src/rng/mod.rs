//! virtio-rng, the entropy device (virtio 1.3, 5.4).

mod device;
mod fill;

pub use device::{Rng, RngState};
