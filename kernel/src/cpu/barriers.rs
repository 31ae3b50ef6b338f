//! Barriers between machines: what one machine left in predictors and buffers is of no use to the next.
//!
//! AMD "Indirect Branch Control Extension"; Intel "Speculative Execution Side Channel Mitigations": IBPB (PRED_CMD), L1D_FLUSH (FLUSH_CMD),
//! MD_CLEAR (VERW).

use super::features::cpuid;
use core::arch::asm;
use spin::Once;
use x86_64::registers::model_specific::Msr;

const PRED_CMD: u32 = 0x49;
const PRED_CMD_IBPB: u64 = 1;
const FLUSH_CMD: u32 = 0x10B;
const FLUSH_CMD_L1D: u64 = 1;

/// Which barriers this processor has.
#[derive(Clone, Copy)]
struct Barriers {
    predictors: bool,
    l1_data: bool,
    buffers: bool,
}

static BARRIERS: Once<Barriers> = Once::new();

fn find() -> Barriers {
    let leaf_7 = if cpuid(0, 0)[0] >= 7 { cpuid(7, 0)[3] } else { 0 };
    let amd = if cpuid(0x8000_0000, 0)[0] >= 0x8000_0008 { cpuid(0x8000_0008, 0)[1] } else { 0 };
    Barriers {
        predictors: leaf_7 & 1 << 26 != 0 || amd & 1 << 12 != 0,
        l1_data: leaf_7 & 1 << 28 != 0,
        buffers: leaf_7 & 1 << 10 != 0,
    }
}

/// To be called before a core runs another machine than it last did.
pub fn between_machines() {
    let barriers = *BARRIERS.call_once(find);
    // SAFETY: write-only command MSRs that CPUID offers; they change no architectural state.
    unsafe {
        if barriers.predictors {
            Msr::new(PRED_CMD).write(PRED_CMD_IBPB);
        }
        if barriers.l1_data {
            Msr::new(FLUSH_CMD).write(FLUSH_CMD_L1D);
        }
    }
    if barriers.buffers {
        // SAFETY: VERW of the data segment's own selector only sets ZF.
        unsafe {
            asm!("mov {0:x}, ds", "push {0}", "verw word ptr [rsp]", "pop {0}", out(reg) _);
        }
    }
}
