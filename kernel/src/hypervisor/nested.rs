//! A machine's nested page table: guest physical to host physical addresses, four levels; RAM in 2 MiB leaves.
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
    /// A 4 KiB leaf of write-back RAM that may be read.
    fn read_only_leaf(physical: u64) -> u64;
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
    pub fn new(frames: &FramePool) -> Option<Self> {
        let root = frames.small()?;
        Some(Self { root: root.address(), tables: Vec::from([root]), entry: PhantomData })
    }

    /// Physical address of the top level.
    pub const fn root(&self) -> u64 {
        self.root
    }

    /// Maps the 2 MiB page around `guest` to `frame`. False when the pool had no frame for a table.
    pub fn map(&mut self, guest: GuestPhysAddr, frame: &LargeFrame, frames: &FramePool) -> bool {
        let Some(slot) = self.slot(guest, 1, frames) else { return false };
        // SAFETY: the slot is the guest's own table's. The frame outlives the entry: the machine owns both.
        unsafe { ptr::write_volatile(slot, E::large_leaf(frame.address() & !(LARGE_FRAME - 1))) };
        true
    }

    /// Maps the 4 KiB page around `guest`, where no large page is, to the page at physical address `page`, which the guest may read and not
    /// write. The page must outlive the table. False when the pool had no frame for a table.
    pub fn map_read_only(&mut self, guest: GuestPhysAddr, page: u64, frames: &FramePool) -> bool {
        let Some(slot) = self.slot(guest, 0, frames) else { return false };
        // SAFETY: the slot is the guest's own table's; the caller keeps the page.
        unsafe { ptr::write_volatile(slot, E::read_only_leaf(page & !(SMALL_FRAME - 1))) };
        true
    }

    /// Takes away the 4 KiB page that [`Self::map_read_only`] mapped around `guest`. Cached translations have to be dropped.
    pub fn unmap(&mut self, guest: GuestPhysAddr, frames: &FramePool) {
        if let Some(slot) = self.slot(guest, 0, frames) {
            // SAFETY: the slot is the guest's own table's.
            unsafe { ptr::write_volatile(slot, 0) };
        }
    }

    /// Where the entry for `guest` stands in the table of `level`, with tables down to there; `None` when the pool had no frame for one.
    fn slot(&mut self, guest: GuestPhysAddr, level: u32, frames: &FramePool) -> Option<*mut u64> {
        let mut table = self.root;
        for level in (level + 1..=3).rev() {
            let slot = slot(table, guest, level);
            // SAFETY: `slot` lies in one of this machine's own tables, which are identity-mapped frames.
            let entry = unsafe { ptr::read(slot) };
            table = if E::is_present(entry) {
                E::address(entry)
            } else {
                let next = frames.small()?;
                let address = next.address();
                self.tables.push(next);
                // SAFETY: as above; a frame from the pool is zero, so it is an empty table.
                unsafe { ptr::write_volatile(slot, E::table(address)) };
                address
            };
        }
        Some(slot(table, guest, level))
    }

    /// Gives every table back. The vCPUs that used it are gone.
    pub fn free(self, frames: &FramePool) {
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
