//! Which check of a VM entry a VMCS fails, for the dump of an entry that the processor refused.
//!
//! Intel SDM vol. 3, 27.2 (control fields and host state) and 27.3 (guest state), the parts that concern the controls which nestling may
//! set. The processor says only which of the three areas is at fault.

mod controls;
mod guest;
mod host;
mod segments;

use super::capabilities::Capabilities;
use super::controls::{entry, primary, secondary};
use super::fields::Field;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const CR0_PE: u64 = 1 << 0;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_PCIDE: u64 = 1 << 17;
const CR4_CET: u64 = 1 << 23;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// SCE, LME, LMA, NXE: all that Intel defines.
const EFER_DEFINED: u64 = 1 | EFER_LME | EFER_LMA | 1 << 11;
const PAGE: u64 = 0xFFF;
/// No processor has wider physical addresses; how wide this one's are is not looked at.
const PHYSICAL_WIDTH: u32 = 52;

/// Every check that the fields fail, each with the field's name and value. Only fields that the controls in force call for are read.
pub fn failing(read: &mut dyn FnMut(Field) -> u64, capabilities: &Capabilities) -> Vec<String> {
    let mut checks = Checks { read, capabilities, failing: Vec::new() };
    checks.controls();
    checks.host();
    checks.guest();
    checks.failing
}

struct Checks<'a> {
    read: &'a mut dyn FnMut(Field) -> u64,
    capabilities: &'a Capabilities,
    failing: Vec<String>,
}

impl Checks<'_> {
    fn get(&mut self, field: Field) -> u64 {
        (self.read)(field)
    }

    /// A field of 32 bits.
    fn get_32(&mut self, field: Field) -> u32 {
        self.get(field) as u32
    }

    /// Notes a failing check: the rule that `field` breaks.
    fn require(&mut self, holds: bool, field: Field, rule: &str) {
        if !holds {
            let value = self.get(field);
            self.failing.push(format!("{field:?} {value:#x}: {rule}"));
        }
    }

    /// `mask`ed bits must be 0.
    fn require_clear(&mut self, field: Field, mask: u64, what: &str) {
        let value = self.get(field);
        let wrong = value & mask;
        if wrong != 0 {
            self.failing.push(format!("{field:?} {value:#x}: bits {wrong:#x} must be 0 ({what})"));
        }
    }

    /// Bits that must be 1 and bits that may be 1, but for those of `exempt`.
    fn require_fixed(&mut self, field: Field, must: u64, may: u64, exempt: u64, register: &str) {
        let value = self.get(field);
        let (missing, excess) = (must & !value & !exempt, value & !may & !exempt);
        if missing != 0 {
            self.failing.push(format!("{field:?} {value:#x}: bits {missing:#x} must be 1 by {register}"));
        }
        if excess != 0 {
            self.failing.push(format!("{field:?} {value:#x}: bits {excess:#x} must be 0 by {register}"));
        }
    }

    /// A physical address in a VMCS.
    fn require_physical(&mut self, field: Field, alignment_mask: u64) {
        self.require_clear(field, alignment_mask, "alignment");
        self.require_clear(field, u64::MAX << PHYSICAL_WIDTH, "beyond the physical address width");
    }

    fn require_canonical(&mut self, field: Field) {
        let width = self.linear_width();
        let value = self.get(field);
        self.require(is_canonical(value, width), field, "must be canonical");
    }

    /// Memory types in each byte of a page attribute table.
    fn require_pat(&mut self, field: Field) {
        let valid = self.get(field).to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7));
        self.require(valid, field, "each byte must be 0, 1 or 4-7");
    }

    /// Width of linear addresses in bits.
    const fn linear_width(&self) -> u32 {
        if self.capabilities.cr4_fixed1 & CR4_LA57 != 0 { 57 } else { 48 }
    }

    fn has_primary(&mut self, control: u32) -> bool {
        self.get_32(Field::PrimaryControls) & control != 0
    }

    /// Secondary controls count only where the primary ones activate them.
    fn has_secondary(&mut self, control: u32) -> bool {
        self.has_primary(primary::SECONDARY_CONTROLS) && self.get_32(Field::SecondaryControls) & control != 0
    }

    fn has_pin(&mut self, control: u32) -> bool {
        self.get_32(Field::PinControls) & control != 0
    }

    fn has_exit(&mut self, control: u32) -> bool {
        self.get_32(Field::ExitControls) & control != 0
    }

    fn has_entry(&mut self, control: u32) -> bool {
        self.get_32(Field::EntryControls) & control != 0
    }

    fn is_unrestricted(&mut self) -> bool {
        self.has_secondary(secondary::UNRESTRICTED_GUEST)
    }

    fn is_ia32e(&mut self) -> bool {
        self.has_entry(entry::IA32E_MODE_GUEST)
    }
}

const fn is_canonical(address: u64, width: u32) -> bool {
    let shift = 64 - width;
    ((address << shift) as i64 >> shift) as u64 == address
}
