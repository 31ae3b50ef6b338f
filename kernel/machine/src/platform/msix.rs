//! MSI-X: a table of interrupt messages, one per vector, each with a mask and a pending bit.
//!
//! PCI Local Bus 3.0, 6.8.2 (MSI-X capability and table structures) and 6.8.3.

use super::outbox::Outbox;
use crate::interrupt::MsiMessage;
use alloc::vec;
use alloc::vec::Vec;

/// Most vectors of a table here: their pending bits fit one quadword.
pub(super) const VECTORS_MAX: u16 = 64;
/// Bytes of a table entry.
pub(super) const ENTRY_BYTES: u32 = 16;
/// Enable bit of the capability's message control.
pub(super) const CONTROL_ENABLE: u16 = 1 << 15;
/// Function mask bit of the capability's message control.
pub(super) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

const ENTRY_MASKED: u32 = 1 << 0;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Address low, address high, data, vector control.
    words: [u32; 4],
}

/// A function's MSI-X state.
#[derive(Clone, Debug)]
pub(super) struct Msix {
    entries: Vec<Entry>,
    pending: u64,
    control: u16,
}

impl Msix {
    /// A disabled table of `vectors` entries, all masked.
    pub(super) fn new(vectors: u16) -> Self {
        let entry = Entry { words: [0, 0, 0, ENTRY_MASKED] };
        Self { entries: vec![entry; usize::from(vectors.min(VECTORS_MAX))], pending: 0, control: 0 }
    }

    /// Number of vectors.
    pub(super) fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// The guest wrote message control.
    pub(super) fn set_control(&mut self, control: u16, out: &mut Outbox) {
        self.control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        if self.control & CONTROL_ENABLE == 0 {
            self.pending = 0;
        }
        self.deliver_pending(out);
    }

    /// The device raises `vector`. Numbers without an entry raise nothing.
    pub(super) fn raise(&mut self, vector: u16, out: &mut Outbox) {
        if vector < self.vectors() && self.control & CONTROL_ENABLE != 0 {
            self.pending |= 1 << vector;
            self.deliver_pending(out);
        }
    }

    fn deliver_pending(&mut self, out: &mut Outbox) {
        if self.pending == 0 || self.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) != CONTROL_ENABLE {
            return;
        }
        for (vector, entry) in self.entries.iter().enumerate() {
            let [low, high, data, control] = entry.words;
            if self.pending & 1 << vector != 0 && control & ENTRY_MASKED == 0 {
                self.pending &= !(1 << vector);
                out.send(MsiMessage { address: u64::from(high) << 32 | u64::from(low), data });
            }
        }
    }

    /// Reads an aligned 4 or 8 bytes of the table; anything else reads zero.
    pub(super) fn read_table(&self, offset: u32, width: u8) -> u64 {
        let word = |offset: u32| {
            let entry = self.entries.get((offset / ENTRY_BYTES) as usize)?;
            entry.words.get((offset % ENTRY_BYTES / 4) as usize).copied()
        };
        match width {
            4 if offset.is_multiple_of(4) => word(offset).unwrap_or(0).into(),
            8 if offset.is_multiple_of(8) => {
                u64::from(word(offset).unwrap_or(0)) | u64::from(word(offset + 4).unwrap_or(0)) << 32
            }
            _ => 0,
        }
    }

    /// Writes an aligned 4 or 8 bytes of the table; anything else is ignored.
    pub(super) fn write_table(&mut self, offset: u32, width: u8, value: u64, out: &mut Outbox) {
        match width {
            4 if offset.is_multiple_of(4) => self.write_word(offset, value as u32),
            8 if offset.is_multiple_of(8) => {
                self.write_word(offset, value as u32);
                self.write_word(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
        self.deliver_pending(out);
    }

    fn write_word(&mut self, offset: u32, value: u32) {
        let index = (offset % ENTRY_BYTES / 4) as usize;
        let entry = self.entries.get_mut((offset / ENTRY_BYTES) as usize);
        if let Some(word) = entry.and_then(|entry| entry.words.get_mut(index)) {
            *word = match index {
                0 => value & !3,
                3 => value & ENTRY_MASKED,
                _ => value,
            };
        }
    }

    /// Reads an aligned 4 or 8 bytes of the pending bit array.
    pub(super) fn read_pending(&self, offset: u32, width: u8) -> u64 {
        match (offset, width) {
            (0, 8) => self.pending,
            (0, 4) => self.pending & 0xFFFF_FFFF,
            (4, 4) => self.pending >> 32,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> (Msix, Outbox) {
        let (mut msix, mut out) = (Msix::new(2), Outbox::default());
        msix.set_control(CONTROL_ENABLE, &mut out);
        for (offset, value) in [(16, 0xFEE0_1000), (20, 0), (24, 0x41), (28, 0)] {
            msix.write_table(offset, 4, value, &mut out);
        }
        (msix, out)
    }

    #[test]
    fn an_unmasked_vector_sends_its_message() {
        let (mut msix, mut out) = enabled();
        msix.raise(1, &mut out);
        assert_eq!(out.take(), Some(MsiMessage { address: 0xFEE0_1000, data: 0x41 }));
        assert_eq!(msix.read_pending(0, 8), 0);
    }

    #[test]
    fn a_masked_vector_stays_pending_until_it_is_unmasked() {
        let (mut msix, mut out) = enabled();
        msix.write_table(28, 4, 1, &mut out);
        msix.raise(1, &mut out);
        assert_eq!(out.take(), None);
        assert_eq!(msix.read_pending(0, 4), 2);
        msix.write_table(28, 4, 0, &mut out);
        assert!(out.take().is_some());
        assert_eq!(msix.read_pending(0, 4), 0);
    }

    #[test]
    fn the_function_mask_holds_every_vector() {
        let (mut msix, mut out) = enabled();
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK, &mut out);
        msix.raise(1, &mut out);
        assert_eq!(out.take(), None);
        msix.set_control(CONTROL_ENABLE, &mut out);
        assert!(out.take().is_some());
    }

    #[test]
    fn nothing_is_sent_or_kept_while_msix_is_off() {
        let (mut msix, mut out) = enabled();
        msix.set_control(0, &mut out);
        msix.raise(1, &mut out);
        msix.set_control(CONTROL_ENABLE, &mut out);
        assert_eq!(out.take(), None);
    }

    #[test]
    fn vectors_and_entries_that_do_not_exist_do_nothing() {
        let (mut msix, mut out) = enabled();
        msix.raise(2, &mut out);
        msix.raise(0xFFFF, &mut out);
        msix.write_table(32, 8, u64::MAX, &mut out);
        msix.write_table(u32::MAX - 7, 8, u64::MAX, &mut out);
        msix.write_table(17, 4, u64::MAX, &mut out);
        assert_eq!(msix.read_table(32, 8), 0);
        assert_eq!(out.take(), None);
    }

    #[test]
    fn the_table_is_read_back_by_dwords_and_quadwords() {
        let (msix, _) = enabled();
        assert_eq!(msix.read_table(16, 8), 0xFEE0_1000);
        assert_eq!(msix.read_table(24, 4), 0x41);
        assert_eq!(msix.read_table(12, 4), 1, "entry 0 is still masked");
        assert_eq!(msix.read_table(24, 2), 0);
    }
}
