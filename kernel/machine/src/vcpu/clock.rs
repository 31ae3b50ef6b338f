//! kvm-clock: how the guest learns the rate of its time-stamp counter and the time of day without asking twice.
//!
//! Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW) and
//! arch/x86/include/asm/pvclock-abi.h. The guest's TSC never changes its rate, so that a page once written stays true until
//! the guest moves its TSC.

use crate::address::{GuestPhysAddr, GuestTsc};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::Exception;

const ENABLE: u64 = 1;
const ALIGNMENT: u64 = 4;
/// PVCLOCK_TSC_STABLE_BIT: the clock is the same on every vCPU and never steps.
const FLAG_TSC_STABLE: u8 = 1;

/// How TSC ticks become nanoseconds: `(ticks << shift) * multiplier >> 32`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Scale {
    multiplier: u32,
    shift: i8,
}

impl Scale {
    /// The scale for a frequency in kHz that keeps the most bits of the multiplier.
    fn new(tsc_khz: u32) -> Self {
        let hertz = u64::from(tsc_khz.max(1)) * 1000;
        // nanoseconds a tick = 10^9 / hertz = multiplier * 2^(shift - 32), with the multiplier's highest bit set.
        let mut shift = 0_i8;
        let mut numerator = 1_000_000_000_u128 << 32;
        let mut denominator = u128::from(hertz);
        while numerator / denominator > u128::from(u32::MAX) {
            denominator <<= 1;
            shift += 1;
        }
        while numerator / denominator < 1 << 31 {
            numerator <<= 1;
            shift -= 1;
        }
        Self { multiplier: (numerator / denominator) as u32, shift }
    }

    fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            u128::from(ticks) >> self.shift.unsigned_abs()
        } else {
            u128::from(ticks) << self.shift.unsigned_abs()
        };
        (shifted.wrapping_mul(u128::from(self.multiplier)) >> 32) as u64
    }
}

/// One vCPU's kvm-clock.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    scale: Scale,
    /// The TSC value at which the machine's clock stood at zero.
    zero: u64,
    system_time: u64,
    wall_clock: u64,
    version: u32,
}

impl Clock {
    pub(super) fn new(tsc_khz: u32) -> Self {
        Self { scale: Scale::new(tsc_khz), zero: 0, system_time: 0, wall_clock: 0, version: 0 }
    }

    /// Nanoseconds of the machine's clock at `now`.
    pub(super) fn nanoseconds(&self, now: GuestTsc) -> u64 {
        self.scale.nanoseconds(now.0.wrapping_sub(self.zero))
    }

    /// The guest is gone to which the pages belonged.
    pub(super) const fn forget_pages(&mut self) {
        (self.system_time, self.wall_clock) = (0, 0);
    }

    pub(super) const fn system_time(&self) -> u64 {
        self.system_time
    }

    pub(super) const fn wall_clock(&self) -> u64 {
        self.wall_clock
    }

    /// Writes MSR_KVM_SYSTEM_TIME_NEW: bit 0 enables, the rest is where `pvclock_vcpu_time_info` goes.
    pub(super) fn set_system_time(
        &mut self,
        value: u64,
        memory: &mut dyn GuestMemory,
    ) -> Result<(), Exception> {
        if value & ENABLE != 0 {
            let at = aligned(value & !ENABLE)?;
            self.publish(at, memory).map_err(|_| Exception::GENERAL_PROTECTION)?;
        }
        self.system_time = value;
        Ok(())
    }

    /// Writes MSR_KVM_WALL_CLOCK_NEW: puts the time of day at the clock's zero to the address given.
    pub(super) fn set_wall_clock(
        &mut self,
        value: u64,
        now: GuestTsc,
        wall_ns: u64,
        memory: &mut dyn GuestMemory,
    ) -> Result<(), Exception> {
        let at = aligned(value)?;
        let zero = wall_ns.saturating_sub(self.nanoseconds(now));
        let seconds = (zero / 1_000_000_000) as u32;
        let nanoseconds = (zero % 1_000_000_000) as u32;
        self.version = self.version.wrapping_add(2);
        let mut structure = [0; 12];
        put(&mut structure, 0, &self.version.to_le_bytes());
        put(&mut structure, 4, &seconds.to_le_bytes());
        put(&mut structure, 8, &nanoseconds.to_le_bytes());
        memory.write(at, &structure).map_err(|_| Exception::GENERAL_PROTECTION)?;
        self.wall_clock = value;
        Ok(())
    }

    /// The guest's TSC jumps by `delta`: the clock goes on as if nothing had happened.
    pub(super) fn shift(&mut self, delta: i64, memory: &mut dyn GuestMemory) {
        self.zero = self.zero.wrapping_add_signed(delta);
        if self.system_time & ENABLE != 0 {
            // The page was RAM when it was given, and RAM it stays. With no frame left to write it to, it is stale.
            let _ = self.publish(GuestPhysAddr(self.system_time & !ENABLE), memory);
        }
    }

    fn publish(&mut self, at: GuestPhysAddr, memory: &mut dyn GuestMemory) -> Result<(), MemoryError> {
        // The vCPU whose page this is does not run now, so that it never sees an odd version.
        self.version = self.version.wrapping_add(2);
        let mut structure = [0; 32];
        put(&mut structure, 0, &self.version.to_le_bytes());
        put(&mut structure, 8, &self.zero.to_le_bytes());
        put(&mut structure, 24, &self.scale.multiplier.to_le_bytes());
        put(&mut structure, 28, &self.scale.shift.to_le_bytes());
        put(&mut structure, 29, &[FLAG_TSC_STABLE]);
        memory.write(at, &structure)
    }
}

fn aligned(address: u64) -> Result<GuestPhysAddr, Exception> {
    if address.is_multiple_of(ALIGNMENT) {
        Ok(GuestPhysAddr(address))
    } else {
        Err(Exception::GENERAL_PROTECTION)
    }
}

/// Copies `bytes` to `offset`; all offsets here are constants within the structure.
fn put(structure: &mut [u8], offset: usize, bytes: &[u8]) {
    if let Some(field) = structure.get_mut(offset..offset + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Ram;

    /// What Linux computes from the page, `__pvclock_read_cycles`.
    fn guest_reads(ram: &Ram, at: u64, tsc: u64) -> u64 {
        let timestamp = ram.read_u64(GuestPhysAddr(at + 8)).unwrap();
        let system_time = ram.read_u64(GuestPhysAddr(at + 16)).unwrap();
        let multiplier = ram.read_u32(GuestPhysAddr(at + 24)).unwrap();
        let [shift, flags] = ram.read_u16(GuestPhysAddr(at + 28)).unwrap().to_le_bytes();
        assert_eq!(flags, FLAG_TSC_STABLE);
        assert_eq!(ram.read_u32(GuestPhysAddr(at)).unwrap() % 2, 0);
        let shift = shift as i8;
        let delta = tsc.wrapping_sub(timestamp);
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        system_time + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64
    }

    #[test]
    fn the_page_turns_ticks_into_nanoseconds_at_every_usual_frequency() {
        for khz in [250_000, 999_999, 1_000_000, 2_400_000, 3_999_123, 5_700_000] {
            let mut clock = Clock::new(khz);
            let mut ram = Ram::new(0x2000);
            clock.set_system_time(0x1040 | ENABLE, &mut ram).unwrap();
            let hour = u64::from(khz) * 1000 * 3600;
            let read = guest_reads(&ram, 0x1040, hour);
            assert!(read.abs_diff(3_600_000_000_000) < 3000, "{khz} kHz: {read}");
            assert_eq!(read, clock.nanoseconds(GuestTsc(hour)));
        }
    }

    #[test]
    fn linux_gets_back_the_frequency_that_was_configured() {
        for khz in [1_000_000_u32, 2_095_078, 3_000_000] {
            let scale = Scale::new(khz);
            // pvclock_tsc_khz()
            let mut computed = (1_000_000_u64 << 32) / u64::from(scale.multiplier);
            if scale.shift < 0 {
                computed <<= -scale.shift;
            } else {
                computed >>= scale.shift;
            }
            assert!(computed.abs_diff(u64::from(khz)) <= 2, "{khz}: {computed}");
        }
    }

    #[test]
    fn moving_the_tsc_does_not_move_the_clock() {
        let mut clock = Clock::new(2_000_000);
        let mut ram = Ram::new(0x1000);
        clock.set_system_time(0x100 | ENABLE, &mut ram).unwrap();
        let before = guest_reads(&ram, 0x100, 5_000_000);
        clock.shift(-4_000_000, &mut ram);
        assert_eq!(guest_reads(&ram, 0x100, 1_000_000), before);
    }

    #[test]
    fn the_wall_clock_is_the_time_at_the_clocks_zero() {
        let mut clock = Clock::new(1_000_000);
        let mut ram = Ram::new(0x1000);
        clock.set_wall_clock(0x80, GuestTsc(250_000_000), 1_700_000_000_500_000_000, &mut ram).unwrap();
        assert_eq!(ram.read_u32(GuestPhysAddr(0x84)), Ok(1_700_000_000));
        assert_eq!(ram.read_u32(GuestPhysAddr(0x88)), Ok(250_000_000));
    }

    #[test]
    fn a_page_outside_ram_or_not_aligned_is_refused() {
        let mut clock = Clock::new(1_000_000);
        let mut ram = Ram::new(0x1000);
        assert!(clock.set_system_time(0xFF0 | ENABLE, &mut ram).is_err());
        assert!(clock.set_system_time(0x102 | ENABLE, &mut ram).is_err());
        assert!(clock.set_wall_clock(0x1000, GuestTsc(0), 0, &mut ram).is_err());
        assert_eq!(clock.system_time(), 0);
    }
}
