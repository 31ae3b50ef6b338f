//! What tests of several modules share: frames, DNS messages, and the two ends that frames come to.

use alloc::vec;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{IpProtocol, TcpPacket, TcpSeqNumber};

use crate::frame::{self, ETHERNET, Offload, Output};
use crate::ip::Header;
use crate::network::MachineKey;
use crate::records::Protocol;
use crate::transport::{self, Transport};

/// Frames where they came to.
#[derive(Default)]
pub(crate) struct Ends {
    pub(crate) machines: Vec<(MachineKey, Vec<u8>, Offload)>,
    pub(crate) uplink: Vec<Vec<u8>>,
    pub(crate) small_only: bool,
    pub(crate) no_room: bool,
}

impl Output for Ends {
    fn to_machine(&mut self, key: MachineKey, frame: &[u8], offload: Offload) -> bool {
        if !self.no_room {
            self.machines.push((key, frame.to_vec(), offload));
        }
        !self.no_room
    }

    fn takes_large(&self, _: MachineKey) -> bool {
        !self.small_only
    }

    fn to_uplink(&mut self, frame: &[u8]) -> bool {
        if !self.no_room {
            self.uplink.push(frame.to_vec());
        }
        !self.no_room
    }
}

/// A TCP segment: its flags as letters.
#[derive(Clone, Copy)]
pub(crate) struct Segment<'a> {
    pub(crate) from: (Ipv4Addr, u16),
    pub(crate) to: (Ipv4Addr, u16),
    pub(crate) flags: &'a str,
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    pub(crate) options: &'a [u8],
    pub(crate) payload: &'a [u8],
}

impl Segment<'_> {
    /// The frame of it.
    pub(crate) fn frame(&self) -> Vec<u8> {
        let head = transport::TCP + self.options.len();
        let mut bytes = vec![0; transport::TCP];
        bytes.extend(self.options);
        bytes.extend(self.payload);
        let mut tcp = TcpPacket::new_unchecked(&mut bytes[..]);
        tcp.set_src_port(self.from.1);
        tcp.set_dst_port(self.to.1);
        tcp.set_seq_number(TcpSeqNumber(self.sequence as i32));
        tcp.set_ack_number(TcpSeqNumber(self.acknowledgement as i32));
        tcp.set_header_len(head as u8);
        tcp.set_syn(self.flags.contains('S'));
        tcp.set_ack(self.flags.contains('A'));
        tcp.set_fin(self.flags.contains('F'));
        tcp.set_rst(self.flags.contains('R'));
        tcp.set_psh(self.flags.contains('P'));
        transport::complete(self.from.0, self.to.0, Protocol::Tcp, &mut bytes);
        frame::to_machine(self.from.0, self.to.0, IpProtocol::Tcp, &bytes)
    }
}

/// The frame of a UDP datagram.
pub(crate) fn datagram(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    frame::to_machine(from.0, to.0, IpProtocol::Udp, &transport::udp(from.0, to.0, from.1, to.1, payload))
}

/// The frame of an ICMP message, its checksum put in.
pub(crate) fn icmp(from: Ipv4Addr, to: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    smoltcp::wire::Icmpv4Packet::new_unchecked(&mut message[..]).fill_checksum();
    frame::to_machine(from, to, IpProtocol::Icmp, &message)
}

/// A frame's headers and payload; all checksums in it must be right.
pub(crate) fn read(frame: &[u8]) -> (Header, Option<Transport>, Vec<u8>) {
    let packet = &frame[ETHERNET..];
    let header = Header::read(packet).expect("an IPv4 header with its checksum");
    let payload = header.payload(packet);
    let transport = Transport::read(header.protocol, payload);
    if header.fragment.is_none() {
        assert!(transport::is_intact(&header, payload), "a wrong checksum: {header:?} {transport:?}");
    }
    (header, transport, payload[transport.map_or(0, |transport| transport.header_bytes)..].to_vec())
}

/// DNS messages.
pub(crate) mod dns {
    use alloc::vec::Vec;

    fn name(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.push(0);
        bytes
    }

    /// A query of one question.
    pub(crate) fn query(id: u16, host: &str, kind: u16) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend(name(host));
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    fn record(host: &str, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut record = name(host);
        record.extend(kind.to_be_bytes());
        record.extend([0, 1, 0, 0, 0, 60]);
        record.extend((data.len() as u16).to_be_bytes());
        record.extend(data);
        record
    }

    /// An A record.
    pub(crate) fn address(host: &str, address: [u8; 4]) -> Vec<u8> {
        record(host, 1, &address)
    }

    /// A CNAME record.
    pub(crate) fn alias(host: &str, to: &str) -> Vec<u8> {
        record(host, 5, &name(to))
    }

    /// The answer to a query.
    pub(crate) fn answer(query: &[u8], records: &[Vec<u8>]) -> Vec<u8> {
        let mut message = query.to_vec();
        message[2] |= 0x80;
        message[7] = records.len() as u8;
        message.extend(records.concat());
        message
    }
}
