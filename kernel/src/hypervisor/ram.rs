//! A machine's RAM: 2 MiB frames, taken from the pool when first touched.
//!
//! Any core reaches it at any time without a lock: a frame, once there, stays for as long as the machine.

use crate::memory::frames::{FramePool, LARGE_FRAME, LargeFrame};
use alloc::boxed::Box;
use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::{HIGH_RAM_START, LOW_RAM_END};
use nestling_machine::memory::{GuestMemory, MemoryError};
use spin::Once;

/// The frames behind a machine's RAM, by number of the 2 MiB page.
pub struct Ram {
    frames: Box<[Once<LargeFrame>]>,
}

impl Ram {
    /// RAM of `bytes`, a multiple of 2 MiB, none of it backed yet.
    pub fn new(bytes: u64) -> Self {
        Self { frames: (0..bytes / LARGE_FRAME).map(|_| Once::new()).collect() }
    }

    /// Bytes that are backed by frames.
    pub fn backed_bytes(&self) -> u64 {
        self.frames.iter().filter(|frame| frame.is_completed()).count() as u64 * LARGE_FRAME
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
    pub fn back(&self, at: GuestPhysAddr, pool: &FramePool) -> Result<&LargeFrame, MemoryError> {
        let slot = self.index(at).and_then(|index| self.frames.get(index));
        let slot = slot.ok_or(MemoryError::NotRam { at, length: 1 })?;
        // Of several cores that touch a page at once, one takes the frame and the others wait for it.
        slot.try_call_once(|| pool.large().ok_or(MemoryError::OutOfFrames))
    }

    /// Every backed page: its guest physical address and its frame.
    pub fn backed(&self) -> impl Iterator<Item = (GuestPhysAddr, &LargeFrame)> {
        self.frames.iter().enumerate().filter_map(|(index, frame)| {
            let offset = index as u64 * LARGE_FRAME;
            let at = if offset < LOW_RAM_END { offset } else { offset - LOW_RAM_END + HIGH_RAM_START };
            frame.get().map(|frame| (GuestPhysAddr(at), frame))
        })
    }

    /// Gives every frame back.
    pub fn free(self, pool: &FramePool) {
        for frame in self.frames.into_iter().filter_map(Once::try_into_inner) {
            pool.free_large(frame);
        }
    }
}

/// RAM together with the pool that new frames come from: what devices and emulation see.
pub struct RamView<'a> {
    /// The machine's RAM.
    pub ram: &'a Ram,
    /// The node's frames.
    pub pool: &'a FramePool,
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
            match self.ram.frames.get(index).and_then(Once::get) {
                // SAFETY: the frame is owned by this machine and identity-mapped; the piece does not cross its end.
                Some(frame) => unsafe {
                    read((frame.address() + address.0 % LARGE_FRAME) as *const u8, target);
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
            unsafe { write((frame.address() + address.0 % LARGE_FRAME) as *mut u8, source) };
        }
        Ok(())
    }
}

/// Copies from memory that a guest may be changing on another core. Naturally aligned words of 2, 4 and 8 bytes are read as one, as drivers
/// and devices expect of indices and descriptors; of anything else a part may be older than another.
///
/// # Safety
/// `into.len()` bytes from `from` on are mapped and no Rust object of L1's.
unsafe fn read(from: *const u8, into: &mut [u8]) {
    compiler_fence(Ordering::SeqCst);
    // SAFETY: mapped by the caller's word, and aligned where a word is read.
    unsafe {
        match into.len() {
            2 if from.cast::<u16>().is_aligned() => {
                into.copy_from_slice(&ptr::read_volatile(from.cast::<u16>()).to_ne_bytes());
            }
            4 if from.cast::<u32>().is_aligned() => {
                into.copy_from_slice(&ptr::read_volatile(from.cast::<u32>()).to_ne_bytes());
            }
            8 if from.cast::<u64>().is_aligned() => {
                into.copy_from_slice(&ptr::read_volatile(from.cast::<u64>()).to_ne_bytes());
            }
            length => ptr::copy_nonoverlapping(from, into.as_mut_ptr(), length),
        }
    }
    compiler_fence(Ordering::SeqCst);
}

/// The same in the other direction.
///
/// # Safety
/// As for [`read`].
unsafe fn write(to: *mut u8, from: &[u8]) {
    compiler_fence(Ordering::SeqCst);
    // SAFETY: as in `read`.
    unsafe {
        match *from {
            [a, b] if to.cast::<u16>().is_aligned() => {
                ptr::write_volatile(to.cast::<u16>(), u16::from_ne_bytes([a, b]));
            }
            [a, b, c, d] if to.cast::<u32>().is_aligned() => {
                ptr::write_volatile(to.cast::<u32>(), u32::from_ne_bytes([a, b, c, d]));
            }
            [a, b, c, d, e, f, g, h] if to.cast::<u64>().is_aligned() => {
                ptr::write_volatile(to.cast::<u64>(), u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()),
        }
    }
    compiler_fence(Ordering::SeqCst);
}
