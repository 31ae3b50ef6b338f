//! L1's own devices: what the firmware tells, the clock, PCI, the network interface and the disk.

pub mod acpi;
pub mod disk;
pub mod dma;
pub mod e1000;
pub mod nic;
pub mod pci;
pub mod rtc;
pub mod serial;
pub mod virtio_blk;
pub mod virtio_net;
pub mod virtio_transport;
