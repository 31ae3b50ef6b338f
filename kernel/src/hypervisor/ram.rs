//! A machine's RAM: 2 MiB frames, taken from the pool when first touched.

use crate::memory::frames::{FramePool, LARGE_FRAME, LargeFrame};
use alloc::vec::Vec;
use core::ptr;
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::{HIGH_RAM_START, LOW_RAM_END};
use nestling_machine::memory::{GuestMemory, MemoryError};

/// The frames behind a machine's RAM, by number of the 2 MiB page.
pub struct Ram {
    frames: Vec<Option<LargeFrame>>,
}

impl Ram {
    /// RAM of `bytes`, a multiple of 2 MiB, none of it backed yet.
    pub fn new(bytes: u64) -> Self {
        Self { frames: (0..bytes / LARGE_FRAME).map(|_| None).collect() }
    }

    /// Bytes that are backed by frames.
    pub fn backed_bytes(&self) -> u64 {
        self.frames.iter().flatten().count() as u64 * LARGE_FRAME
    }

    /// Index of the page that holds `at`; `None` where there is no RAM.
    fn index(&self, at: GuestPhysAddr) -> Option<usize> {
        let offset = match at.0 {
            low if low < LOW_RAM_END => low,
            high => high.checked_sub(HIGH_RAM_START)?.checked_add(LOW_RAM_END)?,
        };
        let index = usize::try_from(offset / LARGE_FRAME).ok()?;
        (index < self.frames.len()).then_some(index)
    }

    /// Whether `at` is RAM.
    pub fn contains(&self, at: GuestPhysAddr) -> bool {
        self.index(at).is_some()
    }

    /// The frame behind `at`, taken from the pool if there was none.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`], or [`MemoryError::OutOfFrames`] when the pool is empty.
    pub fn back(&mut self, at: GuestPhysAddr, pool: &mut FramePool) -> Result<&LargeFrame, MemoryError> {
        let index = self.index(at).ok_or(MemoryError::NotRam { at, length: 1 })?;
        let slot = self.frames.get_mut(index).ok_or(MemoryError::NotRam { at, length: 1 })?;
        if slot.is_none() {
            *slot = Some(pool.large().ok_or(MemoryError::OutOfFrames)?);
        }
        slot.as_ref().ok_or(MemoryError::OutOfFrames)
    }

    /// Every backed page: its guest physical address and its frame.
    pub fn backed(&self) -> impl Iterator<Item = (GuestPhysAddr, &LargeFrame)> {
        self.frames.iter().enumerate().filter_map(|(index, frame)| {
            let offset = index as u64 * LARGE_FRAME;
            let at = if offset < LOW_RAM_END { offset } else { offset - LOW_RAM_END + HIGH_RAM_START };
            frame.as_ref().map(|frame| (GuestPhysAddr(at), frame))
        })
    }

    /// Gives every frame back.
    pub fn free(self, pool: &mut FramePool) {
        for frame in self.frames.into_iter().flatten() {
            pool.free_large(frame);
        }
    }
}

/// RAM together with the pool that new frames come from: what devices and emulation see.
pub struct RamView<'a> {
    /// The machine's RAM.
    pub ram: &'a mut Ram,
    /// The node's frames.
    pub pool: &'a mut FramePool,
}

/// Splits a range at 2 MiB borders: offset of each piece within the range, its address, its length.
fn pieces(at: GuestPhysAddr, length: usize) -> impl Iterator<Item = (usize, GuestPhysAddr, usize)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        if done >= length {
            return None;
        }
        let address = at.0.wrapping_add(done as u64);
        let room = (LARGE_FRAME - address % LARGE_FRAME) as usize;
        let piece = (done, GuestPhysAddr(address), room.min(length - done));
        done += piece.2;
        Some(piece)
    })
}

impl GuestMemory for RamView<'_> {
    fn read(&self, at: GuestPhysAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        let refused = MemoryError::NotRam { at, length: into.len() };
        for (offset, address, length) in pieces(at, into.len()) {
            let index = self.ram.index(address).ok_or(refused)?;
            let target = into.get_mut(offset..offset + length).ok_or(refused)?;
            match self.ram.frames.get(index).and_then(Option::as_ref) {
                // SAFETY: the frame is owned by this machine and identity-mapped; the piece does not cross its end. The guest may
                // write at the same time only from another core, which a machine of one vCPU does not have.
                Some(frame) => unsafe {
                    let source = (frame.address() + address.0 % LARGE_FRAME) as *const u8;
                    ptr::copy_nonoverlapping(source, target.as_mut_ptr(), length);
                },
                None => target.fill(0),
            }
        }
        Ok(())
    }

    fn write(&mut self, at: GuestPhysAddr, from: &[u8]) -> Result<(), MemoryError> {
        let refused = MemoryError::NotRam { at, length: from.len() };
        for (offset, address, length) in pieces(at, from.len()) {
            let source = from.get(offset..offset + length).ok_or(refused)?;
            let frame = self.ram.back(address, self.pool).map_err(|error| match error {
                MemoryError::NotRam { .. } => refused,
                other => other,
            })?;
            // SAFETY: as in `read`; L1's own buffers are never inside a machine's frame.
            unsafe {
                let target = (frame.address() + address.0 % LARGE_FRAME) as *mut u8;
                ptr::copy_nonoverlapping(source.as_ptr(), target, length);
            }
        }
        Ok(())
    }
}
