//! The e1000 network interfaces: Intel's 8254x family and the 82574L (e1000e). Bochs has no other; it is the default in
//! VMware, VirtualBox and Proxmox.
//!
//! Intel 317453 (PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual): 2 (architecture), 3
//! (descriptors and rings), 13 (registers), 14 (initialization); Intel 317694 (82574L data sheet). Only what all members
//! share is used: one ring each way, legacy descriptors, one interrupt.

mod adapter;
mod registers;
mod ring;
#[cfg(test)]
mod tests;

use alloc::string::{String, ToString};
use core::fmt;

use self::adapter::Adapter;
use self::registers::Mmio;
use super::nic::Nic;
use super::pci::{ConfigSpace, Function, Msi};
use crate::cpu::interrupts::{self, IrqLine};
use crate::cpu::pic::LegacyLine;
use crate::cpu::{self, clock};

const VENDOR_INTEL: u16 = 0x8086;
const DEVICE_82574L: u16 = 0x10d3;
/// 82543GC, 82544GC, 82540EM, 82545EM (copper), 82546EB, 82545EM (fiber), 82545GM and the 82574L.
const DEVICES: [u16; 8] = [0x1004, 0x100c, 0x100e, 0x100f, 0x1010, 0x1011, 0x1026, DEVICE_82574L];
/// How long a provoked interrupt may take to arrive. It takes microseconds, more where L0 is busy.
const INTERRUPT_PATIENCE_NS: u64 = 20_000_000;
/// Interrupts on a line for which the device has no cause, in a row, before the line is given up: another device keeps
/// it asserted, and nobody here would ever silence that one.
const MOST_UNCLAIMED: u32 = 100;

/// How the device interrupts.
enum Interrupt {
    Message(IrqLine),
    Line { line: LegacyLine, unclaimed: u32 },
}

impl Interrupt {
    fn take_pending(&self) -> bool {
        match self {
            Self::Message(line) => line.take_pending(),
            Self::Line { line, .. } => line.take_pending(),
        }
    }
}

impl fmt::Display for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(_) => f.write_str("MSI"),
            Self::Line { line, .. } => line.fmt(f),
        }
    }
}

/// A driven e1000.
pub struct E1000 {
    adapter: Adapter<Mmio>,
    name: &'static str,
    interrupt: Option<Interrupt>,
}

impl E1000 {
    /// Whether this driver is the one for a function.
    #[must_use]
    pub fn drives(function: &Function) -> bool {
        function.vendor == VENDOR_INTEL && DEVICES.contains(&function.device)
    }

    /// Starts the device.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub fn new(space: ConfigSpace, function: &Function) -> Result<Self, String> {
        let is_82574 = function.device == DEVICE_82574L;
        space.disable(function.address);
        let region = space.memory_region(function.address, 0);
        space.enable(function.address);
        let registers = region.and_then(Mmio::map).ok_or("its registers have no address")?;
        let adapter = Adapter::start(registers, is_82574).map_err(|error| error.to_string())?;
        let name = if is_82574 { "e1000e" } else { "e1000" };
        let mut nic = Self { adapter, name, interrupt: None };
        nic.interrupt = nic.by_message(space, function).or_else(|| nic.by_line(space, function));
        match &nic.interrupt {
            Some(interrupt) => log::debug!("{name}: interrupts by {interrupt}"),
            None => log::warn!("{name}: no interrupt of it arrives; it is polled, which costs time"),
        }
        if !nic.adapter.link_up() {
            log::warn!("{name}: no link; is its cable connected?");
        }
        Ok(nic)
    }

    /// MSI rather than MSI-X where both are: with one message it needs no table.
    fn by_message(&mut self, space: ConfigSpace, function: &Function) -> Option<Interrupt> {
        let msi: Msi = space.msi(function.address)?;
        let line = interrupts::allocate(self.name)?;
        space.enable_msi(function.address, msi, line.message_address(), line.message_data());
        let interrupt = Interrupt::Message(line);
        if self.arrives(&interrupt) {
            return Some(interrupt);
        }
        space.disable_msi(function.address, msi);
        None
    }

    fn by_line(&mut self, space: ConfigSpace, function: &Function) -> Option<Interrupt> {
        let line = LegacyLine::new(space.interrupt_line(function.address)?)?;
        space.enable_line(function.address);
        let interrupt = Interrupt::Line { line, unclaimed: 0 };
        if self.arrives(&interrupt) {
            if let Interrupt::Line { line, .. } = &interrupt {
                line.rearm();
            }
            return Some(interrupt);
        }
        space.disable_line(function.address);
        None
    }

    /// Tries whether the device's interrupt gets through: firmware and emulators are wrong about it at times.
    fn arrives(&mut self, interrupt: &Interrupt) -> bool {
        self.adapter.enable_interrupts();
        self.adapter.provoke_interrupt();
        let deadline = clock::now_ns().saturating_add(INTERRUPT_PATIENCE_NS);
        let arrived = loop {
            cpu::take_interrupts();
            if interrupt.take_pending() {
                break true;
            }
            if clock::now_ns() >= deadline {
                break false;
            }
        };
        // Takes the provoked cause, so that the line is low again.
        if !(self.adapter.take_causes() && arrived) {
            self.adapter.disable_interrupts();
            return false;
        }
        true
    }
}

impl Nic for E1000 {
    fn driver(&self) -> &'static str {
        self.name
    }

    fn mac(&self) -> [u8; 6] {
        self.adapter.mac()
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        self.adapter.receive(into)
    }

    fn transmit_room(&mut self) -> usize {
        self.adapter.transmit_room()
    }

    fn transmit(&mut self, frame: &[u8]) -> bool {
        self.adapter.transmit(frame)
    }

    fn take_interrupt(&mut self) -> bool {
        let Some(interrupt) = &mut self.interrupt else {
            // Polled: the causes tell of the link.
            return self.adapter.take_causes();
        };
        if !interrupt.take_pending() {
            return false;
        }
        let claimed = self.adapter.take_causes();
        if let Interrupt::Line { line, unclaimed } = interrupt {
            *unclaimed = if claimed { 0 } else { *unclaimed + 1 };
            if *unclaimed > MOST_UNCLAIMED {
                log::warn!(
                    "{}: another device keeps {line} busy; from now on the interface is polled",
                    self.name
                );
                self.interrupt = None;
            } else {
                line.rearm();
            }
        }
        claimed
    }

    fn has_interrupt(&self) -> bool {
        self.interrupt.is_some()
    }
}
