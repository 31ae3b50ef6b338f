//! Registers of a core that only guests use, and that not every vendor's control block holds: DR0-DR3, TSC_AUX, CR2.
//!
//! Intel SDM vol. 3, 18.2 (debug registers), 17.17 (TSC_AUX); AMD APM vol. 2, 13.1.1.

use super::features;
use core::arch::asm;
use x86_64::registers::model_specific::Msr;

const TSC_AUX: u32 = 0xC000_0103;

/// A vCPU's breakpoint addresses while it is off the core. DR6 and DR7 are the vendor's: both switch DR7, one of them DR6.
#[derive(Clone, Copy, Default)]
pub struct BreakpointAddresses([u64; 4]);

impl BreakpointAddresses {
    /// Puts them on the core.
    pub fn load(&self) {
        let [dr0, dr1, dr2, dr3] = self.0;
        // SAFETY: L1 uses no breakpoints, and DR7, which arms them, is zero but for a guest that runs.
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, options(nomem, nostack, preserves_flags));
        }
    }

    /// Takes them off the core.
    pub fn save(&mut self) {
        let [dr0, dr1, dr2, dr3]: [u64; 4];
        // SAFETY: reads registers.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", out(reg) dr0, out(reg) dr1, out(reg) dr2, out(reg) dr3, options(nomem, nostack, preserves_flags));
        }
        self.0 = [dr0, dr1, dr2, dr3];
    }
}

/// The guest's CR2, where no control block switches it.
pub fn read_cr2() -> u64 {
    let value: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets CR2.
pub fn load_cr2(value: u64) {
    // SAFETY: L1 has no page fault that it goes on from, so nothing reads its own CR2.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// Sets TSC_AUX, where the processor has it.
pub fn load_tsc_aux(value: u64) {
    if features::has_rdtscp() {
        // SAFETY: the processor has the MSR, only guests use it, and it takes any 32-bit value.
        unsafe { Msr::new(TSC_AUX).write(value & 0xFFFF_FFFF) };
    }
}
