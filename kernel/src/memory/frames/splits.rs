//! Large frames that are handed out as small ones. Taking one and giving one back takes the same few steps however many there are.

#![forbid(unsafe_code)]

use super::{LARGE_FRAME, SMALL_FRAME, SMALL_PER_LARGE};
use alloc::vec::Vec;

/// In the index: a large frame that is whole.
const WHOLE: u32 = u32::MAX;

/// A large frame; a set bit is a free small frame.
struct Split {
    base: u64,
    free: [u64; SMALL_PER_LARGE / 64],
    count: u32,
    /// It is in [`Splits::available`].
    is_listed: bool,
}

impl Split {
    fn take(&mut self) -> Option<u64> {
        let (index, word) = self.free.iter_mut().enumerate().find(|(_, word)| **word != 0)?;
        let bit = word.trailing_zeros();
        *word &= !(1 << bit);
        self.count -= 1;
        Some(self.base + (index as u64 * 64 + u64::from(bit)) * SMALL_FRAME)
    }
}

/// The large frames that are split.
pub struct Splits {
    splits: Vec<Split>,
    /// Places in `splits` whose frame is whole again.
    unused: Vec<u32>,
    /// Places that have, or had, a free small frame.
    available: Vec<u32>,
    /// For each large frame from `first` on, its place in `splits`.
    index: Vec<u32>,
    first: u64,
    free: usize,
}

impl Splits {
    /// None.
    pub const fn new() -> Self {
        Self {
            splits: Vec::new(),
            unused: Vec::new(),
            available: Vec::new(),
            index: Vec::new(),
            first: 0,
            free: 0,
        }
    }

    /// Makes room for the large frames from `start` to `end`. None is split yet.
    pub fn cover(&mut self, start: u64, end: u64) {
        let last = self.first + self.index.len() as u64 * LARGE_FRAME;
        let (first, last) =
            if self.index.is_empty() { (start, end) } else { (self.first.min(start), last.max(end)) };
        self.first = first;
        self.index.resize(((last - first) / LARGE_FRAME) as usize, WHOLE);
    }

    /// Free small frames.
    pub const fn free_frames(&self) -> usize {
        self.free
    }

    /// Splits a large frame.
    pub fn add(&mut self, base: u64) {
        let place = self.unused.pop().unwrap_or(self.splits.len() as u32);
        let is_listed = self.splits.get(place as usize).is_some_and(|split| split.is_listed);
        let free = [u64::MAX; SMALL_PER_LARGE / 64];
        let split = Split { base, free, count: SMALL_PER_LARGE as u32, is_listed: true };
        match self.splits.get_mut(place as usize) {
            Some(unused) => *unused = split,
            None => self.splits.push(split),
        }
        if !is_listed {
            self.available.push(place);
        }
        if let Some(entry) = self.index.get_mut(((base - self.first) / LARGE_FRAME) as usize) {
            *entry = place;
        }
        self.free += SMALL_PER_LARGE;
    }

    /// A free small frame.
    pub fn take(&mut self) -> Option<u64> {
        while let Some(place) = self.available.last() {
            if let Some(split) = self.splits.get_mut(*place as usize) {
                if let Some(address) = split.take() {
                    self.free -= 1;
                    return Some(address);
                }
                split.is_listed = false;
            }
            self.available.pop();
        }
        None
    }

    /// Takes a small frame back. The large one it is from, once that is whole.
    pub fn give_back(&mut self, address: u64) -> Option<u64> {
        let base = address & !(LARGE_FRAME - 1);
        let Some(entry) = self.index.get_mut(((base - self.first) / LARGE_FRAME) as usize) else {
            unreachable!("every frame of the pool is in the index");
        };
        let Some(split) = self.splits.get_mut(*entry as usize) else {
            unreachable!("a small frame always comes from a split large one");
        };
        let number = ((address - base) / SMALL_FRAME) as usize;
        if let Some(word) = split.free.get_mut(number / 64) {
            *word |= 1 << (number % 64);
        }
        split.count += 1;
        self.free += 1;
        if split.count < SMALL_PER_LARGE as u32 {
            if !core::mem::replace(&mut split.is_listed, true) {
                self.available.push(*entry);
            }
            return None;
        }
        split.free = [0; SMALL_PER_LARGE / 64];
        self.free -= SMALL_PER_LARGE;
        self.unused.push(core::mem::replace(entry, WHOLE));
        Some(base)
    }
}
