//! Which interrupts a local APIC takes, as every other processor may know it.
//!
//! Intel SDM vol. 3, 11.6.2 (destinations), 11.12.10 (x2APIC logical ids).

use crate::interrupt::{Destination, Ipi, MsiMessage};

/// A physical destination of an interrupt message that means everybody.
const XAPIC_BROADCAST: u32 = 0xFF;
/// The same in x2APIC mode.
const X2APIC_BROADCAST: u32 = u32::MAX;

const ENABLED: u64 = 1 << 0;
const SOFTWARE_ENABLED: u64 = 1 << 1;
const X2APIC: u64 = 1 << 2;
const FLAT: u64 = 1 << 3;
const LOGICAL_ID_SHIFT: u32 = 8;

/// An APIC's id and the registers that decide what it takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addressing {
    id: u32,
    bits: u64,
}

impl Addressing {
    /// Of an APIC with this id. `logical_id` and `flat` are xAPIC's; x2APIC derives the logical id.
    pub(super) const fn new(
        id: u32,
        enabled: bool,
        software_enabled: bool,
        x2apic: bool,
        logical_id: u8,
        flat: bool,
    ) -> Self {
        const fn bit(is_set: bool, bit: u64) -> u64 {
            if is_set { bit } else { 0 }
        }
        let bits = bit(enabled, ENABLED)
            | bit(software_enabled, SOFTWARE_ENABLED)
            | bit(x2apic, X2APIC)
            | bit(flat, FLAT)
            | (logical_id as u64) << LOGICAL_ID_SHIFT;
        Self { id, bits }
    }

    /// Everything but the id, in one word.
    pub const fn to_bits(self) -> u64 {
        self.bits
    }

    /// From an id and what [`Self::to_bits`] gave.
    pub const fn from_bits(id: u32, bits: u64) -> Self {
        Self { id, bits }
    }

    const fn has(self, bit: u64) -> bool {
        self.bits & bit != 0
    }

    /// Not turned off in IA32_APIC_BASE: one that is takes nothing at all.
    pub const fn is_enabled(self) -> bool {
        self.has(ENABLED)
    }

    /// Takes vectors, and so may be the least busy of several.
    pub const fn takes_vectors(self) -> bool {
        self.has(ENABLED) && self.has(SOFTWARE_ENABLED)
    }

    /// True when this APIC is among the message's destinations.
    pub const fn accepts(self, message: &MsiMessage) -> bool {
        let destination = message.destination_id();
        if message.is_logical() {
            self.matches_logical(destination)
        } else {
            destination == self.id || destination == XAPIC_BROADCAST
        }
    }

    /// True when this APIC is among the interprocessor interrupt's destinations.
    pub const fn accepts_ipi(self, ipi: &Ipi) -> bool {
        match ipi.destination {
            Destination::Physical(id) => id == self.id,
            Destination::Logical(id) => self.matches_logical(id),
            Destination::All => true,
            Destination::AllExcept(id) => id != self.id,
        }
    }

    const fn matches_logical(self, destination: u32) -> bool {
        if self.has(X2APIC) {
            let own = x2apic_logical_id(self.id);
            return destination == X2APIC_BROADCAST
                || destination >> 16 == own >> 16 && destination & own & 0xFFFF != 0;
        }
        let own = (self.bits >> LOGICAL_ID_SHIFT & 0xFF) as u32;
        match destination {
            XAPIC_BROADCAST => true,
            _ if self.has(FLAT) => destination & own != 0,
            _ => destination >> 4 == own >> 4 && destination & own & 0xF != 0,
        }
    }
}

/// The logical id that x2APIC mode derives: cluster of 16, and the bit in it.
pub(super) const fn x2apic_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xF)
}

/// The physical destination that means everybody.
pub(super) const fn broadcast(x2apic: bool) -> u32 {
    if x2apic { X2APIC_BROADCAST } else { XAPIC_BROADCAST }
}
