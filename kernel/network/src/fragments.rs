//! Putting IPv4 fragments together and cutting packets into them: RFC 791, 3.2; RFC 5722's answer to overlaps (the packet is
//! dropped). A translator needs the whole packet, since only its first fragment has ports.

use alloc::vec::Vec;
use core::net::Ipv4Addr;

use smoltcp::wire::{IpProtocol, Ipv4Packet};

use crate::SECOND;
use crate::frame::{ETHERNET, IPV4};
use crate::ip::{Fragment, Header};

/// Packets that may be incomplete at once ...
const MAX_PACKETS: usize = 8;
/// ... and the bytes of all their fragments.
const MAX_BYTES: usize = 128 * 1024;
/// Fragments of one packet; the largest packet has 45 of a usual link's size.
const MAX_FRAGMENTS: usize = 64;
/// How long a packet may take to come together (RFC 1122, 3.3.2).
const PATIENCE: u64 = 30 * SECOND;
/// The longest packet.
const MAX_PACKET: usize = 65_535;

/// What fragments of one packet have in common.
type PacketId = (Ipv4Addr, Ipv4Addr, IpProtocol, u16);

#[derive(Debug)]
struct Incomplete {
    id: PacketId,
    expires: u64,
    /// The first fragment's header.
    header: Vec<u8>,
    /// Offsets and bytes, in order.
    parts: Vec<(usize, Vec<u8>)>,
    /// Bytes of the whole payload, once the last fragment has come.
    total: Option<usize>,
}

impl Incomplete {
    fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.1.len()).sum()
    }

    /// Takes a fragment; false if it contradicts the others.
    fn insert(&mut self, fragment: Fragment, header: &[u8], payload: &[u8]) -> bool {
        let end = fragment.offset + payload.len();
        // All but the last are multiples of eight bytes long, and empty ones say nothing.
        let odd = payload.is_empty()
            || (fragment.more && !payload.len().is_multiple_of(8))
            || end > MAX_PACKET - IPV4;
        let beyond = self.total.is_some_and(|total| end > total || !fragment.more);
        if odd || beyond || self.parts.len() >= MAX_FRAGMENTS {
            return false;
        }
        let place = self.parts.partition_point(|part| part.0 < fragment.offset);
        let before = place.checked_sub(1).and_then(|before| self.parts.get(before));
        if before.is_some_and(|(offset, bytes)| offset + bytes.len() > fragment.offset)
            || self.parts.get(place).is_some_and(|next| next.0 < end || !fragment.more)
        {
            return false;
        }
        if !fragment.more {
            self.total = Some(end);
        }
        if fragment.offset == 0 {
            self.header = header.to_vec();
        }
        self.parts.insert(place, (fragment.offset, payload.to_vec()));
        true
    }

    /// The packet behind room for an Ethernet header, if it is complete and not too long.
    fn finish(&self) -> Option<Vec<u8>> {
        let bytes = self.bytes();
        if self.total != Some(bytes) || self.header.is_empty() || self.header.len() + bytes > MAX_PACKET {
            return None;
        }
        let mut frame = alloc::vec![0; ETHERNET];
        frame.extend_from_slice(&self.header);
        self.parts.iter().for_each(|part| frame.extend_from_slice(&part.1));
        let mut packet = Ipv4Packet::new_unchecked(frame.get_mut(ETHERNET..)?);
        packet.set_total_len(u16::try_from(self.header.len() + bytes).ok()?);
        packet.set_more_frags(false);
        packet.set_frag_offset(0);
        packet.fill_checksum();
        Some(frame)
    }
}

/// Packets of which not all fragments have come.
#[derive(Debug, Default)]
pub(crate) struct Reassembly {
    incomplete: Vec<Incomplete>,
}

impl Reassembly {
    /// Takes a fragment; gives the packet, behind room for an Ethernet header, with its last one. What comes when there is no
    /// more room takes the place of the oldest.
    pub(crate) fn take(
        &mut self,
        header: &Header,
        fragment: Fragment,
        packet: &[u8],
        now: u64,
    ) -> Option<Vec<u8>> {
        self.incomplete.retain(|incomplete| now < incomplete.expires);
        let id = (header.source, header.destination, header.protocol, fragment.ident);
        let payload = header.payload(packet);
        let at = self.incomplete.iter().position(|incomplete| incomplete.id == id).unwrap_or_else(|| {
            if self.incomplete.len() >= MAX_PACKETS {
                self.incomplete.remove(0);
            }
            let expires = now.saturating_add(PATIENCE);
            self.incomplete.push(Incomplete {
                id,
                expires,
                header: Vec::new(),
                parts: Vec::new(),
                total: None,
            });
            self.incomplete.len() - 1
        });
        let incomplete = self.incomplete.get_mut(at)?;
        if !incomplete.insert(fragment, packet.get(..header.bytes)?, payload) {
            self.incomplete.remove(at);
            return None;
        }
        let whole = incomplete.finish();
        if whole.is_some() {
            self.incomplete.remove(at);
        }
        while self.bytes() > MAX_BYTES && !self.incomplete.is_empty() {
            self.incomplete.remove(0);
        }
        whole
    }

    fn bytes(&self) -> usize {
        self.incomplete.iter().map(Incomplete::bytes).sum()
    }
}

/// Cuts a frame with a packet longer than `mtu` into frames with fragments of it. The header's options go with each.
pub(crate) fn cut(frame: &[u8], header: &Header, ident: u16, mtu: usize, mut emit: impl FnMut(&mut [u8])) {
    let head = ETHERNET + header.bytes;
    let most = mtu.saturating_sub(header.bytes) & !7;
    let (Some(head), Some(payload)) = (frame.get(..head), frame.get(head..ETHERNET + header.total)) else {
        return;
    };
    if most == 0 {
        return;
    }
    let parts = payload.chunks(most);
    let last = parts.len().saturating_sub(1);
    for (index, part) in parts.enumerate() {
        let mut piece = head.to_vec();
        piece.extend_from_slice(part);
        let (Ok(bytes), Ok(offset)) = (u16::try_from(piece.len() - ETHERNET), u16::try_from(index * most))
        else {
            return;
        };
        let Some(packet) = piece.get_mut(ETHERNET..) else { return };
        let mut packet = Ipv4Packet::new_unchecked(packet);
        packet.set_total_len(bytes);
        packet.set_ident(ident);
        packet.set_more_frags(index != last);
        packet.set_frag_offset(offset);
        packet.fill_checksum();
        emit(&mut piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;
    use proptest::prelude::*;

    fn whole(bytes: usize) -> Vec<u8> {
        let payload: Vec<u8> = (0..bytes).map(|index| (index * 7) as u8).collect();
        frame::to_machine(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2), IpProtocol::Udp, &payload)
    }

    fn pieces(frame: &[u8], ident: u16, mtu: usize) -> Vec<Vec<u8>> {
        let header = Header::read(&frame[ETHERNET..]).unwrap();
        let mut pieces = Vec::new();
        cut(frame, &header, ident, mtu, |piece| pieces.push(piece.to_vec()));
        pieces
    }

    fn take(reassembly: &mut Reassembly, piece: &[u8], now: u64) -> Option<Vec<u8>> {
        let header = Header::read(&piece[ETHERNET..]).unwrap();
        reassembly.take(&header, header.fragment.unwrap(), &piece[ETHERNET..], now)
    }

    proptest! {
        #[test]
        fn what_was_cut_comes_together_in_any_order(bytes in 100_usize..20_000, mtu in 68_usize..1500, seed: u64) {
            let frame = whole(bytes);
            prop_assume!(bytes + IPV4 > mtu && bytes / ((mtu - IPV4) & !7) < MAX_FRAGMENTS);
            let mut pieces = pieces(&frame, 1, mtu);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= mtu + ETHERNET));
            let mut state = seed;
            let mut reassembly = Reassembly::default();
            let mut result = None;
            while !pieces.is_empty() {
                prop_assert!(result.is_none());
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let piece = pieces.remove((state >> 33) as usize % pieces.len());
                result = take(&mut reassembly, &piece, 0);
            }
            let result = result.unwrap();
            prop_assert!(Header::read(&result[ETHERNET..]).unwrap().fragment.is_none());
            prop_assert_eq!(&result[ETHERNET + IPV4..], &frame[ETHERNET + IPV4..]);
            prop_assert!(reassembly.incomplete.is_empty());
        }
    }

    #[test]
    fn a_flood_of_first_fragments_stays_within_its_bounds() {
        let mut reassembly = Reassembly::default();
        let frame = whole(60_000);
        for ident in 0..1000 {
            for piece in &pieces(&frame, ident, 1500)[..40] {
                take(&mut reassembly, piece, 0);
                assert!(reassembly.bytes() <= MAX_BYTES && reassembly.incomplete.len() <= MAX_PACKETS);
            }
        }
        let piece = &pieces(&frame, 0, 1500)[0];
        take(&mut reassembly, piece, PATIENCE);
        assert_eq!(reassembly.incomplete.len(), 1, "what is too old goes");
    }

    #[test]
    fn overlapping_fragments_take_their_packet_with_them() {
        let mut reassembly = Reassembly::default();
        let pieces = pieces(&whole(4000), 7, 1500);
        assert!(take(&mut reassembly, &pieces[0], 0).is_none());
        assert_eq!(reassembly.incomplete.len(), 1);
        let mut overlapping = pieces[1].clone();
        let mut packet = Ipv4Packet::new_unchecked(&mut overlapping[ETHERNET..]);
        packet.set_frag_offset(1472);
        packet.fill_checksum();
        assert!(take(&mut reassembly, &overlapping, 0).is_none());
        assert!(reassembly.incomplete.is_empty());
    }
}
