//! Cutting a large TCP segment into those that a link takes: what a network card with TCP segmentation offload does. RFC 9293; RFC 3168
//! (CWR on the first segment alone).

use smoltcp::wire::{Ipv4Packet, TcpPacket, TcpSeqNumber};

use crate::frame::ETHERNET;
use crate::ip::Header;
use crate::records::Protocol;
use crate::transport;

/// Cuts a frame's segment into frames of at most `size` bytes of payload each, written one after another into `scratch` and
/// given to `emit` with their checksums right. A segment that needs no cut is given too.
///
/// IP's identification counts up from the frame's, as hardware does it.
pub(crate) fn cut(
    frame: &[u8],
    header: &Header,
    tcp_bytes: usize,
    size: usize,
    scratch: &mut [u8],
    mut emit: impl FnMut(&mut [u8]),
) {
    let head = ETHERNET + header.bytes + tcp_bytes;
    let (Some(head), Some(payload)) = (frame.get(..head), frame.get(head..ETHERNET + header.total)) else {
        return;
    };
    let Some(ident) = head.get(ETHERNET + 4..).and_then(|ident| ident.first_chunk()) else { return };
    let ident = u16::from_be_bytes(*ident);
    let size = size.max(1);
    let count = payload.len().div_ceil(size).max(1);
    for index in 0..count {
        let at = index * size;
        let Some(part) = payload.get(at..payload.len().min(at + size)) else { return };
        let Some(piece) = scratch.get_mut(..head.len() + part.len()) else { return };
        let (to_head, to_part) = piece.split_at_mut(head.len());
        to_head.copy_from_slice(head);
        to_part.copy_from_slice(part);
        let Some(packet) = piece.get_mut(ETHERNET..) else { return };
        let Ok(bytes) = u16::try_from(packet.len()) else { return };
        let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
        ip.set_total_len(bytes);
        ip.set_ident(ident.wrapping_add(index as u16));
        ip.fill_checksum();
        let Some(segment) = packet.get_mut(header.bytes..) else { return };
        let mut tcp = TcpPacket::new_unchecked(&mut *segment);
        tcp.set_seq_number(TcpSeqNumber(tcp.seq_number().0.wrapping_add(at as i32)));
        if index + 1 < count {
            tcp.set_psh(false);
            tcp.set_fin(false);
        }
        if index > 0 {
            tcp.set_cwr(false);
        }
        transport::complete(header.source, header.destination, Protocol::Tcp, segment);
        emit(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{self, IPV4};
    use crate::transport::{TCP, is_intact};
    use alloc::vec;
    use alloc::vec::Vec;
    use core::net::Ipv4Addr;
    use proptest::prelude::*;
    use smoltcp::wire::IpProtocol;

    proptest! {
        #[test]
        fn the_segments_are_the_large_one_in_pieces(bytes in 0_usize..65_000, size in 1_usize..1460, options in 0_usize..4, flags: u8, sequence: i32) {
            prop_assume!(bytes / size < 200);
            let tcp_bytes = TCP + options * 4;
            let mut segment = vec![1; tcp_bytes];
            let mut tcp = TcpPacket::new_unchecked(&mut segment[..]);
            tcp.set_seq_number(TcpSeqNumber(sequence));
            tcp.clear_flags();
            tcp.set_header_len(tcp_bytes as u8);
            segment[13] = flags;
            segment.extend((0..bytes).map(|index| (index / 3) as u8));
            let frame = frame::to_machine(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), IpProtocol::Tcp, &segment);
            let header = Header::read(&frame[ETHERNET..]).unwrap();
            let (mut payload, mut pieces) = (Vec::new(), Vec::new());
            cut(&frame, &header, tcp_bytes, size, &mut [0; 2048], |piece| pieces.push(piece.to_vec()));
            let last = pieces.len() - 1;
            for (index, piece) in pieces.iter().enumerate() {
                let header = Header::read(&piece[ETHERNET..]).unwrap();
                let segment = header.payload(&piece[ETHERNET..]);
                prop_assert!(is_intact(&header, segment));
                let ip = Ipv4Packet::new_unchecked(&piece[ETHERNET..]);
                prop_assert_eq!(ip.ident(), index as u16);
                let tcp = TcpPacket::new_checked(segment).unwrap();
                prop_assert_eq!(tcp.seq_number().0, sequence.wrapping_add(payload.len() as i32));
                prop_assert_eq!(tcp.options(), &frame[ETHERNET + IPV4 + TCP..][..options * 4]);
                let mut expected = flags;
                if index != last {
                    expected &= !0x09;
                }
                if index != 0 {
                    expected &= !0x80;
                }
                prop_assert_eq!(segment[13], expected);
                prop_assert!(tcp.payload().len() == size || index == last);
                payload.extend_from_slice(tcp.payload());
            }
            prop_assert_eq!(&payload, &segment[tcp_bytes..]);
        }
    }
}
