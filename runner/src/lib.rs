//! nestling's command as a library: starting a node in QEMU or Bochs ([`bed`]) and talking to a node ([`client`]).
//!
//! The command `nestling` is built on it, and so are the workspace's booting tests, demo and benchmarks.

pub mod artifacts;
pub mod bed;
pub mod client;
pub mod duration;
pub mod image;
pub mod kernel_image;
pub mod local;
pub mod random;
pub mod ready;
pub mod state;
pub mod workspace;
