//! What a processor vendor's virtualization must offer. Everything else is shared.

use super::exit::Exit;
use super::nested::NestedEntry;
use super::refusal::Refusal;
use core::ops::RangeInclusive;
use nestling_machine::address::{GuestTsc, Vector};
use nestling_machine::state::{CpuState, Exception, VcpuState};

/// One vendor's virtualization, switched on on every core in use.
pub trait Backend: Sized + Send + Sync + 'static {
    /// The vendor's control block of one vCPU.
    type Vcpu: VendorVcpu + Send;
    /// The vendor's nested page table entry.
    type Entry: NestedEntry + Send + Sync;
    /// "amd" or "intel".
    const VENDOR: &'static str;

    /// Checks the features and switches virtualization on on this core, the first.
    ///
    /// # Errors
    /// [`Refusal`] when a required feature is missing or locked.
    fn enable() -> Result<Self, Refusal>;

    /// Switches virtualization on on this core, another one.
    ///
    /// # Errors
    /// [`Refusal`] when this core lacks what the first one has.
    fn enable_here(&self) -> Result<(), Refusal>;

    /// Optional features by name, and whether they are there.
    fn features(&self) -> &[(&'static str, bool)];

    /// The processor's CPUID without what guests cannot have, because a control for it is missing.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// A vCPU whose nested page table starts at `nested_root`, in the state `state`. It is this core's until it is released.
    fn vcpu(&self, nested_root: u64, state: &VcpuState) -> Self::Vcpu;

    /// A vCPU whose nested page table starts at `nested_root`, that goes on where `snapshot` was taken. Its TSC offset is yet to be set, and it is
    /// this core's until it is released.
    fn thaw(&self, nested_root: u64, snapshot: &<Self::Vcpu as VendorVcpu>::Snapshot) -> Self::Vcpu;
}

/// One vendor's vCPU: its control block, entry and exit.
///
/// What a method reads or changes, [`CpuState`]'s included, is the state as of the last exit; changes take effect at the next entry.
pub trait VendorVcpu: CpuState {
    /// All that it is but its place: registers, what is to be delivered to it, what it is shielded from.
    type Snapshot: Send + Sync;

    /// Takes a snapshot. It is on no core, and is not run any more.
    fn freeze(&mut self) -> Self::Snapshot;

    /// Puts the vCPU to `state` with nothing pending and nothing masked, as INIT does. It is loaded.
    fn reset(&mut self, state: &VcpuState);
    /// Sets EFER as the guest wrote it (already validated); LMA stays the processor's.
    fn set_efer(&mut self, value: u64);
    /// Sets what is added to the TSC when the guest reads it.
    fn set_tsc_offset(&mut self, offset: u64);
    /// The task priority as CR8 shows it (0-15).
    fn task_priority(&self) -> u8;
    /// Sets the task priority that CR8 shows.
    fn set_task_priority(&mut self, priority: u8);

    /// RIP after the instruction that exited, where the processor gives it.
    fn next_rip(&self) -> Option<u64>;
    /// Ends the shadow of STI or MOV SS after the exiting instruction was completed.
    fn clear_interrupt_shadow(&mut self);

    /// Delivers an exception at the next entry. An event whose delivery the last exit cut short stays first.
    fn inject(&mut self, exception: Exception);
    /// Delivers a non-maskable interrupt at the next entry.
    fn inject_nmi(&mut self);
    /// Offers an interrupt: it is delivered as soon as the guest can take it, which includes that its task priority lets the vector
    /// through. `None` withdraws the offer.
    fn offer_interrupt(&mut self, vector: Option<Vector>);
    /// The offered interrupt, if the guest took it during the last run.
    fn take_accepted(&mut self) -> Option<Vector>;

    /// Drops what this core has cached of nested translations of this machine before the next entry.
    fn flush(&mut self);
    /// Loads what this vendor's control block does not hold and the other's does; the core's previous vCPU has been unloaded. Where
    /// this core is not the one that had it last, it was released there.
    fn load(&mut self);
    /// Takes it off the core again.
    fn unload(&mut self);
    /// Leaves nothing of it on this core, so that another one may load it. It is not loaded.
    fn release(&mut self);
    /// Whether the guest's run ends when it waits in a loop around PAUSE; where the processor cannot tell, it does not. It is loaded.
    fn exit_on_pause_loops(&mut self, wanted: bool);
    /// Sees to it that the next run ends within `due` (nanoseconds since boot) unless something else ends it first.
    fn arm(&mut self, due: Option<RangeInclusive<u64>>);
    /// Runs the guest until it exits.
    fn run(&mut self) -> Exit;
    /// How often instructions read or wrote the control block since the vCPU was made, each of which can cost an exit to L0; 0 where it
    /// is plain memory.
    fn accesses(&self) -> u64;
    /// Writes the control block to the log, for an exit that cannot be handled.
    fn dump(&self);
}

/// Converts between the host's TSC and a machine's.
#[derive(Clone, Copy, Debug, Default)]
pub struct TscOffset(pub u64);

impl TscOffset {
    /// The guest's counter at a value of the host's.
    pub const fn guest(self, host: u64) -> GuestTsc {
        GuestTsc(host.wrapping_add(self.0))
    }

    /// The host's counter at a value of the guest's.
    pub const fn host(self, guest: GuestTsc) -> u64 {
        guest.0.wrapping_sub(self.0)
    }
}
