//! The local APIC.

use super::VcpuConfig;
use crate::address::{GuestTsc, Vector};
use crate::interrupt::{Ipi, MsiMessage};

/// A local APIC.
#[derive(Debug)]
pub struct Lapic {}

/// What became of an interrupt that was sent to a local APIC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reception {
    /// It is pending (or was already).
    Accepted,
    /// It is dropped: the APIC is disabled, or the vector or delivery mode is not one it takes.
    Ignored,
    /// An INIT: the processor is to be reset and waits for a start-up interrupt.
    Init,
    /// A start-up interrupt: the processor, if it waits for one, starts at page `Vector` in real mode.
    StartUp(Vector),
}

impl Lapic {
    /// An APIC after reset, with x2APIC mode enabled.
    pub fn new(_config: &VcpuConfig) -> Self {
        Self {}
    }

    /// The highest pending vector above the processor priority.
    pub fn pending(&self) -> Option<Vector> {
        None
    }

    /// Moves what [`Self::pending`] says from requested to in service.
    pub fn acknowledge(&mut self) -> Option<Vector> {
        None
    }

    /// Requests `vector`.
    pub fn raise(&mut self, _vector: Vector, _level: bool) {}

    /// True when this APIC is among the message's destinations.
    pub fn accepts(&self, _message: &MsiMessage) -> bool {
        false
    }

    /// Takes a message for which [`Self::accepts`] is true.
    pub fn deliver(&mut self, _message: &MsiMessage) -> Reception {
        Reception::Ignored
    }

    /// True when this APIC is among the interprocessor interrupt's destinations.
    pub fn accepts_ipi(&self, _ipi: &Ipi) -> bool {
        false
    }

    /// Takes an interprocessor interrupt for which [`Self::accepts_ipi`] is true.
    pub fn deliver_ipi(&mut self, _ipi: &Ipi) -> Reception {
        Reception::Ignored
    }

    /// When [`Self::advance`] is next to be called, if the timer is running and may interrupt.
    pub fn next_deadline(&self) -> Option<GuestTsc> {
        None
    }

    /// Lets the timer catch up with `now`.
    pub fn advance(&mut self, _now: GuestTsc) {}

    /// Reads a register through the xAPIC page; `offset` is within the page.
    pub fn mmio_read(&mut self, _offset: u64, _now: GuestTsc) -> u32 {
        0
    }

    /// Writes a register through the xAPIC page; `offset` is within the page.
    pub fn mmio_write(&mut self, _offset: u64, _value: u32, _now: GuestTsc) {}

    /// The interprocessor interrupt that the last register write sent to others.
    pub fn take_ipi(&mut self) -> Option<Ipi> {
        None
    }

    /// The level-triggered vector whose end the last register write signalled.
    pub fn take_eoi(&mut self) -> Option<Vector> {
        None
    }

    /// A non-maskable interrupt that awaits delivery; asking takes it.
    pub fn take_nmi(&mut self) -> bool {
        false
    }

    /// The task priority register; CR8 is its upper four bits.
    pub fn tpr(&self) -> u8 {
        0
    }

    /// Sets the task priority, as a write of CR8 does (`value` = CR8 << 4).
    pub fn set_tpr(&mut self, _value: u8) {}
}
