//! Network address and port translation: RFC 4787 (UDP), RFC 5382 (TCP), RFC 5508 (ICMP).
//!
//! A mapping belongs to one pair of ends and takes packets from that other end alone, in the RFCs' words address- and port-dependent. No
//! machine is meant to be reached from outside, and a port of its own for each connection makes the way back a single look-up.

mod flows;
mod ports;
pub(crate) mod rewrite;

pub(crate) use flows::{FlowKey, Flows};
pub use ports::PORTS;
pub(crate) use ports::{Owner, Ports};
