//! The node's disk with its cache: what machines' disks read their base from.
//!
//! Accesses are started by whoever misses something, and ended by [`Storage::poll`], which the vCPU loop calls; a machine that waits sees
//! by [`Storage::arrivals`] that it should try again.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::String;

use nestling_storage::cache::{BlockCache, LINE_BYTES};
use nestling_storage::source::Source;

use crate::cpu::{self, clock};
use crate::drivers::disk::Disk;
use crate::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME};

/// One part of this many of the memory for machines is for the cache ...
const CACHE_SHARE: u64 = 32;
/// ... within these bounds.
const CACHE_LEAST_BYTES: u64 = 8 << 20;
const CACHE_MOST_BYTES: u64 = 512 << 20;
/// Without interrupts the disk is asked this often, in nanoseconds.
const POLL_NS: u64 = 100_000;

/// The node's disk and what was read from it.
pub struct Storage {
    disk: Option<Box<dyn Disk + Send>>,
    /// What was read from the disk.
    pub cache: BlockCache,
    arrivals: u64,
}

impl Storage {
    /// A node's disk, if it has one, with a cache from `frames`.
    pub fn new(disk: Option<Box<dyn Disk + Send>>, frames: &mut FramePool) -> Self {
        let Some(disk) = disk else {
            return Self { disk: None, cache: BlockCache::new(0, []), arrivals: 0 };
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
        Self { disk: Some(disk), cache, arrivals: 0 }
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
        let Some(disk) = &mut self.disk else { return };
        if !self.cache.is_waiting() {
            return;
        }
        let now = clock::now_ns();
        if disk.take_interrupt() || disk.deadline().is_some_and(|deadline| deadline <= now) {
            while let Some(ended) = disk.completed(now) {
                if let Err(reason) = &ended.outcome {
                    log::error!("{}: {reason}", disk.driver());
                }
                self.cache.filled(ended.tag, ended.buffer, ended.outcome);
                self.arrivals += 1;
            }
        }
        while let Some(fetch) = self.cache.next_fetch() {
            let (at, bytes, tag) = (fetch.at, fetch.bytes, fetch.line);
            if let Err(buffer) = disk.read(at, bytes, fetch.buffer, tag) {
                self.cache.put_back(nestling_storage::cache::Fetch { line: tag, at, bytes, buffer });
                break;
            }
        }
    }

    /// When [`Self::poll`] has to be called at the latest, in nanoseconds since boot.
    pub fn deadline(&self) -> Option<u64> {
        let disk = self.disk.as_ref().filter(|_| self.cache.is_waiting())?;
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
        use nestling_storage::cache::Lookup;
        if !self.has_disk() {
            return Err("there is no disk".into());
        }
        let (mut at, mut rest) = (at, into);
        while !rest.is_empty() {
            match self.cache.read(at, rest.len() as u64) {
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
