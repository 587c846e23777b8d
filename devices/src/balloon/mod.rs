//! virtio-balloon, the memory that a guest gives back to its host (virtio 1.3, 5.5).

mod device;
pub(crate) mod discard;

pub use device::{Balloon, BalloonState};
