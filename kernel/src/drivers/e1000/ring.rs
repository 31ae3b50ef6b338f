//! The e1000's descriptor rings, legacy format.
//!
//! Intel 317453, 3.2.3 (receive descriptor), 3.2.6 (receive ring), 3.3.3 (legacy transmit descriptor), 3.4 (transmit
//! ring). The device is not trusted: the driver's own indices say which descriptor is next, and what the device writes
//! is copied once and checked.

use core::sync::atomic::{Ordering, fence};

use super::super::dma::SharedMemory;
use super::super::nic::MAX_FRAME_BYTES;

/// Descriptors in each ring, one of which stays unused. A burst of 200 connections arrives as 200 small frames within
/// a millisecond.
pub const LENGTH: usize = 256;
const DESCRIPTOR_BYTES: usize = 16;
/// A ring's size in bytes, a multiple of 128.
pub const RING_BYTES: u32 = (LENGTH * DESCRIPTOR_BYTES) as u32;
/// What RCTL says a receive buffer has.
const BUFFER_BYTES: usize = 2048;
const PAGE_BYTES: usize = 4096;

/// DD, in both kinds of descriptor: the device is done with it.
const DONE: u64 = 1 << 32;
/// EOP of a receive descriptor: the frame ends here.
const RECEIVED_END: u64 = 1 << 33;
/// CE, SE, SEQ, CXE and RXE of a receive descriptor: the frame is damaged.
const DAMAGED: u64 = 0b1001_0111 << 40;
/// EOP, IFCS and RS of a transmit descriptor: the frame ends here, add its checksum, report when it is sent.
const SEND: u64 = 0b1011 << 24;

/// Descriptors and their buffers.
#[derive(Debug)]
struct Ring {
    descriptors: SharedMemory,
    buffers: SharedMemory,
}

impl Ring {
    fn new() -> Option<Self> {
        Some(Self {
            descriptors: SharedMemory::new((LENGTH * DESCRIPTOR_BYTES).div_ceil(PAGE_BYTES))?,
            buffers: SharedMemory::new((LENGTH * BUFFER_BYTES).div_ceil(PAGE_BYTES))?,
        })
    }

    /// The descriptor's second word: length, command or status.
    fn word(&self, index: usize) -> u64 {
        self.descriptors.word(index * DESCRIPTOR_BYTES + 8)
    }

    /// Writes a descriptor whose buffer is its own.
    fn set(&mut self, index: usize, word: u64) {
        let buffer = self.buffers.physical() + (index * BUFFER_BYTES) as u64;
        self.descriptors.set_word(index * DESCRIPTOR_BYTES, buffer);
        self.descriptors.set_word(index * DESCRIPTOR_BYTES + 8, word);
    }
}

fn after(index: usize) -> usize {
    (index + 1) % LENGTH
}

/// Why a received frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// The device says that it is damaged.
    Damaged,
    /// It is longer than an Ethernet frame, or than the room for it.
    TooLong,
}

/// Frames on their way in.
#[derive(Debug)]
pub struct ReceiveRing {
    ring: Ring,
    /// The descriptor the device fills next.
    next: usize,
    /// Descriptors given back since the device was last told.
    unannounced: usize,
    /// The descriptors up to the end of the frame belong to one that is too long.
    discarding: bool,
}

impl ReceiveRing {
    /// A ring with every buffer free; `None` if there is no memory.
    pub fn new() -> Option<Self> {
        let mut ring = Ring::new()?;
        (0..LENGTH).for_each(|index| ring.set(index, 0));
        Some(Self { ring, next: 0, unannounced: 0, discarding: false })
    }

    /// Physical address of the descriptors.
    pub fn physical(&self) -> u64 {
        self.ring.descriptors.physical()
    }

    /// The tail for the device: all descriptors but the one before the next are its.
    pub fn tail(&self) -> u32 {
        ((self.next + LENGTH - 1) % LENGTH) as u32
    }

    /// The tail, if `enough` descriptors were given back since the device was last told.
    pub fn announce(&mut self, enough: usize) -> Option<u32> {
        if self.unannounced < enough {
            return None;
        }
        self.unannounced = 0;
        Some(self.tail())
    }

    /// Copies the oldest received frame to the front of `into` and returns its length, or why there is none;
    /// `None` if nothing more was received.
    pub fn take(&mut self, into: &mut [u8]) -> Option<Result<usize, Dropped>> {
        loop {
            let word = self.ring.word(self.next);
            if word & DONE == 0 {
                return None;
            }
            // The frame is read after the word that says it is there.
            fence(Ordering::Acquire);
            let taken = self.copy_out(word, into);
            self.ring.set(self.next, 0);
            self.next = after(self.next);
            self.unannounced += 1;
            // At most once round the ring: a descriptor that was just given back is for another call.
            if taken.is_some() || self.unannounced >= LENGTH {
                return taken;
            }
        }
    }

    /// The frame in the next descriptor; `None` if it belongs to one that was already dropped.
    fn copy_out(&mut self, word: u64, into: &mut [u8]) -> Option<Result<usize, Dropped>> {
        let ends = word & RECEIVED_END != 0;
        let continued = core::mem::replace(&mut self.discarding, !ends);
        if continued {
            return None;
        }
        let length = usize::from(word as u16);
        if !ends || length > MAX_FRAME_BYTES {
            return Some(Err(Dropped::TooLong));
        }
        if word & DAMAGED != 0 {
            return Some(Err(Dropped::Damaged));
        }
        let copied =
            into.get_mut(..length).is_some_and(|into| self.ring.buffers.read(self.next * BUFFER_BYTES, into));
        Some(if copied { Ok(length) } else { Err(Dropped::TooLong) })
    }
}

/// Frames on their way out.
#[derive(Debug)]
pub struct TransmitRing {
    ring: Ring,
    /// The descriptor for the next frame.
    next: usize,
    /// The oldest descriptor that the device has not reported as sent.
    oldest: usize,
}

impl TransmitRing {
    /// An empty ring; `None` if there is no memory.
    pub fn new() -> Option<Self> {
        Some(Self { ring: Ring::new()?, next: 0, oldest: 0 })
    }

    /// Physical address of the descriptors.
    pub fn physical(&self) -> u64 {
        self.ring.descriptors.physical()
    }

    /// How many frames can be queued.
    pub fn room(&mut self) -> usize {
        // Only a ring that is half full needs to know what was sent, and then much of it was.
        if self.free() < LENGTH / 2 {
            while self.oldest != self.next && self.ring.word(self.oldest) & DONE != 0 {
                self.oldest = after(self.oldest);
            }
        }
        self.free()
    }

    /// Descriptors that were reported as sent; one stays unused.
    fn free(&self) -> usize {
        (self.oldest + LENGTH - self.next - 1) % LENGTH
    }

    /// Queues a frame and returns the tail for the device; `None` if the ring is full or the frame too long.
    pub fn push(&mut self, frame: &[u8]) -> Option<u32> {
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES || self.room() == 0 {
            return None;
        }
        if !self.ring.buffers.write(self.next * BUFFER_BYTES, frame) {
            return None;
        }
        self.ring.set(self.next, frame.len() as u64 | SEND);
        self.next = after(self.next);
        // The device reads the descriptor after it is told of it.
        fence(Ordering::Release);
        Some(self.next as u32)
    }
}
