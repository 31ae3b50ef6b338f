//! L1's heap. A small static arena serves until the memory map is known, then [`claim`] adds the real one.

use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use core::ptr::NonNull;
use spinning_top::RawSpinlock;
use talc::{TalcLock, source::Claim};

const BOOT_ARENA: usize = 256 << 10;

#[global_allocator]
static HEAP: TalcLock<RawSpinlock, Claim> = {
    static mut ARENA: [u8; BOOT_ARENA] = [0; BOOT_ARENA];
    // SAFETY: nothing else names the arena.
    TalcLock::new(unsafe { Claim::array(&raw mut ARENA) })
};

/// Gives the heap a range of memory for good.
///
/// # Safety
/// The range must be mapped RAM that nothing else uses.
pub unsafe fn claim(start: u64, bytes: u64) {
    // SAFETY: the caller hands the range over.
    let claimed = unsafe { HEAP.lock().claim(start as *mut u8, bytes as usize) };
    assert!(claimed.is_some(), "the heap at {start:#x} is too small to be claimed");
}

/// Bytes in use, and bytes in use or free.
pub fn usage() -> (usize, usize) {
    let counters = *HEAP.lock().counters();
    (counters.allocated_bytes, counters.claimed_bytes)
}

/// Page-aligned, zeroed, physically contiguous memory for structures that hardware reads.
pub struct Pages {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the pages are owned like a box's content; whoever writes them through the pointer says why he may.
unsafe impl Send for Pages {}
// SAFETY: through a shared reference only the address is given out.
unsafe impl Sync for Pages {}

impl Pages {
    /// `count` pages of 4 KiB.
    pub fn new(count: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(count.max(1) * 4096, 4096) else {
            unreachable!("callers ask for a few pages")
        };
        // SAFETY: the layout is not empty.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(start) => Self { start, layout },
            None => handle_alloc_error(layout),
        }
    }

    /// Other pages with the same content.
    pub fn duplicate(&self) -> Self {
        let copy = Self::new(self.layout.size() / 4096);
        // SAFETY: both have this size, are initialised, and are two allocations.
        unsafe { core::ptr::copy_nonoverlapping(self.as_ptr(), copy.as_ptr(), self.layout.size()) };
        copy
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Physical address, which is the virtual one.
    pub fn physical(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// The bytes, for set-up before the hardware knows of them.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, initialised to zero, borrowed through `self`.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`; the owner has taken the address from the hardware.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
