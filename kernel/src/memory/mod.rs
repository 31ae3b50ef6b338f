//! L1's memory: the heap for its own data, the frame pool for machines, and its page tables.
//!
//! Everything is identity-mapped: a virtual address is the physical address.

mod copy;
pub mod frames;
pub mod heap;
mod map;
pub mod paging;

use crate::boot::{BootInfo, MemoryKind};
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use frames::FramePool;
pub use paging::map_mmio;

/// L1's heap beyond the static one it boots with, in bytes.
const HEAP_BYTES: u64 = 48 << 20;
/// Below this a node cannot hold its heap, an image and one machine.
const MINIMUM_BYTES: u64 = 192 << 20;
/// Firmware, real-mode vectors and legacy holes.
const LOW_MEMORY_END: u64 = 1 << 20;

unsafe extern "C" {
    static __kernel_start: u8;
    static __kernel_end: u8;
}

/// Why the node cannot run in the memory it was given.
#[derive(Debug)]
pub struct TooLittleMemory {
    /// Usable RAM in MiB.
    pub found_mib: u64,
}

impl core::fmt::Display for TooLittleMemory {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let needed = MINIMUM_BYTES >> 20;
        write!(
            f,
            "{} MiB of memory; a node needs {needed} MiB and the size of its jobs: give the VM more memory",
            self.found_mib
        )
    }
}

/// A page of RAM below 1 MiB that nobody uses, where real mode can start; `None` where the loader tells of none.
pub fn real_mode_page(boot: &BootInfo) -> Option<u64> {
    const PAGE: u64 = 4096;
    /// Above it stands the firmware's extended data area, on machines whose map does not say so.
    const END: u64 = 0x9_0000;
    let text = boot.command_line.place();
    let modules = boot.modules.iter().map(|m| m.as_ptr() as u64..m.as_ptr() as u64 + m.len() as u64);
    let taken: Vec<_> = modules.chain([text]).collect();
    let firmware = || boot.memory.iter().filter(|range| range.kind == MemoryKind::Firmware);
    let is_free = |page: &u64| {
        let overlaps = |start: u64, end: u64| start < page + PAGE && *page < end;
        !taken.iter().any(|range| overlaps(range.start, range.end))
            && !firmware().any(|range| overlaps(range.start, range.end))
    };
    let usable = boot.memory.iter().filter(|range| range.kind == MemoryKind::Usable);
    usable
        .flat_map(|range| {
            // The null page is not mapped.
            let first = range.start.max(PAGE).next_multiple_of(PAGE);
            (first..range.end.min(END)).step_by(PAGE as usize).filter(move |page| page + PAGE <= range.end)
        })
        .filter(is_free)
        .max()
}

/// Stacks for other cores, each above a page that is not mapped. Their memory comes from the pool for good.
pub struct Stacks<'a> {
    frames: &'a FramePool,
    left: Range<u64>,
}

impl<'a> Stacks<'a> {
    /// None yet.
    pub const fn new(frames: &'a FramePool) -> Self {
        Self { frames, left: 0..0 }
    }

    /// The top of another stack of `bytes`, a multiple of the page size; `None` when there is no memory.
    pub fn another(&mut self, bytes: u64) -> Option<u64> {
        let needed = frames::SMALL_FRAME + bytes;
        if self.left.end - self.left.start < needed {
            let frame = self.frames.large()?;
            self.left = frame.address()..frame.address() + frames::LARGE_FRAME;
        }
        let guard = self.left.start;
        self.left.start += needed;
        paging::unmap(guard);
        Some(self.left.start)
    }
}

static TOTAL_BYTES: AtomicU64 = AtomicU64::new(0);

/// Usable RAM of the node, in bytes, L1's own included.
pub fn total_bytes() -> u64 {
    TOTAL_BYTES.load(Ordering::Relaxed)
}

/// Sets up heap and page tables; what RAM is left becomes the frame pool.
///
/// # Errors
/// [`TooLittleMemory`] when the heap does not fit or too little would be left for machines.
pub fn init(boot: &BootInfo) -> Result<FramePool, TooLittleMemory> {
    let total: u64 =
        boot.memory.iter().filter(|r| r.kind == MemoryKind::Usable).map(|r| r.end - r.start).sum();
    TOTAL_BYTES.store(total, Ordering::Relaxed);
    let kernel = &raw const __kernel_start as u64..&raw const __kernel_end as u64;
    let modules = boot.modules.iter().map(|m| m.as_ptr() as u64..m.as_ptr() as u64 + m.len() as u64);
    let mut free = map::free_ranges(&boot.memory, [0..LOW_MEMORY_END, kernel].into_iter().chain(modules));
    let too_little = TooLittleMemory { found_mib: total >> 20 };
    if total < MINIMUM_BYTES {
        return Err(too_little);
    }
    // The boot page tables map 4 GiB, so the heap goes there.
    let heap =
        free.iter_mut().find(|(start, end)| *start + HEAP_BYTES <= (*end).min(1 << 32)).ok_or(too_little)?;
    let heap_start = heap.0;
    heap.0 += HEAP_BYTES;
    // SAFETY: the range is usable RAM, identity-mapped by the boot tables, 2 MiB-aligned, and now in no other list.
    unsafe { heap::claim(heap_start, HEAP_BYTES) };
    paging::init(boot);
    let mut pool = FramePool::new();
    for (start, end) in free {
        pool.add(start, end);
    }
    Ok(pool)
}
