//! Host tests of the parts of the VMX backend that need no hardware, and of the barriers; taken in by path as in kernel_units.rs.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

mod entry_checks;
mod protection;
mod tables;
mod what_is_there;

#[path = "../../../../kernel/src/cpu"]
mod cpu {
    pub mod barriers;
    pub mod features;
}

#[path = "../../../../kernel/src/memory"]
mod memory {
    pub mod frames;

    /// The kernel's pages are read by hardware; these are not.
    pub mod heap {
        pub struct Pages(Vec<u8>);

        impl Pages {
            pub fn new(count: usize) -> Self {
                Self(vec![0; count * 4096])
            }

            pub fn bytes_mut(&mut self) -> &mut [u8] {
                &mut self.0
            }

            pub fn physical(&self) -> u64 {
                self.0.as_ptr() as u64
            }
        }
    }
}

#[path = "../../../../kernel/src/hypervisor"]
mod hypervisor {
    pub mod nested;
    pub mod refusal;
    pub mod vmx {
        pub mod capabilities;
        pub mod controls;
        pub mod entry_checks;
        pub mod ept;
        pub mod exit_reason;
        pub mod features;
        pub mod fields;
        pub mod msr_bitmap;
    }
}

use hypervisor::vmx::capabilities::Capabilities;

/// What a Haswell server says, by MSR, where the hypervisor below keeps posted interrupts to itself.
const HASWELL: [(u32, u64); 14] = [
    (0x480, 0x00DA_0400_0000_0012),
    (0x485, 0x3004_81E5),
    (0x486, 0x8000_0021),
    (0x487, 0xFFFF_FFFF),
    (0x488, 0x2000),
    (0x489, 0x0017_27FF),
    (0x48A, 0x2A),
    (0x48B, 0x0000_7FFF_0000_0000),
    (0x48C, 0x0000_0F01_0633_4141),
    (0x48D, 0x0000_007F_0000_0016),
    (0x48E, 0xFFF9_FFFE_0400_6172),
    (0x48F, 0x007F_FFFF_0003_6DFB),
    (0x490, 0x0000_FFFF_0000_11FB),
    (0x491, 1),
];

/// The capabilities by these registers; reading any other faults.
fn capabilities(registers: &[(u32, u64)]) -> Capabilities {
    Capabilities::read(|index| {
        let register = registers.iter().find(|(at, _)| *at == index);
        register.unwrap_or_else(|| panic!("MSR {index:#x} does not exist")).1
    })
}

fn haswell() -> Capabilities {
    capabilities(&HASWELL)
}

/// A Haswell with registers of its own.
fn haswell_with(changes: &[(u32, u64)]) -> Capabilities {
    capabilities(&[changes, &HASWELL].concat())
}
