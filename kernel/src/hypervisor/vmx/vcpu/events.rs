//! Events: what goes into the guest, what an exit cut short, and the exceptions that exit.
//!
//! Intel SDM vol. 3, 25.8.3 (entry event injection), 25.9.2-25.9.3 (events that exit or were cut short), 27.3.1.5 and 27.6 (checks and order),
//! 28.2-28.3 (what an exit records and saves).

use super::super::controls::primary;
use super::super::exit_reason::{ept_violation, interruption};
use super::super::fields::{Field, interruptibility};
use super::registers::{CR0_PE, read_dr6, write_dr6};
use super::{DEBUG_EXCEPTION, MACHINE_CHECK, RFLAGS_TF, VmxVcpu};
use crate::cpu::guest_registers::load_cr2;
use crate::hypervisor::exit::Exit;
use nestling_machine::address::{GuestPhysAddr, Vector};
use nestling_machine::state::{ControlRegisters, CpuState, DR6_SINGLE_STEP, Exception};

const RFLAGS_IF: u64 = 1 << 9;
const DR6_CAUSES: u64 = 0x600F;
const DR6_ADDRESSES: u64 = 0xF;
const DR7_GENERAL_DETECT: u64 = 1 << 13;
/// Blocking by STI and by MOV SS.
pub(super) const SHADOW: u64 =
    (interruptibility::BLOCKING_BY_STI | interruptibility::BLOCKING_BY_MOV_SS) as u64;
const NMI_BLOCKED: u64 = interruptibility::BLOCKING_BY_NMI as u64;

impl VmxVcpu {
    /// Notes which event the exit cut short, so that the next entry delivers it again. Only some exits can do that.
    pub(super) fn keep_interrupted_event(&mut self) -> bool {
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
    pub(super) fn deliver_nmi(&mut self) {
        if self.can_take_nmi() {
            self.event = interruption::VALID | interruption::NMI | 2;
            self.nmi_pending = false;
            self.nmi_seen = true;
        } else {
            self.windows |= primary::NMI_WINDOW_EXITING;
        }
    }

    pub(super) fn can_take_nmi(&self) -> bool {
        self.event == 0 && self.interruptibility.get(&self.vmcs) & (SHADOW | NMI_BLOCKED) == 0
    }

    /// An IRET that faulted had already ended the blocking of NMIs: it has to block them again until it succeeds.
    fn block_nmi_again(&self, unblocked: bool) {
        if unblocked {
            self.interruptibility.set(self.interruptibility.get(&self.vmcs) | NMI_BLOCKED);
        }
    }

    /// Delivers an exception at the next entry, unless an event whose delivery was cut short stands before it.
    pub(super) fn queue_exception(&mut self, exception: Exception) {
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
            load_cr2(cr2);
        }
    }

    /// Injects an interrupt if the guest can take it now; otherwise an exit is wanted as soon as it can.
    pub(super) fn queue_interrupt(&mut self, vector: Option<Vector>) {
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

    /// An access that the EPT does not allow.
    pub(super) fn nested_fault(&mut self) -> Exit {
        let delivering = self.keep_interrupted_event();
        let has_shadow = || self.interruptibility.get(&self.vmcs) & SHADOW != 0;
        if self.rflags() & RFLAGS_TF != 0 && !has_shadow() {
            // The instruction has not run, so its trap is not due; Bochs notes it all the same. In a shadow entry insists on the note.
            let pending = self.vmcs.read(Field::GuestPendingDebugExceptions);
            self.vmcs.write(Field::GuestPendingDebugExceptions, pending & !DR6_SINGLE_STEP);
        }
        if self.nmi_seen && !delivering {
            let qualification = self.vmcs.read(Field::ExitQualification);
            self.block_nmi_again(qualification & ept_violation::NMI_UNBLOCKED != 0);
        }
        // A walk of the guest's page tables that ends here is found out by emulation, which walks them again.
        let address = GuestPhysAddr(self.vmcs.read(Field::GuestPhysicalAddress));
        Exit::NestedFault { address, by_instruction: !delivering }
    }

    pub(super) fn exception(&mut self) -> Exit {
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
}
