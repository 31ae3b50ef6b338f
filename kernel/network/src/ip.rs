//! IPv4 headers: RFC 791.

use core::net::Ipv4Addr;

use smoltcp::wire::{IpProtocol, Ipv4Packet};

use crate::checksum;

/// What an IPv4 header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Its own bytes, options included.
    pub(crate) bytes: usize,
    /// Bytes of the packet.
    pub(crate) total: usize,
    pub(crate) protocol: IpProtocol,
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) ttl: u8,
    pub(crate) dont_fragment: bool,
    /// Part of a larger packet.
    pub(crate) fragment: Option<Fragment>,
}

/// Where a fragment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) ident: u16,
    /// Bytes of payload before this one.
    pub(crate) offset: usize,
    /// More follow.
    pub(crate) more: bool,
}

impl Header {
    /// Reads a packet's header; what follows the packet's end is Ethernet's padding. None: no IPv4 packet, cut short, or with a
    /// wrong checksum.
    pub(crate) fn read(packet: &[u8]) -> Option<Self> {
        let header = Self::read_quoted(packet)?;
        let intact = header.bytes <= header.total
            && header.total <= packet.len()
            && checksum::sum(packet.get(..header.bytes)?) == 0xffff;
        intact.then_some(header)
    }

    /// Reads the header of a packet that may be cut short behind it, as errors quote them; its checksum is not looked at.
    pub(crate) fn read_quoted(packet: &[u8]) -> Option<Self> {
        let whole = packet.get(..20)?;
        let packet = Ipv4Packet::new_unchecked(packet);
        let bytes = usize::from(packet.header_len());
        if packet.version() != 4 || bytes < whole.len() || packet.as_ref().len() < bytes {
            return None;
        }
        let fragment = (packet.more_frags() || packet.frag_offset() != 0).then(|| Fragment {
            ident: packet.ident(),
            offset: usize::from(packet.frag_offset()),
            more: packet.more_frags(),
        });
        Some(Self {
            bytes,
            total: usize::from(packet.total_len()),
            protocol: packet.next_header(),
            source: packet.src_addr(),
            destination: packet.dst_addr(),
            ttl: packet.hop_limit(),
            dont_fragment: packet.dont_frag(),
            fragment,
        })
    }

    /// The packet's payload.
    pub(crate) fn payload<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        packet.get(self.bytes..self.total).unwrap_or(&[])
    }

    /// The packet's payload, to change.
    pub(crate) fn payload_mut<'a>(&self, packet: &'a mut [u8]) -> &'a mut [u8] {
        packet.get_mut(self.bytes..self.total).unwrap_or(&mut [])
    }
}
