//! Guest memory and entropy for tests.

use super::Entropy;
use crate::address::GuestPhysAddr;
use crate::memory::{GuestMemory, MemoryError};
use alloc::vec;
use alloc::vec::Vec;

/// RAM from address 0 on.
pub(crate) struct Ram(pub(crate) Vec<u8>);

impl Ram {
    pub(crate) fn new(bytes: usize) -> Self {
        Self(vec![0; bytes])
    }

    fn range(&self, at: GuestPhysAddr, length: usize) -> Result<core::ops::Range<usize>, MemoryError> {
        let refused = MemoryError::NotRam { at, length };
        let start = usize::try_from(at.0).map_err(|_| refused)?;
        let end = start.checked_add(length).filter(|&end| end <= self.0.len()).ok_or(refused)?;
        Ok(start..end)
    }
}

impl GuestMemory for Ram {
    fn read(&self, at: GuestPhysAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        let range = self.range(at, into.len())?;
        into.copy_from_slice(&self.0[range]);
        Ok(())
    }

    fn write(&mut self, at: GuestPhysAddr, from: &[u8]) -> Result<(), MemoryError> {
        let range = self.range(at, from.len())?;
        self.0[range].copy_from_slice(from);
        Ok(())
    }
}

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
