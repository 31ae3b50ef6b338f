//! A vCPU on VMX: its VMCS and what the VMCS does not hold, entry and exit.
//!
//! Intel SDM vol. 3, 25.4 (guest state), 25.6-25.8 (controls), 27 (entries).

mod events;
mod exits;
mod registers;
mod snapshot;
mod timer;

use super::controls::{Controls, allows, entry, exit, pin, primary, secondary};
use super::enter::{EXITED, enter, exit_point};
use super::exit_reason::{self, interruption};
use super::fields::Field;
use super::host_state;
use super::vmcs::{CachedField, Vmcs};
use super::{Shared, ept};
use crate::cpu::apic;
use crate::cpu::guest_registers::{load_cr2, read_cr2};
use crate::hypervisor::backend::VendorVcpu;
use crate::hypervisor::exit::Exit;
use alloc::sync::Arc;
use core::cell::Cell;
use core::ops::RangeInclusive;
use events::SHADOW;
use nestling_machine::address::Vector;
use nestling_machine::state::{ControlRegisters, CpuState, EFER_LMA, Exception, Gpr, Registers, VcpuState};
use registers::{
    CR0_HOST_OWNED, CR0_NE, CR4_GUEST_OWNED, CR4_MCE, CR4_VMXE, CS, DS, ES, FS, GS, LDTR, SS, TR,
    access_rights, read_dr6, write_dr6,
};
pub use snapshot::Snapshot;
use timer::Timer;
use x86_64::registers::model_specific::Msr;

const RFLAGS_TF: u64 = 1 << 8;
/// STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE: guests reach them without an exit, and L1 has no use for them.
const SWITCHED_MSRS: [u32; 5] = [0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102];

/// Within how many TSC ticks of the last one a PAUSE belongs to the same loop.
const PAUSE_LOOP_GAP: u64 = 128;
/// How many ticks such a loop lasts before it exits: longer than a lock is held by a vCPU that runs.
const PAUSE_LOOP_WINDOW: u64 = 100_000;
const DEBUG_EXCEPTION: u8 = 1;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// A vCPU's VMCS and what the VMCS does not hold.
pub struct VmxVcpu {
    vmcs: Vmcs,
    controls: Controls,
    ept_pointer: u64,
    vpid: u16,
    /// Its VMCS is active on the core that has it, with that core's host state.
    is_on_core: bool,
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
    /// The guest's idea of CR4.MCE.
    cr4_shadow: u64,
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
    shared: Arc<Shared>,
}

impl VmxVcpu {
    pub(super) fn new(nested_root: u64, state: &VcpuState, vpid: u16, shared: Arc<Shared>) -> Self {
        let vmcs = Vmcs::new(shared.capabilities.revision());
        let s = &state.system;
        let mut vcpu = Self {
            vmcs,
            controls: shared.controls,
            ept_pointer: ept::pointer(nested_root),
            vpid,
            is_on_core: true,
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
            cr4_shadow: s.cr4 & CR4_MCE,
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
            timer: Timer::new(
                shared.capabilities.preemption_timer_shift(),
                shared.controls.exit & exit::SAVE_PREEMPTION_TIMER != 0,
            ),
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
        v.write(Field::Cr4ReadShadow, self.cr4_shadow);
        if c.secondary & secondary::VPID != 0 {
            v.write(Field::Vpid, u64::from(self.vpid));
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
        v.write(Field::GuestGdtrBase, s.gdtr.base);
        v.write(Field::GuestGdtrLimit, u64::from(s.gdtr.limit));
        v.write(Field::GuestIdtrBase, s.idtr.base);
        v.write(Field::GuestIdtrLimit, u64::from(s.idtr.limit));
        v.write(Field::GuestCr0, s.cr0 & !CR0_HOST_OWNED | CR0_NE);
        v.write(Field::Cr0ReadShadow, s.cr0);
        v.write(Field::GuestCr3, s.cr3);
        v.write(Field::GuestCr4, s.cr4 & CR4_GUEST_OWNED | CR4_MCE | CR4_VMXE);
        v.write(Field::GuestIa32Efer, s.efer);
        let long = if s.efer & EFER_LMA != 0 { entry::IA32E_MODE_GUEST } else { 0 };
        v.write(Field::EntryControls, u64::from(self.controls.entry | long));
        v.write(Field::GuestDr7, s.dr7);
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

impl VendorVcpu for VmxVcpu {
    type Snapshot = Snapshot;

    fn freeze(&mut self) -> Snapshot {
        self.snapshot()
    }

    fn reset(&mut self, state: &VcpuState) {
        let s = &state.system;
        self.registers = state.registers;
        self.forget();
        (self.cr0_shadow, self.cr4_shadow, self.efer) = (s.cr0, s.cr4 & CR4_MCE, s.efer & !EFER_LMA);
        self.vmcs.write(Field::Cr4ReadShadow, self.cr4_shadow);
        self.write_guest_state(state);
        self.vmcs.write(Field::EntryInterruptionInfo, 0);
        load_cr2(s.cr2);
        write_dr6(s.dr6);
        (self.event, self.nmi_pending, self.accepted) = (0, false, None);
        (self.task_priority, self.windows) = (0, 0);
        self.flush();
    }

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
        self.queue_exception(exception);
    }

    fn inject_nmi(&mut self) {
        self.nmi_pending = true;
    }

    fn offer_interrupt(&mut self, vector: Option<Vector>) {
        self.queue_interrupt(vector);
    }

    fn take_accepted(&mut self) -> Option<Vector> {
        self.accepted.take()
    }

    fn flush(&mut self) {
        self.shared.forget_translations(self.ept_pointer, self.vpid);
    }

    fn load(&mut self) {
        load_cr2(self.cr2);
        write_dr6(self.dr6);
        for (index, value) in SWITCHED_MSRS.into_iter().zip(self.msrs) {
            // SAFETY: registers of 64-bit mode that L1 does not use; the values are the processor's own, or zero.
            unsafe { Msr::new(index).write(value) };
        }
        self.vmcs.make_current();
        if !self.is_on_core {
            self.is_on_core = true;
            host_state::write(&self.vmcs, exit_point());
            // Another machine may have had its frames and VPID on this core, and it may itself have been here before.
            self.flush();
        }
    }

    fn release(&mut self) {
        self.vmcs.clear();
        (self.is_on_core, self.launched, self.host_rsp) = (false, false, 0);
    }

    fn exit_on_pause_loops(&mut self, wanted: bool) {
        let controls = &mut self.controls.secondary;
        let wanted = wanted && allows(self.shared.capabilities.secondary, secondary::PAUSE_LOOP_EXITING);
        if wanted != (*controls & secondary::PAUSE_LOOP_EXITING != 0) {
            *controls ^= secondary::PAUSE_LOOP_EXITING;
            self.vmcs.write(Field::SecondaryControls, u64::from(*controls));
            self.vmcs.write(Field::PleGap, PAUSE_LOOP_GAP);
            self.vmcs.write(Field::PleWindow, PAUSE_LOOP_WINDOW);
        }
    }

    fn unload(&mut self) {
        self.cr2 = read_cr2();
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
        if let Some(count) = self.timer.arm(due) {
            self.vmcs.write(Field::GuestPreemptionTimer, count);
        }
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
        self.timer.stop();
        if result != EXITED {
            log::error!("VM entry failed: {}", self.vmcs.last_error());
            self.reason.set(exit_reason::ENTRY_FAILURE);
            return Exit::Unexpected { code: u64::from(exit_reason::ENTRY_FAILURE), info1: result, info2: 0 };
        }
        self.launched = true;
        self.exit()
    }

    fn dump(&self) {
        self.write_dump();
    }
}
