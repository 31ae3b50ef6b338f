//! The registers of a processor after INIT, and at its start by a start-up interrupt.
//!
//! Intel SDM vol. 3, table 10-1 (state after power-up, reset and INIT), 9.4.4.1 (start-up interrupts); AMD APM vol. 2, 14.1.3, 14.1.5.

use crate::address::Vector;
use crate::state::{Gpr, Segment, TableRegister, VcpuState};

/// CD, NW and ET.
const CR0_RESET: u64 = 1 << 30 | 1 << 29 | 1 << 4;
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR7_RESET: u64 = 0x400;
const RFLAGS_RESET: u64 = 1 << 1;
const REAL_MODE_LIMIT: u16 = 0xFFFF;
const CODE: u16 = 0x9B;
const DATA: u16 = 0x93;
const LDT: u16 = 0x82;
/// A busy 32-bit task-state segment.
const TSS: u16 = 0x8B;
/// Where the boot processor starts: here, the last 16 bytes of the first MiB, where a machine's firmware would be.
const RESET_SEGMENT: u16 = 0xF000;
const RESET_OFFSET: u64 = 0xFFF0;

/// The state of a boot processor after INIT. `signature` is CPUID leaf 1's EAX.
pub(super) fn reset_state(signature: u32) -> VcpuState {
    at(RESET_SEGMENT, RESET_OFFSET, signature)
}

/// The state of a processor that was started at physical address `page` * 4 KiB.
pub(super) fn start_up_state(page: Vector, signature: u32) -> VcpuState {
    at(u16::from(page.0) << 8, 0, signature)
}

/// Real mode, at an address.
fn at(segment: u16, offset: u64, signature: u32) -> VcpuState {
    let real = |selector: u16, attributes| Segment {
        selector,
        attributes,
        limit: REAL_MODE_LIMIT.into(),
        base: u64::from(selector) << 4,
    };
    let mut state = VcpuState::default();
    state.registers.rip = offset;
    state.registers.rflags = RFLAGS_RESET;
    state.registers.set(Gpr::Rdx, signature.into());
    let system = &mut state.system;
    system.cs = real(segment, CODE);
    let data = real(0, DATA);
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.ldtr = real(0, LDT);
    system.tr = real(0, TSS);
    system.gdtr = TableRegister { base: 0, limit: REAL_MODE_LIMIT };
    system.idtr = system.gdtr;
    system.cr0 = CR0_RESET;
    system.dr6 = DR6_RESET;
    system.dr7 = DR7_RESET;
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_up_interrupt_starts_real_mode_at_its_page() {
        let state = start_up_state(Vector(0x9A), 0x830F10);
        assert_eq!(
            (state.system.cs.selector, state.system.cs.base, state.registers.rip),
            (0x9A00, 0x9_A000, 0)
        );
        assert_eq!((state.system.cr0 & 0x8000_0001, state.system.efer, state.system.cr4), (0, 0, 0));
        assert_eq!(state.registers.get(Gpr::Rdx), 0x830F10);
    }

    #[test]
    fn a_boot_processor_starts_again_where_the_firmware_would_be() {
        let state = reset_state(0);
        assert_eq!(state.system.cs.base + state.registers.rip, 0xF_FFF0);
    }
}
