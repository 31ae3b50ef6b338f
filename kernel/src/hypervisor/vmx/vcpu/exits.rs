//! What exits mean, and the dump of one that means nothing.
//!
//! Intel SDM vol. 3, 26.1 (instructions that exit), 28.2 (exit information), appendix C (exit reasons).

use super::super::entry_checks;
use super::super::exit_reason::{self, CrAccess, PioAccess, reason};
use super::super::fields::Field;
use super::VmxVcpu;
use crate::hypervisor::exit::Exit;
use nestling_machine::state::{CpuState, Exception, Gpr};

impl VmxVcpu {
    /// What the exit that just happened means.
    pub(super) fn exit(&mut self) -> Exit {
        let full = self.vmcs.read(Field::ExitReason) as u32;
        self.reason.set(full);
        let basic = full & exit_reason::BASIC;
        if full & exit_reason::ENTRY_FAILURE != 0 && basic != reason::MACHINE_CHECK_ON_ENTRY {
            return self.unexpected();
        }
        match basic {
            reason::MACHINE_CHECK_ON_ENTRY => Exit::MachineCheck,
            reason::EXCEPTION_OR_NMI => self.exception(),
            reason::EXTERNAL_INTERRUPT => Exit::Interrupt,
            reason::PREEMPTION_TIMER => {
                self.timer.expire();
                Exit::Timer
            }
            reason::TRIPLE_FAULT => Exit::Shutdown,
            reason::INTERRUPT_WINDOW | reason::NMI_WINDOW => Exit::InterruptWindow,
            reason::PAUSE => Exit::PauseLoop,
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
            | reason::VMFUNC
            | reason::SEAMCALL
            | reason::TDCALL => Exit::Faulting(Exception::UNDEFINED),
            reason::EPT_VIOLATION => self.nested_fault(),
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
            CrAccess::Write { cr: 4, gpr } => self.write_cr4(self.gpr(Gpr::from_number(gpr))),
            _ => self.unexpected(),
        }
    }

    /// Writes the VMCS to the log, and for an entry that was refused the checks it fails.
    pub(super) fn write_dump(&self) {
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
            "vmcs: rip {:#x} rsp {:#x} rflags {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} interruptibility {:#x} cs {:#x} base {:#x} rights {:#x}; gpr {:x?}",
            get(Field::GuestRip),
            get(Field::GuestRsp),
            get(Field::GuestRflags),
            get(Field::GuestCr0),
            get(Field::GuestCr3),
            get(Field::GuestCr4),
            get(Field::GuestIa32Efer),
            get(Field::GuestInterruptibility),
            get(Field::GuestCsSelector),
            get(Field::GuestCsBase),
            get(Field::GuestCsAccessRights),
            self.registers.gpr,
        );
        if reason & exit_reason::ENTRY_FAILURE != 0 {
            for check in entry_checks::failing(&mut |field| get(field), &self.shared.capabilities) {
                log::error!("vmcs: {check}");
            }
        }
    }
}
