//! A node's API without its sockets: what the kernel, the agent in a guest and the command line share.
//!
//! Everything here is a plain state machine: bytes and the time go in, bytes and deadlines come out. Nothing blocks, nothing
//! reads a clock, and nothing knows of a network stack or a hypervisor, so all of it is tested on the host.
//!
//! [`types`] is what travels over HTTP, [`agent`] what travels over vsock between the node and the agent in a guest.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod agent;
pub mod types;
