//! Which ports and MSRs a guest reaches without an exit: no port, and the MSRs that the VMCB itself switches.
//!
//! AMD APM vol. 2, 15.10.1 (I/O permissions map), 15.11 (MSR permissions map).

use crate::memory::heap::Pages;
use nestling_machine::address::MsrIndex;
use nestling_machine::vcpu::msr;

const IO_MAP_PAGES: usize = 3;
const MSR_MAP_PAGES: usize = 2;
/// First MSR of each 2 KiB vector of the map, two bits an MSR: read, write.
const MSR_RANGES: [u32; 3] = [0x0000_0000, 0xC000_0000, 0xC001_0000];
const MSRS_PER_RANGE: u32 = 0x2000;

/// The maps; every machine uses the same.
pub struct PermissionMaps {
    io: Pages,
    msr: Pages,
}

impl PermissionMaps {
    /// Maps that intercept everything but [`msr::PASS_THROUGH`].
    pub fn new() -> Self {
        let mut io = Pages::new(IO_MAP_PAGES);
        io.bytes_mut().fill(0xFF);
        let mut map = Pages::new(MSR_MAP_PAGES);
        map.bytes_mut().fill(0xFF);
        for &index in msr::PASS_THROUGH {
            if let Some((byte, bit)) = position(index) {
                map.bytes_mut()[byte] &= !(0b11 << bit);
            }
        }
        Self { io, msr: map }
    }

    /// Physical address of the I/O map.
    pub fn io(&self) -> u64 {
        self.io.physical()
    }

    /// Physical address of the MSR map.
    pub fn msr(&self) -> u64 {
        self.msr.physical()
    }
}

/// Byte and bit of an MSR's two bits; `None` for MSRs outside the map, which always exit.
fn position(index: MsrIndex) -> Option<(usize, u32)> {
    let (range, offset) = MSR_RANGES.iter().enumerate().find_map(|(range, first)| {
        let offset = index.0.checked_sub(*first)?;
        (offset < MSRS_PER_RANGE).then_some((range, offset))
    })?;
    Some((range * 2048 + (offset / 4) as usize, offset % 4 * 2))
}
