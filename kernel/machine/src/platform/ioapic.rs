//! The I/O APIC: a few interrupt lines, each with a redirection entry that says what message it sends.
//!
//! Intel 82093AA data sheet, 3 (registers). It has as few pins as the machine has lines, which is one: Linux reads and writes every
//! pin's entry several times at boot, and each access is an exit that must be decoded.

use crate::address::Vector;
use crate::interrupt::MsiMessage;
use crate::layout;

/// The global system interrupt of pin 0.
pub(super) const FIRST_GSI: u32 = layout::UART_GSI;
/// Pins, each with a redirection entry.
const PINS: usize = 1;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const INDEX_ID: u8 = 0x00;
const INDEX_VERSION: u8 = 0x01;
const INDEX_ARBITRATION: u8 = 0x02;
const INDEX_REDIRECTION: u8 = 0x10;
const VERSION: u32 = 0x11;
const ID_MASK: u32 = 0x0F00_0000;

const VECTOR_MASK: u64 = 0xFF;
const DELIVERY_MODE_MASK: u64 = 0x700;
const LOGICAL_DESTINATION: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are read-only; bits 17-47 are reserved.
const WRITABLE: u64 = 0xFFFF_0000_0001_AFFF;

#[derive(Clone, Copy, Debug)]
struct Pin {
    entry: u64,
    high: bool,
}

/// The I/O APIC's registers and lines.
#[derive(Clone, Debug)]
pub(super) struct IoApic {
    select: u8,
    id: u32,
    pins: [Pin; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        Self { select: 0, id: 0, pins: [Pin { entry: MASKED, high: false }; PINS] }
    }
}

impl Pin {
    /// The message the pin's entry describes.
    fn message(&self) -> MsiMessage {
        let entry = self.entry;
        let mut address = layout::LAPIC_BASE | (entry >> 56) << 12 | ((entry >> 48) & 0xFF) << 4;
        if entry & LOGICAL_DESTINATION != 0 {
            address |= 1 << 2;
        }
        let mut data = (entry & (VECTOR_MASK | DELIVERY_MODE_MASK)) as u32;
        if entry & LEVEL != 0 {
            data |= 1 << 15 | 1 << 14;
        }
        MsiMessage { address, data }
    }

    /// Sends a level interrupt whose line is high, unless one is still in service.
    fn service_level(&mut self) -> Option<MsiMessage> {
        let ready = self.high && self.entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        ready.then(|| {
            self.entry |= REMOTE_IRR;
            self.message()
        })
    }
}

impl IoApic {
    /// Sets the line of a global system interrupt; returns the message to send, if it sends one. Those without a pin do nothing.
    pub(super) fn set_line(&mut self, gsi: u32, high: bool) -> Option<MsiMessage> {
        let pin = self.pins.get_mut(gsi.checked_sub(FIRST_GSI)? as usize)?;
        let rose = high && !pin.high;
        pin.high = high;
        if pin.entry & LEVEL != 0 {
            pin.service_level()
        } else {
            (rose && pin.entry & MASKED == 0).then(|| pin.message())
        }
    }

    /// A local APIC ended a level-triggered interrupt; returns the message of a line with that vector that is still high.
    pub(super) fn end_of_interrupt(&mut self, vector: Vector) -> Option<MsiMessage> {
        let mut again = None;
        for pin in &mut self.pins {
            if pin.entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR
                && pin.entry & VECTOR_MASK == u64::from(vector.0)
            {
                pin.entry &= !REMOTE_IRR;
                again = pin.service_level().or(again);
            }
        }
        again
    }

    /// Reads the 32-bit register at `offset` in the page.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            REGISTER_SELECT => self.select.into(),
            REGISTER_WINDOW => match self.select {
                INDEX_ID | INDEX_ARBITRATION => self.id,
                INDEX_VERSION => VERSION | (PINS as u32 - 1) << 16,
                index => match self.pins.get(Self::pin_of(index)) {
                    Some(pin) if index & 1 == 0 => pin.entry as u32,
                    Some(pin) => (pin.entry >> 32) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes the 32-bit register at `offset` in the page; returns a message that the write set free.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Option<MsiMessage> {
        match offset {
            REGISTER_SELECT => self.select = value as u8,
            REGISTER_WINDOW if self.select == INDEX_ID => self.id = value & ID_MASK,
            REGISTER_WINDOW => {
                let index = self.select;
                let pin = self.pins.get_mut(Self::pin_of(index))?;
                let (shift, half) = if index & 1 == 0 { (0, 0xFFFF_FFFF) } else { (32, 0xFFFF_FFFF << 32) };
                let writable = WRITABLE & half;
                pin.entry = (pin.entry & !writable) | (u64::from(value) << shift & writable);
                if pin.entry & LEVEL == 0 {
                    pin.entry &= !REMOTE_IRR;
                }
                return pin.service_level();
            }
            _ => {}
        }
        None
    }

    /// The pin whose entry register `index` is half of; out of range for registers that are no entry.
    fn pin_of(index: u8) -> usize {
        index.checked_sub(INDEX_REDIRECTION).map_or(usize::MAX, |offset| usize::from(offset / 2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set_entry(ioapic: &mut IoApic, entry: u64) -> Option<MsiMessage> {
        ioapic.write(REGISTER_SELECT, 0x11);
        let high = ioapic.write(REGISTER_WINDOW, (entry >> 32) as u32);
        ioapic.write(REGISTER_SELECT, 0x10);
        ioapic.write(REGISTER_WINDOW, entry as u32).or(high)
    }

    fn entry(ioapic: &mut IoApic) -> u64 {
        ioapic.write(REGISTER_SELECT, 0x10);
        let low = u64::from(ioapic.read(REGISTER_WINDOW));
        ioapic.write(REGISTER_SELECT, 0x11);
        low | u64::from(ioapic.read(REGISTER_WINDOW)) << 32
    }

    #[test]
    fn the_version_register_tells_the_number_of_pins() {
        let mut ioapic = IoApic::default();
        ioapic.write(REGISTER_SELECT, 1);
        assert_eq!(ioapic.read(REGISTER_WINDOW), 0x11 | (PINS as u32 - 1) << 16);
    }

    #[test]
    fn pins_are_masked_at_reset() {
        let mut ioapic = IoApic::default();
        assert_eq!(entry(&mut ioapic), MASKED);
        assert_eq!(ioapic.set_line(FIRST_GSI, true), None);
    }

    #[test]
    fn a_rising_edge_sends_the_message_once() {
        let mut ioapic = IoApic::default();
        set_entry(&mut ioapic, 0x0300_0000_0000_0024);
        assert_eq!(ioapic.set_line(FIRST_GSI, true), Some(MsiMessage { address: 0xFEE0_3000, data: 0x24 }));
        assert_eq!(ioapic.set_line(FIRST_GSI, true), None);
        assert_eq!(ioapic.set_line(FIRST_GSI, false), None);
        assert!(ioapic.set_line(FIRST_GSI, true).is_some());
    }

    #[test]
    fn a_level_interrupt_repeats_until_the_line_falls() {
        let mut ioapic = IoApic::default();
        set_entry(&mut ioapic, LEVEL | LOGICAL_DESTINATION | 0x31);
        let message = MsiMessage { address: 0xFEE0_0004, data: 0xC031 };
        assert_eq!(ioapic.set_line(FIRST_GSI, true), Some(message));
        assert_ne!(entry(&mut ioapic) & REMOTE_IRR, 0);
        assert_eq!(ioapic.set_line(FIRST_GSI, true), None);
        assert_eq!(ioapic.end_of_interrupt(Vector(0x32)), None);
        assert_eq!(ioapic.end_of_interrupt(Vector(0x31)), Some(message));
        ioapic.set_line(FIRST_GSI, false);
        assert_eq!(ioapic.end_of_interrupt(Vector(0x31)), None);
        assert_eq!(entry(&mut ioapic) & REMOTE_IRR, 0);
    }

    #[test]
    fn unmasking_a_high_level_line_sends_its_message() {
        let mut ioapic = IoApic::default();
        set_entry(&mut ioapic, MASKED | LEVEL | 0x40);
        assert_eq!(ioapic.set_line(FIRST_GSI, true), None);
        assert!(set_entry(&mut ioapic, LEVEL | 0x40).is_some());
    }

    #[test]
    fn extended_destination_bits_reach_the_message() {
        let mut ioapic = IoApic::default();
        set_entry(&mut ioapic, 0x01_FE << 48 | 0x50);
        assert_eq!(ioapic.set_line(FIRST_GSI, true).map(|message| message.address), Some(0xFEE0_1FE0));
    }

    #[test]
    fn interrupts_without_a_pin_do_nothing() {
        let mut ioapic = IoApic::default();
        for gsi in [0, FIRST_GSI - 1, FIRST_GSI + 1, u32::MAX] {
            assert_eq!(ioapic.set_line(gsi, true), None);
        }
    }

    #[test]
    fn registers_that_do_not_exist_read_zero_and_ignore_writes() {
        let mut ioapic = IoApic::default();
        for index in (0..=0xFF).filter(|index| !(0x10..0x10 + 2 * PINS as u32).contains(index)) {
            ioapic.write(REGISTER_SELECT, index);
            assert_eq!(ioapic.write(REGISTER_WINDOW, 0xFFFF_FFFF), None);
        }
        assert_eq!(ioapic.read(0x40), 0);
    }
}
