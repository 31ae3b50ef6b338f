//! What a machine's processors share: buses, interrupt routing, devices, firmware tables.
//!
//! [`Platform`] is a pure state machine. The hypervisor feeds it the guest's port and memory-mapped accesses, lets it work on its
//! queues ([`Platform::poll`]), and delivers the interrupt messages it hands out.

mod console;
mod ioapic;
pub mod linux;
mod serial;
pub mod virtio;

use crate::address::{GuestPhysAddr, Vector};
use crate::interrupt::MsiMessage;
use crate::memory::GuestMemory;
use alloc::string::String;
use core::fmt;

pub use console::{CONSOLE_TAIL_BYTES, ConsoleTail};
pub use virtio::{VsockHost, VsockState};

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
    serial: serial::Serial,
    ioapic: ioapic::IoApic,
    end: Option<MachineEnd>,
}

impl Platform {
    /// The devices of a machine that has just been switched on.
    pub fn new(config: PlatformConfig) -> Self {
        Self {
            vsock: VsockHost::new(config.guest_cid),
            serial: serial::Serial::default(),
            ioapic: ioapic::IoApic::default(),
            end: None,
        }
    }

    /// The guest reads `width` (1, 2 or 4) bytes from `port`. Unknown ports read all ones.
    pub fn pio_read(&mut self, port: u16, _width: u8) -> u32 {
        u32::from(self.serial.read(port & 7))
    }

    /// The guest writes `width` (1, 2 or 4) bytes to `port`. Unknown ports ignore writes.
    pub fn pio_write(&mut self, port: u16, _width: u8, value: u32) {
        self.serial.write(port & 7, value as u8);
    }

    /// The guest reads `width` (1, 2, 4 or 8) bytes at an address that is not RAM. The local APIC's page is not the platform's.
    /// Unknown addresses read all ones.
    pub fn mmio_read(&mut self, at: GuestPhysAddr, _width: u8) -> u64 {
        u64::from(self.ioapic.read(at.0))
    }

    /// The guest writes `width` (1, 2, 4 or 8) bytes at an address that is not RAM. Unknown addresses ignore writes.
    pub fn mmio_write(&mut self, at: GuestPhysAddr, _width: u8, value: u64) {
        self.ioapic.write(at.0, value as u32);
    }

    /// Whether [`Self::poll`] has something to do.
    pub fn needs_poll(&self) -> bool {
        false
    }

    /// Works on the queues the guest has filled, and moves bytes the host has for the guest. Cheap when there is nothing to do.
    pub fn poll(&mut self, _memory: &mut dyn GuestMemory, _entropy: &mut dyn Entropy) {}

    /// The next interrupt message to deliver to a local APIC: from MSI-X or the I/O APIC.
    pub fn take_interrupt(&mut self) -> Option<MsiMessage> {
        None
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: Vector) {
        self.ioapic.end_of_interrupt(vector);
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
