//! Host tests of the parts of the VMX backend that need no hardware, taken in by path as in kernel_units.rs.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

#[path = "../../../kernel/src/memory"]
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

#[path = "../../../kernel/src/hypervisor"]
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

#[test]
fn x() {
    use hypervisor::vmx::fields::Field;
    assert!(Field::ExitReason.is_read_only());
}
