//! The frame pool: physical memory for machines, in 2 MiB and 4 KiB frames.
//!
//! A frame is owned by whoever holds its value; it cannot be copied, and it is zero when it is handed out. Frames come back
//! dirty and are zeroed before anyone sees them again: in idle time where there is some, otherwise when they are handed out.

use alloc::vec::Vec;
use core::{ptr, slice};

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
}

impl SmallFrame {
    /// Physical (and L1 virtual) address.
    pub const fn address(&self) -> u64 {
        self.0
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

/// A large frame handed out as small ones; a set bit is a free small frame.
struct Split {
    base: u64,
    free: [u64; SMALL_PER_LARGE / 64],
    count: usize,
}

/// All memory that machines can have.
pub struct FramePool {
    clean: Vec<u64>,
    dirty: Vec<u64>,
    split: Vec<Split>,
    total_large: usize,
}

impl FramePool {
    /// An empty pool.
    pub const fn new() -> Self {
        Self { clean: Vec::new(), dirty: Vec::new(), split: Vec::new(), total_large: 0 }
    }

    /// Adds usable RAM; both ends are multiples of 2 MiB.
    pub fn add(&mut self, start: u64, end: u64) {
        let frames = (start..end).step_by(LARGE_FRAME as usize);
        self.total_large += frames.clone().count();
        self.dirty.extend(frames);
        // Freeing must not need memory: room for every frame in both lists.
        self.dirty.reserve(self.total_large - self.dirty.len());
        self.clean.reserve(self.total_large - self.clean.len());
    }

    /// Free memory and all memory, in 4 KiB frames.
    pub fn counts(&self) -> (usize, usize) {
        let large = self.clean.len() + self.dirty.len();
        let small: usize = self.split.iter().map(|split| split.count).sum();
        (large * SMALL_PER_LARGE + small, self.total_large * SMALL_PER_LARGE)
    }

    /// A zeroed 2 MiB frame; `None` when there is none.
    pub fn large(&mut self) -> Option<LargeFrame> {
        if let Some(address) = self.clean.pop() {
            return Some(LargeFrame(address));
        }
        let address = self.dirty.pop()?;
        zero(address, LARGE_FRAME);
        Some(LargeFrame(address))
    }

    /// Takes at least `bytes` of memory out of the pool for good, in one piece; `None` when no such piece is free. What it holds means nothing.
    pub fn carve(&mut self, bytes: u64) -> Option<&'static mut [u8]> {
        let count = usize::try_from(bytes.div_ceil(LARGE_FRAME)).ok().filter(|count| *count > 0)?;
        let mut free: Vec<u64> = self.dirty.iter().chain(&self.clean).copied().collect();
        free.sort_unstable();
        let span = (count as u64 - 1) * LARGE_FRAME;
        let start = free.windows(count).find_map(|run| match run {
            [first, .., last] if last - first == span => Some(*first),
            [only] => Some(*only),
            _ => None,
        })?;
        let taken = start..start + span + LARGE_FRAME;
        self.dirty.retain(|address| !taken.contains(address));
        self.clean.retain(|address| !taken.contains(address));
        self.total_large -= count;
        // SAFETY: the frames were the pool's own, identity-mapped RAM that has some content, and are in no list any more.
        Some(unsafe { slice::from_raw_parts_mut(start as *mut u8, (span + LARGE_FRAME) as usize) })
    }

    /// A zeroed 4 KiB frame; `None` when there is none.
    pub fn small(&mut self) -> Option<SmallFrame> {
        if !self.split.iter().any(|split| split.count > 0) {
            let base = self.dirty.pop().or_else(|| self.clean.pop())?;
            self.split.push(Split { base, free: [u64::MAX; SMALL_PER_LARGE / 64], count: SMALL_PER_LARGE });
        }
        let split = self.split.iter_mut().find(|split| split.count > 0)?;
        let (index, word) = split.free.iter_mut().enumerate().find(|(_, word)| **word != 0)?;
        let bit = word.trailing_zeros();
        *word &= !(1 << bit);
        split.count -= 1;
        let address = split.base + (index as u64 * 64 + u64::from(bit)) * SMALL_FRAME;
        zero(address, SMALL_FRAME);
        Some(SmallFrame(address))
    }

    /// Takes a 2 MiB frame back.
    pub fn free_large(&mut self, frame: LargeFrame) {
        self.dirty.push(frame.0);
    }

    /// Takes a 4 KiB frame back.
    pub fn free_small(&mut self, frame: SmallFrame) {
        let base = frame.0 & !(LARGE_FRAME - 1);
        let Some(position) = self.split.iter().position(|split| split.base == base) else {
            unreachable!("a small frame always comes from a split large one");
        };
        let split = &mut self.split[position];
        let index = ((frame.0 - base) / SMALL_FRAME) as usize;
        split.free[index / 64] |= 1 << (index % 64);
        split.count += 1;
        if split.count == SMALL_PER_LARGE {
            self.split.swap_remove(position);
            self.dirty.push(base);
        }
    }

    /// Zeroes one dirty frame ahead of need. False when none is left to do.
    pub fn clean_one(&mut self) -> bool {
        let Some(address) = self.dirty.pop() else { return false };
        zero(address, LARGE_FRAME);
        self.clean.push(address);
        true
    }
}

fn zero(address: u64, bytes: u64) {
    // SAFETY: the address came from the pool's own lists, so it is identity-mapped RAM that nobody else holds.
    unsafe { ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
}
