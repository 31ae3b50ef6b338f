//! Frames: where they go, what a network card may be left to do for them, and how those that start here are built.

use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr};

use crate::link::{GATEWAY, GATEWAY_MAC, MACHINE, MACHINE_MAC};
use crate::network::MachineKey;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub(crate) const IPV4: usize = 20;
/// Hops that packets from here may make.
const TTL: u8 = 64;

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// It is complete; nobody looked at it.
    #[default]
    Complete,
    /// It is complete and was found right.
    Verified,
    /// It has to be completed: the sum of everything from `start` on belongs at `start + offset`, both from the frame's
    /// begin; the field holds the pseudo-header's sum.
    Partial {
        /// Where the sum begins, in bytes from the frame's begin.
        start: u16,
        /// Where it is put, in bytes from `start`.
        offset: u16,
    },
}

/// One large TCP segment that stands for several of `size` bytes of payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// Payload bytes of each segment but the last; not 0.
    pub size: u16,
    /// Bytes of Ethernet, IP and TCP headers.
    pub header_bytes: u16,
}

/// What a frame leaves to its receiver: the machine's virtio-net header, put plainly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The state of the transport checksum.
    pub checksum: Checksum,
    /// TCP over IPv4 to be cut; then the checksum is partial.
    pub gso: Option<Gso>,
}

/// Where frames go.
pub trait Output {
    /// A frame for a machine. False: no room, the frame is lost.
    fn to_machine(&mut self, key: MachineKey, frame: &[u8], offload: Offload) -> bool;

    /// Whether a machine takes large TCP frames ([`Offload::gso`]).
    fn takes_large(&self, key: MachineKey) -> bool;

    /// A frame for the uplink, complete, of 1514 bytes at most. False: no room, the frame is lost.
    fn to_uplink(&mut self, frame: &[u8]) -> bool;
}

/// Writes an Ethernet header.
pub(crate) fn set_ethernet(frame: &mut [u8], destination: [u8; 6], source: [u8; 6], kind: EthernetProtocol) {
    if let Ok(mut frame) = EthernetFrame::new_checked(frame) {
        frame.set_dst_addr(EthernetAddress(destination));
        frame.set_src_addr(EthernetAddress(source));
        frame.set_ethertype(kind);
    }
}

/// An IPv4 packet behind room for an Ethernet header.
pub(crate) fn packet(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: IpProtocol,
    payload: &[u8],
) -> Vec<u8> {
    let header = Ipv4Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: TTL,
    };
    let mut frame = alloc::vec![0; ETHERNET + IPV4];
    if let Some(packet) = frame.get_mut(ETHERNET..) {
        header.emit(&mut Ipv4Packet::new_unchecked(packet), &ChecksumCapabilities::default());
    }
    frame.extend_from_slice(payload);
    frame
}

/// A frame from the gateway to a machine with an IPv4 packet in it.
pub(crate) fn from_gateway(protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    to_machine(GATEWAY, MACHINE, protocol, payload)
}

/// The same from any address to any address.
pub(crate) fn to_machine(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: IpProtocol,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = packet(source, destination, protocol, payload);
    set_ethernet(&mut frame, MACHINE_MAC, GATEWAY_MAC, EthernetProtocol::Ipv4);
    frame
}
