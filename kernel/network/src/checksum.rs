//! The Internet checksum: RFC 1071, and RFC 1624 for changing what it covers.

use core::net::Ipv4Addr;

/// The ones' complement sum of bytes, not complemented; a last odd byte counts as if a zero followed.
///
/// Eight bytes a step: the node's processor code has no vector instructions, and every byte that comes from outside passes
/// here.
pub(crate) fn sum(data: &[u8]) -> u16 {
    let (words, rest) = data.as_chunks::<8>();
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    let (mut high, mut low) = (0_u64, 0_u64);
    for word in words.iter().chain([&last]) {
        let word = u64::from_ne_bytes(*word);
        high = high.wrapping_add(word >> 32);
        low = low.wrapping_add(word & 0xffff_ffff);
    }
    // Sums of 32-bit numbers, fewer than 2^32 of them: neither has wrapped, nor does the sum of their halves.
    let folded = fold64((high >> 32) + (high & 0xffff_ffff) + (low >> 32) + (low & 0xffff_ffff));
    u16::from_be_bytes(folded.to_ne_bytes())
}

fn fold64(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The sum of sums.
pub(crate) fn add(sums: &[u16]) -> u16 {
    fold64(sums.iter().map(|sum| u64::from(*sum)).sum())
}

/// The sum of the pseudo-header of a TCP segment or UDP datagram of so many bytes (RFC 9293, 3.1; RFC 768).
pub(crate) fn pseudo_header(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, bytes: usize) -> u16 {
    fold64(words(source) + words(destination) + u64::from(protocol) + bytes as u64)
}

fn words(address: Ipv4Addr) -> u64 {
    let bits = u64::from(address.to_bits());
    (bits >> 16) + (bits & 0xffff)
}

/// What becomes of checksums when some words that they cover are replaced.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Change(u64);

impl Change {
    /// One word is replaced.
    pub(crate) fn word(self, old: u16, new: u16) -> Self {
        Self(self.0 + u64::from(!old) + u64::from(new))
    }

    /// An address is replaced.
    pub(crate) fn address(self, old: Ipv4Addr, new: Ipv4Addr) -> Self {
        let ([a, b, c, d], [e, f, g, h]) = (old.octets(), new.octets());
        self.word(u16::from_be_bytes([a, b]), u16::from_be_bytes([e, f]))
            .word(u16::from_be_bytes([c, d]), u16::from_be_bytes([g, h]))
    }

    /// The checksum after it (RFC 1624, equation 3).
    pub(crate) fn applied(self, checksum: u16) -> u16 {
        !fold64(self.0 + u64::from(!checksum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// RFC 1071's definition, word by word.
    fn reference(data: &[u8]) -> u16 {
        let mut sum = 0_u64;
        for pair in data.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        fold64(sum)
    }

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }

    proptest! {
        #[test]
        fn a_sum_is_that_of_its_words(data: Vec<u8>) {
            prop_assert_eq!(sum(&data), reference(&data));
        }

        #[test]
        fn a_change_gives_the_checksum_of_the_changed(mut data in proptest::collection::vec(any::<u8>(), 16..64), new: [u8; 4], port: u16) {
            data.truncate(data.len() & !1);
            let before = !sum(&data);
            let old = Ipv4Addr::new(data[4], data[5], data[6], data[7]);
            let change = Change::default()
                .address(old, Ipv4Addr::from(new))
                .word(u16::from_be_bytes([data[10], data[11]]), port);
            data[4..8].copy_from_slice(&new);
            data[10..12].copy_from_slice(&port.to_be_bytes());
            let after = change.applied(before);
            // Zero has two forms in ones' complement; both verify.
            prop_assert_eq!(add(&[sum(&data), after]), 0xffff);
        }
    }
}
