//! Where things are in a machine's physical address space and I/O space.

/// First byte above RAM below 4 GiB; more RAM continues at 4 GiB.
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// Where RAM that does not fit below [`LOW_RAM_END`] continues.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// PCI Express memory-mapped configuration space of bus 0 (1 MiB).
pub const ECAM_BASE: u64 = 0xE000_0000;
/// Size of [`ECAM_BASE`]'s window: one bus.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// Memory BARs are placed from here ...
pub const PCI_MMIO_BASE: u64 = 0xE010_0000;
/// ... to here.
pub const PCI_MMIO_END: u64 = 0xF000_0000;
/// The I/O APIC's register page.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// The local APIC's register page (xAPIC mode).
pub const LAPIC_BASE: u64 = 0xFEE0_0000;

/// Initial boot parameters page (`struct boot_params`).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Identity page tables of the 64-bit entry.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// GDT of the 64-bit entry.
pub const BOOT_GDT: u64 = 0x6000;
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// ACPI tables; the RSDP stands first.
pub const ACPI_TABLES: u64 = 0xE_0000;
/// The protected-mode kernel.
pub const KERNEL: u64 = 0x100_0000;

/// The 16550 serial port, 8 ports.
pub const UART_PORT: u16 = 0x3F8;
/// ISA interrupt (and GSI) of the serial port.
pub const UART_GSI: u32 = 4;
/// ACPI sleep control register (one byte), then sleep status, then reset.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register (one byte).
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register (one byte); writing [`ACPI_RESET_VALUE`] resets.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// The value that resets at [`ACPI_RESET_PORT`].
pub const ACPI_RESET_VALUE: u8 = 0x01;
/// I/O BARs are placed from here.
pub const PCI_IO_BASE: u16 = 0xC000;
