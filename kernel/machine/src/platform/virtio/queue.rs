//! Split virtqueues, the device's side.
//!
//! Virtio 1.2, 2.7 (split virtqueues), 2.7.5.3 (indirect descriptors), 2.7.7 and 2.7.10 (suppressing interrupts and notifications by
//! flags or by event index). Every field the guest owns is copied once and checked before it is used; a queue that breaks a rule is
//! a [`QueueError`], never a guess.

use crate::address::GuestPhysAddr;
use crate::memory::{GuestMemory, MemoryError};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{Ordering, fence};

const DESCRIPTOR_BYTES: u64 = 16;
const DESCRIPTOR_NEXT: u16 = 1 << 0;
const DESCRIPTOR_WRITE: u16 = 1 << 1;
const DESCRIPTOR_INDIRECT: u16 = 1 << 2;
const USED_NO_NOTIFY: u16 = 1;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// The MSI-X vector number that means none.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

/// What is wrong with a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::platform) enum Rule {
    /// The size is zero, no power of two, or larger than the device's.
    Size { size: u16, max: u16 },
    /// A ring's address is not aligned as its type must be.
    Alignment { ring: &'static str, at: u64, alignment: u64 },
    /// The available index is more than the queue's size ahead.
    AvailableIndex { index: u16, expected: u16 },
    /// A descriptor number is not below the size of its table.
    DescriptorIndex { index: u16, size: u32 },
    /// A chain has more descriptors than the queue: it loops, or is too long.
    ChainTooLong { head: u16 },
    /// A device-readable descriptor follows a device-writable one.
    ReadableAfterWritable { head: u16 },
    /// An indirect table where none may be, or of an impossible length.
    Indirect { head: u16, length: u32 },
    /// A buffer's end overflows, or the chain has 4 GiB or more.
    Length { head: u16 },
    /// A buffer is too small for what the device puts there.
    BufferTooSmall { head: u16, length: u64, needed: u64 },
    /// A request is malformed; what is wrong with it.
    Request { head: u16, reason: &'static str },
    /// A ring or a buffer is not in RAM.
    Memory(MemoryError),
}

/// A queue broke a rule of virtio.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::platform) struct QueueError {
    /// The queue's number.
    pub(super) queue: u16,
    /// Which rule, and how.
    pub(super) rule: Rule,
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queue {}: ", self.queue)?;
        match &self.rule {
            Rule::Size { size, max } => write!(f, "size {size} is not a power of two from 1 to {max}"),
            Rule::Alignment { ring, at, alignment } => {
                write!(f, "the {ring} at {at:#x} is not aligned to {alignment} bytes")
            }
            Rule::AvailableIndex { index, expected } => {
                write!(f, "available index {index} is further ahead of {expected} than the queue is long")
            }
            Rule::DescriptorIndex { index, size } => {
                write!(f, "descriptor {index} is outside its table of {size}")
            }
            Rule::ChainTooLong { head } => {
                write!(f, "the chain at descriptor {head} loops or is longer than the queue")
            }
            Rule::ReadableAfterWritable { head } => {
                write!(f, "the chain at descriptor {head} has a readable buffer after a writable one")
            }
            Rule::Indirect { head, length } => {
                write!(f, "the chain at descriptor {head} has an impossible indirect table of {length} bytes")
            }
            Rule::Length { head } => write!(f, "the chain at descriptor {head} has an impossible length"),
            Rule::BufferTooSmall { head, length, needed } => {
                write!(
                    f,
                    "the chain at descriptor {head} has room for {length} bytes, but {needed} are needed"
                )
            }
            Rule::Request { head, reason } => write!(f, "the chain at descriptor {head}: {reason}"),
            Rule::Memory(error) => write!(f, "{error}"),
        }
    }
}

/// A guest buffer.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    at: u64,
    length: u32,
}

/// A chain of guest buffers that the driver has made available.
#[derive(Clone, Debug, Default)]
pub(in crate::platform) struct Chain {
    queue: u16,
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// The first descriptor's number, which names the chain.
    pub(super) const fn head(&self) -> u16 {
        self.head
    }

    /// An error about this chain.
    pub(super) const fn error(&self, rule: Rule) -> QueueError {
        QueueError { queue: self.queue, rule }
    }

    /// Bytes that the device may read.
    pub(super) fn readable_bytes(&self) -> u64 {
        self.readable.iter().map(|buffer| u64::from(buffer.length)).sum()
    }

    /// Bytes that the device may write.
    pub(super) fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(|buffer| u64::from(buffer.length)).sum()
    }

    /// Reads all of `into` from `offset` in the readable buffers on.
    pub(super) fn read(
        &self,
        memory: &dyn GuestMemory,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), QueueError> {
        let mut rest = into;
        for (at, length) in parts(&self.readable, offset) {
            let count = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let Some((part, behind)) = core::mem::take(&mut rest).split_at_mut_checked(count) else { break };
            memory.read(GuestPhysAddr(at), part).map_err(|error| self.error(Rule::Memory(error)))?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        self.all_done(rest.len(), self.readable_bytes(), offset)
    }

    /// Writes all of `from` from `offset` in the writable buffers on.
    pub(super) fn write(
        &self,
        memory: &mut dyn GuestMemory,
        offset: u64,
        from: &[u8],
    ) -> Result<(), QueueError> {
        let mut rest = from;
        for (at, length) in parts(&self.writable, offset) {
            let count = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let Some((part, behind)) = rest.split_at_checked(count) else { break };
            memory.write(GuestPhysAddr(at), part).map_err(|error| self.error(Rule::Memory(error)))?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        self.all_done(rest.len(), self.writable_bytes(), offset)
    }

    fn all_done(&self, left: usize, length: u64, offset: u64) -> Result<(), QueueError> {
        if left == 0 {
            return Ok(());
        }
        let needed = length.max(offset).saturating_add(left as u64);
        Err(self.error(Rule::BufferTooSmall { head: self.head, length, needed }))
    }
}

/// Address and length of what is left of each buffer behind the first `offset` bytes.
fn parts(buffers: &[Buffer], offset: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut skip = offset;
    buffers.iter().filter_map(move |buffer| {
        let skipped = skip.min(buffer.length.into());
        skip -= skipped;
        let length = u64::from(buffer.length) - skipped;
        // The end of every buffer was checked when its chain was read.
        (length > 0).then(|| (buffer.at.wrapping_add(skipped), length))
    })
}

/// One queue as the driver has set it up, and how far the device is.
#[derive(Clone, Debug)]
pub(in crate::platform) struct Queue {
    index: u16,
    max_size: u16,
    /// Number of descriptors.
    pub(super) size: u16,
    /// Address of the descriptor table.
    pub(super) descriptors: u64,
    /// Address of the available ring.
    pub(super) available: u64,
    /// Address of the used ring.
    pub(super) used: u64,
    /// MSI-X vector, or [`NO_VECTOR`].
    pub(super) vector: u16,
    enabled: bool,
    event_index: bool,
    indirect: bool,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver was last considered for an interrupt.
    signalled: u16,
    /// What was last written to ask for or suppress notifications.
    notify_written: Option<u16>,
}

impl Queue {
    /// Queue number `index`, off, of at most `max_size` descriptors, a power of two.
    pub(super) const fn new(index: u16, max_size: u16) -> Self {
        Self {
            index,
            max_size,
            size: max_size,
            descriptors: 0,
            available: 0,
            used: 0,
            vector: NO_VECTOR,
            enabled: false,
            event_index: false,
            indirect: false,
            next_available: 0,
            next_used: 0,
            signalled: 0,
            notify_written: None,
        }
    }

    /// Back to the state after [`Self::new`].
    pub(super) const fn reset(&mut self) {
        *self = Self::new(self.index, self.max_size);
    }

    /// Whether the driver has switched the queue on.
    pub(super) const fn enabled(&self) -> bool {
        self.enabled
    }

    const fn error(&self, rule: Rule) -> QueueError {
        QueueError { queue: self.index, rule }
    }

    /// The driver switches the queue on, having negotiated these features.
    pub(super) fn enable(&mut self, event_index: bool, indirect: bool) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > self.max_size {
            return Err(self.error(Rule::Size { size: self.size, max: self.max_size }));
        }
        let rings = [
            ("descriptor table", self.descriptors, 16),
            ("available ring", self.available, 2),
            ("used ring", self.used, 4),
        ];
        for (ring, at, alignment) in rings {
            if at % alignment != 0 {
                return Err(self.error(Rule::Alignment { ring, at, alignment }));
            }
        }
        (self.enabled, self.event_index, self.indirect) = (true, event_index, indirect);
        Ok(())
    }

    fn read_u16(&self, memory: &dyn GuestMemory, base: u64, offset: u64) -> Result<u16, QueueError> {
        memory
            .read_u16(GuestPhysAddr(base.wrapping_add(offset)))
            .map_err(|error| self.error(Rule::Memory(error)))
    }

    fn write(
        &self,
        memory: &mut dyn GuestMemory,
        base: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), QueueError> {
        memory
            .write(GuestPhysAddr(base.wrapping_add(offset)), bytes)
            .map_err(|error| self.error(Rule::Memory(error)))
    }

    /// The slot of a ring that a free-running index means.
    fn slot(&self, index: u16) -> u64 {
        u64::from(index & self.size.wrapping_sub(1))
    }

    /// Whether the driver has made a chain available.
    pub(super) fn has_available(&self, memory: &dyn GuestMemory) -> Result<bool, QueueError> {
        if !self.enabled {
            return Ok(false);
        }
        let index = self.read_u16(memory, self.available, 2)?;
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(self.error(Rule::AvailableIndex { index, expected: self.next_available }));
        }
        Ok(index != self.next_available)
    }

    /// Takes the next chain, if there is one, into `chain`.
    pub(super) fn pop(&mut self, memory: &dyn GuestMemory, chain: &mut Chain) -> Result<bool, QueueError> {
        if !self.has_available(memory)? {
            return Ok(false);
        }
        let head = self.read_u16(memory, self.available, 4 + 2 * self.slot(self.next_available))?;
        self.read_chain(memory, head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    fn read_chain(&self, memory: &dyn GuestMemory, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        (chain.queue, chain.head) = (self.index, head);
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut table_size) = (self.descriptors, u32::from(self.size));
        let mut in_indirect = false;
        let mut index = head;
        let mut total: u64 = 0;
        for _ in 0..=self.size {
            if u32::from(index) >= table_size {
                return Err(self.error(Rule::DescriptorIndex { index, size: table_size }));
            }
            let mut bytes = [0; DESCRIPTOR_BYTES as usize];
            let at = table.wrapping_add(u64::from(index) * DESCRIPTOR_BYTES);
            memory.read(GuestPhysAddr(at), &mut bytes).map_err(|error| self.error(Rule::Memory(error)))?;
            let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
            let at = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
            let length = u32::from_le_bytes([l0, l1, l2, l3]);
            let flags = u16::from_le_bytes([f0, f1]);

            if flags & DESCRIPTOR_INDIRECT != 0 {
                let entries = length / DESCRIPTOR_BYTES as u32;
                let possible = self.indirect
                    && !in_indirect
                    && flags & DESCRIPTOR_NEXT == 0
                    && entries > 0
                    && length % DESCRIPTOR_BYTES as u32 == 0;
                if !possible {
                    return Err(self.error(Rule::Indirect { head, length }));
                }
                (table, table_size, in_indirect, index) = (at, entries, true, 0);
                continue;
            }

            total = total.saturating_add(length.into());
            if at.checked_add(length.into()).is_none() || total > u64::from(u32::MAX) {
                return Err(self.error(Rule::Length { head }));
            }
            let buffer = Buffer { at, length };
            if flags & DESCRIPTOR_WRITE != 0 {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(self.error(Rule::ReadableAfterWritable { head }));
            }
            if flags & DESCRIPTOR_NEXT == 0 {
                return Ok(());
            }
            index = u16::from_le_bytes([n0, n1]);
        }
        Err(self.error(Rule::ChainTooLong { head }))
    }

    /// Gives a chain back, `written` bytes of its writable buffers filled.
    pub(super) fn push_used(
        &mut self,
        memory: &mut dyn GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.put_used(memory, head, written)?;
        self.publish_used(memory)
    }

    /// As [`Self::push_used`], but the driver sees the chain only with [`Self::publish_used`].
    pub(super) fn put_used(
        &mut self,
        memory: &mut dyn GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let element = (u64::from(written) << 32 | u64::from(head)).to_le_bytes();
        self.write(memory, self.used, 4 + 8 * self.slot(self.next_used), &element)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver every chain that was given back.
    pub(super) fn publish_used(&self, memory: &mut dyn GuestMemory) -> Result<(), QueueError> {
        self.write(memory, self.used, 2, &self.next_used.to_le_bytes())
    }

    /// Asks for a notification of the next chain, or for none. After asking, look again: a chain may have come before the driver
    /// saw it.
    pub(super) fn set_notifications(
        &mut self,
        memory: &mut dyn GuestMemory,
        wanted: bool,
    ) -> Result<(), QueueError> {
        if !self.enabled {
            return Ok(());
        }
        let (offset, value) = if self.event_index {
            // An index already passed is not passed again for 65,535 chains.
            let event = self.next_available.wrapping_sub(u16::from(!wanted));
            (4 + 8 * u64::from(self.size), event)
        } else {
            (0, if wanted { 0 } else { USED_NO_NOTIFY })
        };
        if self.notify_written != Some(value) {
            self.write(memory, self.used, offset, &value.to_le_bytes())?;
            self.notify_written = Some(value);
            // The driver writes its index before it reads this, and this is written before its index is read: one of the two sees the
            // other, also when they are on two cores.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since this was last asked.
    pub(super) fn take_signal(&mut self, memory: &dyn GuestMemory) -> Result<bool, QueueError> {
        let given_back = self.next_used.wrapping_sub(self.signalled);
        if given_back == 0 {
            return Ok(false);
        }
        self.signalled = self.next_used;
        // As for notifications: the driver asks for interrupts before it looks at what was given back.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.read_u16(memory, self.available, 4 + 2 * u64::from(self.size))?;
            Ok(self.next_used.wrapping_sub(event).wrapping_sub(1) < given_back)
        } else {
            Ok(self.read_u16(memory, self.available, 0)? & AVAIL_NO_INTERRUPT == 0)
        }
    }
}

#[cfg(test)]
mod tests;
