//! Moving what a machine has changed from memory to the scratch partition.
//!
//! Blocks go out in batches of a cluster, in the order of their numbers. A batch's blocks stay in memory until it is written; those that
//! change meanwhile are left out of it.

use super::Volume;
use crate::BLOCK_BYTES;
use crate::backing::Backing;
use crate::overlay::{BLOCKS_PER_TABLE, Place, Slot};
use crate::scratch::{BLOCKS_PER_CLUSTER, CLUSTER_BYTES, Refusal};
use alloc::vec::Vec;

/// The most clusters of one machine that are written at once.
const BATCHES_MAX: usize = 4;

/// Blocks on their way to a cluster, in its order; `None` for those that have changed.
#[derive(Debug)]
struct Batch {
    cluster: u32,
    blocks: Vec<Option<(u64, Slot)>>,
}

/// What a volume has on the scratch partition, and on its way there.
#[derive(Debug)]
pub(super) struct Spill {
    id: u64,
    wanted: bool,
    full: bool,
    /// Blocks that are there.
    blocks: u64,
    /// Where to look for blocks to move.
    hand: u64,
    batches: Vec<Batch>,
}

impl Spill {
    pub(super) const fn new(id: u64) -> Self {
        Self { id, wanted: false, full: false, blocks: 0, hand: 0, batches: Vec::new() }
    }

    /// Whether nothing is there, on its way there, or to go there.
    pub(super) const fn is_unused(&self) -> bool {
        !self.wanted && self.blocks == 0 && self.batches.is_empty()
    }

    /// Something waits for memory.
    pub(super) const fn want(&mut self) {
        self.wanted = true;
    }

    /// Nothing more can be moved.
    pub(super) const fn is_full(&self) -> bool {
        self.full
    }

    /// Bytes that are there.
    pub(super) const fn bytes(&self) -> u64 {
        self.blocks * BLOCK_BYTES as u64
    }

    /// So many blocks are there no more.
    pub(super) const fn left(&mut self, blocks: u64) {
        self.blocks = self.blocks.saturating_sub(blocks);
    }

    /// A block in memory changes or loses its place.
    pub(super) fn changed(&mut self, block: u64) {
        for entry in self.batches.iter_mut().flat_map(|batch| &mut batch.blocks) {
            if entry.is_some_and(|(other, _)| other == block) {
                *entry = None;
            }
        }
        self.full = false;
    }

    fn is_moving(&self, block: u64) -> bool {
        self.batches.iter().flat_map(|batch| &batch.blocks).flatten().any(|(other, _)| *other == block)
    }
}

impl<S: AsRef<[u8]> + AsMut<[u8]>> Volume<S> {
    /// Takes note of what was written to the scratch partition, and gives it more if memory is short. Returns whether what waits should be tried
    /// again. Cheap when nothing waits and nothing is under way.
    pub fn spill(&mut self, backing: &mut Backing) -> bool {
        if !self.spill.wanted && self.spill.batches.is_empty() {
            return false;
        }
        let before = self.overlay.used();
        self.take_written(backing);
        let freed = self.overlay.used() < before;
        if freed {
            self.spill.wanted = false;
        }
        while self.spill.wanted && self.spill.batches.len() < BATCHES_MAX {
            let refusal = self.begin_batch(backing);
            if let Err(refusal) = refusal {
                // With nothing under way nothing will change.
                self.spill.full = refusal == Refusal::Full && self.spill.batches.is_empty();
                break;
            }
        }
        if self.spill.full {
            self.spill.wanted = false;
        }
        freed || self.spill.full || self.fault.is_some()
    }

    fn take_written(&mut self, backing: &mut Backing) {
        let Some(scratch) = &mut backing.scratch else { return };
        while let Some((cluster, outcome)) = scratch.take_done(self.spill.id) {
            let index = self.spill.batches.iter().position(|batch| batch.cluster == cluster);
            let batch = index.map(|index| self.spill.batches.swap_remove(index));
            let first = cluster * BLOCKS_PER_CLUSTER as u32;
            // What was read ahead there is out of date.
            backing.cache.invalidate(scratch.position(first), CLUSTER_BYTES as u64);
            if let Err(reason) = outcome {
                self.fault.get_or_insert(reason);
                scratch.keep(cluster, 0);
                continue;
            }
            let mut kept = 0;
            for (number, entry) in (first..).zip(batch.iter().flat_map(|batch| &batch.blocks)) {
                if let Some((block, _)) = entry {
                    self.overlay.set(*block, Place::Scratch(number));
                    kept += 1;
                }
            }
            self.spill.blocks += u64::from(kept);
            scratch.keep(cluster, kept);
        }
    }

    fn begin_batch(&mut self, backing: &mut Backing) -> Result<(), Refusal> {
        let scratch = backing.scratch.as_mut().ok_or(Refusal::Full)?;
        let hand = self.spill.hand;
        let blocks = self.blocks_to_move();
        if blocks.is_empty() {
            return Err(Refusal::Full);
        }
        let overlay = &self.overlay;
        let begun = scratch.begin(self.spill.id, |buffer| {
            for (place, (_, slot)) in buffer.chunks_exact_mut(BLOCK_BYTES).zip(&blocks) {
                place.copy_from_slice(overlay.pages(*slot, 1));
            }
        });
        match begun {
            Ok(cluster) => {
                self.spill.batches.push(Batch { cluster, blocks: blocks.into_iter().map(Some).collect() });
                Ok(())
            }
            Err(refusal) => {
                self.spill.hand = hand;
                Err(refusal)
            }
        }
    }

    /// The next blocks in memory from the hand on, at most a cluster's, that are not on their way already.
    fn blocks_to_move(&mut self) -> Vec<(u64, Slot)> {
        let all = self.bytes.div_ceil(BLOCK_BYTES as u64).max(1);
        let mut found = Vec::with_capacity(BLOCKS_PER_CLUSTER);
        let (mut block, mut looked_at) = (self.spill.hand % all, 0);
        while looked_at < all && found.len() < BLOCKS_PER_CLUSTER {
            let step = if self.overlay.has_table(block) {
                if let Place::Memory(slot) = self.overlay.place(block)
                    && !self.spill.is_moving(block)
                {
                    found.push((block, slot));
                }
                1
            } else {
                BLOCKS_PER_TABLE - block % BLOCKS_PER_TABLE
            };
            looked_at += step;
            block = if block + step < all { block + step } else { 0 };
        }
        self.spill.hand = block;
        found
    }

    /// Gives up everything on the scratch partition.
    pub(super) fn leave_scratch(&mut self, backing: &mut Backing) {
        let Some(scratch) = &mut backing.scratch else { return };
        scratch.forget(self.spill.id);
        let all = self.bytes.div_ceil(BLOCK_BYTES as u64);
        let mut block = 0;
        while self.spill.blocks > 0 && block < all {
            if !self.overlay.has_table(block) {
                block = (block / BLOCKS_PER_TABLE + 1) * BLOCKS_PER_TABLE;
                continue;
            }
            if let Place::Scratch(number) = self.overlay.place(block) {
                scratch.release(number);
                self.spill.left(1);
            }
            block += 1;
        }
    }
}
