//! The DNS proxy at a machine's gateway: RFC 1035, RFC 5452 (answers are only taken with the right id, port, server and question),
//! RFC 5625 (what a proxy passes on as it is).
//!
//! UDP alone: an answer that says it is cut short is passed on as it is, and a machine that tries TCP is refused.

mod message;
mod names;
mod queries;

pub(crate) use message::{Query, answered, error};
pub(crate) use names::Names;
pub(crate) use queries::{InFlight, Queries};

pub(crate) use smoltcp::wire::DnsRcode as Rcode;

/// The port of DNS.
pub(crate) const PORT: u16 = 53;
