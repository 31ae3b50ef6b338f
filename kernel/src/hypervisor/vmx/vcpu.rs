//! A vCPU on VMX: its VMCS, and what exits mean.
//!
//! Intel SDM vol. 3, 25.4 (guest state), 25.6-25.9 (controls and exit information), 26 (non-root operation), 27.6 (event injection), 28
//! (exits), appendix C (exit reasons).

use super::controls::{Controls, entry, exit, pin, primary, secondary};
use super::enter::{EXITED, enter, exit_point};
use super::entry_checks;
use super::exit_reason::{self, CrAccess, PioAccess, ept_violation, interruption, reason};
use super::fields::Field;
use super::host_state;
use super::vmcs::{CachedField, Vmcs};
use super::{Shared, ept};
use crate::cpu::{apic, clock};
use crate::hypervisor::backend::VendorVcpu;
use crate::hypervisor::exit::Exit;
use alloc::rc::Rc;
use core::arch::asm;
use core::cell::Cell;
use core::ops::RangeInclusive;
use nestling_machine::address::{GuestPhysAddr, Vector};
use nestling_machine::state::{
    ControlRegisters, CpuState, DR6_SINGLE_STEP, EFER_LMA, EFER_LME, Exception, Gpr, Registers, Segment,
    SegmentRegister, VcpuState,
};
use x86_64::registers::model_specific::Msr;

const CR0_PE: u64 = 1 << 0;
const CR0_NE: u64 = 1 << 5;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// Bits of CR0 whose real values are L1's: VMX wants NE set, and neither entry nor exit switches NW and CD.
const CR0_HOST_OWNED: u64 = CR0_NE | CR0_NW | CR0_CD;
const CR4_PAE: u64 = 1 << 5;
const CR4_VMXE: u64 = 1 << 13;
const CR4_PCIDE: u64 = 1 << 17;
/// Bits of CR4 that a guest may set: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, PCIDE, OSXSAVE, SMEP,
/// SMAP, PKE. All others belong to features that CPUID hides.
const CR4_GUEST_OWNED: u64 = 0x0077_0FFF;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_IF: u64 = 1 << 9;
const DR6_CAUSES: u64 = 0x600F;
const DR6_ADDRESSES: u64 = 0xF;
const DR7_RESET: u64 = 0x400;
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE: guests reach them without an exit, and L1 has no use for them.
const SWITCHED_MSRS: [u32; 5] = [0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102];

const DEBUG_EXCEPTION: u8 = 1;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// Interruptibility: blocking by STI and by MOV SS.
const SHADOW: u64 = 0b11;
/// Interruptibility: blocking by NMI.
const NMI_BLOCKED: u64 = 1 << 3;

/// Access rights: the segment is unusable.
const UNUSABLE: u64 = 1 << 16;
const BUSY_TSS: u64 = 0x8B;
/// Access rights of a code segment: conforming.
const CODE_CONFORMING: u64 = 1 << 2;

/// A vCPU's VMCS and what the VMCS does not hold.
pub struct VmxVcpu {
    vmcs: Vmcs,
    controls: Controls,
    ept_pointer: u64,
    vpid: u16,
    launched: bool,
    host_rsp: u64,
    /// RAX to R15 but for RSP; RIP and RFLAGS here are not used.
    registers: Registers,
    rip: CachedField,
    rsp: CachedField,
    rflags: CachedField,
    cr0: CachedField,
    cr4: CachedField,
    cr3: CachedField,
    code_access_rights: CachedField,
    interruptibility: CachedField,
    /// The guest's idea of the bits of CR0 that L1 owns.
    cr0_shadow: u64,
    /// EFER as the guest wrote it; LMA follows CR0.PG.
    efer: u64,
    /// What is not in the VMCS, while the vCPU is off the core.
    dr6: u64,
    cr2: u64,
    msrs: [u64; 5],
    /// The event to inject at the next entry, as the entry interruption information has it; 0 for none.
    event: u32,
    event_error: u32,
    nmi_pending: bool,
    /// Whether an NMI was ever injected: only then can IRET change anything.
    nmi_seen: bool,
    task_priority: u8,
    /// Exits that are wanted once the guest can take what is pending, and what the VMCS has of them.
    windows: u32,
    windows_written: u32,
    accepted: Option<Vector>,
    timer: Timer,
    reason: Cell<u32>,
    shared: Rc<Shared>,
}

/// The preemption timer, which counts down while the guest runs. Times are values of the TSC.
#[derive(Default)]
struct Timer {
    /// What was last written to the field, in TSC ticks.
    ticks: u64,
    /// When it will have counted down, if nothing stops it.
    fires: u64,
    /// When it last stopped, at an exit.
    stopped: u64,
    /// It has counted down; also before the first entry. A stopped timer of value 0 ends the next run at once.
    expired: bool,
}

impl VmxVcpu {
    pub(super) fn new(nested_root: u64, state: &VcpuState, vpid: u16, shared: Rc<Shared>) -> Self {
        let vmcs = Vmcs::new(shared.capabilities.revision());
        let s = &state.system;
        let mut vcpu = Self {
            vmcs,
            controls: shared.controls,
            ept_pointer: ept::pointer(nested_root, shared.has_access_dirty()),
            vpid,
            launched: false,
            host_rsp: 0,
            registers: state.registers,
            rip: CachedField::new(Field::GuestRip),
            rsp: CachedField::new(Field::GuestRsp),
            rflags: CachedField::new(Field::GuestRflags),
            cr0: CachedField::new(Field::GuestCr0),
            cr4: CachedField::new(Field::GuestCr4),
            cr3: CachedField::new(Field::GuestCr3),
            code_access_rights: CachedField::new(Field::GuestCsAccessRights),
            interruptibility: CachedField::new(Field::GuestInterruptibility),
            cr0_shadow: s.cr0,
            efer: s.efer & !EFER_LMA,
            dr6: s.dr6,
            cr2: s.cr2,
            msrs: [0; 5],
            event: 0,
            event_error: 0,
            nmi_pending: false,
            nmi_seen: false,
            task_priority: 0,
            windows: 0,
            windows_written: 0,
            accepted: None,
            timer: Timer { expired: true, ..Timer::default() },
            reason: Cell::new(0),
            shared,
        };
        vcpu.write_controls();
        host_state::write(&vcpu.vmcs, exit_point());
        vcpu.write_guest_state(state);
        // Frames and VPIDs are used again: nothing of their former owners may be left.
        vcpu.flush();
        vcpu.vmcs.count_from_here();
        vcpu
    }

    fn write_controls(&self) {
        let (v, c) = (&self.vmcs, &self.controls);
        v.write(Field::PinControls, u64::from(c.pin));
        v.write(Field::PrimaryControls, u64::from(c.primary));
        v.write(Field::SecondaryControls, u64::from(c.secondary));
        v.write(Field::ExitControls, u64::from(c.exit));
        let exceptions = 1 << DEBUG_EXCEPTION | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;
        v.write(Field::ExceptionBitmap, exceptions);
        v.write(Field::PageFaultErrorCodeMask, 0);
        v.write(Field::PageFaultErrorCodeMatch, 0);
        v.write(Field::Cr3TargetCount, 0);
        v.write(Field::ExitMsrStoreCount, 0);
        v.write(Field::ExitMsrLoadCount, 0);
        v.write(Field::EntryMsrLoadCount, 0);
        v.write(Field::EntryInterruptionInfo, 0);
        v.write(Field::MsrBitmap, self.shared.msr_bitmap.physical());
        v.write(Field::EptPointer, self.ept_pointer);
        v.write(Field::Cr0Mask, CR0_HOST_OWNED);
        v.write(Field::Cr4Mask, !CR4_GUEST_OWNED);
        v.write(Field::Cr4ReadShadow, 0);
        if c.secondary & secondary::VPID != 0 {
            v.write(Field::Vpid, u64::from(self.vpid));
        }
        if c.secondary & secondary::XSAVES != 0 {
            v.write(Field::XssExitingBitmap, u64::MAX);
        }
        if c.pin & pin::PREEMPTION_TIMER != 0 {
            v.write(Field::GuestPreemptionTimer, 0);
        }
    }

    fn write_guest_state(&self, state: &VcpuState) {
        let (v, s) = (&self.vmcs, &state.system);
        for (name, segment) in [
            (&CS, &s.cs),
            (&DS, &s.ds),
            (&ES, &s.es),
            (&FS, &s.fs),
            (&GS, &s.gs),
            (&SS, &s.ss),
            (&LDTR, &s.ldtr),
            (&TR, &s.tr),
        ] {
            v.write(name.selector, u64::from(segment.selector));
            v.write(name.base, segment.base);
            v.write(name.limit, u64::from(segment.limit));
            v.write(name.access_rights, access_rights(segment));
        }
        if s.tr.attributes == 0 {
            // The processor insists on a task register, which a guest that has not loaded one cannot tell.
            v.write(Field::GuestTrAccessRights, BUSY_TSS);
            v.write(Field::GuestTrLimit, 0xFFFF);
        }
        v.write(Field::GuestGdtrBase, s.gdtr.base);
        v.write(Field::GuestGdtrLimit, u64::from(s.gdtr.limit));
        v.write(Field::GuestIdtrBase, s.idtr.base);
        v.write(Field::GuestIdtrLimit, u64::from(s.idtr.limit));
        v.write(Field::GuestCr0, s.cr0 & !CR0_HOST_OWNED | CR0_NE);
        v.write(Field::Cr0ReadShadow, s.cr0);
        v.write(Field::GuestCr3, s.cr3);
        v.write(Field::GuestCr4, s.cr4 & CR4_GUEST_OWNED | CR4_VMXE);
        v.write(Field::GuestIa32Efer, s.efer);
        let long = if s.efer & EFER_LMA != 0 { entry::IA32E_MODE_GUEST } else { 0 };
        v.write(Field::EntryControls, u64::from(self.controls.entry | long));
        v.write(Field::GuestDr7, if s.dr7 == 0 { DR7_RESET } else { s.dr7 });
        v.write(Field::GuestIa32Debugctl, 0);
        v.write(Field::GuestSysenterCs, 0);
        v.write(Field::GuestSysenterEsp, 0);
        v.write(Field::GuestSysenterEip, 0);
        v.write(Field::GuestRip, state.registers.rip);
        v.write(Field::GuestRsp, state.registers.get(Gpr::Rsp));
        v.write(Field::GuestRflags, state.registers.rflags | 1 << 1);
        v.write(Field::GuestInterruptibility, 0);
        v.write(Field::GuestActivityState, 0);
        v.write(Field::GuestPendingDebugExceptions, 0);
        v.write(Field::VmcsLinkPointer, u64::MAX);
    }

    /// Notes which event the exit cut short, so that the next entry delivers it again. Only some exits can do that.
    fn keep_interrupted_event(&mut self) -> bool {
        let info = self.vmcs.read(Field::IdtVectoringInfo) as u32;
        if info & interruption::VALID == 0 {
            return false;
        }
        // INT n and its like have not changed RIP: the instruction runs again instead.
        if !interruption::is_software(info) {
            self.event = info & !interruption::NMI_UNBLOCKED;
            if info & interruption::HAS_ERROR_CODE != 0 {
                self.event_error = self.vmcs.read(Field::IdtVectoringErrorCode) as u32;
            }
            if info & interruption::TYPE == interruption::NMI {
                self.interruptibility.set(self.interruptibility.get(&self.vmcs) & !NMI_BLOCKED);
            }
        }
        true
    }

    /// Delivers a pending NMI, or asks for an exit as soon as that is possible.
    fn deliver_nmi(&mut self) {
        if self.can_take_nmi() {
            self.event = interruption::VALID | interruption::NMI | 2;
            self.nmi_pending = false;
            self.nmi_seen = true;
        } else {
            self.windows |= primary::NMI_WINDOW_EXITING;
        }
    }

    fn can_take_nmi(&self) -> bool {
        self.event == 0 && self.interruptibility.get(&self.vmcs) & (SHADOW | NMI_BLOCKED) == 0
    }

    /// An IRET that faulted had already ended the blocking of NMIs: it has to block them again until it succeeds.
    fn block_nmi_again(&self, unblocked: bool) {
        if unblocked {
            self.interruptibility.set(self.interruptibility.get(&self.vmcs) | NMI_BLOCKED);
        }
    }

    fn exit(&mut self) -> Exit {
        let full = self.vmcs.read(Field::ExitReason) as u32;
        self.reason.set(full);
        if full & exit_reason::ENTRY_FAILURE != 0 {
            return self.unexpected();
        }
        match full & exit_reason::BASIC {
            reason::EXCEPTION_OR_NMI => self.exception(),
            reason::EXTERNAL_INTERRUPT => Exit::Interrupt,
            reason::PREEMPTION_TIMER => {
                self.timer.expired = true;
                Exit::Timer
            }
            reason::TRIPLE_FAULT => Exit::Shutdown,
            reason::INTERRUPT_WINDOW | reason::NMI_WINDOW => Exit::InterruptWindow,
            reason::CPUID => Exit::Cpuid,
            reason::HLT => Exit::Hlt,
            reason::INVD | reason::WBINVD => Exit::CacheFlush,
            reason::RDMSR => Exit::ReadMsr,
            reason::WRMSR => Exit::WriteMsr,
            reason::CR_ACCESS => self.control_register(),
            reason::IO_INSTRUCTION => self.pio(),
            reason::XSETBV => Exit::Xsetbv,
            reason::RDPMC => Exit::Faulting(Exception::GENERAL_PROTECTION),
            reason::GETSEC
            | reason::VMCALL..=reason::VMXON
            | reason::MWAIT
            | reason::MONITOR
            | reason::INVEPT
            | reason::INVVPID
            | reason::VMFUNC => Exit::Faulting(Exception::UNDEFINED),
            reason::EPT_VIOLATION => {
                let delivering = self.keep_interrupted_event();
                if self.rflags() & RFLAGS_TF != 0 {
                    // The instruction has not run, so its trap is not due; Bochs notes it all the same.
                    self.vmcs.write(Field::GuestPendingDebugExceptions, 0);
                }
                if self.nmi_seen && !delivering {
                    let qualification = self.vmcs.read(Field::ExitQualification);
                    self.block_nmi_again(qualification & ept_violation::NMI_UNBLOCKED != 0);
                }
                // A walk of the guest's page tables that ends here is found out by emulation, which walks them again.
                let address = GuestPhysAddr(self.vmcs.read(Field::GuestPhysicalAddress));
                Exit::NestedFault { address, by_instruction: !delivering }
            }
            _ => self.unexpected(),
        }
    }

    fn unexpected(&self) -> Exit {
        Exit::Unexpected {
            code: u64::from(self.reason.get()),
            info1: self.vmcs.read(Field::ExitQualification),
            info2: self.vmcs.read(Field::GuestPhysicalAddress),
        }
    }

    fn exception(&mut self) -> Exit {
        let delivering = self.keep_interrupted_event();
        let info = self.vmcs.read(Field::ExitInterruptionInfo) as u32;
        if info & interruption::TYPE == interruption::NMI {
            return Exit::Nmi;
        }
        let vector = info as u8;
        if vector == MACHINE_CHECK {
            return Exit::MachineCheck;
        }
        if self.nmi_seen && !delivering {
            self.block_nmi_again(info & interruption::NMI_UNBLOCKED != 0);
        }
        if vector == DEBUG_EXCEPTION {
            self.debug_exception(info);
        }
        let error_code = (info & interruption::HAS_ERROR_CODE != 0)
            .then(|| self.vmcs.read(Field::ExitInterruptionErrorCode) as u32);
        Exit::Exception(Exception { vector: Vector(vector), error_code, cr2: None })
    }

    /// What the processor does to DR6 and DR7 when it delivers #DB, and leaves to the hypervisor when #DB exits (28.2.1, 28.3.1).
    fn debug_exception(&self, info: u32) {
        if info & interruption::TYPE == interruption::PRIVILEGED_SOFTWARE_EXCEPTION {
            // INT1 sets no bit, and is delivered as a trap.
            self.rip.set(self.rip().wrapping_add(self.vmcs.read(Field::ExitInstructionLength)));
            return;
        }
        let causes = self.vmcs.read(Field::ExitQualification) & DR6_CAUSES;
        write_dr6(read_dr6() & !DR6_ADDRESSES | causes);
        let dr7 = self.vmcs.read(Field::GuestDr7);
        if dr7 & DR7_GENERAL_DETECT != 0 {
            self.vmcs.write(Field::GuestDr7, dr7 & !DR7_GENERAL_DETECT);
        }
        if self.rflags() & RFLAGS_TF != 0 && self.interruptibility.get(&self.vmcs) & SHADOW != 0 {
            // Entry insists on a single step being pending after STI and MOV SS (27.3.1.5).
            let pending = self.vmcs.read(Field::GuestPendingDebugExceptions);
            self.vmcs.write(Field::GuestPendingDebugExceptions, pending | DR6_SINGLE_STEP);
        }
    }

    fn pio(&self) -> Exit {
        let access = PioAccess::decode(self.vmcs.read(Field::ExitQualification));
        if access.string {
            return Exit::StringPio;
        }
        Exit::Pio {
            port: access.port,
            width: access.width,
            input: access.input,
            next_rip: self.rip().wrapping_add(self.vmcs.read(Field::ExitInstructionLength)),
        }
    }

    fn control_register(&mut self) -> Exit {
        let access = CrAccess::decode(self.vmcs.read(Field::ExitQualification));
        match access {
            CrAccess::Write { cr: 8, gpr } => {
                Exit::TaskPriority { register: Gpr::from_number(gpr), write: true }
            }
            CrAccess::Read { cr: 8, gpr } => {
                Exit::TaskPriority { register: Gpr::from_number(gpr), write: false }
            }
            CrAccess::Write { cr: 0, gpr } => self.write_cr0(self.gpr(Gpr::from_number(gpr))),
            // Only a bit that no guest may set differs from what the guest reads.
            CrAccess::Write { cr: 4, .. } => Exit::Faulting(Exception::GENERAL_PROTECTION),
            _ => self.unexpected(),
        }
    }

    /// MOV to CR0 that changes bits of L1's. The guest gets to see them as it wants them, and runs the instruction again: with nothing of
    /// L1's to change, the processor carries it out, a switch of mode included.
    fn write_cr0(&mut self, value: u64) -> Exit {
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
        self.code_access_rights.get(&self.vmcs) & 1 << 13 != 0
    }

    fn is_64_bit(&self) -> bool {
        self.efer() & EFER_LMA != 0 && self.code_is_long()
    }

    fn write_back(&mut self) {
        for field in [&self.rip, &self.rsp, &self.rflags, &self.interruptibility] {
            field.write_back(&self.vmcs);
        }
        if self.windows != self.windows_written {
            self.vmcs.write(Field::PrimaryControls, u64::from(self.controls.primary | self.windows));
            self.windows_written = self.windows;
        }
        if self.event != 0 {
            // The exit clears the field's valid bit, so it need not be written when there is nothing to inject.
            self.vmcs.write(Field::EntryInterruptionInfo, u64::from(self.event));
            if self.event & interruption::HAS_ERROR_CODE != 0 {
                self.vmcs.write(Field::EntryExceptionErrorCode, u64::from(self.event_error));
            }
            self.event = 0;
        }
    }

    fn forget(&self) {
        for field in [
            &self.rip,
            &self.rsp,
            &self.rflags,
            &self.cr0,
            &self.cr3,
            &self.cr4,
            &self.code_access_rights,
            &self.interruptibility,
        ] {
            field.forget();
        }
    }
}

/// The fields of a segment register.
struct SegmentFields {
    selector: Field,
    base: Field,
    limit: Field,
    access_rights: Field,
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
        $(const $name: SegmentFields = SegmentFields {
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
fn access_rights(segment: &Segment) -> u64 {
    const PRESENT: u16 = 1 << 7;
    let packed = u64::from(segment.attributes);
    if segment.attributes & PRESENT == 0 { UNUSABLE } else { packed & 0xFF | (packed & 0xF00) << 4 }
}

/// VMX's form of a segment's attributes to the shared packed one, in which an unusable segment is not present.
const fn attributes(access_rights: u64) -> u16 {
    if access_rights & UNUSABLE != 0 { 0 } else { (access_rights & 0xFF | access_rights >> 4 & 0xF00) as u16 }
}

fn read_dr6() -> u64 {
    let value: u64;
    // SAFETY: reads a register that only guests use.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

fn write_dr6(value: u64) {
    // SAFETY: a register that only guests use; the upper half, which must be zero, comes from the processor or is cut off.
    unsafe { asm!("mov dr6, {}", in(reg) value & 0xFFFF_FFFF, options(nomem, nostack, preserves_flags)) };
}

impl ControlRegisters for VmxVcpu {
    fn cr0(&self) -> u64 {
        self.cr0.get(&self.vmcs) & !CR0_HOST_OWNED | self.cr0_shadow & CR0_HOST_OWNED
    }

    fn cr4(&self) -> u64 {
        self.cr4.get(&self.vmcs) & CR4_GUEST_OWNED
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

impl VendorVcpu for VmxVcpu {
    fn set_efer(&mut self, value: u64) {
        self.efer = value & !EFER_LMA;
        let value = self.efer();
        self.vmcs.write(Field::GuestIa32Efer, value);
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcs.write(Field::TscOffset, offset);
    }

    fn task_priority(&self) -> u8 {
        self.task_priority
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.task_priority = priority;
    }

    fn next_rip(&self) -> Option<u64> {
        Some(self.rip().wrapping_add(self.vmcs.read(Field::ExitInstructionLength)))
    }

    fn clear_interrupt_shadow(&mut self) {
        self.interruptibility.set(self.interruptibility.get(&self.vmcs) & !SHADOW);
    }

    fn inject(&mut self, exception: Exception) {
        if self.event != 0 {
            return;
        }
        self.event = interruption::VALID | interruption::HARDWARE_EXCEPTION | u32::from(exception.vector.0);
        // Real mode pushes no error codes.
        if let Some(code) = exception.error_code.filter(|_| self.cr0() & CR0_PE != 0) {
            self.event |= interruption::HAS_ERROR_CODE;
            self.event_error = code;
        }
        if let Some(cr2) = exception.cr2 {
            // SAFETY: while a guest is on the core the register is the guest's; L1 has no page fault that it survives.
            unsafe { asm!("mov cr2, {}", in(reg) cr2, options(nomem, nostack, preserves_flags)) };
        }
    }

    fn inject_nmi(&mut self) {
        self.nmi_pending = true;
    }

    fn offer_interrupt(&mut self, vector: Option<Vector>) {
        self.windows &= !primary::INTERRUPT_WINDOW_EXITING;
        let Some(vector) = vector.filter(|vector| vector.0 >> 4 > self.task_priority) else { return };
        // An NMI comes first.
        let open = self.event == 0
            && !(self.nmi_pending && self.can_take_nmi())
            && self.rflags() & RFLAGS_IF != 0
            && self.interruptibility.get(&self.vmcs) & SHADOW == 0;
        if open {
            self.event = interruption::VALID | interruption::EXTERNAL_INTERRUPT | u32::from(vector.0);
            self.accepted = Some(vector);
        } else {
            self.windows |= primary::INTERRUPT_WINDOW_EXITING;
        }
    }

    fn take_accepted(&mut self) -> Option<Vector> {
        self.accepted.take()
    }

    fn flush(&mut self) {
        self.shared.forget_translations(self.ept_pointer, self.vpid);
    }

    fn load(&mut self) {
        // SAFETY: L1 uses neither CR2 nor a breakpoint that could show in DR6.
        unsafe { asm!("mov cr2, {}", in(reg) self.cr2, options(nomem, nostack, preserves_flags)) };
        write_dr6(self.dr6);
        for (index, value) in SWITCHED_MSRS.into_iter().zip(self.msrs) {
            // SAFETY: registers of 64-bit mode that L1 does not use; the values are the processor's own, or zero.
            unsafe { Msr::new(index).write(value) };
        }
        self.vmcs.make_current();
    }

    fn unload(&mut self) {
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cr2", out(reg) self.cr2, options(nomem, nostack, preserves_flags)) };
        self.dr6 = read_dr6();
        for (index, value) in SWITCHED_MSRS.into_iter().zip(&mut self.msrs) {
            // SAFETY: registers of 64-bit mode.
            *value = unsafe { Msr::new(index).read() };
        }
    }

    fn arm(&mut self, due: Option<RangeInclusive<u64>>) {
        if self.controls.pin & pin::PREEMPTION_TIMER == 0 {
            return apic::timer_arm(due.map(|due| *due.end()));
        }
        let shift = self.shared.capabilities.preemption_timer_shift();
        let now = clock::tsc();
        // What lies beyond the field's range is looked at again when half of the range has passed.
        let far = now.saturating_add(1 << 31 << shift);
        let (due_from, due_to) = match due {
            Some(due) => (clock::tsc_at(*due.start()).min(far), clock::tsc_at(*due.end())),
            None => (far, u64::MAX),
        };
        if self.controls.exit & exit::SAVE_PREEMPTION_TIMER == 0 {
            // Every entry starts it anew from the field.
            self.timer.fires = now.saturating_add(self.timer.ticks);
        } else if !self.timer.expired {
            // It stood still since the exit.
            self.timer.fires = self.timer.fires.saturating_add(now.saturating_sub(self.timer.stopped));
        }
        // A little later will do: not every exit is worth a write.
        let tolerance = (due_to.saturating_sub(due_from) / 8).max(self.shared.timer_tolerance);
        if !self.timer.expired && (due_from..=due_to.saturating_add(tolerance)).contains(&self.timer.fires) {
            return;
        }
        let count = (due_to.saturating_sub(now) >> shift).min(u64::from(u32::MAX));
        self.timer.expired = false;
        self.timer.ticks = count << shift;
        self.timer.fires = now.saturating_add(self.timer.ticks);
        self.vmcs.write(Field::GuestPreemptionTimer, count);
    }

    fn accesses(&self) -> u64 {
        self.vmcs.accesses()
    }

    fn run(&mut self) -> Exit {
        self.windows &= !primary::NMI_WINDOW_EXITING;
        if self.nmi_pending {
            self.deliver_nmi();
        }
        self.vmcs.make_current();
        self.write_back();
        let host_rsp = self.host_rsp;
        // SAFETY: the VMCS is current and `launched` is what became of it; `host_state` filled its host state on this core. The nested
        // page table maps only the machine's own frames, and the MSR bitmap and controls keep everything else away from the guest.
        let result = unsafe { enter(&raw mut self.registers, &raw mut self.host_rsp, self.launched) };
        if self.host_rsp != host_rsp {
            self.vmcs.count_access();
        }
        self.forget();
        self.timer.stopped = clock::tsc();
        if result != EXITED {
            log::error!("VM entry failed: {}", self.vmcs.last_error());
            self.reason.set(exit_reason::ENTRY_FAILURE);
            return Exit::Unexpected { code: u64::from(exit_reason::ENTRY_FAILURE), info1: result, info2: 0 };
        }
        self.launched = true;
        self.exit()
    }

    fn dump(&self) {
        let (v, reason) = (&self.vmcs, self.reason.get());
        let get = |field| v.try_read(field).unwrap_or(0);
        log::error!(
            "vmcs: exit {reason:#x} ({}), qualification {:#x}, guest physical {:#x}, vectoring {:#x}, instruction length {}",
            exit_reason::name(reason),
            get(Field::ExitQualification),
            get(Field::GuestPhysicalAddress),
            get(Field::IdtVectoringInfo),
            get(Field::ExitInstructionLength),
        );
        log::error!(
            "vmcs: rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} interruptibility {:#x} cs {:x?} ss {:x?}; gpr {:x?}",
            get(Field::GuestRip),
            get(Field::GuestRsp),
            get(Field::GuestRflags),
            get(Field::GuestCr0),
            get(Field::GuestCr3),
            get(Field::GuestCr4),
            get(Field::GuestIa32Efer),
            get(Field::GuestInterruptibility),
            self.segment(SegmentRegister::Cs),
            self.segment(SegmentRegister::Ss),
            self.registers.gpr,
        );
        if reason & exit_reason::ENTRY_FAILURE != 0 {
            for check in entry_checks::failing(&mut |field| get(field), &self.shared.capabilities) {
                log::error!("vmcs: {check}");
            }
        }
    }
}
