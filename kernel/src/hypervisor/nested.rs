//! Nested page tables: guest physical to host physical addresses, four levels. What an entry's bits are is the vendor's.
//!
//! AMD APM vol. 2, 15.25; Intel SDM vol. 3, 29.3. Along a walk permissions are ANDed (APM vol. 2, 15.25.5; SDM vol. 3, 29.3.2): what lies
//! behind an entry without write permission cannot be written, whatever the entries below it say. A template is shared by that alone.

use crate::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME, SmallFrame};
use core::sync::atomic::{AtomicU64, Ordering};
use nestling_machine::address::GuestPhysAddr;

/// Entries of a table.
pub const ENTRIES: usize = (SMALL_FRAME / 8) as usize;
/// The level of the root. Level 0 maps pages of 4 KiB, level 1 those of 2 MiB.
pub const ROOT_LEVEL: u32 = 3;
/// The level whose entries can be leaves of 2 MiB.
pub const LARGE_LEVEL: u32 = 1;

/// A vendor's page table entry. The processor never writes to one: accessed and dirty bits are set from the start or not in use, so that the
/// tables of a template stay as they are.
pub trait NestedEntry {
    /// An entry that points to the next table, with every permission.
    fn table(physical: u64) -> u64;
    /// A 2 MiB leaf of write-back RAM with every permission.
    fn large_leaf(physical: u64) -> u64;
    /// A 4 KiB leaf of write-back RAM with every permission.
    fn small_leaf(physical: u64) -> u64;
    /// A 4 KiB leaf of write-back memory that may be read and nothing else.
    fn device_leaf(physical: u64) -> u64;
    /// The same entry without write permission.
    fn read_only(entry: u64) -> u64;
    /// Whether the entry is in use.
    fn is_present(entry: u64) -> bool;
    /// Whether the entry, if present, lets writes through.
    fn is_writable(entry: u64) -> bool;
    /// Whether a present entry of [`LARGE_LEVEL`] is a leaf.
    fn is_large(entry: u64) -> bool;
    /// The physical address in the entry.
    fn address(entry: u64) -> u64;
}

/// One table of a machine that exists: a frame, identity-mapped, that stays as long as the machine, and that any core may be reading.
#[derive(Clone, Copy)]
pub struct Table(u64);

impl Table {
    /// The table at a physical address.
    ///
    /// # Safety
    /// A frame of nested page table entries is there, and stays for as long as this value and its copies are used.
    pub const unsafe fn at(physical: u64) -> Self {
        Self(physical)
    }

    /// Its physical address.
    pub const fn physical(self) -> u64 {
        self.0
    }

    fn slot(&self, index: usize) -> &AtomicU64 {
        // SAFETY: the table is a frame by `at`'s contract, and the index stays within it. Entries are read and written as atomic words only.
        unsafe { AtomicU64::from_ptr((self.0 as *mut u64).add(index % ENTRIES)) }
    }

    /// An entry by its number.
    pub fn entry(self, index: usize) -> u64 {
        self.slot(index).load(Ordering::Acquire)
    }

    /// Sets an entry. What it leads to was written before.
    pub fn set(self, index: usize, entry: u64) {
        self.slot(index).store(entry, Ordering::Release);
    }
}

/// The number of the entry for `guest` in a table of `level`.
pub const fn index_at(guest: GuestPhysAddr, level: u32) -> usize {
    (guest.0 >> (12 + 9 * level)) as usize & (ENTRIES - 1)
}

/// Where a guest physical address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The physical address of the byte.
    pub physical: u64,
    /// Bytes from there to the end of its page.
    pub room: u64,
    /// Every entry on the way lets writes through: the page is the machine's own.
    pub is_private: bool,
}

/// Follows `guest` from the root on, as the processor does; `None` where nothing is mapped.
pub fn walk<E: NestedEntry>(root: Table, guest: GuestPhysAddr) -> Option<Place> {
    let (mut table, mut is_private) = (root, true);
    for level in (0..=ROOT_LEVEL).rev() {
        let entry = table.entry(index_at(guest, level));
        if !E::is_present(entry) {
            return None;
        }
        is_private &= E::is_writable(entry);
        let page = match level {
            0 => SMALL_FRAME,
            LARGE_LEVEL if E::is_large(entry) => LARGE_FRAME,
            _ => {
                // SAFETY: a present entry that is no leaf leads to a table, which stays as long as the one that points to it.
                table = unsafe { Table::at(E::address(entry)) };
                continue;
            }
        };
        let offset = guest.0 % page;
        let physical = (E::address(entry) & !(page - 1)) + offset;
        return Some(Place { physical, room: page - offset, is_private });
    }
    None
}

/// Gives back what is reached through entries that let writes through, the table at `table` included: everything that is the machine's own.
///
/// # Safety
/// No processor and nobody else uses the table or what it leads to, and it is given back once.
pub unsafe fn free<E: NestedEntry>(table: Table, level: u32, pool: &FramePool) {
    use crate::memory::frames::LargeFrame;
    for index in 0..ENTRIES {
        let entry = table.entry(index);
        if !E::is_present(entry) || !E::is_writable(entry) {
            continue;
        }
        let address = E::address(entry);
        // SAFETY: a writable entry owns its frame: the frame was left to it, no other entry has it, and the caller vouches that nobody uses it.
        unsafe {
            match level {
                0 => pool.free_small(SmallFrame::from_address(address)),
                LARGE_LEVEL if E::is_large(entry) => {
                    pool.free_large(LargeFrame::from_address(address & !(LARGE_FRAME - 1)));
                }
                _ => free::<E>(Table::at(address), level - 1, pool),
            }
        }
    }
    // SAFETY: as above.
    pool.free_small(unsafe { SmallFrame::from_address(table.physical()) });
}
