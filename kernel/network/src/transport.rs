//! What the network has to know of TCP (RFC 9293), UDP (RFC 768) and ICMP echo (RFC 792), and the few packets of theirs that start
//! here.

use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, IpProtocol, TcpPacket, TcpSeqNumber, UdpPacket};

use crate::checksum;
use crate::ip::Header;
use crate::records::Protocol;

/// Bytes of a UDP header.
pub(crate) const UDP: usize = 8;
/// Bytes of a TCP header without options.
pub(crate) const TCP: usize = 20;
/// Bytes of an ICMP echo's header.
const ECHO: usize = 8;
/// Kinds of TCP options (RFC 9293, 3.2): end of the list, no operation, maximum segment size.
const OPTION_END: u8 = 0;
const OPTION_NONE: u8 = 1;
const OPTION_MSS: u8 = 2;

/// What a packet with ports, or an ICMP echo, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transport {
    pub(crate) protocol: Protocol,
    /// For ICMP the identifier.
    pub(crate) source_port: u16,
    /// For ICMP the identifier too.
    pub(crate) destination_port: u16,
    /// Bytes of its header.
    pub(crate) header_bytes: usize,
    /// Bytes after it.
    pub(crate) payload_bytes: usize,
    /// Of TCP alone.
    pub(crate) tcp: Tcp,
    /// An echo's request, not its reply.
    pub(crate) echo_request: bool,
}

/// What a TCP header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tcp {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
}

impl Transport {
    /// Reads the head of an IP packet's payload. None: another protocol, or not even a header.
    pub(crate) fn read(protocol: IpProtocol, payload: &[u8]) -> Option<Self> {
        let other = Self {
            protocol: Protocol::Udp,
            source_port: 0,
            destination_port: 0,
            header_bytes: UDP,
            payload_bytes: 0,
            tcp: Tcp::default(),
            echo_request: false,
        };
        match protocol {
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(payload).ok()?;
                let header_bytes = usize::from(tcp.header_len());
                Some(Self {
                    protocol: Protocol::Tcp,
                    source_port: tcp.src_port(),
                    destination_port: tcp.dst_port(),
                    header_bytes,
                    payload_bytes: payload.len().saturating_sub(header_bytes),
                    tcp: Tcp {
                        syn: tcp.syn(),
                        ack: tcp.ack(),
                        fin: tcp.fin(),
                        rst: tcp.rst(),
                        sequence: tcp.seq_number().0 as u32,
                        acknowledgement: tcp.ack_number().0 as u32,
                    },
                    ..other
                })
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(payload).ok()?;
                Some(Self {
                    source_port: udp.src_port(),
                    destination_port: udp.dst_port(),
                    payload_bytes: usize::from(udp.len()).saturating_sub(UDP),
                    ..other
                })
            }
            IpProtocol::Icmp => {
                let icmp = Icmpv4Packet::new_checked(payload).ok()?;
                let echo_request = match icmp.msg_type() {
                    Icmpv4Message::EchoRequest => true,
                    Icmpv4Message::EchoReply => false,
                    _ => return None,
                };
                Some(Self {
                    protocol: Protocol::Icmp,
                    source_port: icmp.echo_ident(),
                    destination_port: icmp.echo_ident(),
                    header_bytes: ECHO,
                    payload_bytes: payload.len().saturating_sub(ECHO),
                    echo_request,
                    ..other
                })
            }
            _ => None,
        }
    }

    /// Where its checksum stands, in bytes from its begin.
    pub(crate) fn checksum_at(&self) -> usize {
        checksum_at(self.protocol)
    }
}

/// Where a protocol's checksum stands, in bytes from its header's begin.
pub(crate) fn checksum_at(protocol: Protocol) -> usize {
    match protocol {
        Protocol::Tcp => 16,
        Protocol::Udp | Protocol::Dns => 6,
        Protocol::Icmp => 2,
    }
}

/// Whether the checksum of a packet's payload is right.
pub(crate) fn is_intact(header: &Header, payload: &[u8]) -> bool {
    let pseudo = match header.protocol {
        IpProtocol::Tcp => checksum::pseudo_header(header.source, header.destination, 6, payload.len()),
        IpProtocol::Udp if payload.get(6..8) == Some(&[0, 0]) => return true,
        IpProtocol::Udp => {
            // What the datagram covers may be less than the packet.
            let bytes =
                payload.get(4..6).and_then(|bytes| <[u8; 2]>::try_from(bytes).ok()).map(u16::from_be_bytes);
            let Some(datagram) = bytes.and_then(|bytes| payload.get(..usize::from(bytes))) else {
                return false;
            };
            let pseudo = checksum::pseudo_header(header.source, header.destination, 17, datagram.len());
            return checksum::add(&[pseudo, checksum::sum(datagram)]) == 0xffff;
        }
        _ => 0,
    };
    checksum::add(&[pseudo, checksum::sum(payload)]) == 0xffff
}

/// Writes the checksum of a TCP segment or UDP datagram.
pub(crate) fn complete(source: Ipv4Addr, destination: Ipv4Addr, protocol: Protocol, payload: &mut [u8]) {
    let (number, at) = (if protocol == Protocol::Tcp { 6 } else { 17 }, checksum_at(protocol));
    let Some(payload) = (if protocol == Protocol::Udp { datagram_mut(payload) } else { Some(payload) })
    else {
        return;
    };
    let Some(field) = payload.get_mut(at..at + 2) else { return };
    field.fill(0);
    let pseudo = checksum::pseudo_header(source, destination, number, payload.len());
    let sum = !checksum::add(&[pseudo, checksum::sum(payload)]);
    // UDP's zero says that there is no checksum.
    let sum = if sum == 0 && protocol == Protocol::Udp { 0xffff } else { sum };
    if let Some(field) = payload.get_mut(at..at + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

/// The bytes that a UDP header says are the datagram's; the packet may have more.
fn datagram_mut(payload: &mut [u8]) -> Option<&mut [u8]> {
    let bytes = u16::from_be_bytes(*payload.get(4..)?.first_chunk()?);
    payload.get_mut(..usize::from(bytes))
}

/// A UDP datagram, its checksum included.
pub(crate) fn udp(source: Ipv4Addr, destination: Ipv4Addr, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; UDP];
    datagram.extend_from_slice(payload);
    let bytes = u16::try_from(datagram.len()).unwrap_or(u16::MAX);
    let mut udp = UdpPacket::new_unchecked(datagram.as_mut_slice());
    udp.set_src_port(from);
    udp.set_dst_port(to);
    udp.set_len(bytes);
    complete(source, destination, Protocol::Udp, &mut datagram);
    datagram
}

/// A TCP segment that resets a connection, without payload.
pub(crate) fn reset(
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    sequence: u32,
    acknowledgement: Option<u32>,
) -> [u8; TCP] {
    let mut segment = [0; TCP];
    let mut tcp = TcpPacket::new_unchecked(&mut segment[..]);
    tcp.set_src_port(source.1);
    tcp.set_dst_port(destination.1);
    tcp.set_seq_number(TcpSeqNumber(sequence as i32));
    tcp.set_ack_number(TcpSeqNumber(acknowledgement.unwrap_or(0) as i32));
    tcp.set_header_len(TCP as u8);
    tcp.set_rst(true);
    tcp.set_ack(acknowledgement.is_some());
    complete(source.0, destination.0, Protocol::Tcp, &mut segment);
    segment
}

/// The sequence number and acknowledgement of the reset that answers a segment (RFC 9293, 3.10.7.1); none answers a reset.
pub(crate) fn reset_for(tcp: &Tcp, payload_bytes: usize) -> Option<(u32, Option<u32>)> {
    if tcp.rst {
        return None;
    }
    if tcp.ack {
        return Some((tcp.acknowledgement, None));
    }
    let length = (payload_bytes as u32).wrapping_add(u32::from(tcp.syn)).wrapping_add(u32::from(tcp.fin));
    Some((0, Some(tcp.sequence.wrapping_add(length))))
}

/// Lowers the maximum segment size that a SYN names to what fits (RFC 4459, 3.2). `segment` is the TCP segment; its checksum is kept
/// right.
pub(crate) fn clamp_mss(segment: &mut [u8], header_bytes: usize, most: u16) {
    let mut at = TCP;
    while at < header_bytes {
        let (kind, length) = match (segment.get(at), segment.get(at + 1)) {
            (Some(&OPTION_NONE), _) => {
                at += 1;
                continue;
            }
            (None | Some(&OPTION_END), _) | (_, None) => return,
            (Some(&kind), Some(&length)) => (kind, usize::from(length)),
        };
        if length < 2 || at + length > header_bytes {
            return;
        }
        if kind == OPTION_MSS && length == 4 {
            let Some(&[high, low]) = segment.get(at + 2..at + 4).and_then(|bytes| bytes.first_chunk()) else {
                return;
            };
            if u16::from_be_bytes([high, low]) <= most {
                return;
            }
            // The value may stand at an odd place; then its bytes are halves of two words.
            let words = (at + 2) & !1..(at + 5) & !1;
            let sum = |segment: &[u8]| segment.get(words.clone()).map(checksum::sum);
            let Some(before) = sum(segment) else { return };
            if let Some(place) = segment.get_mut(at + 2..at + 4) {
                place.copy_from_slice(&most.to_be_bytes());
            }
            let Some(after) = sum(segment) else { return };
            let change = checksum::Change::default().word(before, after);
            adjust(segment, 16, change);
            return;
        }
        at += length;
    }
}

/// Applies a change to the checksum that stands at `at`.
pub(crate) fn adjust(segment: &mut [u8], at: usize, change: checksum::Change) {
    if let Some(field) = segment.get_mut(at..at + 2).and_then(|field| field.first_chunk_mut::<2>()) {
        *field = change.applied(u16::from_be_bytes(*field)).to_be_bytes();
    }
}
