//! The ports of the CMOS real-time clock, which the machine does not have.
//!
//! Motorola MC146818 data sheet, registers A and D. The FADT says that there is no clock; a guest that looks all the same must not
//! wait for an update to end, so status register A says that none is in progress and D that time and RAM are not valid.

/// Port that selects a register.
pub(super) const INDEX_PORT: u16 = 0x70;
/// Port that reads and writes the selected register.
pub(super) const DATA_PORT: u16 = 0x71;

const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
/// Time base 32,768 Hz, rate 1,024 Hz, update not in progress.
const STATUS_A_VALUE: u8 = 0x26;
/// 24-hour mode.
const STATUS_B_VALUE: u8 = 0x02;

/// The index register.
#[derive(Clone, Debug, Default)]
pub(super) struct Cmos {
    index: u8,
}

impl Cmos {
    /// Reads [`DATA_PORT`].
    pub(super) const fn read_data(&self) -> u8 {
        match self.index {
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            _ => 0,
        }
    }

    /// Writes [`INDEX_PORT`]; bit 7 would mask NMIs.
    pub(super) const fn write_index(&mut self, value: u8) {
        self.index = value & 0x7F;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_update_is_ever_in_progress_and_no_time_is_valid() {
        let mut cmos = Cmos::default();
        cmos.write_index(0x80 | STATUS_A);
        assert_eq!(cmos.read_data() & 0x80, 0);
        cmos.write_index(0x0D);
        assert_eq!(cmos.read_data() & 0x80, 0);
    }
}
