//! A vCPU on SVM: its VMCB, and what exits mean.
//!
//! AMD APM vol. 2, 15.6-15.13 (exits), 15.20-15.21 (events and interrupts), Appendix C (exit codes).

use super::enter::enter;
use super::host_state;
use super::nmi::{Delivery, Nmi};
use super::permission_maps::PermissionMaps;
use super::vmcb::{self, Vmcb, exit_code, intercept1, intercept2};
use crate::cpu::{apic, clock};
use crate::hypervisor::backend::VendorVcpu;
use crate::hypervisor::exit::Exit;
use crate::memory::heap::Pages;
use alloc::sync::Arc;
use core::ops::RangeInclusive;
use nestling_machine::address::{GuestPhysAddr, Vector};
use nestling_machine::state::{
    ControlRegisters, CpuState, DR6_SINGLE_STEP, Exception, Gpr, Registers, Segment, SegmentRegister,
    SystemState, TableRegister, VcpuState,
};

const CR0_PE: u64 = 1 << 0;
const EFER_SVME: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_IF: u64 = 1 << 9;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// EXITINFO1 of a nested page fault: during the walk of the guest's own page tables (APM vol. 2, 15.25.6).
const NPF_PAGE_WALK: u64 = 1 << 33;
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR7_RESET: u64 = 0x400;
/// Vectors below are exceptions', or reserved for them.
const FIRST_INTERRUPT: u8 = 32;
const DEBUG_EXCEPTION: u8 = 1;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// How long a guest may first run whose next instruction is in an interrupt shadow while an interrupt waits: long enough for that
/// instruction; with each exit that comes before it all the same, twice as long.
const SHADOW_NS: u64 = 20_000;
/// How many PAUSEs come before one that exits: some 100,000 cycles, longer than a lock is held by a vCPU that runs.
const PAUSE_FILTER_COUNT: u16 = 3000;
/// How many exits in a row are believed to have come before the same instruction.
const SHADOW_EXITS: u8 = 9;

/// A vCPU's VMCB and what the VMCB does not hold.
pub struct SvmVcpu {
    vmcb: Pages,
    registers: Registers,
    offered: Option<Vector>,
    accepted: Option<Vector>,
    nmi: Nmi,
    /// What waits for the guest to be entered wants it to be left again as soon as possible; how many exits have not been enough.
    hurry: Option<u8>,
    /// Where the instruction in the shadow of STI or MOV SS stands, when the last exit came before it, and how many exits have.
    shadow: Option<(u64, u8)>,
    /// An interrupt waits for that instruction.
    shadow_pending: bool,
    nrip_save: bool,
    /// RIP after the exiting instruction, where this exit gave it.
    next_rip: Option<u64>,
    pause_filter: bool,
    maps: Arc<PermissionMaps>,
}

/// The VMCB, whose save area VMRUN, VMLOAD and their counterparts fill (15.5.1), and what it does not hold.
pub struct Snapshot {
    vmcb: Pages,
    registers: Registers,
    accepted: Option<Vector>,
    nmi: Nmi,
    shadow: Option<(u64, u8)>,
    nrip_save: bool,
    pause_filter: bool,
}

impl SvmVcpu {
    pub(super) fn new(
        nested_root: u64,
        state: &VcpuState,
        asid: u32,
        nrip_save: bool,
        pause_filter: bool,
        maps: Arc<PermissionMaps>,
    ) -> Self {
        let mut vcpu = Self {
            vmcb: Pages::new(1),
            registers: state.registers,
            offered: None,
            accepted: None,
            nmi: Nmi::new(),
            hurry: None,
            shadow: None,
            shadow_pending: false,
            nrip_save,
            next_rip: None,
            pause_filter,
            maps,
        };
        let (io, msr) = (vcpu.maps.io(), vcpu.maps.msr());
        let b = vcpu.block_mut();
        b.intercept_exceptions = 1 << DEBUG_EXCEPTION | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;
        b.intercept1 = intercept1::INTR
            | intercept1::NMI
            | intercept1::INIT
            | intercept1::RDPMC
            | intercept1::CPUID
            | intercept1::INVD
            | intercept1::HLT
            | intercept1::INVLPGA
            | intercept1::IOIO_PROT
            | intercept1::MSR_PROT
            | intercept1::SHUTDOWN;
        b.intercept2 = intercept2::VMRUN
            | intercept2::VMMCALL
            | intercept2::VMLOAD
            | intercept2::VMSAVE
            | intercept2::STGI
            | intercept2::CLGI
            | intercept2::SKINIT
            | intercept2::ICEBP
            | intercept2::WBINVD
            | intercept2::MONITOR
            | intercept2::MWAIT
            | intercept2::MWAIT_ARMED
            | intercept2::XSETBV
            | intercept2::RDPRU;
        b.iopm_base = io;
        b.msrpm_base = msr;
        b.asid = asid;
        b.tlb_control = vmcb::TLB_FLUSH_ALL;
        b.int_control = vmcb::V_INTR_MASKING;
        b.np_enable = 1;
        b.nested_cr3 = nested_root;
        b.efer = EFER_SVME;
        b.g_pat = PAT_RESET;
        b.dr6 = DR6_RESET;
        b.dr7 = DR7_RESET;
        vcpu.set_system(&state.system);
        vcpu
    }

    /// A vCPU that goes on where the snapshot was taken. An event that was to be injected still is; an interrupt that was offered is offered again.
    pub(super) fn thaw(nested_root: u64, snapshot: &Snapshot, asid: u32, maps: Arc<PermissionMaps>) -> Self {
        let mut vcpu = Self {
            vmcb: snapshot.vmcb.duplicate(),
            registers: snapshot.registers,
            offered: None,
            accepted: snapshot.accepted,
            nmi: snapshot.nmi,
            hurry: None,
            shadow: snapshot.shadow,
            shadow_pending: false,
            nrip_save: snapshot.nrip_save,
            next_rip: None,
            pause_filter: snapshot.pause_filter,
            maps,
        };
        let b = vcpu.block_mut();
        b.asid = asid;
        b.nested_cr3 = nested_root;
        b.int_control &= !vmcb::V_IRQ;
        b.tlb_control = vmcb::TLB_FLUSH_ALL;
        vcpu
    }

    fn set_system(&mut self, s: &SystemState) {
        let b = self.block_mut();
        (b.cs, b.ds, b.es, b.fs, b.gs, b.ss) = (s.cs, s.ds, s.es, s.fs, s.gs, s.ss);
        (b.ldtr, b.tr, b.gdtr, b.idtr) = (s.ldtr, s.tr, table_segment(s.gdtr), table_segment(s.idtr));
        (b.cr0, b.cr2, b.cr3, b.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
        b.efer = s.efer | EFER_SVME;
        (b.dr6, b.dr7, b.cpl) = (s.dr6, s.dr7, s.cpl);
    }

    fn block(&self) -> &Vmcb {
        // SAFETY: the page is a VMCB (plain integers, any value valid); the processor touches it only inside `enter`.
        unsafe { &*self.vmcb.as_ptr().cast::<Vmcb>() }
    }

    fn block_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as above, and borrowed mutably through `self`.
        unsafe { &mut *self.vmcb.as_ptr().cast::<Vmcb>() }
    }

    /// Hands an interrupt that is to be injected over as a virtual one, which the processor takes at once where it can; returns it.
    ///
    /// QEMU 7.2, which has no NRIP save, keeps an injected interrupt in mind, and when its thread is called away before the next exit, delivers it
    /// a second time, as an exception, wherever the guest is then. Bochs takes virtual ones late.
    fn hand_over_interrupt(&mut self) -> Option<u64> {
        let open = self.registers.rflags & RFLAGS_IF != 0 && !self.nrip_save;
        let b = self.block_mut();
        let event = b.event_inject;
        let is_interrupt =
            event & (vmcb::EVENT_VALID | vmcb::EVENT_TYPE) == vmcb::EVENT_VALID | vmcb::EVENT_INTERRUPT;
        if !is_interrupt || !open || b.interrupt_shadow & 1 != 0 || b.int_control & vmcb::V_IRQ != 0 {
            return None;
        }
        b.event_inject = 0;
        b.int_vector = u32::from(event as u8);
        let priority = (event as u32 & 0xFF) >> 4;
        b.int_control =
            b.int_control & !vmcb::V_INTR_PRIO | vmcb::V_IRQ | priority << vmcb::V_INTR_PRIO_SHIFT;
        Some(event)
    }

    /// Takes it back if the exit came before the guest took it.
    fn take_back_interrupt(&mut self, event: u64) {
        let b = self.block_mut();
        if b.int_control & vmcb::V_IRQ != 0 && b.event_inject & vmcb::EVENT_VALID == 0 {
            b.event_inject = event;
        }
        b.int_control &= !vmcb::V_IRQ;
    }

    /// Notes which event the exit interrupted, so that the next entry delivers it again.
    fn keep_interrupted_event(&mut self) {
        let mut info = self.block().exit_int_info;
        let pending = info & vmcb::EVENT_VALID != 0;
        let vector = info as u8;
        // QEMU calls virtual interrupts exceptions, of which there are none with these vectors.
        if vector >= FIRST_INTERRUPT && info & vmcb::EVENT_TYPE == vmcb::EVENT_EXCEPTION {
            info &= !vmcb::EVENT_TYPE;
        }
        let kind = info & vmcb::EVENT_TYPE;
        // INT n (and INT3, INTO, which are exceptions of type 4 or 3) has not changed RIP: the instruction runs again instead.
        let software =
            kind == vmcb::EVENT_SOFTWARE || kind == vmcb::EVENT_EXCEPTION && (vector == 3 || vector == 4);
        self.block_mut().event_inject = if pending && !software { info } else { 0 };
        let Some(offered) = self.offered else { return };
        let cut_short = pending && kind == vmcb::EVENT_INTERRUPT && vector == offered.0;
        // Emulators leave V_IRQ set when delivery is cut short; processors clear it. Either way the guest has taken it.
        if cut_short || self.block().int_control & vmcb::V_IRQ == 0 {
            self.accepted = self.offered.take();
            self.block_mut().int_control &= !vmcb::V_IRQ;
        }
    }

    /// Notes an interrupt shadow for QEMU 7.2, which saves it at an exit and forgets it at the next entry: a second exit before the same
    /// instruction does not show it any more. After many of them the instruction has run, and is a jump to itself.
    fn keep_interrupt_shadow(&mut self) {
        // Real processors remember it by themselves. Those without NRIP save do no worse by this.
        if self.nrip_save {
            return;
        }
        let rip = self.registers.rip;
        let exits = match self.shadow {
            Some((at, exits)) if at == rip => exits + 1,
            _ => 0,
        };
        let shadowed = self.block().interrupt_shadow & 1 != 0 || exits > 0;
        self.shadow = (shadowed && exits < SHADOW_EXITS).then_some((rip, exits));
        self.block_mut().interrupt_shadow = self.shadow.is_some().into();
    }

    /// Delivers a pending NMI when nothing stands before it.
    fn deliver_nmi(&mut self) {
        let (mut nmi, mut registers) = (self.nmi, self.registers);
        let delivery = nmi.deliver(self.block_mut(), registers.rip, &mut registers.rflags);
        (self.nmi, self.registers) = (nmi, registers);
        self.hurry = match delivery {
            Delivery::Soon => Some(self.hurry.map_or(0, |exits| (exits + 1).min(SHADOW_EXITS))),
            Delivery::None => None,
        };
    }

    fn exit(&mut self) -> Exit {
        let b = self.block();
        // Some emulators extend the code's low half only.
        let code = b.exit_code as u32;
        let (info1, info2, next_rip) = (b.exit_info1, b.exit_info2, b.next_rip);
        let delivering = b.exit_int_info & vmcb::EVENT_VALID != 0;
        self.next_rip = (self.nrip_save && next_rip != 0).then_some(next_rip);
        let (mut nmi, rip) = (self.nmi, self.registers.rip);
        let ours = nmi.after_exit(self.block_mut(), code, rip);
        self.nmi = nmi;
        if ours {
            return Exit::InterruptWindow;
        }
        match code {
            exit_code::INTR => Exit::Interrupt,
            exit_code::NMI => Exit::Nmi,
            exit_code::VINTR => Exit::InterruptWindow,
            exit_code::PAUSE => Exit::PauseLoop,
            exit_code::WRITE_CR8 => Exit::TaskPriorityWrite,
            exit_code::ICEBP => Exit::Int1,
            exit_code::CPUID => Exit::Cpuid,
            exit_code::HLT => Exit::Hlt,
            exit_code::MSR if info1 == 0 => Exit::ReadMsr,
            exit_code::MSR => Exit::WriteMsr,
            exit_code::IOIO => Self::pio(info1, info2),
            exit_code::NPF => Exit::NestedFault {
                address: GuestPhysAddr(info2),
                by_instruction: info1 & NPF_PAGE_WALK == 0 && !delivering,
            },
            exit_code::XSETBV => Exit::Xsetbv,
            exit_code::INVD | exit_code::WBINVD => Exit::CacheFlush,
            exit_code::RDPMC => Exit::Faulting(Exception::GENERAL_PROTECTION),
            exit_code::INVLPGA
            | exit_code::VMRUN..=exit_code::SKINIT
            | exit_code::MONITOR..=exit_code::MWAIT_CONDITIONAL
            | exit_code::RDPRU => Exit::Faulting(Exception::UNDEFINED),
            exit_code::EXCP_BASE..=exit_code::EXCP_LAST => {
                let vector = (code - exit_code::EXCP_BASE) as u8;
                if vector == MACHINE_CHECK {
                    return Exit::MachineCheck;
                }
                let error_code = (vector == ALIGNMENT_CHECK).then_some(info1 as u32);
                Exit::Exception(Exception { vector: Vector(vector), error_code, cr2: None })
            }
            exit_code::SHUTDOWN => Exit::Shutdown,
            _ => Exit::Unexpected { code: u64::from(code), info1, info2 },
        }
    }

    fn pio(info1: u64, next_rip: u64) -> Exit {
        const STRING: u64 = 1 << 2;
        if info1 & STRING != 0 {
            return Exit::StringPio;
        }
        let width = (info1 >> 4 & 7) as u8;
        Exit::Pio { port: (info1 >> 16) as u16, width, input: info1 & 1 != 0, next_rip }
    }
}

const fn table_segment(table: TableRegister) -> Segment {
    Segment { selector: 0, attributes: 0, limit: table.limit as u32, base: table.base }
}

impl ControlRegisters for SvmVcpu {
    fn cr0(&self) -> u64 {
        self.block().cr0
    }

    fn cr4(&self) -> u64 {
        self.block().cr4
    }

    fn efer(&self) -> u64 {
        self.block().efer & !EFER_SVME
    }

    fn cpl(&self) -> u8 {
        self.block().cpl
    }
}

impl CpuState for SvmVcpu {
    fn gpr(&self, register: Gpr) -> u64 {
        self.registers.get(register)
    }

    fn set_gpr(&mut self, register: Gpr, value: u64) {
        self.registers.set(register, value);
    }

    fn rip(&self) -> u64 {
        self.registers.rip
    }

    fn set_rip(&mut self, value: u64) {
        self.registers.rip = value;
    }

    fn rflags(&self) -> u64 {
        self.registers.rflags
    }

    fn set_rflags(&mut self, value: u64) {
        self.registers.rflags = value;
    }

    fn cr3(&self) -> u64 {
        self.block().cr3
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        let b = self.block();
        match register {
            SegmentRegister::Es => b.es,
            SegmentRegister::Cs => b.cs,
            SegmentRegister::Ss => b.ss,
            SegmentRegister::Ds => b.ds,
            SegmentRegister::Fs => b.fs,
            SegmentRegister::Gs => b.gs,
        }
    }

    fn segment_base(&self, register: SegmentRegister) -> u64 {
        self.segment(register).base
    }

    fn code_attributes(&self) -> u16 {
        self.block().cs.attributes
    }

    fn note_single_step(&mut self) {
        self.block_mut().dr6 |= DR6_SINGLE_STEP;
    }
}

/// Puts CR2 where the guest finds it though VMRUN should: Bochs' does not, and shows what stands in the register (15.5.1).
fn load_cr2(value: u64) {
    // SAFETY: L1 has no page fault that it goes on from, so nothing reads its own CR2.
    unsafe { core::arch::asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

impl VendorVcpu for SvmVcpu {
    type Snapshot = Snapshot;

    fn freeze(&mut self) -> Snapshot {
        Snapshot {
            vmcb: self.vmcb.duplicate(),
            registers: self.registers,
            accepted: self.accepted,
            nmi: self.nmi,
            shadow: self.shadow,
            nrip_save: self.nrip_save,
            pause_filter: self.pause_filter,
        }
    }

    fn reset(&mut self, state: &VcpuState) {
        self.registers = state.registers;
        (self.offered, self.accepted, self.next_rip) = (None, None, None);
        (self.hurry, self.shadow, self.shadow_pending) = (None, None, false);
        self.nmi = Nmi::new();
        let b = self.block_mut();
        b.intercept1 &= !intercept1::IRET;
        b.intercept_cr &= !vmcb::INTERCEPT_CR8_WRITE;
        b.int_control = vmcb::V_INTR_MASKING;
        b.interrupt_shadow = 0;
        b.event_inject = 0;
        self.set_system(&state.system);
        load_cr2(state.system.cr2);
        self.flush();
    }

    fn set_efer(&mut self, value: u64) {
        let b = self.block_mut();
        b.efer = value & !EFER_LMA | b.efer & EFER_LMA | EFER_SVME;
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.block_mut().tsc_offset = offset;
    }

    fn task_priority(&self) -> u8 {
        (self.block().int_control & vmcb::V_TPR) as u8
    }

    fn set_task_priority(&mut self, priority: u8) {
        let b = self.block_mut();
        b.int_control = b.int_control & !vmcb::V_TPR | u32::from(priority) & vmcb::V_TPR;
    }

    fn next_rip(&self) -> Option<u64> {
        self.next_rip
    }

    fn clear_interrupt_shadow(&mut self) {
        self.shadow = None;
        self.block_mut().interrupt_shadow = 0;
    }

    fn inject(&mut self, exception: Exception) {
        let b = self.block_mut();
        if b.event_inject & vmcb::EVENT_VALID != 0 {
            return;
        }
        let mut event = u64::from(exception.vector.0) | vmcb::EVENT_EXCEPTION | vmcb::EVENT_VALID;
        // Real mode pushes no error codes.
        if let Some(code) = exception.error_code.filter(|_| b.cr0 & CR0_PE != 0) {
            event |= vmcb::EVENT_HAS_ERROR | u64::from(code) << 32;
        }
        b.event_inject = event;
        if let Some(cr2) = exception.cr2 {
            b.cr2 = cr2;
            load_cr2(cr2);
        }
    }

    fn inject_nmi(&mut self) {
        self.nmi.send();
    }

    fn offer_interrupt(&mut self, vector: Option<Vector>) {
        // It comes first.
        self.deliver_nmi();
        let open = self.registers.rflags & RFLAGS_IF != 0;
        self.offered = None;
        self.shadow_pending = false;
        let b = self.block_mut();
        b.int_control &= !vmcb::V_IRQ;
        b.intercept_cr &= !vmcb::INTERCEPT_CR8_WRITE;
        let Some(vector) = vector else { return };
        let priority = u32::from(vector.0 >> 4);
        let unmasked = priority > b.int_control & vmcb::V_TPR;
        if open && unmasked && b.interrupt_shadow & 1 == 0 && b.event_inject & vmcb::EVENT_VALID == 0 {
            b.event_inject = u64::from(vector.0) | vmcb::EVENT_INTERRUPT | vmcb::EVENT_VALID;
            self.accepted = Some(vector);
            return;
        }
        // While one waits, CR8 is not to change without our knowledge: QEMU compares priorities otherwise than the processor, and ends
        // when a guest writes CR8 with a virtual interrupt pending.
        b.intercept_cr |= vmcb::INTERCEPT_CR8_WRITE;
        if !unmasked {
            return;
        }
        if open && self.shadow.is_some() {
            // After the next instruction. A virtual interrupt would come before it, and if it is a HLT, that would wait for what has come.
            self.shadow_pending = true;
            return;
        }
        let b = self.block_mut();
        // The processor delivers it when the guest opens the window: no exit just for that.
        b.int_control =
            b.int_control & !vmcb::V_INTR_PRIO | vmcb::V_IRQ | priority << vmcb::V_INTR_PRIO_SHIFT;
        b.int_vector = u32::from(vector.0);
        self.offered = Some(vector);
    }

    fn take_accepted(&mut self) -> Option<Vector> {
        self.accepted.take()
    }

    fn flush(&mut self) {
        self.block_mut().tlb_control = vmcb::TLB_FLUSH_ALL;
    }

    fn load(&mut self) {
        load_cr2(self.block().cr2);
        self.flush();
    }

    fn unload(&mut self) {}

    fn release(&mut self) {}

    fn exit_on_pause_loops(&mut self, wanted: bool) {
        let wanted = wanted && self.pause_filter;
        let b = self.block_mut();
        b.intercept1 = b.intercept1 & !intercept1::PAUSE | if wanted { intercept1::PAUSE } else { 0 };
        b.pause_filter_count = PAUSE_FILTER_COUNT;
    }

    fn arm(&mut self, due: Option<RangeInclusive<u64>>) {
        let exits = self.shadow.filter(|_| self.shadow_pending).map(|(_, exits)| exits);
        let waits = exits.into_iter().chain(self.hurry).min();
        let soon = waits.map(|exits| clock::now_ns().saturating_add(SHADOW_NS << exits));
        apic::timer_arm(due.map(|due| *due.end()).into_iter().chain(soon).min());
    }

    fn accesses(&self) -> u64 {
        0
    }

    fn run(&mut self) -> Exit {
        let registers = self.registers;
        let b = self.block_mut();
        b.rax = registers.get(Gpr::Rax);
        b.rsp = registers.get(Gpr::Rsp);
        b.rip = registers.rip;
        b.rflags = registers.rflags;
        let handed_over = self.hand_over_interrupt();
        let (vmcb, host) = (self.vmcb.physical(), host_state());
        // SAFETY: both are VMCB pages, one owned by `self`, the other filled on this core when SVM was switched on. The nested page table maps only the
        // machine's own frames, and the permission maps and intercepts keep everything else away from the guest.
        unsafe { enter(&raw mut self.registers, vmcb, host) };
        let b = self.block();
        let (rax, rsp, rip, rflags) = (b.rax, b.rsp, b.rip, b.rflags);
        self.registers.set(Gpr::Rax, rax);
        self.registers.set(Gpr::Rsp, rsp);
        self.registers.rip = rip;
        self.registers.rflags = rflags;
        self.block_mut().tlb_control = 0;
        self.keep_interrupt_shadow();
        self.keep_interrupted_event();
        if let Some(event) = handed_over {
            self.take_back_interrupt(event);
        }
        self.exit()
    }

    fn dump(&self) {
        let (b, r) = (self.block(), &self.registers);
        log::error!(
            "vmcb: exit {:#x} info {:#x} {:#x} int_info {:#x}; rip {:#x} rsp {:#x} rflags {:#x} rax {:#x}",
            b.exit_code,
            b.exit_info1,
            b.exit_info2,
            b.exit_int_info,
            b.rip,
            b.rsp,
            b.rflags,
            b.rax
        );
        log::error!(
            "vmcb: cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:x?} ss {:x?}; gpr {:x?}",
            b.cr0,
            b.cr2,
            b.cr3,
            b.cr4,
            b.efer,
            b.cs,
            b.ss,
            r.gpr
        );
    }
}
