//! What is left to do to a frame, and how the header in front of it says so.
//!
//! Virtio 1.2, 5.1.6 (`struct virtio_net_hdr`), 5.1.6.2 (packet transmission), 5.1.6.4 (processing of incoming packets).
//!
//! What a guest says is checked against the frame, so that whoever gets an [`Offload`] can rely on it.

/// Bytes of `struct virtio_net_hdr`.
pub(super) const HEADER_BYTES: usize = 12;
/// Bytes of an Ethernet header, without a VLAN's tag.
pub(super) const ETHERNET_BYTES: usize = 14;
/// The longest frame: an Ethernet header and the longest IP packet.
pub const FRAME_BYTES_MAX: usize = ETHERNET_BYTES + 65_535;
/// The most segments of a frame: with 48 bytes in each, the least that Linux' TCP puts into one, the longest has fewer.
const SEGMENTS_MAX: usize = 2048;

const FLAG_NEEDS_CHECKSUM: u8 = 1 << 0;
const FLAG_DATA_VALID: u8 = 1 << 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;

/// Where the data offset stands in a TCP header, and the header's least length (RFC 9293, 3.1).
const TCP_DATA_OFFSET: usize = 12;
const TCP_BYTES_MIN: usize = 20;

/// What is known of a frame's transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Checksum {
    /// It is complete; nobody has looked at it.
    #[default]
    Complete,
    /// It is complete and was found right. Only for frames to the guest.
    Verified,
    /// It is that of the pseudo header alone and has to be completed.
    Partial {
        /// Where the transport header starts, in bytes from the frame's start.
        start: u16,
        /// Where the checksum is in the transport header, in bytes.
        offset: u16,
    },
}

/// How a frame is cut into several (generic segmentation offload).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gso {
    /// Payload bytes of each segment but the last.
    pub size: u16,
    /// Bytes of the Ethernet, IPv4 and TCP headers that go in front of each.
    pub header_bytes: u16,
}

/// What is left to do to a frame before it can go over a cable.
///
/// Places in the frame lie in it, a frame to cut has a partial checksum, and what it is cut into fits the MTU: frames for which
/// this is not so are dropped by the device, in either direction.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Offload {
    /// The state of its transport checksum.
    pub checksum: Checksum,
    /// The frame is TCP over IPv4 and has to be cut.
    pub gso: Option<Gso>,
}

/// Which offloads one side takes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Accepts {
    /// Frames whose checksum is to be completed or was verified.
    pub csum: bool,
    /// TCP over IPv4 to be segmented. Never without `csum`.
    pub tso4: bool,
}

impl Offload {
    /// What the header in front of `frame` asks for; `None` if it asks for what cannot be, or for what was not agreed on.
    pub(super) fn from_header(
        header: &[u8; HEADER_BYTES],
        frame: &[u8],
        accepts: Accepts,
        mtu: u16,
    ) -> Option<Self> {
        // The header's length is a hint that a driver need not get right (5.1.6.2.2), and the number of buffers is not the guest's to say.
        let [flags, kind, _, _, size0, size1, start0, start1, offset0, offset1, _, _] = *header;
        let (start, offset) = (u16::from_le_bytes([start0, start1]), u16::from_le_bytes([offset0, offset1]));
        let partial = flags & FLAG_NEEDS_CHECKSUM != 0;
        let gso = match kind {
            GSO_NONE => None,
            GSO_TCPV4 if partial => Some(Gso {
                size: u16::from_le_bytes([size0, size1]),
                header_bytes: tcp_payload(frame, start.into())?,
            }),
            _ => return None,
        };
        let checksum = if partial { Checksum::Partial { start, offset } } else { Checksum::Complete };
        let offload = Self { checksum, gso };
        offload.suits(frame.len(), accepts, mtu).then_some(offload)
    }

    /// The header in front of a frame that lies in `buffers` buffers.
    pub(super) fn to_header(self, buffers: u16) -> [u8; HEADER_BYTES] {
        let (flags, start, offset) = match self.checksum {
            Checksum::Complete => (0, 0, 0),
            Checksum::Verified => (FLAG_DATA_VALID, 0, 0),
            Checksum::Partial { start, offset } => (FLAG_NEEDS_CHECKSUM, start, offset),
        };
        let (kind, length, size) =
            self.gso.map_or((GSO_NONE, 0, 0), |gso| (GSO_TCPV4, gso.header_bytes, gso.size));
        let [l0, l1] = length.to_le_bytes();
        let [z0, z1] = size.to_le_bytes();
        let [s0, s1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        let [b0, b1] = buffers.to_le_bytes();
        [flags, kind, l0, l1, z0, z1, s0, s1, o0, o1, b0, b1]
    }

    /// Whether a frame of `length` bytes can have this offload, and be one at all.
    pub(super) fn suits(&self, length: usize, accepts: Accepts, mtu: u16) -> bool {
        let longest = ETHERNET_BYTES + usize::from(mtu);
        if !(ETHERNET_BYTES..=FRAME_BYTES_MAX).contains(&length) {
            return false;
        }
        let header = match self.checksum {
            Checksum::Complete => None,
            Checksum::Verified if accepts.csum => None,
            Checksum::Partial { start, offset }
                if accepts.csum
                    && usize::from(start) >= ETHERNET_BYTES
                    && usize::from(start) + usize::from(offset) + 2 <= length =>
            {
                Some(start)
            }
            Checksum::Verified | Checksum::Partial { .. } => return false,
        };
        let Some(gso) = self.gso else { return length <= longest };
        let (size, header_bytes) = (usize::from(gso.size), usize::from(gso.header_bytes));
        accepts.tso4
            && header.is_some_and(|start| start < gso.header_bytes)
            && size > 0
            && header_bytes + size <= longest
            && length.checked_sub(header_bytes).is_some_and(|payload| payload.div_ceil(size) <= SEGMENTS_MAX)
    }
}

/// Where the payload of the TCP segment in `frame` starts whose header is at `start`.
fn tcp_payload(frame: &[u8], start: usize) -> Option<u16> {
    let words = frame.get(start + TCP_DATA_OFFSET)? >> 4;
    let length = usize::from(words) * 4;
    (length >= TCP_BYTES_MIN).then(|| u16::try_from(start + length).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    const ALL: Accepts = Accepts { csum: true, tso4: true };
    const MTU: u16 = 1500;
    /// An Ethernet and an IPv4 header.
    const TCP: u16 = 34;

    /// A frame whose TCP header has 32 bytes.
    fn frame(length: usize) -> alloc::vec::Vec<u8> {
        let mut frame = vec![0; length];
        frame[usize::from(TCP) + 12] = 0x80;
        frame
    }

    fn header(flags: u8, kind: u8, size: u16, start: u16, offset: u16) -> [u8; HEADER_BYTES] {
        let [size, start, offset] = [size.to_le_bytes(), start.to_le_bytes(), offset.to_le_bytes()];
        // A wrong length hint and number of buffers, which are to be ignored.
        [flags, kind, 7, 7, size[0], size[1], start[0], start[1], offset[0], offset[1], 9, 9]
    }

    fn parse(header: [u8; HEADER_BYTES], length: usize) -> Option<Offload> {
        Offload::from_header(&header, &frame(length), ALL, MTU)
    }

    #[test]
    fn a_plain_frame_has_nothing_left_to_do() {
        assert_eq!(parse(header(0, 0, 99, 99, 99), 1514), Some(Offload::default()));
    }

    #[test]
    fn a_frame_to_segment_has_its_header_length_from_the_frame() {
        let offload = parse(header(1, 1, 1448, TCP, 16), 60_000).unwrap();
        assert_eq!(offload.checksum, Checksum::Partial { start: TCP, offset: 16 });
        assert_eq!(offload.gso, Some(Gso { size: 1448, header_bytes: 66 }));
    }

    #[test]
    fn frames_that_are_no_frames_are_refused() {
        for length in [0, 13] {
            assert_eq!(Offload::from_header(&header(0, 0, 0, 0, 0), &vec![0; length], ALL, MTU), None);
        }
        assert_eq!(parse(header(0, 0, 0, 0, 0), 1515), None, "longer than the MTU, not to be segmented");
        assert_eq!(parse(header(1, 1, 1448, TCP, 16), FRAME_BYTES_MAX + 1), None);
        assert!(parse(header(1, 1, 1448, TCP, 16), FRAME_BYTES_MAX).is_some());
    }

    #[test]
    fn impossible_headers_are_refused() {
        for (flags, kind, size, start, offset) in [
            (1, 0, 0, 13, 0),          // a checksum of the Ethernet header
            (1, 0, 0, 1500, 13),       // one that ends behind the frame
            (1, 0, 0, 0xFFFF, 0xFFFF), // far behind it
            (0, 1, 1448, TCP, 16),     // segments without a checksum
            (1, 1, 0, TCP, 16),        // of no bytes
            (1, 1, 1449, TCP, 16),     // longer than the MTU with their headers
            (1, 1, 1448, 1480, 16),    // whose TCP header is cut off
            (1, 3, 1448, TCP, 16),     // UDP
            (1, 4, 1448, TCP, 16),     // IPv6
            (1, 0x81, 1448, TCP, 16),  // ECN
            (1, 0xFF, 1448, TCP, 16),
        ] {
            assert_eq!(
                parse(header(flags, kind, size, start, offset), 1514),
                None,
                "{flags} {kind} {size} {start}"
            );
        }
        assert_eq!(parse(header(1, 1, 16, TCP, 16), 60_000), None, "thousands of segments");
        let short = Offload::from_header(&header(1, 1, 1448, TCP, 16), &[0; 100], ALL, MTU);
        assert_eq!(short, None, "a TCP header of no bytes");
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let neither = Accepts::default();
        let csum = Accepts { csum: true, tso4: false };
        assert_eq!(Offload::from_header(&header(1, 0, 0, TCP, 16), &frame(100), neither, MTU), None);
        assert!(Offload::from_header(&header(1, 0, 0, TCP, 16), &frame(100), csum, MTU).is_some());
        assert_eq!(Offload::from_header(&header(1, 1, 1448, TCP, 16), &frame(100), csum, MTU), None);
    }

    #[test]
    fn headers_to_the_guest_say_what_is_left_to_do() {
        let plain = Offload::default();
        assert_eq!(plain.to_header(1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(Offload { checksum: Checksum::Verified, gso: None }.to_header(1)[0], 2);
        let checksum = Checksum::Partial { start: TCP, offset: 16 };
        let gso = Some(Gso { size: 1448, header_bytes: 66 });
        let header = Offload { checksum, gso }.to_header(0x102);
        assert_eq!(header, [1, 1, 66, 0, 0xA8, 5, 34, 0, 16, 0, 2, 1]);
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_places_lie_in_the_frame_and_segments_fit_the_mtu(
            header in any::<[u8; HEADER_BYTES]>(),
            kind in 0_u8..3,
            frame in prop::collection::vec(any::<u8>(), 0..4000),
        ) {
            let mut header = header;
            header[1] = kind;
            header[7] &= 0x0F;
            if let Some(offload) = Offload::from_header(&header, &frame, ALL, MTU) {
                if let Checksum::Partial { start, offset } = offload.checksum {
                    prop_assert!(start >= 14 && usize::from(start) + usize::from(offset) + 2 <= frame.len());
                }
                match offload.gso {
                    None => prop_assert!(frame.len() <= 1514),
                    Some(gso) => {
                        prop_assert!(usize::from(gso.header_bytes) <= frame.len());
                        prop_assert!(gso.size > 0 && gso.header_bytes + gso.size <= 1514);
                        prop_assert_ne!(offload.checksum, Checksum::Complete);
                    }
                }
            }
        }
    }
}
