//! L1's own devices: what the firmware tells, the clock, PCI, and the network interface.

pub mod acpi;
pub mod rtc;
pub mod serial;
