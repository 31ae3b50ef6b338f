//! One virtual processor: everything about it that is not its registers.
//!
//! The hypervisor loop owns the registers (in the vendor's control block) and asks here what CPUID, RDMSR, WRMSR and XSETBV do,
//! which interrupt comes next and when the timer fires. [`emulate`] carries out single instructions on the hypervisor's behalf.

pub mod cpuid;
pub mod emulate;
pub mod lapic;
pub mod msr;

use crate::address::{GuestTsc, MsrIndex};
use crate::memory::GuestMemory;
use crate::state::Exception;

pub use cpuid::HostCpuid;
pub use lapic::Lapic;
pub use msr::MsrEffect;

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

/// What CPUID and MSR policy need to know from the vendor's control block.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CpuContext {
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the guest sees it.
    pub efer: u64,
    /// Current privilege level, 0-3.
    pub cpl: u8,
}

/// One virtual processor.
#[derive(Debug)]
pub struct Vcpu {
    /// Its local APIC.
    pub lapic: Lapic,
}

impl Vcpu {
    /// A processor as it is at power-on.
    pub fn new(config: &VcpuConfig, _host: &HostCpuid) -> Self {
        Self { lapic: Lapic::new(config) }
    }

    /// EAX, EBX, ECX, EDX of a CPUID leaf.
    pub fn cpuid(&self, _leaf: u32, _subleaf: u32, _context: &CpuContext) -> [u32; 4] {
        [0; 4]
    }

    /// RDMSR at guest time `now`.
    ///
    /// # Errors
    /// The exception to deliver: the MSR does not exist or may not be read.
    pub fn read_msr(
        &mut self,
        _index: MsrIndex,
        _now: GuestTsc,
        _context: &CpuContext,
    ) -> Result<u64, Exception> {
        Err(Exception::GENERAL_PROTECTION)
    }

    /// WRMSR at guest time `now`, which is `wall_ns` nanoseconds after the Unix epoch.
    ///
    /// # Errors
    /// The exception to deliver: the MSR does not exist or does not take this value.
    pub fn write_msr(
        &mut self,
        _index: MsrIndex,
        _value: u64,
        _now: GuestTsc,
        _context: &CpuContext,
        _wall_ns: u64,
        _memory: &mut dyn GuestMemory,
    ) -> Result<MsrEffect, Exception> {
        Err(Exception::GENERAL_PROTECTION)
    }

    /// XSETBV; returns the XCR0 to load.
    ///
    /// # Errors
    /// The exception to deliver.
    pub fn xsetbv(&mut self, _index: u32, _value: u64, _context: &CpuContext) -> Result<u64, Exception> {
        Err(Exception::UNDEFINED)
    }

    /// The guest's XCR0.
    pub fn xcr0(&self) -> u64 {
        1
    }

    /// The guest's TSC_AUX.
    pub fn tsc_aux(&self) -> u64 {
        0
    }

    /// To be called just before entering the guest, after any interrupt was injected: arms or disarms the paravirtual end of interrupt.
    pub fn before_entry(&mut self, _memory: &mut dyn GuestMemory) {}

    /// To be called first thing after an exit: notices a paravirtual end of interrupt.
    pub fn after_exit(&mut self, _memory: &mut dyn GuestMemory) {}
}
