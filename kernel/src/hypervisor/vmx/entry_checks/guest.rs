//! Checks of the guest's registers and of what is no register: Intel SDM vol. 3, 27.3.1.1 and 27.3.1.3-27.3.1.6.

use super::{
    CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_PAE, CR4_PCIDE, Checks, EFER_DEFINED, EFER_LMA, EFER_LME,
    PHYSICAL_WIDTH,
};
use crate::hypervisor::vmx::controls::{entry, pin, secondary};
use crate::hypervisor::vmx::exit_reason::interruption;
use crate::hypervisor::vmx::fields::{Field, activity, interruptibility};

/// CD and NW are not checked in guests.
const CR0_CACHING: u64 = 1 << 30 | 1 << 29;
/// LBR, BTF, BLD, TR, BTS, BTINT, BTS_OFF_OS, BTS_OFF_USR, the two freezes, uncore PMI, freeze in SMM, RTM.
const DEBUGCTL_DEFINED: u64 = 0xFFC7;
const DEBUGCTL_BTF: u64 = 1 << 1;

const RFLAGS_ONE: u64 = 1 << 1;
pub(super) const RFLAGS_TF: u64 = 1 << 8;
pub(super) const RFLAGS_IF: u64 = 1 << 9;
pub(super) const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_ZERO: u64 = !0 << 22 | 1 << 15 | 1 << 5 | 1 << 3;

/// In access rights: a 64-bit code segment.
const LONG: u32 = 1 << 13;

const PENDING_SINGLE_STEP: u64 = 1 << 14;
/// Breakpoints 0-3, bus lock, enabled breakpoint, single step, RTM.
const PENDING_DEFINED: u64 = 0xF | 1 << 11 | 1 << 12 | PENDING_SINGLE_STEP | 1 << 16;

const DEBUG: u32 = 1;
const MACHINE_CHECK: u32 = 18;

impl Checks<'_> {
    pub(super) fn guest(&mut self) {
        self.control_registers();
        self.guest_msrs();
        self.segments();
        for field in [Field::GuestGdtrBase, Field::GuestIdtrBase] {
            self.require_canonical(field);
        }
        for field in [Field::GuestGdtrLimit, Field::GuestIdtrLimit] {
            self.require_clear(field, 0xFFFF_0000, "a table's limit has 16 bits");
        }
        self.instruction_pointer_and_flags();
        self.activity();
        self.interruptibility();
        self.pending_debug_exceptions();
        self.link_pointer();
        self.pdptes();
    }

    fn control_registers(&mut self) {
        let known = *self.capabilities;
        let free = if self.is_unrestricted() { CR0_PE | CR0_PG | CR0_CACHING } else { CR0_CACHING };
        self.require_fixed(
            Field::GuestCr0,
            known.cr0_fixed0,
            known.cr0_fixed1,
            free,
            "IA32_VMX_CR0_FIXED0/1",
        );
        self.require_fixed(Field::GuestCr4, known.cr4_fixed0, known.cr4_fixed1, 0, "IA32_VMX_CR4_FIXED0/1");
        let (cr0, cr4) = (self.get(Field::GuestCr0), self.get(Field::GuestCr4));
        self.require(cr0 & CR0_PG == 0 || cr0 & CR0_PE != 0, Field::GuestCr0, "PG needs PE");
        self.require(cr4 & CR4_CET == 0 || cr0 & CR0_WP != 0, Field::GuestCr4, "CET needs CR0.WP");
        if self.is_ia32e() {
            self.require(cr0 & CR0_PG != 0, Field::GuestCr0, "an IA-32e mode guest has PG");
            self.require(cr4 & CR4_PAE != 0, Field::GuestCr4, "an IA-32e mode guest has PAE");
        } else {
            self.require(cr4 & CR4_PCIDE == 0, Field::GuestCr4, "PCIDE needs an IA-32e mode guest");
        }
        self.require_clear(Field::GuestCr3, u64::MAX << PHYSICAL_WIDTH, "beyond the physical address width");
    }

    fn guest_msrs(&mut self) {
        for field in [Field::GuestSysenterEsp, Field::GuestSysenterEip] {
            self.require_canonical(field);
        }
        if self.has_entry(entry::LOAD_DEBUG_CONTROLS) {
            self.require_clear(Field::GuestIa32Debugctl, !DEBUGCTL_DEFINED, "reserved");
            self.require_clear(Field::GuestDr7, 0xFFFF_FFFF_0000_0000, "upper half");
        }
        if self.has_entry(entry::LOAD_PAT) {
            self.require_pat(Field::GuestIa32Pat);
        }
        if self.has_entry(entry::LOAD_EFER) {
            let efer = self.get(Field::GuestIa32Efer);
            self.require_clear(Field::GuestIa32Efer, !EFER_DEFINED, "reserved");
            let (lma, lme) = (efer & EFER_LMA != 0, efer & EFER_LME != 0);
            let holds = lma == self.is_ia32e();
            self.require(
                holds,
                Field::GuestIa32Efer,
                "LMA must equal the entry control \"IA-32e mode guest\"",
            );
            let holds = self.get(Field::GuestCr0) & CR0_PG == 0 || lma == lme;
            self.require(holds, Field::GuestIa32Efer, "with paging LMA must equal LME");
        }
    }

    fn instruction_pointer_and_flags(&mut self) {
        let rip = self.get(Field::GuestRip);
        if self.is_ia32e() && self.get_32(Field::GuestCsAccessRights) & LONG != 0 {
            let upper = rip as i64 >> self.linear_width();
            self.require(upper == 0 || upper == -1, Field::GuestRip, "the unused upper bits must be equal");
        } else {
            self.require_clear(Field::GuestRip, 0xFFFF_FFFF_0000_0000, "CS is no 64-bit segment");
        }
        let rflags = self.get(Field::GuestRflags);
        self.require_clear(Field::GuestRflags, RFLAGS_ZERO, "reserved");
        self.require(rflags & RFLAGS_ONE != 0, Field::GuestRflags, "bit 1 must be 1");
        if rflags & RFLAGS_VM != 0 {
            let holds = !self.is_ia32e() && self.get(Field::GuestCr0) & CR0_PE != 0;
            self.require(holds, Field::GuestRflags, "VM is for protected mode outside IA-32e mode");
        }
        if self.injects(interruption::EXTERNAL_INTERRUPT) {
            self.require(rflags & RFLAGS_IF != 0, Field::GuestRflags, "an injected interrupt needs IF");
        }
    }

    /// Whether the entry injects an event of this type.
    fn injects(&mut self, kind: u32) -> bool {
        let info = self.get_32(Field::EntryInterruptionInfo);
        info & interruption::VALID != 0 && info & interruption::TYPE == kind
    }

    fn activity(&mut self) {
        const FIELD: Field = Field::GuestActivityState;
        let state = self.get_32(FIELD);
        if state == activity::ACTIVE {
            return;
        }
        let offered = self.capabilities.allows_activity_state(state);
        self.require(offered, FIELD, "a state that the processor does not offer (IA32_VMX_MISC bits 6-8)");
        let blocked = self.get_32(Field::GuestInterruptibility)
            & (interruptibility::BLOCKING_BY_STI | interruptibility::BLOCKING_BY_MOV_SS);
        self.require(blocked == 0, FIELD, "must be active in the shadow of STI or MOV SS");
        if state == activity::HLT {
            let dpl = self.get_32(Field::GuestSsAccessRights) >> 5 & 0b11;
            self.require(dpl == 0, FIELD, "HLT is for privilege level 0");
        }
        let info = self.get_32(Field::EntryInterruptionInfo);
        if info & interruption::VALID != 0 {
            let (kind, vector) = (info & interruption::TYPE, info & interruption::VECTOR);
            let is_exception = kind == interruption::HARDWARE_EXCEPTION;
            let holds = match state {
                activity::HLT => match kind {
                    interruption::EXTERNAL_INTERRUPT | interruption::NMI => true,
                    interruption::HARDWARE_EXCEPTION => matches!(vector, DEBUG | MACHINE_CHECK),
                    interruption::OTHER_EVENT => vector == 0,
                    _ => false,
                },
                activity::SHUTDOWN => kind == interruption::NMI || is_exception && vector == MACHINE_CHECK,
                _ => false,
            };
            self.require(holds, FIELD, "the injected event cannot occur in this state");
        }
    }

    fn interruptibility(&mut self) {
        use interruptibility::{
            BLOCKING_BY_MOV_SS, BLOCKING_BY_NMI, BLOCKING_BY_SMI, BLOCKING_BY_STI, ENCLAVE,
        };
        const FIELD: Field = Field::GuestInterruptibility;
        let value = self.get_32(FIELD);
        let (sti, mov_ss) = (value & BLOCKING_BY_STI != 0, value & BLOCKING_BY_MOV_SS != 0);
        self.require_clear(FIELD, 0xFFFF_FFE0, "reserved");
        self.require_clear(FIELD, u64::from(BLOCKING_BY_SMI), "SMIs are blocked in SMM only");
        self.require_clear(FIELD, u64::from(ENCLAVE), "no guest runs in an enclave");
        self.require(!sti || !mov_ss, FIELD, "blocking by STI and by MOV SS exclude each other");
        let holds = !sti || self.get(Field::GuestRflags) & RFLAGS_IF != 0;
        self.require(holds, FIELD, "blocking by STI needs RFLAGS.IF");
        if self.injects(interruption::EXTERNAL_INTERRUPT) {
            self.require(!sti && !mov_ss, FIELD, "an interrupt is injected while interrupts are blocked");
        }
        if self.injects(interruption::NMI) {
            self.require(!mov_ss, FIELD, "an NMI is injected while MOV SS blocks it");
            self.require(!sti, FIELD, "an NMI is injected while STI blocks it, which some processors refuse");
            let holds = value & BLOCKING_BY_NMI == 0 || !self.has_pin(pin::VIRTUAL_NMIS);
            self.require(holds, FIELD, "an NMI is injected while NMIs are blocked");
        }
    }

    fn pending_debug_exceptions(&mut self) {
        const FIELD: Field = Field::GuestPendingDebugExceptions;
        self.require_clear(FIELD, !PENDING_DEFINED, "reserved");
        let blocked = self.get_32(Field::GuestInterruptibility)
            & (interruptibility::BLOCKING_BY_STI | interruptibility::BLOCKING_BY_MOV_SS)
            != 0;
        if !blocked && self.get_32(Field::GuestActivityState) != activity::HLT {
            return;
        }
        let steps = self.get(Field::GuestRflags) & RFLAGS_TF != 0
            && self.get(Field::GuestIa32Debugctl) & DEBUGCTL_BTF == 0;
        let pending = self.get(FIELD) & PENDING_SINGLE_STEP != 0;
        self.require(
            steps == pending,
            FIELD,
            "in a shadow or HLT, bit 14 must be set if and only if TF is set and BTF clear",
        );
    }

    /// With VMCS shadowing it leads to a VMCS of the right revision, which cannot be seen from here.
    fn link_pointer(&mut self) {
        const FIELD: Field = Field::VmcsLinkPointer;
        let holds = self.get(FIELD) == u64::MAX || self.has_secondary(secondary::VMCS_SHADOWING);
        self.require(holds, FIELD, "must be all ones where VMCS shadowing is off");
    }

    fn pdptes(&mut self) {
        const PRESENT: u64 = 1 << 0;
        const RESERVED: u64 = 0b11 << 1 | 0b1111 << 5 | u64::MAX << PHYSICAL_WIDTH;
        let pages_by_pdptes = self.get(Field::GuestCr0) & CR0_PG != 0
            && self.get(Field::GuestCr4) & CR4_PAE != 0
            && !self.is_ia32e();
        if !pages_by_pdptes || !self.has_secondary(secondary::EPT) {
            return;
        }
        for field in [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3] {
            if self.get(field) & PRESENT != 0 {
                self.require_clear(field, RESERVED, "reserved");
            }
        }
    }
}
