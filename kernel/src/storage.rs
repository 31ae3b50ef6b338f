//! The node's disk with its cache: what machines' disks read their base from.
//!
//! Accesses are started by whoever misses something, and ended by [`Storage::poll`], which the vCPU loop calls; a machine that waits sees
//! by [`Storage::arrivals`] that it should try again.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::String;

use nestling_storage::backing::Backing;
use nestling_storage::cache::{BlockCache, Fetch, LINE_BYTES, Lookup};
use nestling_storage::partitions;
use nestling_storage::scratch::{CLUSTER_BYTES, Scratch, Write};
use nestling_storage::source::Source;

use crate::cpu::{self, clock};
use crate::drivers::disk::Disk;
use crate::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME};

/// One part of this many of the memory for machines is for the cache ...
const CACHE_SHARE: u64 = 32;
/// ... within these bounds.
const CACHE_LEAST_BYTES: u64 = 8 << 20;
const CACHE_MOST_BYTES: u64 = 512 << 20;
/// The name of the scratch partition.
const SCRATCH_PARTITION: &str = "nestling-scratch";
/// Clusters that are written to it at once.
const SCRATCH_WRITES: usize = 8;
/// Set in the tags of accesses that write a cluster; others are the numbers of cache lines.
const WRITES: usize = 1 << 40;
/// Without interrupts the disk is asked this often, in nanoseconds.
const POLL_NS: u64 = 100_000;

/// The node's disk and what machines share of it.
pub struct Storage {
    disk: Option<Box<dyn Disk + Send>>,
    /// What was read from the disk, and its scratch partition.
    pub backing: Backing,
    arrivals: u64,
}

impl Storage {
    /// A node's disk, if it has one, with a cache from `frames`.
    pub fn new(disk: Option<Box<dyn Disk + Send>>, frames: &mut FramePool) -> Self {
        let Some(disk) = disk else {
            return Self { disk: None, backing: Backing::none(), arrivals: 0 };
        };
        let total = frames.counts().1 as u64 * SMALL_FRAME;
        let mut bytes = (total / CACHE_SHARE).clamp(CACHE_LEAST_BYTES, CACHE_MOST_BYTES);
        let mut memory = frames.carve(bytes);
        while memory.is_none() && bytes > LARGE_FRAME {
            bytes /= 2;
            memory = frames.carve(bytes);
        }
        let memory = memory.unwrap_or_default();
        log::info!(
            "disk: {} MiB by {}, {}, {} MiB of cache",
            disk.bytes() >> 20,
            disk.driver(),
            if disk.has_interrupt() { "with interrupts" } else { "polled" },
            memory.len() >> 20
        );
        let cache = BlockCache::new(disk.bytes(), memory.chunks_exact_mut(LINE_BYTES));
        Self { disk: Some(disk), backing: Backing { cache, scratch: None }, arrivals: 0 }
    }

    /// Looks for the scratch partition. Its table and what is written at once take memory out of `frames`.
    pub fn find_scratch(&mut self, frames: &mut FramePool) {
        // What is wrong with a table is said when images are looked for.
        let Ok(Some(found)) = partitions::read(self) else { return };
        let Some(partition) = found.iter().find(|partition| partition.name == SCRATCH_PARTITION) else {
            return;
        };
        if self.disk.as_ref().is_some_and(|disk| disk.is_read_only()) {
            log::warn!("the disk is read-only: the partition {SCRATCH_PARTITION} is not used");
            return;
        }
        let clusters = Scratch::clusters(partition.bytes);
        let Some(memory) = frames.carve((clusters + SCRATCH_WRITES * CLUSTER_BYTES) as u64) else {
            log::warn!("no memory for the table of the partition {SCRATCH_PARTITION}: it is not used");
            return;
        };
        let (buffers, rest) = memory.split_at_mut(SCRATCH_WRITES * CLUSTER_BYTES);
        let Some(table) = rest.get_mut(..clusters) else { return };
        log::info!("scratch: {} MiB", partition.bytes >> 20);
        let buffers = buffers.chunks_exact_mut(CLUSTER_BYTES);
        self.backing.scratch = Some(Scratch::new(partition.at, table, buffers));
    }

    /// The scratch partition's size in bytes; zero without one.
    pub fn scratch_bytes(&self) -> u64 {
        self.backing.scratch.as_ref().map_or(0, Scratch::bytes)
    }

    fn is_waiting(&self) -> bool {
        self.backing.cache.is_waiting() || self.backing.scratch.as_ref().is_some_and(Scratch::is_writing)
    }

    /// Whether the node has a disk.
    pub const fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Changes whenever something arrived that a machine may wait for.
    pub const fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// Takes what the disk has done, and gives it more to do. Cheap when there is nothing.
    pub fn poll(&mut self) {
        if !self.is_waiting() {
            return;
        }
        let Self { disk: Some(disk), backing: Backing { cache, scratch }, arrivals } = self else { return };
        let now = clock::now_ns();
        if disk.take_interrupt() || disk.deadline().is_some_and(|deadline| deadline <= now) {
            while let Some(ended) = disk.completed(now) {
                if let Err(reason) = &ended.outcome {
                    log::error!("{}: {reason}", disk.driver());
                }
                match (ended.tag.checked_sub(WRITES), &mut *scratch) {
                    (Some(cluster), Some(scratch)) => {
                        scratch.written(cluster as u32, ended.buffer, ended.outcome);
                    }
                    _ => cache.filled(ended.tag, ended.buffer, ended.outcome),
                }
                *arrivals += 1;
            }
        }
        // Who reads waits for it; who writes waits only when much is under way.
        while let Some(Fetch { line, at, bytes, buffer }) = cache.next_fetch() {
            if let Err(buffer) = disk.read(at, bytes, buffer, line) {
                return cache.put_back(Fetch { line, at, bytes, buffer });
            }
        }
        let Some(scratch) = scratch else { return };
        while let Some(Write { cluster, at, buffer }) = scratch.next_write() {
            if let Err(buffer) = disk.write(at, CLUSTER_BYTES, buffer, WRITES | cluster as usize) {
                return scratch.put_back(Write { cluster, at, buffer });
            }
        }
    }

    /// When [`Self::poll`] has to be called at the latest, in nanoseconds since boot.
    pub fn deadline(&self) -> Option<u64> {
        let disk = self.disk.as_ref().filter(|_| self.is_waiting())?;
        let poll = (!disk.has_interrupt()).then(|| clock::now_ns().saturating_add(POLL_NS));
        disk.deadline().into_iter().chain(poll).min()
    }
}

/// Reading while the node boots, when nothing else is to be done meanwhile.
impl Source for Storage {
    fn bytes(&self) -> u64 {
        self.disk.as_ref().map_or(0, |disk| disk.bytes())
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String> {
        if !self.has_disk() {
            return Err("there is no disk".into());
        }
        let (mut at, mut rest) = (at, into);
        while !rest.is_empty() {
            match self.backing.cache.read(at, rest.len() as u64) {
                Lookup::Hit(bytes) => {
                    let Some((place, behind)) = rest.split_at_mut_checked(bytes.len()) else { break };
                    place.copy_from_slice(bytes);
                    at += bytes.len() as u64;
                    rest = behind;
                }
                Lookup::Failed(reason) => return Err(reason),
                Lookup::Miss => {
                    self.poll();
                    cpu::take_interrupts();
                }
            }
        }
        Ok(())
    }
}
