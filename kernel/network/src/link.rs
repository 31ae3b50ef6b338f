//! The link that every machine sees: the same addresses in each, since no machine sees another's.
//!
//! The addresses are of 192.0.0.0/29 (RFC 7335), set aside for hosts that speak IPv4 to a translator next to them: neither a
//! cloud's network, nor Docker's, nor a company's uses them.

use core::net::Ipv4Addr;

/// A machine's Ethernet address.
pub const MACHINE_MAC: [u8; 6] = [0x02, 0x6e, 0x65, 0x73, 0x74, 0x02];
/// The gateway's.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x6e, 0x65, 0x73, 0x74, 0x01];
/// A machine's address.
pub const MACHINE: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
/// The gateway's address: router, DHCP server, DNS server.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 1);
/// Bits of the link's prefix.
pub const PREFIX: u8 = 29;
/// Most bytes of an IP packet on the link.
pub const MTU: usize = 1500;

/// Whether an address is of the link.
pub(crate) fn contains(address: Ipv4Addr) -> bool {
    same_network(address, GATEWAY, PREFIX)
}

/// Whether two addresses agree in their first `prefix` bits.
pub(crate) fn same_network(a: Ipv4Addr, b: Ipv4Addr, prefix: u8) -> bool {
    (a.to_bits() ^ b.to_bits()) & netmask(prefix) == 0
}

/// The mask of a prefix of so many bits.
pub(crate) fn netmask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(prefix))).unwrap_or(0)
}
