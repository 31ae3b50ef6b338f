//! The two faces of the local APIC's registers: the xAPIC page and the x2APIC MSRs.
//!
//! Intel SDM vol. 3, 11.4.1 (register map), 11.12 (x2APIC: MSR map, reserved bits, semantics of each register).

use super::addressing::x2apic_logical_id;
use super::{Lapic, LvtEntry};
use crate::address::{GuestTsc, MsrIndex};
use crate::state::Exception;

/// First MSR of the x2APIC range.
pub(super) const X2APIC_BASE: u32 = 0x800;

const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TASK_PRIORITY: u32 = 0x08;
const PROCESSOR_PRIORITY: u32 = 0x0A;
const END_OF_INTERRUPT: u32 = 0x0B;
const LOGICAL_DESTINATION: u32 = 0x0D;
const DESTINATION_FORMAT: u32 = 0x0E;
const SPURIOUS: u32 = 0x0F;
const IN_SERVICE: u32 = 0x10;
const TRIGGER_MODE: u32 = 0x18;
const REQUEST: u32 = 0x20;
const ERROR_STATUS: u32 = 0x28;
const INTERRUPT_COMMAND: u32 = 0x30;
const INTERRUPT_COMMAND_HIGH: u32 = 0x31;
const LVT_FIRST: u32 = 0x32;
const LVT_LAST: u32 = 0x37;
const INITIAL_COUNT: u32 = 0x38;
const CURRENT_COUNT: u32 = 0x39;
const DIVIDE_CONFIGURATION: u32 = 0x3E;
const SELF_IPI: u32 = 0x3F;

/// Version 0x14 (integrated), six LVT entries.
const VERSION_VALUE: u32 = 5 << 16 | 0x14;

/// Bits of the spurious-interrupt register that exist: vector, enable, focus checking.
const SPURIOUS_BITS: u32 = 0x3FF;
/// Reserved bits of the interrupt command register in x2APIC mode. Bit 12, delivery status, is ignored.
const ICR_RESERVED: u64 = 0xFFF3_2000;

impl Lapic {
    /// Reads a register through the xAPIC page; `offset` is within the page.
    ///
    /// In other modes than xAPIC nothing answers: all ones.
    pub fn mmio_read(&mut self, offset: u64, now: GuestTsc) -> u32 {
        if !self.is_xapic() {
            return u32::MAX;
        }
        let Some(register) = register_at(offset) else { return 0 };
        match register {
            ID => self.id << 24,
            LOGICAL_DESTINATION => self.logical_destination,
            DESTINATION_FORMAT => self.destination_format,
            INTERRUPT_COMMAND => self.icr as u32,
            INTERRUPT_COMMAND_HIGH => (self.icr >> 32) as u32,
            _ => self.read_common(register, now).unwrap_or(0),
        }
    }

    /// Writes a register through the xAPIC page; `offset` is within the page. Reserved bits and registers are ignored.
    pub fn mmio_write(&mut self, offset: u64, value: u32, now: GuestTsc) {
        if !self.is_xapic() {
            return;
        }
        let Some(register) = register_at(offset) else { return };
        match register {
            END_OF_INTERRUPT => self.end_of_interrupt(),
            LOGICAL_DESTINATION => self.logical_destination = value & 0xFF00_0000,
            DESTINATION_FORMAT => self.destination_format = value | 0x0FFF_FFFF,
            INTERRUPT_COMMAND => {
                self.icr = self.icr & !0xFFFF_FFFF | u64::from(value & !(1 << 12));
                let destination = (self.icr >> 56) as u32;
                self.send(value, destination);
            }
            INTERRUPT_COMMAND_HIGH => self.icr = self.icr & 0xFFFF_FFFF | u64::from(value) << 32,
            ERROR_STATUS => self.latch_errors(),
            _ => {
                let _ = self.write_common(register, value, now);
            }
        }
    }

    /// Reads a register by its x2APIC MSR.
    ///
    /// # Errors
    /// #GP: not in x2APIC mode, no such register, or one that cannot be read.
    pub fn msr_read(&mut self, index: MsrIndex, now: GuestTsc) -> Result<u64, Exception> {
        if !self.is_x2apic() {
            return Err(Exception::GENERAL_PROTECTION);
        }
        match index.0.wrapping_sub(X2APIC_BASE) {
            ID => Ok(u64::from(self.id)),
            LOGICAL_DESTINATION => Ok(u64::from(x2apic_logical_id(self.id))),
            INTERRUPT_COMMAND => Ok(self.icr),
            register => self.read_common(register, now).map(u64::from),
        }
    }

    /// Writes a register by its x2APIC MSR.
    ///
    /// # Errors
    /// #GP: not in x2APIC mode, no such register, one that cannot be written, or a reserved bit set.
    pub fn msr_write(&mut self, index: MsrIndex, value: u64, now: GuestTsc) -> Result<(), Exception> {
        if !self.is_x2apic() {
            return Err(Exception::GENERAL_PROTECTION);
        }
        let register = index.0.wrapping_sub(X2APIC_BASE);
        if register == INTERRUPT_COMMAND {
            if value & ICR_RESERVED != 0 {
                return Err(Exception::GENERAL_PROTECTION);
            }
            self.icr = value & !(1 << 12);
            self.send(value as u32, (value >> 32) as u32);
            return Ok(());
        }
        let value = u32::try_from(value).map_err(|_| Exception::GENERAL_PROTECTION)?;
        match register {
            END_OF_INTERRUPT if value == 0 => self.end_of_interrupt(),
            ERROR_STATUS if value == 0 => self.latch_errors(),
            SELF_IPI if value <= 0xFF => self.send_self(value),
            TASK_PRIORITY if value <= 0xFF => self.task_priority = value as u8,
            SPURIOUS if value & !SPURIOUS_BITS == 0 => return self.write_common(register, value, now),
            DIVIDE_CONFIGURATION if value & !0xB == 0 => return self.write_common(register, value, now),
            INITIAL_COUNT => return self.write_common(register, value, now),
            LVT_FIRST..=LVT_LAST => {
                let entry = LvtEntry::from_register(register - LVT_FIRST);
                if value & !(entry.writable() | entry.read_only()) != 0 {
                    return Err(Exception::GENERAL_PROTECTION);
                }
                return self.write_common(register, value, now);
            }
            _ => return Err(Exception::GENERAL_PROTECTION),
        }
        Ok(())
    }

    /// Registers that read alike through both faces.
    fn read_common(&mut self, register: u32, now: GuestTsc) -> Result<u32, Exception> {
        Ok(match register {
            VERSION => VERSION_VALUE,
            TASK_PRIORITY => u32::from(self.task_priority),
            PROCESSOR_PRIORITY => u32::from(self.processor_priority()),
            SPURIOUS => self.spurious,
            IN_SERVICE..TRIGGER_MODE => self.in_service.register(register - IN_SERVICE),
            TRIGGER_MODE..REQUEST => self.level.register(register - TRIGGER_MODE),
            REQUEST..ERROR_STATUS => self.requested.register(register - REQUEST),
            ERROR_STATUS => self.error_status,
            LVT_FIRST..=LVT_LAST => self.lvt(LvtEntry::from_register(register - LVT_FIRST)),
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => {
                self.advance(now);
                self.timer.current_count(self.timer_mode(), now)
            }
            DIVIDE_CONFIGURATION => self.timer.divide_configuration(),
            _ => return Err(Exception::GENERAL_PROTECTION),
        })
    }

    /// Registers that are written alike through both faces; bits that do not exist are dropped.
    fn write_common(&mut self, register: u32, value: u32, now: GuestTsc) -> Result<(), Exception> {
        match register {
            TASK_PRIORITY => self.task_priority = value as u8,
            SPURIOUS => {
                self.advance(now);
                self.set_spurious(value & SPURIOUS_BITS);
            }
            LVT_FIRST..=LVT_LAST => {
                self.advance(now);
                self.set_lvt(LvtEntry::from_register(register - LVT_FIRST), value);
            }
            INITIAL_COUNT => self.timer.set_initial_count(value, self.timer_mode(), now),
            DIVIDE_CONFIGURATION => {
                self.advance(now);
                self.timer.set_divide_configuration(value, self.timer_mode(), now);
            }
            _ => return Err(Exception::GENERAL_PROTECTION),
        }
        Ok(())
    }
}

/// The register at an offset of the xAPIC page: each is 32 bits wide at a 16-byte boundary.
fn register_at(offset: u64) -> Option<u32> {
    (offset & 0xF == 0 && offset < 0x400).then_some((offset >> 4) as u32)
}
