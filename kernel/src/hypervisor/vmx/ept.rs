//! The entry format of extended page tables.
//!
//! Intel SDM vol. 3, 29.3.2 (translation and entries), 29.3.7 (memory types), 25.6.11 (EPT pointer).

use crate::hypervisor::nested::NestedEntry;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const ALL_ACCESS: u64 = READ | WRITE | EXECUTE;
const WRITE_BACK: u64 = 6;
const LEAF_MEMORY_TYPE_SHIFT: u32 = 3;
/// The leaf's memory type is the only one that counts: the guest's PAT is not asked.
const IGNORE_PAT: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// In the pointer: length of the walk less one.
const FOUR_LEVELS: u64 = 3 << 3;

/// An EPT entry.
pub struct EptEntry;

impl NestedEntry for EptEntry {
    fn table(physical: u64) -> u64 {
        physical & ADDRESS | ALL_ACCESS
    }

    fn large_leaf(physical: u64) -> u64 {
        physical & ADDRESS | ALL_ACCESS | WRITE_BACK << LEAF_MEMORY_TYPE_SHIFT | IGNORE_PAT | LARGE
    }

    fn small_leaf(physical: u64) -> u64 {
        physical & ADDRESS | ALL_ACCESS | WRITE_BACK << LEAF_MEMORY_TYPE_SHIFT | IGNORE_PAT
    }

    fn device_leaf(physical: u64) -> u64 {
        physical & ADDRESS | READ | WRITE_BACK << LEAF_MEMORY_TYPE_SHIFT | IGNORE_PAT
    }

    fn read_only(entry: u64) -> u64 {
        entry & !WRITE
    }

    fn is_present(entry: u64) -> bool {
        entry & ALL_ACCESS != 0
    }

    fn is_writable(entry: u64) -> bool {
        entry & WRITE != 0
    }

    fn is_large(entry: u64) -> bool {
        entry & LARGE != 0
    }

    fn address(entry: u64) -> u64 {
        entry & ADDRESS
    }
}

/// The EPT pointer of a table of four levels that starts at physical address `root` and is itself read through the caches.
///
/// Accessed and dirty flags stay off: with them the processor writes to the tables, which a template's clones share, and takes its walks of the
/// guest's page tables for writes (29.3.5), so that a clone would copy each of them.
pub const fn pointer(root: u64) -> u64 {
    root & ADDRESS | WRITE_BACK | FOUR_LEVELS
}
