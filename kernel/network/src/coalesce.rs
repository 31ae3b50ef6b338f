//! Joining TCP segments for a machine that follow each other into one large frame: what Linux calls generic receive offload. The machine takes
//! one interrupt and one walk through its stack for up to 44 segments; it can always be undone, since only segments with equal
//! headers are joined.
//!
//! Of acknowledgements that say nothing else and come in one batch only the last goes on (RFC 3449, 5.2.1): a machine that sends gets
//! one for every two segments, and senders count the bytes acknowledged, not the acknowledgements (RFC 3465). One that repeats an
//! earlier one, or has selective acknowledgements, says that something was lost and always goes on.

use alloc::vec::Vec;

use smoltcp::wire::{Ipv4Packet, TcpPacket};

use crate::checksum;
use crate::frame::{Checksum, ETHERNET, Gso, IPV4, Offload, Output};
use crate::ip::Header;
use crate::network::MachineKey;
use crate::records::Protocol;
use crate::transport::{TCP, Transport, checksum_at};

/// Connections whose segments are joined at once.
const SLOTS: usize = 8;
/// The longest packet.
const MAX_PACKET: usize = 65_535;
/// Flags that segments within a train carry: ACK, and PSH at its end.
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
/// How the options of a segment begin that has time stamps and no others (RFC 7323, appendix A).
const TIME_STAMPS: [u8; 4] = [1, 1, 8, 10];
const TIME_STAMPS_BYTES: usize = 12;

#[derive(Debug)]
struct Train {
    key: MachineKey,
    frame: Vec<u8>,
    /// Bytes of Ethernet, IP and TCP headers.
    head: usize,
    /// Payload bytes of all segments but the last; 0 for an acknowledgement that waits for a later one.
    size: usize,
    segments: usize,
    /// The sequence number that comes next.
    next: u32,
    acknowledgement: u32,
}

/// Segments that wait for others to join.
#[derive(Debug, Default)]
pub(crate) struct Coalescer {
    trains: Vec<Train>,
    /// Buffers of trains that are gone.
    spare: Vec<Vec<u8>>,
}

impl Coalescer {
    /// Takes a frame for a machine whose checksums are right. `transport` none: nothing that could be joined.
    pub(crate) fn push(
        &mut self,
        key: MachineKey,
        frame: &[u8],
        header: &Header,
        transport: Option<&Transport>,
        out: &mut impl Output,
    ) -> bool {
        let Some(transport) = transport.filter(|transport| transport.protocol == Protocol::Tcp) else {
            return out.to_machine(key, frame, verified());
        };
        let head = ETHERNET + header.bytes + transport.header_bytes;
        let frame = frame.get(..ETHERNET + header.total).unwrap_or(frame);
        let same = |train: &Train| train.key == key && is_same_connection(&train.frame, frame);
        let waiting = self.trains.iter().position(same);
        let flags = frame.get(ETHERNET + header.bytes + 13).copied().unwrap_or(0);
        let can_join = header.bytes == IPV4 && flags & !PSH == ACK && transport.payload_bytes > 0;
        let acknowledges = header.bytes == IPV4 && flags == ACK && is_acknowledgement(frame);
        if let Some(at) = waiting {
            if let Some(train) =
                self.trains.get_mut(at).filter(|train| acknowledges && train.is_outdated(head, transport))
            {
                train.frame.clear();
                train.frame.extend_from_slice(frame);
                train.acknowledgement = transport.tcp.acknowledgement;
                return true;
            }
            if let Some(train) =
                self.trains.get_mut(at).filter(|train| can_join && train.fits(frame, head, transport))
            {
                train.frame.extend_from_slice(frame.get(head..).unwrap_or(&[]));
                train.segments += 1;
                train.next = train.next.wrapping_add(transport.payload_bytes as u32);
                let ends = flags & PSH != 0 || transport.payload_bytes < train.size;
                if ends {
                    if let Some(byte) = train.frame.get_mut(ETHERNET + IPV4 + 13) {
                        *byte |= flags & PSH;
                    }
                    return self.send(at, out);
                }
                return true;
            }
            self.send(at, out);
        }
        let is_worth_it = acknowledges || (can_join && flags & PSH == 0 && out.takes_large(key));
        if !is_worth_it {
            return out.to_machine(key, frame, verified());
        }
        if self.trains.len() >= SLOTS {
            self.send(0, out);
        }
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(frame);
        self.trains.push(Train {
            key,
            frame: buffer,
            head,
            size: transport.payload_bytes,
            segments: 1,
            next: transport.tcp.sequence.wrapping_add(transport.payload_bytes as u32),
            acknowledgement: transport.tcp.acknowledgement,
        });
        true
    }

    /// Sends all that waits.
    pub(crate) fn flush(&mut self, out: &mut impl Output) {
        while !self.trains.is_empty() {
            self.send(0, out);
        }
    }

    /// Forgets what waits for a machine.
    pub(crate) fn forget(&mut self, key: MachineKey) {
        self.trains.retain(|train| train.key != key);
    }

    fn send(&mut self, at: usize, out: &mut impl Output) -> bool {
        let mut train = self.trains.remove(at);
        let offload = train.finish();
        let sent = out.to_machine(train.key, &train.frame, offload);
        self.spare.push(train.frame);
        sent
    }
}

impl Train {
    /// Whether a segment of the same connection goes on where this ends, with the same headers otherwise.
    fn fits(&self, frame: &[u8], head: usize, transport: &Transport) -> bool {
        // All but lengths, identification and checksums; window and sequence number are the first's (RFC 9293 lets a window
        // be told late).
        let parts =
            [ETHERNET..ETHERNET + 2, ETHERNET + 6..ETHERNET + 10, ETHERNET + IPV4 + 8..ETHERNET + IPV4 + 13];
        let equal = |part: core::ops::Range<usize>| self.frame.get(part.clone()) == frame.get(part);
        let options = ETHERNET + IPV4 + TCP..head;
        head == self.head
            && transport.tcp.sequence == self.next
            && transport.payload_bytes <= self.size
            && self.frame.len() - ETHERNET + transport.payload_bytes <= MAX_PACKET
            && parts.into_iter().all(equal)
            && equal(options)
    }

    /// Whether an acknowledgement of the same connection says all that this one does, and more.
    fn is_outdated(&self, head: usize, transport: &Transport) -> bool {
        let more = transport.tcp.acknowledgement.wrapping_sub(self.acknowledgement);
        self.size == 0
            && head == self.head
            && transport.tcp.sequence == self.next
            && (1..1 << 31).contains(&more)
    }

    /// Makes the headers those of the whole.
    fn finish(&mut self) -> Offload {
        if self.segments < 2 {
            return verified();
        }
        let Some(packet) = self.frame.get_mut(ETHERNET..) else { return verified() };
        let bytes = packet.len();
        let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
        ip.set_total_len(u16::try_from(bytes).unwrap_or(u16::MAX));
        ip.fill_checksum();
        let (source, destination) = (ip.src_addr(), ip.dst_addr());
        let pseudo = checksum::pseudo_header(source, destination, 6, bytes - IPV4);
        if let Some(segment) = packet.get_mut(IPV4..) {
            TcpPacket::new_unchecked(segment).set_checksum(pseudo);
        }
        let (start, offset) = ((ETHERNET + IPV4) as u16, checksum_at(Protocol::Tcp) as u16);
        Offload {
            checksum: Checksum::Partial { start, offset },
            gso: Some(Gso { size: self.size as u16, header_bytes: self.head as u16 }),
        }
    }
}

fn verified() -> Offload {
    Offload { checksum: Checksum::Verified, gso: None }
}

/// Whether a TCP frame without IP options has neither payload nor options but time stamps.
fn is_acknowledgement(frame: &[u8]) -> bool {
    match frame.get(ETHERNET + IPV4 + TCP..) {
        Some([]) => true,
        Some(options) => options.len() == TIME_STAMPS_BYTES && options.starts_with(&TIME_STAMPS),
        None => false,
    }
}

/// Whether two TCP frames without IP options have the same addresses and ports.
fn is_same_connection(a: &[u8], b: &[u8]) -> bool {
    let ends = ETHERNET + 12..ETHERNET + IPV4 + 4;
    a.get(ends.clone()) == b.get(ends)
}
