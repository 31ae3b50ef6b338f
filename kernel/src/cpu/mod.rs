//! The cores: starting them, and on each descriptor tables, exceptions, interrupts, the local APIC and the clock.

pub mod apic;
pub mod barriers;
pub mod clock;
pub mod cores;
pub mod descriptors;
pub mod exceptions;
pub mod features;
pub mod fpu;
pub mod guest_registers;
pub mod interrupts;
pub mod local;
pub mod pic;

use x86_64::instructions::{hlt, interrupts as flag};

/// Opens a window in which pending interrupts are taken; their handlers only set flags.
pub fn take_interrupts() {
    flag::enable();
    x86_64::instructions::nop();
    flag::disable();
}

/// Waits for the next interrupt. An interrupt that came since the flags were last looked at ends the wait at once, because
/// interrupts are off until the very HLT.
pub fn idle() {
    flag::enable_and_hlt();
    flag::disable();
}

/// Stops this core for good.
pub fn halt_forever() -> ! {
    flag::disable();
    loop {
        hlt();
    }
}
