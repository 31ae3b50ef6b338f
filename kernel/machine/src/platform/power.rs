//! How a guest switches its machine off or resets it: ACPI's sleep and reset registers, and the keyboard controller's reset line.
//!
//! ACPI 6.5, 4.8.3.6 (reset register) and 4.8.3.7 (sleep control and status registers).

use super::{MachineEnd, acpi};
use crate::layout;

/// Command port of the keyboard controller, of which only the reset command exists.
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xFE;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Whether a byte written to `port` ends the machine.
pub(super) fn end_by_write(port: u16, value: u8) -> Option<MachineEnd> {
    match port {
        layout::ACPI_SLEEP_CONTROL_PORT => {
            let wanted = value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == acpi::SLEEP_TYPE_S5;
            wanted.then_some(MachineEnd::PowerOff)
        }
        layout::ACPI_RESET_PORT => (value == layout::ACPI_RESET_VALUE).then_some(MachineEnd::Reset),
        KEYBOARD_COMMAND_PORT => (value == KEYBOARD_RESET).then_some(MachineEnd::Reset),
        _ => None,
    }
}

/// What a byte read from `port` gives, if it is one of the power registers.
pub(super) const fn read(port: u16) -> Option<u8> {
    match port {
        layout::ACPI_SLEEP_CONTROL_PORT | layout::ACPI_SLEEP_STATUS_PORT | layout::ACPI_RESET_PORT => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sleep_type_5_with_sleep_enable_switches_the_machine_off() {
        let off = SLEEP_ENABLE | acpi::SLEEP_TYPE_S5 << 2;
        for value in 0..=0xFF {
            let end = end_by_write(layout::ACPI_SLEEP_CONTROL_PORT, value);
            assert_eq!(end.is_some(), value & 0x3C == off, "{value:#x}");
        }
    }

    #[test]
    fn the_reset_register_and_the_keyboard_controller_reset() {
        assert_eq!(end_by_write(layout::ACPI_RESET_PORT, 1), Some(MachineEnd::Reset));
        assert_eq!(end_by_write(layout::ACPI_RESET_PORT, 0), None);
        assert_eq!(end_by_write(0x64, 0xFE), Some(MachineEnd::Reset));
        assert_eq!(end_by_write(0x64, 0xD1), None);
        assert_eq!(end_by_write(0x60, 0xFE), None);
    }
}
