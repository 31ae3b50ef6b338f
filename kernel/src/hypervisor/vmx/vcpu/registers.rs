//! The guest's registers: read from the VMCS when first asked for, and the bits of CR0 and CR4 that are L1's.
//!
//! Intel SDM vol. 3, 24.8 (restrictions on CR0 and CR4), 25.4.1 (guest register state), 25.6.6 (masks and read shadows), 26.3 (MOV to CR).

use super::super::fields::{Field, SEGMENT_UNUSABLE};
use super::VmxVcpu;
use crate::hypervisor::exit::Exit;
use core::arch::asm;
use nestling_machine::state::{
    ControlRegisters, CpuState, DR6_SINGLE_STEP, EFER_LMA, EFER_LME, Exception, Gpr, Segment, SegmentRegister,
};

pub(super) const CR0_PE: u64 = 1 << 0;
pub(super) const CR0_NE: u64 = 1 << 5;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// Bits of CR0 whose real values are L1's: VMX wants NE set, and neither entry nor exit switches NW and CD.
pub(super) const CR0_HOST_OWNED: u64 = CR0_NE | CR0_NW | CR0_CD;
const CR4_PAE: u64 = 1 << 5;
pub(super) const CR4_MCE: u64 = 1 << 6;
pub(super) const CR4_VMXE: u64 = 1 << 13;
const CR4_PCIDE: u64 = 1 << 17;
/// Bits of CR4 whose real values are the guest's: VME, PVI, TSD, DE, PSE, PAE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, PCIDE, OSXSAVE, SMEP,
/// SMAP, PKE. MCE stays set, so that a machine check exits; all others belong to features that CPUID hides.
pub(super) const CR4_GUEST_OWNED: u64 = 0x0077_0FBF;
const UNUSABLE: u64 = SEGMENT_UNUSABLE as u64;
const RFLAGS_VM: u64 = 1 << 17;
/// Access rights of a code segment: conforming, and L.
const CODE_CONFORMING: u64 = 1 << 2;
const CODE_LONG: u64 = 1 << 13;

impl ControlRegisters for VmxVcpu {
    fn cr0(&self) -> u64 {
        self.cr0.get(&self.vmcs) & !CR0_HOST_OWNED | self.cr0_shadow & CR0_HOST_OWNED
    }

    fn cr4(&self) -> u64 {
        self.cr4.get(&self.vmcs) & CR4_GUEST_OWNED | self.cr4_shadow
    }

    fn efer(&self) -> u64 {
        // The field is not one that L0 keeps at hand; CR0 is.
        let active = self.efer & EFER_LME != 0 && self.cr0.get(&self.vmcs) & CR0_PG != 0;
        self.efer | if active { EFER_LMA } else { 0 }
    }

    fn cpl(&self) -> u8 {
        // A code segment that is not conforming has the privilege level that runs it, and was read already.
        let code = self.code_access_rights.get(&self.vmcs);
        let conforming = code & CODE_CONFORMING != 0 || self.rflags() & RFLAGS_VM != 0;
        let from = if conforming { self.vmcs.read(Field::GuestSsAccessRights) } else { code };
        (from >> 5 & 3) as u8
    }
}

impl CpuState for VmxVcpu {
    fn gpr(&self, register: Gpr) -> u64 {
        match register {
            Gpr::Rsp => self.rsp.get(&self.vmcs),
            other => self.registers.get(other),
        }
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        match register {
            Gpr::Rsp => self.rsp.set(value),
            other => self.registers.set(other, value),
        }
    }

    fn rip(&self) -> u64 {
        self.rip.get(&self.vmcs)
    }

    fn set_rip(&mut self, value: u64) {
        self.rip.set(value);
    }

    fn rflags(&self) -> u64 {
        self.rflags.get(&self.vmcs)
    }

    fn set_rflags(&mut self, value: u64) {
        self.rflags.set(value);
    }

    fn cr3(&self) -> u64 {
        self.cr3.get(&self.vmcs)
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        let (v, name) = (&self.vmcs, SegmentFields::of(register));
        Segment {
            selector: v.read(name.selector) as u16,
            attributes: attributes(v.read(name.access_rights)),
            limit: v.read(name.limit) as u32,
            base: v.read(name.base),
        }
    }

    fn segment_base(&self, register: SegmentRegister) -> u64 {
        self.vmcs.read(SegmentFields::of(register).base)
    }

    fn code_attributes(&self) -> u16 {
        attributes(self.code_access_rights.get(&self.vmcs))
    }

    fn note_single_step(&mut self) {
        write_dr6(read_dr6() | DR6_SINGLE_STEP);
    }
}

impl VmxVcpu {
    /// MOV to CR0 that changes bits of L1's. The guest gets to see them as it wants them, and runs the instruction again: with nothing of
    /// L1's to change, the processor carries it out, a switch of mode included. Should it fault for a reason not looked at here (page directory
    /// pointers, a task register of 16 bits), the guest sees its CD, NW and NE changed all the same.
    pub(super) fn write_cr0(&mut self, value: u64) -> Exit {
        let is_64_bit = self.is_64_bit();
        let value = if is_64_bit { value } else { value & 0xFFFF_FFFF };
        let (old, cr4) = (self.cr0(), self.cr4());
        let (enables, disables) = (value & !old & CR0_PG != 0, old & !value & CR0_PG != 0);
        let invalid = value >> 32 != 0
            || value & CR0_PG != 0 && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0
            || enables && self.efer & EFER_LME != 0 && (cr4 & CR4_PAE == 0 || self.code_is_long())
            || disables && (is_64_bit || cr4 & CR4_PCIDE != 0);
        if invalid {
            return Exit::Faulting(Exception::GENERAL_PROTECTION);
        }
        self.cr0_shadow = value;
        self.vmcs.write(Field::Cr0ReadShadow, value);
        Exit::ControlRegister
    }

    /// The L bit of the code segment.
    fn code_is_long(&self) -> bool {
        self.code_access_rights.get(&self.vmcs) & CODE_LONG != 0
    }

    fn is_64_bit(&self) -> bool {
        self.efer() & EFER_LMA != 0 && self.code_is_long()
    }

    /// MOV to CR4 that changes bits of L1's: MCE as for CR0, every other faults.
    pub(super) fn write_cr4(&mut self, value: u64) -> Exit {
        let value = if self.is_64_bit() { value } else { value & 0xFFFF_FFFF };
        if value & !(CR4_GUEST_OWNED | CR4_MCE) != 0 {
            return Exit::Faulting(Exception::GENERAL_PROTECTION);
        }
        self.cr4_shadow = value & CR4_MCE;
        self.vmcs.write(Field::Cr4ReadShadow, self.cr4_shadow);
        Exit::ControlRegister
    }
}

/// The fields of a segment register.
pub(super) struct SegmentFields {
    pub(super) selector: Field,
    pub(super) base: Field,
    pub(super) limit: Field,
    pub(super) access_rights: Field,
}

impl SegmentFields {
    const fn of(register: SegmentRegister) -> &'static Self {
        match register {
            SegmentRegister::Es => &ES,
            SegmentRegister::Cs => &CS,
            SegmentRegister::Ss => &SS,
            SegmentRegister::Ds => &DS,
            SegmentRegister::Fs => &FS,
            SegmentRegister::Gs => &GS,
        }
    }
}

macro_rules! segments {
    ($($name:ident: $selector:ident $base:ident $limit:ident $access_rights:ident,)*) => {
        $(pub(super) const $name: SegmentFields = SegmentFields {
            selector: Field::$selector,
            base: Field::$base,
            limit: Field::$limit,
            access_rights: Field::$access_rights,
        };)*
    };
}

segments! {
    CS: GuestCsSelector GuestCsBase GuestCsLimit GuestCsAccessRights,
    DS: GuestDsSelector GuestDsBase GuestDsLimit GuestDsAccessRights,
    ES: GuestEsSelector GuestEsBase GuestEsLimit GuestEsAccessRights,
    FS: GuestFsSelector GuestFsBase GuestFsLimit GuestFsAccessRights,
    GS: GuestGsSelector GuestGsBase GuestGsLimit GuestGsAccessRights,
    SS: GuestSsSelector GuestSsBase GuestSsLimit GuestSsAccessRights,
    LDTR: GuestLdtrSelector GuestLdtrBase GuestLdtrLimit GuestLdtrAccessRights,
    TR: GuestTrSelector GuestTrBase GuestTrLimit GuestTrAccessRights,
}

/// The shared packed form of a segment's attributes to VMX's.
pub(super) fn access_rights(segment: &Segment) -> u64 {
    const PRESENT: u16 = 1 << 7;
    let packed = u64::from(segment.attributes);
    if segment.attributes & PRESENT == 0 { UNUSABLE } else { packed & 0xFF | (packed & 0xF00) << 4 }
}

/// VMX's form of a segment's attributes to the shared packed one, in which an unusable segment is not present.
const fn attributes(access_rights: u64) -> u16 {
    if access_rights & UNUSABLE != 0 { 0 } else { (access_rights & 0xFF | access_rights >> 4 & 0xF00) as u16 }
}

pub(super) fn read_dr6() -> u64 {
    let value: u64;
    // SAFETY: reads a register that only guests use.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

pub(super) fn write_dr6(value: u64) {
    // SAFETY: a register that only guests use; the upper half, which must be zero, comes from the processor or is cut off.
    unsafe { asm!("mov dr6, {}", in(reg) value & 0xFFFF_FFFF, options(nomem, nostack, preserves_flags)) };
}
