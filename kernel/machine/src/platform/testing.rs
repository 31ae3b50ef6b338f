//! What stands behind devices in tests.

use super::{Disk, Entropy, Progress};
use alloc::vec;
use alloc::vec::Vec;

/// Entropy that counts: 1, 2, 3, ...
#[derive(Default)]
pub(crate) struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, into: &mut [u8]) {
        for byte in into {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
    }
}

/// A disk in memory that can be slow and can fail.
pub(crate) struct MemoryDisk {
    pub(crate) bytes: Vec<u8>,
    /// The most bytes done at once.
    pub(crate) most: u64,
    /// How often it does something until it has to be waited for; `None` never is.
    pub(crate) ready: Option<u32>,
    pub(crate) fails: bool,
}

impl MemoryDisk {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes], most: u64::MAX, ready: None, fails: false }
    }

    fn range(&mut self, at: u64, length: u64) -> Result<&mut [u8], Progress> {
        assert!(at.is_multiple_of(512) && length.is_multiple_of(512) && length > 0, "whole sectors");
        if self.fails {
            return Err(Progress::Failed);
        }
        match &mut self.ready {
            Some(0) => return Err(Progress::Wait),
            Some(ready) => *ready -= 1,
            None => {}
        }
        let end = (at + length.min(self.most)) as usize;
        Ok(&mut self.bytes[at as usize..end])
    }

    fn fill(&mut self, at: u64, length: u64, value: u8) -> Progress {
        match self.range(at, length) {
            Ok(bytes) => {
                bytes.fill(value);
                Progress::Done(bytes.len() as u64)
            }
            Err(progress) => progress,
        }
    }
}

/// What a discarded sector of [`MemoryDisk`] is filled with.
pub(crate) const DISCARDED: u8 = 0xDD;

impl Disk for MemoryDisk {
    fn read(&mut self, at: u64, length: u64, take: &mut dyn FnMut(&[u8])) -> Progress {
        match self.range(at, length) {
            Ok(bytes) => {
                bytes.chunks(1536).for_each(take);
                Progress::Done(bytes.len() as u64)
            }
            Err(progress) => progress,
        }
    }

    fn write(&mut self, at: u64, length: u64, give: &mut dyn FnMut(&mut [u8])) -> Progress {
        match self.range(at, length) {
            Ok(bytes) => {
                bytes.chunks_mut(2560).for_each(give);
                Progress::Done(bytes.len() as u64)
            }
            Err(progress) => progress,
        }
    }

    fn write_zeroes(&mut self, at: u64, length: u64) -> Progress {
        self.fill(at, length, 0)
    }

    fn discard(&mut self, at: u64, length: u64) -> Progress {
        self.fill(at, length, DISCARDED)
    }
}
