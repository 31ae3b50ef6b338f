//! A guest's RAM, as devices and the processor model reach it.
//!
//! Access is by copy only: a byte that the guest may be changing is read once, and no reference into guest memory exists.

use crate::address::GuestPhysAddr;
use core::fmt;

/// Why guest memory could not be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryError {
    /// Part of the range is not RAM.
    NotRam {
        /// Start of the refused range.
        at: GuestPhysAddr,
        /// Its length in bytes.
        length: usize,
    },
    /// The node has no free frame to back the page.
    OutOfFrames,
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRam { at, length } => write!(f, "{length} bytes at {at:?} are not all RAM"),
            Self::OutOfFrames => write!(f, "the node has no free frame left for this machine"),
        }
    }
}

impl core::error::Error for MemoryError {}

/// A machine's RAM.
pub trait GuestMemory {
    /// Copies `into.len()` bytes from `at`. RAM never touched before reads as zeros.
    fn read(&self, at: GuestPhysAddr, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `from` to `at`. On an error nothing or a prefix has been written.
    fn write(&mut self, at: GuestPhysAddr, from: &[u8]) -> Result<(), MemoryError>;

    /// Reads a little-endian u16.
    fn read_u16(&self, at: GuestPhysAddr) -> Result<u16, MemoryError> {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes).map(|()| u16::from_le_bytes(bytes))
    }

    /// Reads a little-endian u32.
    fn read_u32(&self, at: GuestPhysAddr) -> Result<u32, MemoryError> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes).map(|()| u32::from_le_bytes(bytes))
    }

    /// Reads a little-endian u64.
    fn read_u64(&self, at: GuestPhysAddr) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes).map(|()| u64::from_le_bytes(bytes))
    }
}
