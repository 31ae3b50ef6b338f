//! What every boot protocol tells, in one form.

use super::CommandLine;
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

impl MemoryRange {
    /// The range of `bytes` from `start`; `None` when it is empty or passes the end of the address space.
    pub fn new(start: u64, bytes: u64, kind: MemoryKind) -> Option<Self> {
        let end = start.checked_add(bytes)?;
        (bytes > 0).then_some(Self { start, end, kind })
    }
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
    /// Physical address of the ACPI root pointer or of a copy of it, if the loader gave one.
    pub rsdp: Option<u64>,
}
