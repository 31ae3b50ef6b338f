//! A machine's guest physical memory: the nested page table, which is the truth for where a page lies, and who owns it.
//!
//! A machine that boots gets 2 MiB frames as it touches its RAM. A clone starts with a root whose entries are its template's without write
//! permission, and nothing else: what it reads is the template's, and what it writes it copies first, the tables on the way and then the page.
//! Any core reads the table at any time without a lock: an entry only changes from absent to present, or from inherited to the machine's own,
//! and what is its own stays for as long as the machine. An entry that lets writes through owns what it leads to; so the table is also the list
//! of what goes back to the pool.

use super::nested::{self, ENTRIES, LARGE_LEVEL, NestedEntry, Place, ROOT_LEVEL, Table, index_at, walk};
use crate::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME, SMALL_PER_LARGE, SmallFrame};
use alloc::vec::Vec;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::{HIGH_RAM_START, LOW_RAM_END};
use nestling_machine::memory::MemoryError;
use spin::Mutex;

/// A clone that writes to a page of its template copies a piece around it of at most one part in so many of what it has copied: a page at first.
const COPY_GROWTH: u64 = 64;
/// The most that is copied at once.
const COPY_MAX: u64 = 64 << 10;
/// A clone that touches RAM that its template never had gets at most one part in so many of what it already got that way: few exits for one that
/// needs much, little memory for one that needs little.
const GROWTH: u64 = 4;
/// The most pages whose copying is recorded.
const RECORD_MAX: usize = 1024;

/// What changed when a page was made private.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Nothing: it was already.
    None,
    /// It was absent, which no processor remembers.
    Added,
    /// Something present was replaced: what processors have cached of it must be dropped before anyone relies on the new page.
    Moved,
}

/// A machine's guest physical memory.
pub struct Pages<E> {
    root: Table,
    /// Bytes of RAM.
    bytes: u64,
    /// It has a template.
    is_clone: bool,
    /// Held while entries are changed.
    changing: Mutex<()>,
    small: AtomicUsize,
    large: AtomicUsize,
    /// Bytes of RAM that the template did not have.
    fresh_bytes: AtomicU64,
    /// Bytes of the template that it has copied.
    copied_bytes: AtomicU64,
    /// Pages copied because they were written to, and not ahead of that.
    copied: AtomicUsize,
    is_recording: AtomicBool,
    record: Mutex<Vec<u32>>,
    entry: PhantomData<E>,
}

impl<E: NestedEntry> Pages<E> {
    /// RAM of `bytes`, a multiple of 2 MiB, none of it there yet. `None` when the pool is empty.
    pub fn new(bytes: u64, pool: &FramePool) -> Option<Self> {
        let root = pool.small()?;
        Some(Self::with_root(root, bytes, false))
    }

    fn with_root(root: SmallFrame, bytes: u64, is_clone: bool) -> Self {
        // SAFETY: the frame is zero or was filled with entries, and belongs to this value until it is freed.
        let root = unsafe { Table::at(root.into_address()) };
        Self {
            root,
            bytes,
            is_clone,
            changing: Mutex::new(()),
            small: AtomicUsize::new(1),
            large: AtomicUsize::new(0),
            fresh_bytes: AtomicU64::new(0),
            copied_bytes: AtomicU64::new(0),
            copied: AtomicUsize::new(0),
            is_recording: AtomicBool::new(false),
            record: Mutex::new(Vec::new()),
            entry: PhantomData,
        }
    }

    /// The memory of a clone. `self` is a template's: nobody changes it any more, and it outlives the clone. `None` when the pool is empty.
    pub fn share(&self, pool: &FramePool) -> Option<Self> {
        let root = pool.unfilled()?.fill(|index| inherited::<E>(self.root.entry(index)));
        Some(Self::with_root(root, self.bytes, true))
    }

    /// Physical address of the root.
    pub const fn root(&self) -> u64 {
        self.root.physical()
    }

    /// Bytes of memory that are its own: RAM and tables.
    pub fn private_bytes(&self) -> u64 {
        self.small.load(Ordering::Relaxed) as u64 * SMALL_FRAME
            + self.large.load(Ordering::Relaxed) as u64 * LARGE_FRAME
    }

    /// Pages of its template that it has copied because it wrote to them.
    pub fn copied_pages(&self) -> usize {
        self.copied.load(Ordering::Relaxed)
    }

    /// Starts to record which pages of the template are copied.
    pub fn start_record(&self) {
        self.is_recording.store(true, Ordering::Relaxed);
    }

    /// The pages whose copying was recorded, by number, in the order they were copied.
    pub fn take_record(&self) -> Vec<u32> {
        core::mem::take(&mut self.record.lock())
    }

    /// Whether `at` is RAM.
    pub const fn contains(&self, at: GuestPhysAddr) -> bool {
        let offset = match at.0 {
            low if low < LOW_RAM_END => low,
            high => match high.checked_sub(HIGH_RAM_START) {
                Some(above) => above.saturating_add(LOW_RAM_END),
                None => return false,
            },
        };
        offset < self.bytes
    }

    /// Where `at` lies; `None` where nothing is mapped.
    pub fn find(&self, at: GuestPhysAddr) -> Option<Place> {
        walk::<E>(self.root, at)
    }

    /// Makes the page of RAM around `at` the machine's own, if it is not yet.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`], or [`MemoryError::OutOfFrames`] when the pool is empty. What was changed until then is whole.
    pub fn make_private(&self, at: GuestPhysAddr, pool: &FramePool) -> Result<Change, MemoryError> {
        self.own(at, pool, true)
    }

    /// The same ahead of need: nobody has written to the page yet.
    ///
    /// # Errors
    /// As for [`Self::make_private`].
    pub fn copy_ahead(&self, page: u32, pool: &FramePool) -> Result<Change, MemoryError> {
        self.own(GuestPhysAddr(u64::from(page) * SMALL_FRAME), pool, false)
    }

    fn own(&self, at: GuestPhysAddr, pool: &FramePool, is_needed: bool) -> Result<Change, MemoryError> {
        if !self.contains(at) {
            return Err(MemoryError::NotRam { at, length: 1 });
        }
        if self.find(at).is_some_and(|place| place.is_private) {
            return Ok(Change::None);
        }
        if !self.is_clone {
            return self.add_large(at, pool);
        }
        if !pool.has_unpromised() {
            return Err(MemoryError::OutOfFrames);
        }
        let _changing = self.changing.lock();
        // Another core may have been faster; a page of the machine's own is not to be taken for an inherited one.
        if self.find(at).is_some_and(|place| place.is_private) {
            return Ok(Change::None);
        }
        let mut change = Change::None;
        let table = self.table(at, LARGE_LEVEL, pool, &mut change)?;
        if self.give_large(table, at, pool) {
            return Ok(change.and(Change::Added));
        }
        let table = self.table(at, 0, pool, &mut change)?;
        let index = index_at(at, 0);
        let entry = table.entry(index);
        if E::is_writable(entry) && E::is_present(entry) {
            return Ok(change);
        }
        let (pages, is_fresh) = match E::is_present(entry) {
            true => (
                piece(self.copied_bytes.load(Ordering::Relaxed) / COPY_GROWTH, COPY_MAX) / SMALL_FRAME,
                false,
            ),
            false => (self.fresh_allowance() / SMALL_FRAME, true),
        };
        // The page itself first: of those around it, as many as there are frames for.
        change = change.and(self.own_page(table, index, pool)?);
        let first = index - index % (pages as usize).max(1);
        for neighbour in first..first + pages as usize {
            let entry = table.entry(neighbour);
            if E::is_present(entry) != is_fresh && !(E::is_present(entry) && E::is_writable(entry)) {
                match self.own_page(table, neighbour, pool) {
                    Ok(other) => change = change.and(other),
                    Err(_) => break,
                }
            }
        }
        if is_needed && !is_fresh {
            self.note_copy(at);
        }
        Ok(change)
    }

    /// How much RAM that the template never had is given at once: 4 KiB to 2 MiB.
    fn fresh_allowance(&self) -> u64 {
        piece(self.fresh_bytes.load(Ordering::Relaxed) / GROWTH, LARGE_FRAME)
    }

    /// A machine that boots gets a whole large frame, which is zeroed before anything is locked.
    fn add_large(&self, at: GuestPhysAddr, pool: &FramePool) -> Result<Change, MemoryError> {
        let frame = pool.large().ok_or(MemoryError::OutOfFrames)?;
        let _changing = self.changing.lock();
        let mut change = Change::None;
        let table = match self.table(at, LARGE_LEVEL, pool, &mut change) {
            Ok(table) if !E::is_present(table.entry(index_at(at, LARGE_LEVEL))) => table,
            // Another core was faster, or there is no frame for a table.
            other => {
                pool.free_large(frame);
                return other.map(|_| Change::None);
            }
        };
        table.set(index_at(at, LARGE_LEVEL), E::large_leaf(frame.into_address()));
        self.large.fetch_add(1, Ordering::Relaxed);
        Ok(change.and(Change::Added))
    }

    /// Gives a clone that already got much a whole large frame where its template has nothing, if there is one.
    fn give_large(&self, table: Table, at: GuestPhysAddr, pool: &FramePool) -> bool {
        let index = index_at(at, LARGE_LEVEL);
        if E::is_present(table.entry(index)) || self.fresh_allowance() < LARGE_FRAME {
            return false;
        }
        let Some(frame) = pool.large() else { return false };
        table.set(index, E::large_leaf(frame.into_address()));
        self.large.fetch_add(1, Ordering::Relaxed);
        self.fresh_bytes.fetch_add(LARGE_FRAME, Ordering::Relaxed);
        true
    }

    /// The machine's own table of `level` on the way to `at`: those on the way that are missing are made, inherited ones are copied, and a large
    /// page in the way becomes small ones. Under the lock.
    fn table(
        &self,
        at: GuestPhysAddr,
        level: u32,
        pool: &FramePool,
        change: &mut Change,
    ) -> Result<Table, MemoryError> {
        let mut table = self.root;
        for above in (level + 1..=ROOT_LEVEL).rev() {
            let index = index_at(at, above);
            let entry = table.entry(index);
            let is_present = E::is_present(entry);
            if is_present && E::is_writable(entry) && !(above == LARGE_LEVEL && E::is_large(entry)) {
                // SAFETY: a present entry that is no leaf leads to a table of this machine's.
                table = unsafe { Table::at(E::address(entry)) };
                continue;
            }
            let frame = pool.unfilled().ok_or(MemoryError::OutOfFrames)?;
            let frame = if !is_present {
                frame.fill(|_| 0)
            } else if above == LARGE_LEVEL && E::is_large(entry) {
                let page = E::address(entry) & !(LARGE_FRAME - 1);
                frame.fill(|number| E::read_only(E::small_leaf(page + number as u64 * SMALL_FRAME)))
            } else {
                // SAFETY: a present entry that is no leaf leads to a table, the template's here.
                let below = unsafe { Table::at(E::address(entry)) };
                frame.fill(|number| inherited::<E>(below.entry(number)))
            };
            self.small.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the frame was filled with entries and belongs to the entry that is about to lead to it.
            let own = unsafe { Table::at(frame.into_address()) };
            table.set(index, E::table(own.physical()));
            *change = change.and(if is_present { Change::Moved } else { Change::Added });
            table = own;
        }
        Ok(table)
    }

    /// Gives the machine a 4 KiB page of its own at an entry of one of its own tables: a copy of what is inherited there, or a page of zeros.
    fn own_page(&self, table: Table, index: usize, pool: &FramePool) -> Result<Change, MemoryError> {
        let entry = table.entry(index);
        let (frame, change) = if E::is_present(entry) {
            if E::is_writable(entry) {
                return Ok(Change::None);
            }
            let frame = pool.unfilled().ok_or(MemoryError::OutOfFrames)?;
            let from = E::address(entry) as *const [u8; SMALL_FRAME as usize];
            // SAFETY: the page is a template's, which is identity-mapped, never written, and outlives this machine.
            let frame = frame.copy(unsafe { &*from });
            self.copied_bytes.fetch_add(SMALL_FRAME, Ordering::Relaxed);
            (frame, Change::Moved)
        } else {
            let frame = pool.small().ok_or(MemoryError::OutOfFrames)?;
            self.fresh_bytes.fetch_add(SMALL_FRAME, Ordering::Relaxed);
            (frame, Change::Added)
        };
        table.set(index, E::small_leaf(frame.into_address()));
        self.small.fetch_add(1, Ordering::Relaxed);
        Ok(change)
    }

    fn note_copy(&self, at: GuestPhysAddr) {
        self.copied.fetch_add(1, Ordering::Relaxed);
        if self.is_recording.load(Ordering::Relaxed)
            && let Ok(page) = u32::try_from(at.0 / SMALL_FRAME)
        {
            let mut record = self.record.lock();
            if record.len() < RECORD_MAX {
                record.push(page);
            }
        }
    }

    /// Maps the 4 KiB page around `at`, where no RAM is, to the page at physical address `page`, which the guest may read and not write. The page must
    /// outlive the table. `None` when the pool had no frame for a table.
    #[must_use]
    pub fn map_device(&self, at: GuestPhysAddr, page: u64, pool: &FramePool) -> Option<Change> {
        self.set_device(at, E::device_leaf(page & !(SMALL_FRAME - 1)), pool)
    }

    /// Takes away the page that [`Self::map_device`] mapped around `at`. Cached translations have to be dropped.
    #[must_use]
    pub fn unmap_device(&self, at: GuestPhysAddr, pool: &FramePool) -> Option<Change> {
        self.set_device(at, 0, pool)
    }

    fn set_device(&self, at: GuestPhysAddr, entry: u64, pool: &FramePool) -> Option<Change> {
        if self.contains(at) {
            return Some(Change::None);
        }
        let _changing = self.changing.lock();
        let mut change = Change::None;
        let table = self.table(at, 0, pool, &mut change).ok()?;
        let before = table.entry(index_at(at, 0));
        table.set(index_at(at, 0), entry);
        Some(change.and(if E::is_present(before) { Change::Moved } else { Change::Added }))
    }

    /// Gives everything that is its own back.
    ///
    /// # Safety
    /// No vCPU and no clone uses it any more.
    pub unsafe fn free(self, pool: &FramePool) {
        // SAFETY: the caller's word; `self` is consumed, so that it happens once.
        unsafe { nested::free::<E>(self.root, ROOT_LEVEL, pool) };
    }

    /// A digest of every page and table that is the machine's own, to show that none of them changes.
    pub fn digest(&self) -> u64 {
        digest::<E>(self.root, ROOT_LEVEL, 0xCBF2_9CE4_8422_2325)
    }
}

impl Change {
    /// Both.
    const fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Moved, _) | (_, Self::Moved) => Self::Moved,
            (Self::Added, _) | (_, Self::Added) => Self::Added,
            (Self::None, Self::None) => Self::None,
        }
    }
}

/// How much is given at once: the largest power of two up to `share`, from 4 KiB to `most`.
fn piece(share: u64, most: u64) -> u64 {
    1 << share.clamp(SMALL_FRAME, most).ilog2()
}

/// A template's entry, as a clone has it.
fn inherited<E: NestedEntry>(entry: u64) -> u64 {
    if E::is_present(entry) { E::read_only(entry) } else { entry }
}

/// FNV-1a over words.
fn digest<E: NestedEntry>(table: Table, level: u32, mut hash: u64) -> u64 {
    const PRIME: u64 = 0x100_0000_01B3;
    for index in 0..ENTRIES {
        let entry = table.entry(index);
        hash = (hash ^ entry).wrapping_mul(PRIME);
        if !E::is_present(entry) || !E::is_writable(entry) {
            continue;
        }
        let pages = match level {
            0 => 1,
            LARGE_LEVEL if E::is_large(entry) => SMALL_PER_LARGE,
            _ => {
                // SAFETY: a present entry that is no leaf leads to a table.
                hash = digest::<E>(unsafe { Table::at(E::address(entry)) }, level - 1, hash);
                continue;
            }
        };
        for page in 0..pages {
            // SAFETY: a leaf leads to a frame of this machine's, of which every page is read as words like a table.
            let page =
                unsafe { Table::at((E::address(entry) & !(SMALL_FRAME - 1)) + page as u64 * SMALL_FRAME) };
            for word in 0..ENTRIES {
                hash = (hash ^ page.entry(word)).wrapping_mul(PRIME);
            }
        }
    }
    hash
}
