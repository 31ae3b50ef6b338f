//! Which of the loader's memory is free for machines.

use super::frames::LARGE_FRAME;
use crate::boot::{MemoryKind, MemoryRange};
use alloc::vec::Vec;
use core::ops::Range;

/// Usable RAM in whole 2 MiB frames that are neither `occupied` nor the firmware's, each frame once: loaders' maps
/// overlap at times.
pub fn free_ranges(
    memory: &[MemoryRange],
    occupied: impl IntoIterator<Item = Range<u64>>,
) -> Vec<(u64, u64)> {
    let firmware =
        memory.iter().filter(|range| range.kind == MemoryKind::Firmware).map(|range| range.start..range.end);
    let mut occupied: Vec<Range<u64>> = occupied.into_iter().chain(firmware).collect();
    let mut free = Vec::new();
    for range in memory.iter().filter(|range| range.kind == MemoryKind::Usable) {
        let mut pieces = Vec::from([(range.start, range.end)]);
        for taken in occupied.iter().filter(|taken| !taken.is_empty()) {
            pieces = pieces
                .into_iter()
                .flat_map(|(start, end)| [(start, end.min(taken.start)), (start.max(taken.end), end)])
                .filter(|(start, end)| start < end)
                .collect();
        }
        occupied.push(range.start..range.end);
        let whole = |(start, end): (u64, u64)| {
            let first = start.checked_next_multiple_of(LARGE_FRAME)?;
            let last = end & !(LARGE_FRAME - 1);
            (first < last).then_some((first, last))
        };
        free.extend(pieces.into_iter().filter_map(whole));
    }
    free
}
