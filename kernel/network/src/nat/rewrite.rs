//! Replacing a packet's ends, its checksums along with them.

use core::net::Ipv4Addr;

use smoltcp::wire::Ipv4Packet;

use crate::checksum::Change;
use crate::ip::Header;
use crate::records::Protocol;
use crate::transport::{adjust, checksum_at};

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Replaces one end of an IPv4 packet by another address and port (an echo's identifier). `transport_checksum` is false where the
/// checksum is computed afterwards. A packet that is cut short is changed as far as it goes.
pub(crate) fn replace(
    packet: &mut [u8],
    header: &Header,
    protocol: Protocol,
    end: End,
    to: (Ipv4Addr, u16),
    transport_checksum: bool,
) {
    let Some((head, payload)) = packet.split_at_mut_checked(header.bytes) else { return };
    let mut ip = Ipv4Packet::new_unchecked(head);
    let old_address = match end {
        End::Source => header.source,
        End::Destination => header.destination,
    };
    match end {
        End::Source => ip.set_src_addr(to.0),
        End::Destination => ip.set_dst_addr(to.0),
    }
    ip.fill_checksum();
    let at = match (protocol, end) {
        (Protocol::Icmp, _) => 4,
        (_, End::Source) => 0,
        (_, End::Destination) => 2,
    };
    let Some(port) = payload.get_mut(at..).and_then(|port| port.first_chunk_mut::<2>()) else { return };
    let old_port = u16::from_be_bytes(*port);
    *port = to.1.to_be_bytes();
    if !transport_checksum {
        return;
    }
    let mut change = Change::default().word(old_port, to.1);
    if protocol != Protocol::Icmp {
        change = change.address(old_address, to.0);
    }
    let field = checksum_at(protocol);
    if protocol == Protocol::Udp {
        // Zero says that there is none, so a sum of zero is written as its other form.
        if payload.get(field..field + 2).is_none_or(|sum| *sum == [0, 0]) {
            return;
        }
        adjust(payload, field, change);
        if let Some(sum) = payload.get_mut(field..field + 2).filter(|sum| **sum == [0, 0]) {
            sum.fill(0xff);
        }
        return;
    }
    adjust(payload, field, change);
}

/// One hop less for a packet to go.
pub(crate) fn count_hop(packet: &mut [u8], header: &Header) {
    if let Some(head) = packet.get_mut(..header.bytes) {
        let mut ip = Ipv4Packet::new_unchecked(head);
        ip.set_hop_limit(header.ttl.saturating_sub(1));
        ip.fill_checksum();
    }
}

/// Replaces an address in an IPv4 header alone, for packets whose payload does not depend on it.
pub(crate) fn replace_address(packet: &mut [u8], header: &Header, end: End, to: Ipv4Addr) {
    if let Some(head) = packet.get_mut(..header.bytes) {
        let mut ip = Ipv4Packet::new_unchecked(head);
        match end {
            End::Source => ip.set_src_addr(to),
            End::Destination => ip.set_dst_addr(to),
        }
        ip.fill_checksum();
    }
}
