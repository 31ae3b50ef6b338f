//! Which MSRs a guest reaches without an exit: those that every entry and exit, or every change of vCPU, switches.
//!
//! Intel SDM vol. 3, 25.6.9 (MSR-bitmap address).

use crate::memory::heap::Pages;
use nestling_machine::address::MsrIndex;
use nestling_machine::vcpu::msr;

/// First MSR of each 1 KiB vector of the bitmap, one bit an MSR; MSRs outside always exit.
const MSR_RANGES: [u32; 2] = [0x0000_0000, 0xC000_0000];
const MSRS_PER_RANGE: u32 = 0x2000;
const BYTES_PER_RANGE: usize = 1024;
/// The vectors for WRMSR follow those for RDMSR.
const WRITES: usize = BYTES_PER_RANGE * MSR_RANGES.len();

/// The bitmap; every machine uses the same.
pub struct MsrBitmap(Pages);

impl MsrBitmap {
    /// A bitmap that intercepts everything but [`msr::PASS_THROUGH`].
    pub fn new() -> Self {
        let mut page = Pages::new(1);
        fill(page.bytes_mut());
        Self(page)
    }

    /// Physical address of the page.
    pub fn physical(&self) -> u64 {
        self.0.physical()
    }
}

/// Fills the bitmap's page of 4096 bytes.
pub fn fill(page: &mut [u8]) {
    page.fill(0xFF);
    for (byte, bit) in msr::PASS_THROUGH.iter().filter_map(|index| position(*index)) {
        for at in [byte, WRITES + byte] {
            if let Some(byte) = page.get_mut(at) {
                *byte &= !(1 << bit);
            }
        }
    }
}

/// Byte and bit of an MSR's read intercept; `None` for MSRs outside the bitmap.
fn position(index: MsrIndex) -> Option<(usize, u32)> {
    let (range, offset) = MSR_RANGES.iter().enumerate().find_map(|(range, first)| {
        let offset = index.0.checked_sub(*first)?;
        (offset < MSRS_PER_RANGE).then_some((range, offset))
    })?;
    Some((range * BYTES_PER_RANGE + (offset / 8) as usize, offset % 8))
}
