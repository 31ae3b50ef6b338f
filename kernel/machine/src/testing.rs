//! Guest memory for tests.

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
        let start = usize::try_from(at.0).ok();
        start
            .and_then(|start| Some(start..start.checked_add(length)?))
            .filter(|range| range.end <= self.0.len())
            .ok_or(MemoryError::NotRam { at, length })
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
