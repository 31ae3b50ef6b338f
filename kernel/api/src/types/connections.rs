//! Whom a job's machine connected to.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// How many connections a job made, or tried to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    /// All of them.
    pub total: u64,
    /// Those that were refused.
    pub refused: u64,
}

/// `GET /v1/jobs/{id}/connections`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionList {
    /// Connections the job made or tried to make, those not kept included.
    pub total_count: u64,
    /// How many of them were refused.
    pub refused_count: u64,
    /// How many of them are not kept.
    pub omitted_count: u64,
    /// Those that are kept, first one first.
    pub connections: Vec<Connection>,
}

/// One connection of a job's machine to the outside, or an attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// When it was first seen, RFC 3339 in UTC.
    pub time: String,
    /// How it travels.
    pub protocol: Protocol,
    /// The name that the machine looked its address up by, if it did.
    pub name: Option<String>,
    /// The IPv4 address at the other end; none when a name was refused before it had one.
    pub address: Option<String>,
    /// The TCP or UDP port at the other end; none for ICMP.
    pub port: Option<u16>,
    /// Bytes of payload that the machine sent, so far.
    pub bytes_sent: u64,
    /// Bytes of payload that came for it, so far.
    pub bytes_received: u64,
    /// Whether it was let through.
    pub verdict: Verdict,
    /// Why it was refused, for a person to read.
    pub reason: Option<String>,
}

/// How a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP: packets between the same two ends.
    Udp,
    /// ICMP echo.
    Icmp,
    /// A name that was looked up and not let through.
    Dns,
}

impl Protocol {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Dns => "dns",
        }
    }
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was let through.
    Allowed,
    /// It was answered by a refusal.
    Refused,
}

impl Verdict {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
        }
    }
}
