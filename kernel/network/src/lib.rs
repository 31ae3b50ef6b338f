//! The network that the machines of a node share: each sees a link of its own with a gateway on it, and the gateway alone.
//!
//! Everything here is a pure state machine: frames go in, frames come out, time is an argument. [`Network`] answers a
//! machine's ARP (`arp`), DHCP (`dhcp`) and DNS (`dns`), translates the rest to the uplink's address and back
//! (`nat`) as far as the job's [`Policy`] lets it, and tells of every connection (`records`). Every frame may come from
//! a hostile guest or a hostile network: nothing panics, whatever is kept is bounded, and one machine's share is not
//! another's.
//!
//! Headers are read and written with smoltcp's `wire`, which checks lengths first.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod arp;
mod checksum;
mod coalesce;
mod dhcp;
mod dns;
mod fragments;
mod frame;
mod icmp;
mod ip;
mod link;
mod machine;
mod nat;
mod neighbors;
mod network;
mod policy;
mod records;
mod segments;
#[cfg(test)]
mod testing;
mod transport;
mod uplink;

pub use frame::{Checksum, Gso, Offload, Output};
pub use link::{GATEWAY, GATEWAY_MAC, MACHINE, MACHINE_MAC, MTU, PREFIX};
pub use nat::PORTS;
pub use network::{Counters, MachineKey, Network};
pub use policy::{Policy, Refusal};
pub use records::{Protocol, Record};
pub use uplink::{LEAST_MTU, UplinkConfig};

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;
