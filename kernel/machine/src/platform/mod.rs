//! What a machine's processors share: buses, interrupt routing, devices, firmware tables.
//!
//! [`Platform`] is a pure state machine. The hypervisor feeds it the guest's port and memory-mapped accesses, lets it work on its
//! queues ([`Platform::poll`]), and delivers the interrupt messages it hands out.

mod acpi;
mod cmos;
mod console;
mod ioapic;
pub mod linux;
mod outbox;
mod power;
mod serial;
#[cfg(test)]
mod testing;
pub mod virtio;

use crate::address::{GuestPhysAddr, Vector};
use crate::interrupt::MsiMessage;
use crate::layout;
use crate::memory::GuestMemory;
use alloc::string::String;
use core::fmt;

pub use console::{CONSOLE_TAIL_BYTES, ConsoleTail};
pub use virtio::{VsockHost, VsockState};

use cmos::Cmos;
use ioapic::IoApic;
use outbox::Outbox;
use serial::Serial;

const UART_LAST_PORT: u16 = layout::UART_PORT + 7;
const IOAPIC_BYTES: u64 = 4096;

/// A source of random bytes for the guest.
pub trait Entropy {
    /// Fills `into` with random bytes.
    fn fill(&mut self, into: &mut [u8]);
}

/// What a machine's platform is made of.
#[derive(Clone, Copy, Debug)]
pub struct PlatformConfig {
    /// The guest's vsock context id, 3 or more.
    pub guest_cid: u64,
}

/// Why a machine ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MachineEnd {
    /// The guest switched the machine off (ACPI S5).
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest broke a device's rules; the device stopped.
    DeviceFault {
        /// The device.
        device: &'static str,
        /// What was wrong.
        reason: String,
    },
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched the machine off"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::DeviceFault { device, reason } => {
                write!(f, "the guest broke the rules of {device}: {reason}")
            }
        }
    }
}

/// A machine's devices.
#[derive(Debug)]
pub struct Platform {
    vsock: VsockHost,
    serial: Serial,
    cmos: Cmos,
    ioapic: IoApic,
    interrupts: Outbox,
    end: Option<MachineEnd>,
}

impl Platform {
    /// The devices of a machine that has just been switched on.
    pub fn new(config: PlatformConfig) -> Self {
        Self {
            vsock: VsockHost::new(config.guest_cid),
            serial: Serial::default(),
            cmos: Cmos::default(),
            ioapic: IoApic::default(),
            interrupts: Outbox::default(),
            end: None,
        }
    }

    /// The guest reads `width` (1, 2 or 4) bytes from `port`. Unknown ports read all ones.
    pub fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        // The rest are byte-wide devices: a wider access is one access a byte.
        let mut value = 0;
        for index in 0..width.min(4) {
            value |= u32::from(self.read_byte_port(port.wrapping_add(index.into()))) << (8 * index);
        }
        value
    }

    /// The guest writes `width` (1, 2 or 4) bytes to `port`. Unknown ports ignore writes.
    pub fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        for index in 0..width.min(4) {
            self.write_byte_port(port.wrapping_add(index.into()), (value >> (8 * index)) as u8);
        }
    }

    fn read_byte_port(&mut self, port: u16) -> u8 {
        match port {
            layout::UART_PORT..=UART_LAST_PORT => {
                let value = self.serial.read(port - layout::UART_PORT);
                self.update_serial_line();
                value
            }
            cmos::DATA_PORT => self.cmos.read_data(),
            _ => power::read(port).unwrap_or(0xFF),
        }
    }

    fn write_byte_port(&mut self, port: u16, value: u8) {
        match port {
            layout::UART_PORT..=UART_LAST_PORT => {
                self.serial.write(port - layout::UART_PORT, value);
                self.update_serial_line();
            }
            cmos::INDEX_PORT => self.cmos.write_index(value),
            _ => {
                if let Some(end) = power::end_by_write(port, value) {
                    self.end.get_or_insert(end);
                }
            }
        }
    }

    fn update_serial_line(&mut self) {
        if let Some(message) = self.ioapic.set_line(layout::UART_GSI, self.serial.interrupt_line()) {
            self.interrupts.send(message);
        }
    }

    /// The guest reads `width` (1, 2, 4 or 8) bytes at an address that is not RAM. The local APIC's page is not the platform's.
    /// Unknown addresses read all ones.
    pub fn mmio_read(&mut self, at: GuestPhysAddr, width: u8) -> u64 {
        if let Some(offset) = offset_in(at, layout::IOAPIC_BASE, IOAPIC_BYTES) {
            let register = u64::from(self.ioapic.read(offset & !3));
            return (register >> (8 * (offset & 3))) & ones(width);
        }
        ones(width)
    }

    /// The guest writes `width` (1, 2, 4 or 8) bytes at an address that is not RAM. Unknown addresses ignore writes.
    pub fn mmio_write(&mut self, at: GuestPhysAddr, width: u8, value: u64) {
        if let Some(offset) = offset_in(at, layout::IOAPIC_BASE, IOAPIC_BYTES)
            && let Some(message) = self.ioapic.write(offset, (value & ones(width)) as u32)
        {
            self.interrupts.send(message);
        }
    }

    /// Whether [`Self::poll`] has something to do.
    pub fn needs_poll(&self) -> bool {
        false
    }

    /// Works on the queues the guest has filled, and moves bytes the host has for the guest. Cheap when there is nothing to do.
    pub fn poll(&mut self, _memory: &mut dyn GuestMemory, _entropy: &mut dyn Entropy) {}

    /// The next interrupt message to deliver to a local APIC: from MSI-X or the I/O APIC.
    pub fn take_interrupt(&mut self) -> Option<MsiMessage> {
        self.interrupts.take()
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: Vector) {
        if let Some(message) = self.ioapic.end_of_interrupt(vector) {
            self.interrupts.send(message);
        }
    }

    /// Whether and why the machine has ended. Once it has, it must not run again.
    pub const fn end(&self) -> Option<&MachineEnd> {
        self.end.as_ref()
    }

    /// The host's end of the machine's vsock connection.
    pub fn vsock(&mut self) -> &mut VsockHost {
        &mut self.vsock
    }

    /// What the machine last printed on its serial port.
    pub const fn console(&self) -> &ConsoleTail {
        self.serial.console()
    }
}

/// Where `at` is in the region of `length` bytes at `base`, if it is in it.
fn offset_in(at: GuestPhysAddr, base: u64, length: u64) -> Option<u64> {
    at.0.checked_sub(base).filter(|&offset| offset < length)
}

/// All ones in `width` bytes.
fn ones(width: u8) -> u64 {
    u64::MAX.checked_shr(64_u32.saturating_sub(8 * u32::from(width))).unwrap_or(0)
}
