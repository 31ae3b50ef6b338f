//! The frame pool: physical memory for machines, in 2 MiB and 4 KiB frames.
//!
//! A frame is owned by whoever holds its value; it cannot be copied, and it is zero when it is handed out. Frames come back
//! dirty and are zeroed before anyone sees them again: in idle time where there is some, otherwise when they are handed out.

mod splits;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};
use core::{ptr, slice};
use spin::Mutex;
use splits::Splits;

/// Bytes of a large frame.
pub const LARGE_FRAME: u64 = 2 << 20;
/// Bytes of a small frame.
pub const SMALL_FRAME: u64 = 4 << 10;
/// Small frames in a large one.
pub const SMALL_PER_LARGE: usize = (LARGE_FRAME / SMALL_FRAME) as usize;

/// An owned 2 MiB frame, zeroed when it was handed out.
#[derive(Debug)]
#[must_use = "a frame that is dropped is lost: give it back to the pool"]
pub struct LargeFrame(u64);

/// An owned 4 KiB frame, zeroed when it was handed out.
#[derive(Debug)]
#[must_use = "a frame that is dropped is lost: give it back to the pool"]
pub struct SmallFrame(u64);

impl LargeFrame {
    /// Physical (and L1 virtual) address.
    pub const fn address(&self) -> u64 {
        self.0
    }

    /// Takes the frame over whose address [`Self::into_address`] gave.
    ///
    /// # Safety
    /// The address came from there, and no other value is made from it.
    pub const unsafe fn from_address(address: u64) -> Self {
        Self(address)
    }

    /// Leaves the frame to whoever keeps its address: a page table that it is entered in.
    pub const fn into_address(self) -> u64 {
        self.0
    }
}

impl SmallFrame {
    /// Physical (and L1 virtual) address.
    pub const fn address(&self) -> u64 {
        self.0
    }

    /// Takes the frame over whose address [`Self::into_address`] gave.
    ///
    /// # Safety
    /// The address came from there, and no other value is made from it.
    pub const unsafe fn from_address(address: u64) -> Self {
        Self(address)
    }

    /// Leaves the frame to whoever keeps its address: a page table that it is entered in.
    pub const fn into_address(self) -> u64 {
        self.0
    }
}

/// An owned 4 KiB frame with what its last owner left in it. Nobody sees it before it is overwritten as a whole.
#[derive(Debug)]
#[must_use = "a frame that is dropped is lost: fill it"]
pub struct UnfilledFrame(u64);

impl UnfilledFrame {
    /// The frame with a copy of `content`.
    pub fn copy(self, content: &[u8; SMALL_FRAME as usize]) -> SmallFrame {
        // SAFETY: the frame is this value's own and identity-mapped, and a page long; `content` is another.
        unsafe { ptr::copy_nonoverlapping(content.as_ptr(), self.0 as *mut u8, content.len()) };
        SmallFrame(self.0)
    }

    /// The frame with these words.
    pub fn fill(self, mut word: impl FnMut(usize) -> u64) -> SmallFrame {
        for index in 0..SMALL_FRAME as usize / 8 {
            // SAFETY: as in `copy`; the index stays within the page.
            unsafe { ptr::write((self.0 as *mut u64).add(index), word(index)) };
        }
        SmallFrame(self.0)
    }
}

/// A large frame that nobody but L1 reaches: it is mapped for no guest and given to no device.
#[derive(Debug)]
#[must_use = "a frame that is dropped is lost: give it back to the pool"]
pub struct PrivateFrame(LargeFrame);

impl PrivateFrame {
    /// Takes a frame over that is mapped nowhere else.
    pub const fn new(frame: LargeFrame) -> Self {
        Self(frame)
    }

    /// The frame, to be given back.
    pub const fn into_frame(self) -> LargeFrame {
        self.0
    }
}

impl AsRef<[u8]> for PrivateFrame {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the frame is this value's own, identity-mapped and initialised; it is borrowed through `self`.
        unsafe { slice::from_raw_parts(self.0.address() as *const u8, LARGE_FRAME as usize) }
    }
}

impl AsMut<[u8]> for PrivateFrame {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`.
        unsafe { slice::from_raw_parts_mut(self.0.address() as *mut u8, LARGE_FRAME as usize) }
    }
}

/// The frames that nobody owns.
struct Free {
    clean: Vec<u64>,
    dirty: Vec<u64>,
    splits: Splits,
    /// Frames that a core is zeroing ahead of need: in no list, and soon in `clean`.
    in_work: usize,
}

/// All memory that machines can have. Every core takes frames from it and gives them back; its lock is held for a few instructions, never
/// while a frame is zeroed, and no other is taken under it.
pub struct FramePool {
    free: Mutex<Free>,
    total_large: usize,
    /// See [`Self::promise`].
    promised: AtomicUsize,
}

impl FramePool {
    /// An empty pool.
    pub const fn new() -> Self {
        let free = Free { clean: Vec::new(), dirty: Vec::new(), splits: Splits::new(), in_work: 0 };
        Self { free: Mutex::new(free), total_large: 0, promised: AtomicUsize::new(0) }
    }

    /// Adds usable RAM; both ends are multiples of 2 MiB.
    pub fn add(&mut self, start: u64, end: u64) {
        let frames = (start..end).step_by(LARGE_FRAME as usize);
        self.total_large += frames.clone().count();
        let Free { clean, dirty, splits, .. } = self.free.get_mut();
        splits.cover(start, end);
        dirty.extend(frames);
        // Freeing must not need memory: room for every frame in both lists.
        dirty.reserve(self.total_large - dirty.len());
        clean.reserve(self.total_large - clean.len());
    }

    /// Free memory and all memory, in 4 KiB frames.
    pub fn counts(&self) -> (usize, usize) {
        let free = self.free.lock();
        let large = free.clean.len() + free.dirty.len() + free.in_work;
        (large * SMALL_PER_LARGE + free.splits.free_frames(), self.total_large * SMALL_PER_LARGE)
    }

    /// So many 4 KiB frames are promised to machines that have yet to take them.
    pub fn promise(&self, frames: usize) {
        self.promised.store(frames, Ordering::Relaxed);
    }

    /// Whether there is a frame for one to whom none was promised.
    pub fn has_unpromised(&self) -> bool {
        let promised = self.promised.load(Ordering::Relaxed);
        promised == 0 || self.counts().0 > promised
    }

    /// A zeroed 2 MiB frame; `None` when there is none.
    pub fn large(&self) -> Option<LargeFrame> {
        let (address, is_clean) = self.take()?;
        if !is_clean {
            zero(address, LARGE_FRAME);
        }
        Some(LargeFrame(address))
    }

    /// Takes at least `bytes` of memory out of the pool for good, in one piece; `None` when no such piece is free. What it holds means nothing.
    pub fn carve(&mut self, bytes: u64) -> Option<&'static mut [u8]> {
        let Free { clean, dirty, .. } = self.free.get_mut();
        let count = usize::try_from(bytes.div_ceil(LARGE_FRAME)).ok().filter(|count| *count > 0)?;
        let mut free: Vec<u64> = dirty.iter().chain(&*clean).copied().collect();
        free.sort_unstable();
        let span = (count as u64 - 1) * LARGE_FRAME;
        let start = free.windows(count).find_map(|run| match run {
            [first, .., last] if last - first == span => Some(*first),
            [only] => Some(*only),
            _ => None,
        })?;
        let taken = start..start + span + LARGE_FRAME;
        dirty.retain(|address| !taken.contains(address));
        clean.retain(|address| !taken.contains(address));
        self.total_large -= count;
        // SAFETY: the frames were the pool's own, identity-mapped RAM that has some content, and are in no list any more.
        Some(unsafe { slice::from_raw_parts_mut(start as *mut u8, (span + LARGE_FRAME) as usize) })
    }

    /// The address of a free large frame, and whether it is zero.
    fn take(&self) -> Option<(u64, bool)> {
        loop {
            let mut free = self.free.lock();
            let clean = free.clean.pop().map(|address| (address, true));
            let found = clean.or_else(|| free.dirty.pop().map(|address| (address, false)));
            if found.is_some() || free.in_work == 0 {
                return found;
            }
            drop(free);
            core::hint::spin_loop();
        }
    }

    /// A zeroed 4 KiB frame; `None` when there is none.
    pub fn small(&self) -> Option<SmallFrame> {
        let address = self.take_small()?;
        zero(address, SMALL_FRAME);
        Some(SmallFrame(address))
    }

    /// A 4 KiB frame to be overwritten as a whole; `None` when there is none.
    pub fn unfilled(&self) -> Option<UnfilledFrame> {
        self.take_small().map(UnfilledFrame)
    }

    fn take_small(&self) -> Option<u64> {
        let split = self.free.lock().splits.take();
        if split.is_some() {
            return split;
        }
        let (base, _) = self.take()?;
        let mut free = self.free.lock();
        free.splits.add(base);
        free.splits.take()
    }

    /// Takes a 2 MiB frame back.
    pub fn free_large(&self, frame: LargeFrame) {
        self.free.lock().dirty.push(frame.0);
    }

    /// Takes a 4 KiB frame back.
    pub fn free_small(&self, frame: SmallFrame) {
        let mut free = self.free.lock();
        if let Some(whole) = free.splits.give_back(frame.0) {
            free.dirty.push(whole);
        }
    }

    /// Zeroes one dirty frame ahead of need. False when none is left to do.
    pub fn clean_one(&self) -> bool {
        let address = {
            let mut free = self.free.lock();
            let Some(address) = free.dirty.pop() else { return false };
            free.in_work += 1;
            address
        };
        zero(address, LARGE_FRAME);
        let mut free = self.free.lock();
        free.in_work -= 1;
        free.clean.push(address);
        true
    }
}

fn zero(address: u64, bytes: u64) {
    // SAFETY: the address came from the pool's own lists, so it is identity-mapped RAM that nobody else holds.
    unsafe { ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
}
