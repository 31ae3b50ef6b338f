//! One virtual processor: everything about it that is not its registers.
//!
//! The hypervisor loop owns the registers (in the vendor's control block) and asks here what CPUID, RDMSR, WRMSR and XSETBV do,
//! which interrupt comes next and when the timer fires. [`emulate`] carries out single instructions on the hypervisor's behalf.

mod clock;
pub mod cpuid;
pub mod emulate;
mod inbox;
pub mod lapic;
pub mod msr;
mod pv_eoi;
mod router;
mod start_up;
#[cfg(test)]
mod tests;
mod xstate;

use crate::address::{GuestTsc, Vector};
use crate::memory::GuestMemory;
use crate::state::{ControlRegisters, Exception, VcpuState};

pub use cpuid::HostCpuid;
pub use inbox::{Inbox, Signals};
pub use lapic::Lapic;
pub use msr::MsrEffect;
pub use router::InterruptRouter;

/// What a vCPU is made from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuConfig {
    /// Its number and its APIC id, from 0.
    pub id: u32,
    /// How many the machine has.
    pub vcpu_count: u32,
    /// Frequency of the guest's time-stamp counter in kHz.
    pub tsc_khz: u32,
}

/// One virtual processor.
#[derive(Clone, Debug)]
pub struct Vcpu {
    /// Its local APIC.
    pub lapic: Lapic,
    cpuid: cpuid::GuestCpuid,
    xstate: xstate::ExtendedState,
    stored: msr::Stored,
    clock: clock::Clock,
    pv_eoi: pv_eoi::PvEoi,
}

impl Vcpu {
    /// A processor as it is at power-on, with the features of `host` that a guest may have.
    pub fn new(config: &VcpuConfig, host: &HostCpuid) -> Self {
        let xstate = xstate::ExtendedState::new(host);
        Self {
            lapic: Lapic::new(config),
            cpuid: cpuid::GuestCpuid::new(config, host, &xstate),
            xstate,
            stored: msr::Stored::new(host.is_amd(), host.has_fast_fxsr()),
            clock: clock::Clock::new(config.tsc_khz),
            pv_eoi: pv_eoi::PvEoi::default(),
        }
    }

    /// INIT: puts what it resets to its value after it. Returns the registers' state, with the processor at its reset vector.
    ///
    /// Time, XCR0, PAT and the APIC's mode stay (SDM vol. 3, table 10-1 and 11.12.5.1), and the pages shared with the hypervisor are given
    /// up, since the guest that gave them may be gone.
    pub fn init(&mut self) -> VcpuState {
        self.lapic.reset();
        self.pv_eoi = pv_eoi::PvEoi::default();
        self.clock.forget_pages();
        start_up::reset_state(self.cpuid.signature())
    }

    /// A start-up interrupt after [`Self::init`]: the registers' state.
    pub fn start_up(&self, page: Vector) -> VcpuState {
        start_up::start_up_state(page, self.cpuid.signature())
    }

    /// EAX, EBX, ECX, EDX of a CPUID leaf.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &dyn ControlRegisters) -> [u32; 4] {
        self.cpuid.get(leaf, subleaf, context, &self.xstate, self.lapic.is_enabled())
    }

    /// XSETBV; returns the XCR0 to load.
    ///
    /// # Errors
    /// The exception to deliver: #UD without CR4.OSXSAVE, #GP for a value or register that the processor does not have.
    pub fn xsetbv(
        &mut self,
        index: u32,
        value: u64,
        context: &dyn ControlRegisters,
    ) -> Result<u64, Exception> {
        self.xstate.xsetbv(index, value, context)
    }

    /// The guest's XCR0.
    pub fn xcr0(&self) -> u64 {
        self.xstate.xcr0()
    }

    /// Takes over what XCR0 holds after an exit, on a processor that lets guests write it without one, as QEMU's emulation of SVM
    /// does. To be called before [`Self::cpuid`] of leaf 0xD and before the guest leaves the core.
    pub fn observe_xcr0(&mut self, value: u64) {
        self.xstate.observe(value);
    }

    /// The guest's TSC_AUX.
    pub fn tsc_aux(&self) -> u64 {
        self.stored.tsc_aux
    }

    /// Nanoseconds since the machine's clock stood at zero, as the guest's kvm-clock tells them.
    pub fn nanoseconds(&self, now: GuestTsc) -> u64 {
        self.clock.nanoseconds(now)
    }

    /// To be called just before entering the guest, after any interrupt was acknowledged for injection: lets the guest end it
    /// without an exit where that is possible. Cheap, and touches guest memory only when that changes.
    pub fn before_entry(&mut self, memory: &mut dyn GuestMemory) {
        self.pv_eoi.before_entry(&self.lapic, memory);
    }

    /// To be called first thing after an exit, before anything asks the local APIC: notices an interrupt that the guest ended.
    pub fn after_exit(&mut self, memory: &mut dyn GuestMemory) {
        self.pv_eoi.after_exit(&mut self.lapic, memory);
    }
}
