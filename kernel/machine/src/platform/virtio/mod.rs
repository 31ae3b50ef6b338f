//! Virtio devices on PCI.

pub(super) mod blk;
mod connection;
#[cfg(test)]
pub(super) mod driver;
pub(super) mod net;
mod queue;
pub(super) mod rng;
pub(super) mod transport;
pub(super) mod vsock;

pub use blk::{Disk, DiskConfig, Progress};
pub use connection::{AGENT_PORT, HOST_CID, RECEIVE_BUFFER_BYTES, SEND_BUFFER_BYTES, VsockHost, VsockState};
pub use net::{Accepts, Checksum, FRAME_BYTES_MAX, Gso, NetworkConfig, NetworkHost, Offload};
