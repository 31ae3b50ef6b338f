//! From the boot loader to Rust: entry in 64-bit mode, and what the loader says of the machine.
//!
//! Each protocol fills a [`BootInfo`]; nothing after this module knows which one it was.

mod command_line;
pub mod pvh;

pub use command_line::CommandLine;

use alloc::vec::Vec;

/// A range of physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// First byte after the range.
    pub end: u64,
    /// What it is used for.
    pub kind: MemoryKind,
}

/// What a range of physical memory holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryKind {
    /// RAM that is free for use.
    Usable,
    /// Firmware tables and other memory that may be read but not used.
    Firmware,
}

/// What the boot loader tells of the machine.
#[derive(Debug)]
pub struct BootInfo {
    /// The kernel's command line, empty if none was given.
    pub command_line: CommandLine,
    /// Files loaded beside the kernel: images.
    pub modules: Vec<&'static [u8]>,
    /// Physical memory, in the loader's order.
    pub memory: Vec<MemoryRange>,
    /// Physical address of the ACPI root pointer, if the loader gave one.
    pub rsdp: Option<u64>,
}
