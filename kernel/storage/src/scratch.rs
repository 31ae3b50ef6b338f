//! The scratch partition: where overlays put what does not fit into memory.
//!
//! It is given out in clusters of 64 KiB, each written once as a whole and free again when none of its blocks is needed any more. What it
//! held before the node started means nothing.

use crate::BLOCK_BYTES;
use crate::cache::Buffer;
use alloc::string::String;
use alloc::vec::Vec;

/// Bytes of a cluster.
pub const CLUSTER_BYTES: usize = 64 << 10;
/// Blocks of a cluster.
pub const BLOCKS_PER_CLUSTER: usize = CLUSTER_BYTES / BLOCK_BYTES;
/// The most clusters: their blocks' numbers have 31 bits.
const CLUSTERS_MAX: u64 = (1 << 31) / BLOCKS_PER_CLUSTER as u64;

/// In the table: a cluster that is being written.
const BEING_WRITTEN: u8 = 0xFF;

/// Why a cluster cannot be written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many as may be are being written.
    Busy,
    /// All clusters are in use.
    Full,
}

#[derive(Debug)]
enum State {
    Waiting(Buffer),
    Writing,
    Done(Result<(), String>),
}

/// A cluster on its way to the disk.
#[derive(Debug)]
struct Flight {
    /// Whose it is; `None` when that machine is gone.
    owner: Option<u64>,
    cluster: u32,
    state: State,
}

/// A cluster to be written to the disk.
#[derive(Debug)]
pub struct Write {
    /// To be passed to [`Scratch::written`].
    pub cluster: u32,
    /// Where on the disk, in bytes.
    pub at: u64,
    /// What to write.
    pub buffer: Buffer,
}

/// The scratch partition of a node.
#[derive(Debug)]
pub struct Scratch {
    at: u64,
    /// For each cluster, how many of its blocks are needed.
    live: &'static mut [u8],
    used: usize,
    cursor: usize,
    buffers: Vec<Buffer>,
    flights: Vec<Flight>,
}

impl Scratch {
    /// Clusters of a partition of `bytes`.
    #[must_use]
    pub fn clusters(bytes: u64) -> usize {
        (bytes / CLUSTER_BYTES as u64).min(CLUSTERS_MAX) as usize
    }

    /// The partition at byte `at` of the disk, with as many clusters as `table` has bytes. As many are written at once as there are `buffers` of
    /// [`CLUSTER_BYTES`].
    #[must_use]
    pub fn new(at: u64, table: &'static mut [u8], buffers: impl IntoIterator<Item = Buffer>) -> Self {
        table.fill(0);
        let buffers = buffers.into_iter().filter(|buffer| buffer.len() == CLUSTER_BYTES).collect();
        Self { at, live: table, used: 0, cursor: 0, buffers, flights: Vec::new() }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.live.len() as u64 * CLUSTER_BYTES as u64
    }

    /// Bytes of clusters that are in use.
    #[must_use]
    pub const fn used_bytes(&self) -> u64 {
        self.used as u64 * CLUSTER_BYTES as u64
    }

    /// Whether clusters are on their way to the disk.
    #[must_use]
    pub fn is_writing(&self) -> bool {
        self.flights.iter().any(|flight| !matches!(flight.state, State::Done(_)))
    }

    /// Where a block is on the disk, in bytes.
    #[must_use]
    pub fn position(&self, block: u32) -> u64 {
        self.at.saturating_add(u64::from(block) * BLOCK_BYTES as u64)
    }

    /// Starts to write a free cluster with what `fill` puts there; returns its number.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn begin(&mut self, owner: u64, fill: impl FnOnce(&mut [u8])) -> Result<u32, Refusal> {
        if self.used >= self.live.len() {
            return Err(Refusal::Full);
        }
        let buffer = self.buffers.pop().ok_or(Refusal::Busy)?;
        let (before, after) = self.live.split_at_checked(self.cursor).unwrap_or((self.live, &[]));
        let free = |part: &[u8]| part.iter().position(|live| *live == 0);
        let found = free(after).map(|index| self.cursor + index).or_else(|| free(before));
        let Some((index, live)) = found.and_then(|index| Some((index, self.live.get_mut(index)?))) else {
            self.buffers.push(buffer);
            return Err(Refusal::Full);
        };
        *live = BEING_WRITTEN;
        self.used += 1;
        self.cursor = index + 1;
        let cluster = index as u32;
        fill(buffer);
        self.flights.push(Flight { owner: Some(owner), cluster, state: State::Waiting(buffer) });
        Ok(cluster)
    }

    /// The next cluster to give to the disk.
    pub fn next_write(&mut self) -> Option<Write> {
        let waits = |flight: &&mut Flight| matches!(flight.state, State::Waiting(_));
        let flight = self.flights.iter_mut().find(waits)?;
        let State::Waiting(buffer) = core::mem::replace(&mut flight.state, State::Writing) else {
            return None;
        };
        let cluster = flight.cluster;
        Some(Write { cluster, at: self.at.saturating_add(u64::from(cluster) * CLUSTER_BYTES as u64), buffer })
    }

    /// The disk could not take a write now.
    pub fn put_back(&mut self, write: Write) {
        match self.flights.iter_mut().find(|flight| flight.cluster == write.cluster) {
            Some(flight) => flight.state = State::Waiting(write.buffer),
            None => self.buffers.push(write.buffer),
        }
    }

    /// A write has ended; without its buffer if the device may still read it.
    pub fn written(&mut self, cluster: u32, buffer: Option<Buffer>, outcome: Result<(), String>) {
        self.buffers.extend(buffer);
        let Some(index) = self.flights.iter().position(|flight| flight.cluster == cluster) else { return };
        if let Some(flight) = self.flights.get_mut(index) {
            flight.state = State::Done(outcome);
            if flight.owner.is_none() {
                self.flights.swap_remove(index);
                self.keep(cluster, 0);
            }
        }
    }

    /// A cluster of this owner that was written, or why not. [`Self::keep`] then says what it is needed for.
    pub fn take_done(&mut self, owner: u64) -> Option<(u32, Result<(), String>)> {
        let done = |flight: &Flight| flight.owner == Some(owner) && matches!(flight.state, State::Done(_));
        let index = self.flights.iter().position(done)?;
        let flight = self.flights.swap_remove(index);
        let State::Done(outcome) = flight.state else { return None };
        Some((flight.cluster, outcome))
    }

    /// So many blocks of a cluster that was written are needed.
    pub fn keep(&mut self, cluster: u32, blocks: u8) {
        if let Some(live) = self.live.get_mut(cluster as usize) {
            *live = blocks;
            self.used -= usize::from(blocks == 0);
        }
    }

    /// A block is needed no more.
    pub fn release(&mut self, block: u32) {
        let cluster = block as usize / BLOCKS_PER_CLUSTER;
        if let Some(live) = self.live.get_mut(cluster).filter(|live| !matches!(**live, 0 | BEING_WRITTEN)) {
            *live -= 1;
            self.used -= usize::from(*live == 0);
        }
    }

    /// An owner is gone: nobody will ask for what it has on the way.
    pub fn forget(&mut self, owner: u64) {
        let (mut index, mut unwritten) = (0, Vec::new());
        while let Some(flight) = self.flights.get_mut(index) {
            if flight.owner != Some(owner) {
                index += 1;
                continue;
            }
            flight.owner = None;
            if matches!(flight.state, State::Writing) {
                index += 1;
            } else {
                unwritten.push(self.flights.swap_remove(index));
            }
        }
        for flight in unwritten {
            if let State::Waiting(buffer) = flight.state {
                self.buffers.push(buffer);
            }
            self.keep(flight.cluster, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::boxed::Box;
    use alloc::vec;

    fn scratch(clusters: usize, buffers: usize) -> Scratch {
        let leak = |bytes: usize| &mut *Box::leak(vec![0xA5; bytes].into_boxed_slice());
        Scratch::new(1 << 20, leak(clusters), (0..buffers).map(|_| leak(CLUSTER_BYTES)))
    }

    fn write_all(scratch: &mut Scratch) -> usize {
        let mut count = 0;
        while let Some(write) = scratch.next_write() {
            scratch.written(write.cluster, Some(write.buffer), Ok(()));
            count += 1;
        }
        count
    }

    #[test]
    fn a_cluster_is_used_until_its_last_block_is_released() {
        let mut scratch = scratch(2, 2);
        let cluster = scratch.begin(7, |buffer| buffer.fill(9)).unwrap();
        let write = scratch.next_write().unwrap();
        assert_eq!((write.at, write.buffer[0]), ((1 << 20) + u64::from(cluster) * CLUSTER_BYTES as u64, 9));
        assert_eq!(scratch.take_done(7), None);
        scratch.written(cluster, Some(write.buffer), Ok(()));
        assert_eq!((scratch.take_done(8), scratch.take_done(7)), (None, Some((cluster, Ok(())))));
        scratch.keep(cluster, 2);
        let block = cluster * BLOCKS_PER_CLUSTER as u32;
        assert_eq!(scratch.position(block), (1 << 20) + u64::from(cluster) * CLUSTER_BYTES as u64);
        scratch.release(block + 3);
        assert_eq!(scratch.used_bytes(), CLUSTER_BYTES as u64);
        scratch.release(block + 5);
        assert_eq!(scratch.used_bytes(), 0);
        scratch.release(block + 5);
        assert_eq!(scratch.used_bytes(), 0, "once");
    }

    #[test]
    fn no_more_are_written_at_once_than_there_are_buffers_nor_than_there_are_clusters() {
        let mut scratch = scratch(3, 2);
        assert_ne!(scratch.begin(1, |_| {}), scratch.begin(1, |_| {}));
        assert_eq!(scratch.begin(1, |_| {}), Err(Refusal::Busy));
        assert_eq!(write_all(&mut scratch), 2);
        assert!(!scratch.is_writing());
        scratch.begin(1, |_| {}).unwrap();
        assert_eq!(scratch.begin(1, |_| {}), Err(Refusal::Full));
    }

    #[test]
    fn what_a_machine_that_is_gone_had_on_the_way_becomes_free() {
        let mut scratch = scratch(3, 3);
        assert!((0..3).all(|_| scratch.begin(1, |_| {}).is_ok()));
        let writing = scratch.next_write().unwrap();
        let done = scratch.next_write().unwrap();
        scratch.written(done.cluster, Some(done.buffer), Err("broken".into()));
        scratch.forget(1);
        assert_eq!(scratch.used_bytes(), CLUSTER_BYTES as u64, "the device still reads it");
        scratch.written(writing.cluster, Some(writing.buffer), Ok(()));
        assert_eq!(scratch.used_bytes(), 0);
        (0..3).for_each(|_| assert!(scratch.begin(2, |_| {}).is_ok()));
    }

    #[test]
    fn a_write_that_was_put_back_is_the_next_one() {
        let mut scratch = scratch(3, 3);
        assert!((0..2).all(|_| scratch.begin(1, |_| {}).is_ok()));
        let write = scratch.next_write().unwrap();
        let cluster = write.cluster;
        scratch.put_back(write);
        assert_eq!(scratch.next_write().unwrap().cluster, cluster);
    }
}
