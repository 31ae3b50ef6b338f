//! Why a guest stopped running, in no vendor's terms, and the counters.

use core::sync::atomic::{AtomicU64, Ordering};
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::state::{Exception, Gpr};

/// An exit from a guest.
#[derive(Clone, Copy, Debug)]
pub enum Exit {
    /// A physical interrupt is pending for L1.
    Interrupt,
    /// The time that was set by the vendor's own timer is up.
    Timer,
    /// A physical NMI arrived.
    Nmi,
    /// The guest can take the interrupt that was offered.
    InterruptWindow,
    /// The guest waits in a loop around PAUSE.
    PauseLoop,
    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// IN or OUT of one element between AL/AX/EAX and a port.
    Pio {
        /// The port.
        port: u16,
        /// 1, 2 or 4 bytes.
        width: u8,
        /// IN rather than OUT.
        input: bool,
        /// RIP after the instruction.
        next_rip: u64,
    },
    /// INS or OUTS, with or without REP.
    StringPio,
    /// An access that the nested page table does not allow.
    NestedFault {
        /// The guest physical address.
        address: GuestPhysAddr,
        /// By the instruction at RIP itself, rather than by a walk of its page tables or the delivery of an event.
        by_instruction: bool,
    },
    /// MOV from or to CR8, on a processor without a place for it.
    TaskPriority {
        /// The instruction's register.
        register: Gpr,
        /// To CR8 rather than from it.
        write: bool,
    },
    /// MOV to CR8, on a processor that does not tell from which register.
    TaskPriorityWrite,
    /// An access to a control register that the backend has already dealt with.
    ControlRegister,
    /// INT1, not executed yet.
    Int1,
    /// XSETBV.
    Xsetbv,
    /// INVD or WBINVD.
    CacheFlush,
    /// An instruction that does not exist for guests, or a privileged one that always faults: this exception is due.
    Faulting(Exception),
    /// An intercepted exception, to be delivered after all.
    Exception(Exception),
    /// The hardware reported an error of its own.
    MachineCheck,
    /// Triple fault.
    Shutdown,
    /// The processor refused the control block, or an exit nobody asked for.
    Unexpected {
        /// The vendor's exit code.
        code: u64,
        /// The vendor's first detail.
        info1: u64,
        /// The vendor's second detail.
        info2: u64,
    },
}

/// The classes that are counted, as the API names them.
pub const KINDS: [&str; 18] = [
    "interrupt",
    "timer",
    "nmi",
    "interrupt_window",
    "cpuid",
    "hlt",
    "read_msr",
    "write_msr",
    "pio",
    "string_pio",
    "ram_fault",
    "mmio",
    "xsetbv",
    "cache_flush",
    "control_register",
    "exception",
    "other",
    "pause",
];

/// Index into [`KINDS`] of a nested fault on RAM.
pub const RAM_FAULT: usize = 10;
/// Index into [`KINDS`] of an emulated access to a device.
pub const MMIO: usize = 11;

impl Exit {
    /// Index into [`KINDS`]; nested faults count as MMIO until found to be RAM.
    pub const fn kind(&self) -> usize {
        match self {
            Self::Interrupt => 0,
            Self::Timer => 1,
            Self::Nmi => 2,
            Self::InterruptWindow => 3,
            Self::Cpuid => 4,
            Self::Hlt => 5,
            Self::ReadMsr => 6,
            Self::WriteMsr => 7,
            Self::Pio { .. } => 8,
            Self::StringPio => 9,
            Self::NestedFault { .. } => MMIO,
            Self::Xsetbv => 12,
            Self::CacheFlush => 13,
            Self::TaskPriority { .. } | Self::TaskPriorityWrite | Self::ControlRegister => 14,
            Self::Faulting(_) | Self::Exception(_) | Self::Int1 => 15,
            Self::PauseLoop => 17,
            Self::MachineCheck | Self::Shutdown | Self::Unexpected { .. } => 16,
        }
    }
}

/// Exits counted by [`KINDS`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitCounts([u64; KINDS.len()]);

/// Counters of one vCPU: one core counts, any core reads.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; KINDS.len()]);

impl ExitCounters {
    fn change(&self, kind: usize, change: impl FnOnce(u64) -> u64) {
        // Nobody else writes, so that the two steps need not be one.
        if let Some(counter) = self.0.get(kind) {
            counter.store(change(counter.load(Ordering::Relaxed)), Ordering::Relaxed);
        }
    }

    /// Counts one exit of a kind.
    pub fn count(&self, kind: usize) {
        self.change(kind, |count| count + 1);
    }

    /// Moves the exit just counted to another kind.
    pub fn recount(&self, from: usize, to: usize) {
        self.change(from, |count| count.saturating_sub(1));
        self.change(to, |count| count + 1);
    }

    /// The counts so far.
    pub fn counts(&self) -> ExitCounts {
        ExitCounts(core::array::from_fn(|kind| self.0[kind].load(Ordering::Relaxed)))
    }
}

impl ExitCounts {
    /// Adds other counts.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }

    /// Name and count of every kind that occurred.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        KINDS.into_iter().zip(self.0).filter(|(_, count)| *count > 0)
    }
}
