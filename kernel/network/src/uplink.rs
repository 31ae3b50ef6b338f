//! The uplink as the network needs it.

use alloc::vec::Vec;
use core::net::{Ipv4Addr, SocketAddrV4};

use crate::link;

/// The least that the MTU of an uplink is taken to be: what every host takes in one piece (RFC 791).
pub const LEAST_MTU: u16 = 576;
/// IPv4's and TCP's headers without options.
const TCP_HEADERS: usize = 40;

/// The node's address and what is beyond it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkConfig {
    /// The interface's Ethernet address.
    pub mac: [u8; 6],
    /// The node's address.
    pub address: Ipv4Addr,
    /// Bits of its link's prefix, 0..=32.
    pub prefix: u8,
    /// The way out of the link.
    pub gateway: Option<Ipv4Addr>,
    /// Who resolves names, in order of preference.
    pub dns_servers: Vec<SocketAddrV4>,
    /// Most bytes of an IP packet on its link; from [`LEAST_MTU`] to [`link::MTU`], whatever stands here.
    pub mtu: u16,
}

impl UplinkConfig {
    /// Most bytes of an IP packet on the uplink's link.
    pub(crate) fn mtu(&self) -> usize {
        usize::from(self.mtu.max(LEAST_MTU)).min(link::MTU)
    }

    /// The largest payload of a TCP segment without options that fits.
    pub(crate) fn largest_segment(&self) -> u16 {
        self.mtu().saturating_sub(TCP_HEADERS) as u16
    }

    /// Whether an address is of the uplink's link.
    pub(crate) fn is_on_link(&self, address: Ipv4Addr) -> bool {
        link::same_network(address, self.address, self.prefix)
    }

    /// Who on the link takes packets for an address.
    pub(crate) fn next_hop(&self, destination: Ipv4Addr) -> Option<Ipv4Addr> {
        if self.is_on_link(destination) { Some(destination) } else { self.gateway }
    }
}
