//! A machine's nested page table: guest physical to host physical addresses, four levels, 2 MiB leaves.
//!
//! The walk is shared; only the bits of an entry are the vendor's (AMD APM vol. 2, 15.25; Intel SDM vol. 3, 29.3).

use crate::memory::frames::{FramePool, LARGE_FRAME, LargeFrame, SMALL_FRAME, SmallFrame};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::ptr;
use nestling_machine::address::GuestPhysAddr;

/// A vendor's page table entry.
pub trait NestedEntry {
    /// An entry that points to the next table, with every permission.
    fn table(physical: u64) -> u64;
    /// A 2 MiB leaf of write-back RAM with every permission.
    fn large_leaf(physical: u64) -> u64;
    /// Whether the entry is in use.
    fn is_present(entry: u64) -> bool;
    /// The physical address in the entry.
    fn address(entry: u64) -> u64;
}

/// The table. Its frames go back to the pool by [`Self::free`].
pub struct NestedTable<E> {
    tables: Vec<SmallFrame>,
    root: u64,
    entry: PhantomData<E>,
}

impl<E: NestedEntry> NestedTable<E> {
    /// An empty table; `None` when the pool is empty.
    pub fn new(frames: &mut FramePool) -> Option<Self> {
        let root = frames.small()?;
        Some(Self { root: root.address(), tables: Vec::from([root]), entry: PhantomData })
    }

    /// Physical address of the top level.
    pub const fn root(&self) -> u64 {
        self.root
    }

    /// Maps the 2 MiB page around `guest` to `frame`. False when the pool had no frame for a table.
    pub fn map(&mut self, guest: GuestPhysAddr, frame: &LargeFrame, frames: &mut FramePool) -> bool {
        let mut table = self.root;
        for level in [3, 2] {
            let slot = slot(table, guest, level);
            // SAFETY: `slot` lies in one of this machine's own tables, which are identity-mapped frames.
            let entry = unsafe { ptr::read(slot) };
            table = if E::is_present(entry) {
                E::address(entry)
            } else {
                let Some(next) = frames.small() else { return false };
                let address = next.address();
                self.tables.push(next);
                // SAFETY: as above; a frame from the pool is zero, so it is an empty table.
                unsafe { ptr::write_volatile(slot, E::table(address)) };
                address
            };
        }
        // SAFETY: as above. The frame outlives the entry: the machine owns both.
        unsafe {
            ptr::write_volatile(slot(table, guest, 1), E::large_leaf(frame.address() & !(LARGE_FRAME - 1)))
        };
        true
    }

    /// Gives every table back. The vCPUs that used it are gone.
    pub fn free(self, frames: &mut FramePool) {
        for table in self.tables {
            frames.free_small(table);
        }
    }
}

/// Where a table's entry for `guest` stands; level 0 maps 4 KiB pages, 3 is the root.
const fn slot(table: u64, guest: GuestPhysAddr, level: u32) -> *mut u64 {
    let index = guest.0 >> (12 + 9 * level) & (SMALL_FRAME / 8 - 1);
    (table + index * 8) as *mut u64
}
