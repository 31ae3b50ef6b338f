//! A machine's RAM as devices and emulation reach it: by the same table as the processor, without a lock.

use super::nested::NestedEntry;
use super::pages::{Change, Pages};
use crate::memory::frames::{FramePool, SMALL_FRAME};
use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::LOW_RAM_END;
use nestling_machine::memory::{GuestMemory, MemoryError};

/// What has to happen when a page moves: see [`Change::Moved`].
pub trait Translations {
    /// Sees to it that no processor uses what it has cached of the machine's translations any more.
    fn drop_all(&self);
}

/// A machine that no processor runs yet.
impl Translations for () {
    fn drop_all(&self) {}
}

/// RAM together with the pool that new frames come from: what devices and emulation see.
pub struct RamView<'a, E, T> {
    /// The machine's memory.
    pub pages: &'a Pages<E>,
    /// The node's frames.
    pub pool: &'a FramePool,
    /// The processors that run it.
    pub translations: T,
}

impl<E: NestedEntry, T> RamView<'_, E, T> {
    /// Whether a range is RAM.
    fn check(&self, at: GuestPhysAddr, length: usize) -> Result<(), MemoryError> {
        let refused = MemoryError::NotRam { at, length };
        let last = at.0.checked_add((length as u64).saturating_sub(1)).ok_or(refused)?;
        // RAM is in two pieces, and what lies between them is longer than any buffer.
        let is_ram = self.pages.contains(at) && self.pages.contains(GuestPhysAddr(last));
        if length == 0 || is_ram && (at.0 < LOW_RAM_END) == (last < LOW_RAM_END) {
            Ok(())
        } else {
            Err(refused)
        }
    }
}

impl<E: NestedEntry, T: Translations> GuestMemory for RamView<'_, E, T> {
    fn read(&self, at: GuestPhysAddr, into: &mut [u8]) -> Result<(), MemoryError> {
        self.check(at, into.len())?;
        let (mut at, mut rest) = (at, into);
        while !rest.is_empty() {
            let place = self.pages.find(at);
            let room = place.map_or(SMALL_FRAME - at.0 % SMALL_FRAME, |place| place.room);
            let length = rest.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let (piece, behind) = rest.split_at_mut(length);
            match place {
                // SAFETY: the page is this machine's or its template's, identity-mapped, and the piece does not cross its end.
                Some(place) => unsafe { read(place.physical as *const u8, piece) },
                None => piece.fill(0),
            }
            (at, rest) = (GuestPhysAddr(at.0.wrapping_add(length as u64)), behind);
        }
        Ok(())
    }

    fn write(&mut self, at: GuestPhysAddr, from: &[u8]) -> Result<(), MemoryError> {
        self.check(at, from.len())?;
        let (mut at, mut rest) = (at, from);
        while !rest.is_empty() {
            let place = match self.pages.find(at).filter(|place| place.is_private) {
                Some(place) => place,
                None => {
                    if self.pages.make_private(at, self.pool)? == Change::Moved {
                        self.translations.drop_all();
                    }
                    let found = self.pages.find(at).filter(|place| place.is_private);
                    found.ok_or(MemoryError::OutOfFrames)?
                }
            };
            let length = rest.len().min(usize::try_from(place.room).unwrap_or(usize::MAX));
            let (piece, behind) = rest.split_at(length);
            // SAFETY: the page is this machine's own, identity-mapped, and the piece does not cross its end; L1's own buffers are never in one.
            unsafe { write(place.physical as *mut u8, piece) };
            (at, rest) = (GuestPhysAddr(at.0.wrapping_add(length as u64)), behind);
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
