//! Interrupt messages, as they travel between devices, the I/O APIC and local APICs.
//!
//! Intel SDM vol. 3, 11.11 (message signalled interrupts) and 11.6 (interprocessor interrupts).

use crate::address::Vector;

/// What an interrupt message asks its destination to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeliveryMode {
    /// Deliver the vector.
    Fixed,
    /// Deliver the vector to the least busy of the destinations; here, to the first that accepts.
    LowestPriority,
    /// System management interrupt; nothing here takes it.
    Smi,
    /// Non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT: reset the processor to the wait-for-SIPI state.
    Init,
    /// Start-up interprocessor interrupt; the vector is the page number of the entry point.
    StartUp,
    /// As an 8259 would; nothing here sends it.
    ExtInt,
}

impl DeliveryMode {
    /// Decodes the three-bit field of a message, an ICR or an LVT; `None` for the reserved encoding.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}

/// Which local APICs an interrupt is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Destination {
    /// The APIC with this id.
    Physical(u32),
    /// The APICs whose logical destination register matches.
    Logical(u32),
    /// Every APIC.
    All,
    /// Every APIC but the one with this id.
    AllExcept(u32),
}

/// A message signalled interrupt: a 32-bit write of `data` to `address`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiMessage {
    /// Address: bits 31-20 are 0xFEE, 19-12 the destination, 11-5 seven more bits of it, 3 redirection hint, 2 logical.
    pub address: u64,
    /// Data: bit 15 level triggered, 14 assert, 10-8 delivery mode, 7-0 vector.
    pub data: u32,
}

impl MsiMessage {
    /// The destination id: eight bits as always, and bits 8-14 from address bits 5-11, where
    /// `KVM_FEATURE_MSI_EXT_DEST_ID` puts them.
    pub const fn destination_id(&self) -> u32 {
        let low = (self.address >> 12 & 0xFF) as u32;
        let extended = (self.address >> 5 & 0x7F) as u32;
        low | extended << 8
    }

    /// True when the destination id is a logical one.
    pub const fn is_logical(&self) -> bool {
        self.address & 1 << 2 != 0
    }

    /// The vector.
    pub const fn vector(&self) -> Vector {
        Vector(self.data as u8)
    }

    /// The delivery mode; `None` for the reserved encoding.
    pub const fn delivery_mode(&self) -> Option<DeliveryMode> {
        DeliveryMode::from_bits(self.data >> 8)
    }

    /// True when the interrupt is level-triggered, so that its end is broadcast to the I/O APIC.
    pub const fn is_level(&self) -> bool {
        self.data & 1 << 15 != 0
    }

    /// True unless the message takes a level-triggered line away again, which local APICs ignore.
    pub const fn is_assert(&self) -> bool {
        !self.is_level() || self.data & 1 << 14 != 0
    }
}

/// An interprocessor interrupt that a local APIC sends to others.
///
/// What it sends to itself it has already accepted when this is returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ipi {
    /// Which processors.
    pub destination: Destination,
    /// What they shall do.
    pub delivery: DeliveryMode,
    /// With which vector.
    pub vector: Vector,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extended_destination_takes_address_bits_5_to_11() {
        let message = MsiMessage { address: 0xFEE0_0000 | 0x34 << 12 | 0x12 << 5 | 1 << 2, data: 0xC1A5 };
        assert_eq!(message.destination_id(), 0x1234);
        assert!(message.is_logical());
        assert_eq!(message.vector(), Vector(0xA5));
        assert_eq!(message.delivery_mode(), Some(DeliveryMode::LowestPriority));
        assert!(message.is_level() && message.is_assert());
    }

    #[test]
    fn the_reserved_delivery_mode_has_no_meaning() {
        assert_eq!(MsiMessage { address: 0xFEE0_0000, data: 0x0300 }.delivery_mode(), None);
    }
}
