//! L1's heap. A small static arena serves until the memory map is known, then [`claim`] adds the real one.

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
