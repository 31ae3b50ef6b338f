//! Host tests of the kernel's service and drivers. The kernel is built for a target without a test harness,
//! so its files, and the tests in them, are taken in by path; what they need of the rest of the kernel is
//! played here.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

#[path = "../../../kernel/src/boot"]
mod boot {
    mod command_line;
    pub use command_line::CommandLine;
}

#[path = "../../../kernel/src/hypervisor"]
mod hypervisor {
    mod figures;
    pub use figures::TemplateFigures;
}

mod cpu {
    pub fn take_interrupts() {}

    pub mod clock {
        pub fn now_ns() -> u64 {
            0
        }

        pub fn unix_ns() -> u64 {
            0
        }

        pub fn tsc() -> u64 {
            0
        }
    }

    pub mod interrupts {
        pub struct IrqLine;

        impl IrqLine {
            pub fn message_address(&self) -> u64 {
                0
            }

            pub fn message_data(&self) -> u32 {
                0
            }

            pub fn take_pending(&self) -> bool {
                false
            }
        }

        pub fn allocate(_: &'static str) -> Option<IrqLine> {
            None
        }
    }

    pub mod pic {
        pub struct LegacyLine;

        impl LegacyLine {
            pub fn new(_: u8) -> Option<Self> {
                None
            }

            pub fn rearm(&self) {}

            pub fn take_pending(&self) -> bool {
                false
            }
        }

        impl core::fmt::Display for LegacyLine {
            fn fmt(&self, _: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                Ok(())
            }
        }
    }
}

/// Physical memory, as tests fill it.
mod memory {
    use std::cell::RefCell;

    thread_local! {
        static PLACED: RefCell<Vec<(u64, Vec<u8>)>> = const { RefCell::new(Vec::new()) };
    }

    /// Puts bytes at an address; everything around them reads as zeros.
    pub fn place(address: u64, bytes: &[u8]) {
        PLACED.with_borrow_mut(|placed| placed.push((address, bytes.to_vec())));
    }

    pub fn map_mmio(address: u64, bytes: usize) -> *mut u8 {
        let mut memory = vec![0; bytes];
        PLACED.with_borrow(|placed| {
            for (start, content) in placed {
                for (offset, byte) in (*start..).zip(content) {
                    if let Some(place) =
                        offset.checked_sub(address).and_then(|at| memory.get_mut(at as usize))
                    {
                        *place = *byte;
                    }
                }
            }
        });
        memory.leak().as_mut_ptr()
    }
}

#[path = "../../../kernel/src/drivers"]
mod drivers {
    pub mod acpi;
    pub mod dma;
    pub mod e1000;
    pub mod nic;
    pub mod pci;
    pub mod rtc;
    pub mod virtio_net;
    pub mod virtio_transport;
}

#[path = "../../../kernel/src/service"]
mod service {
    pub mod engine;
    pub mod entropy;
    pub mod http_server;
    pub mod images;
    pub mod machines;
    pub mod network;
    pub mod node;
    pub mod settings;
    mod templates;
    pub mod testing;
    pub mod uplink;
}
