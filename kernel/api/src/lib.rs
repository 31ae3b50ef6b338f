//! A node's API without its sockets: what the kernel, the agent in a guest and the command line share.
//!
//! Everything here is a plain state machine: bytes and the time go in, bytes and deadlines come out. Nothing blocks, nothing
//! reads a clock, and nothing knows of a network stack or a hypervisor, so all of it is tested on the host.
//!
//! [`types`] is what travels over HTTP, [`agent`] what travels over vsock between the node and the agent in a guest,
//! [`jobs`] what happens in between.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod agent;
mod bounded;
mod budget;
mod config;
pub mod egress;
pub mod error;
mod handlers;
pub mod http;
pub mod jobs;
mod json;
pub mod log;
pub mod multiplex;
mod node;
mod openapi;
mod router;
#[cfg(test)]
mod testing;
pub mod time;
pub mod types;

pub use config::{ApiConfig, Limits};
pub use node::Node;
pub use openapi::OPENAPI;
pub use time::Clock;

use budget::Budget;
use jobs::JobStore;

/// The API of one node: all that its connections share.
#[derive(Debug)]
pub struct Api {
    /// The node's jobs.
    pub jobs: JobStore,
    config: ApiConfig,
    bodies: Budget,
    answers: Budget,
}

impl Api {
    /// An API without jobs.
    #[must_use]
    pub fn new(config: ApiConfig) -> Self {
        Self {
            jobs: JobStore::new(config.limits),
            bodies: Budget::new(config.limits.bodies_total_bytes),
            answers: Budget::new(config.limits.answers_total_bytes),
            config,
        }
    }
}
