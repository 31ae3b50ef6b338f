//! Virtio devices on PCI.

mod connection;
#[cfg(test)]
pub(super) mod driver;
mod queue;
pub(super) mod rng;
pub(super) mod transport;
pub(super) mod vsock;

pub use connection::{AGENT_PORT, HOST_CID, RECEIVE_BUFFER_BYTES, SEND_BUFFER_BYTES, VsockHost, VsockState};
