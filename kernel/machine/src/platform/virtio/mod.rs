//! Virtio devices on PCI.

mod connection;

pub use connection::{AGENT_PORT, HOST_CID, RECEIVE_BUFFER_BYTES, SEND_BUFFER_BYTES, VsockHost, VsockState};
