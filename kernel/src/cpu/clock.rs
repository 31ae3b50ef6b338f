//! Time: the TSC, calibrated once at boot.
//!
//! In order of trust: the rate the hypervisor states (kvm-clock, then CPUID leaf 0x4000_0010), the processor's own leaf 0x15
//! with a crystal frequency, and otherwise a measurement against the ACPI PM timer (ACPI 6.5, 4.8.2.1) or the PIT.

use super::{apic, features};
use core::arch::x86_64::_rdtsc;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use x86_64::instructions::port::Port;
use x86_64::registers::model_specific::Msr;

static BASE: AtomicU64 = AtomicU64::new(0);
static KHZ: AtomicU64 = AtomicU64::new(0);
/// Nanoseconds in a tick, as a 32.32 fixed-point number.
static NS_PER_TICK: AtomicU64 = AtomicU64::new(0);
static UNIX_AT_BASE: AtomicU64 = AtomicU64::new(0);

const PM_TIMER_HZ: u64 = 3_579_545;
const PIT_HZ: u64 = 1_193_182;
const MEASURE_NS: u64 = 10_000_000;

/// Where the TSC's rate came from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// kvm-clock's multiplier.
    KvmClock,
    /// CPUID leaf 0x4000_0010.
    HypervisorLeaf,
    /// CPUID leaf 0x15.
    CrystalLeaf,
    /// Measured against the ACPI PM timer.
    PmTimer,
    /// Measured against the PIT.
    Pit,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KvmClock => "kvm-clock",
            Self::HypervisorLeaf => "the hypervisor's CPUID leaf",
            Self::CrystalLeaf => "CPUID leaf 0x15",
            Self::PmTimer => "the ACPI PM timer",
            Self::Pit => "the PIT",
        })
    }
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has RDTSC.
    unsafe { _rdtsc() }
}

/// Nanoseconds since the kernel's entry; zero before calibration.
pub fn now_ns() -> u64 {
    let ticks = tsc().wrapping_sub(BASE.load(Ordering::Relaxed));
    ((u128::from(ticks) * u128::from(NS_PER_TICK.load(Ordering::Relaxed))) >> 32) as u64
}

/// The counter's value at a time in nanoseconds since the kernel's entry.
pub fn tsc_at(ns: u64) -> u64 {
    // The inverse of `now_ns`, rounded up: a timer set by this never fires before the clock says so.
    let ticks = (u128::from(ns) << 32).div_ceil(u128::from(NS_PER_TICK.load(Ordering::Relaxed).max(1)));
    BASE.load(Ordering::Relaxed).saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX))
}

/// The time in nanoseconds since the kernel's entry at a value of the counter, rounded up; zero for values before it.
pub fn ns_at_tsc(tsc: u64) -> u64 {
    let ticks = u128::from(tsc.saturating_sub(BASE.load(Ordering::Relaxed)));
    let ns = (ticks * u128::from(NS_PER_TICK.load(Ordering::Relaxed))).div_ceil(1 << 32);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// The counter's rate in kHz.
pub fn khz() -> u64 {
    KHZ.load(Ordering::Relaxed)
}

/// Nanoseconds since 1970-01-01 UTC.
pub fn unix_ns() -> u64 {
    UNIX_AT_BASE.load(Ordering::Relaxed) + now_ns()
}

/// Sets the wall clock.
pub fn set_unix_ns(now: u64) {
    UNIX_AT_BASE.store(now.saturating_sub(now_ns()), Ordering::Relaxed);
}

/// Finds the rates of the TSC and of the APIC timer. `entry_tsc` becomes time zero; `pm_timer` is the I/O port of the PM timer.
pub fn init(entry_tsc: u64, pm_timer: Option<u16>) -> Source {
    BASE.store(entry_tsc, Ordering::Relaxed);
    let stated = kvm_clock().or_else(hypervisor_leaf).or_else(crystal_leaf);
    let (khz, source) = match stated {
        Some((khz, source)) if features::has_tsc_deadline() => {
            apic::timer_init(0, 1);
            (khz, source)
        }
        _ => {
            let (measured, apic_ticks) = measure(pm_timer);
            let (khz, source) =
                stated.unwrap_or((measured, if pm_timer.is_some() { Source::PmTimer } else { Source::Pit }));
            apic::timer_init(apic_ticks, MEASURE_NS);
            (khz, source)
        }
    };
    KHZ.store(khz, Ordering::Relaxed);
    NS_PER_TICK.store(((1_000_000u128 << 32) / u128::from(khz.max(1))) as u64, Ordering::Relaxed);
    source
}

fn kvm_clock() -> Option<(u64, Source)> {
    const SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;
    /// `struct pvclock_vcpu_time_info`.
    #[repr(C, align(64))]
    struct TimeInfo {
        version: u32,
        pad: u32,
        tsc_timestamp: u64,
        system_time: u64,
        mul: u32,
        shift: i8,
        flags: u8,
    }
    if features::kvm_features()? & 1 << 3 == 0 {
        return None;
    }
    let mut info =
        TimeInfo { version: 0, pad: 0, tsc_timestamp: 0, system_time: 0, mul: 0, shift: 0, flags: 0 };
    let address = &raw mut info;
    // SAFETY: CPUID offers the MSR; KVM fills the structure, which outlives the registration ended right after.
    let (mul, shift) = unsafe {
        let mut msr = Msr::new(SYSTEM_TIME_NEW);
        msr.write(address as u64 | 1);
        let result = (
            core::ptr::read_volatile(&raw const (*address).mul),
            core::ptr::read_volatile(&raw const (*address).shift),
        );
        msr.write(0);
        result
    };
    if mul == 0 {
        return None;
    }
    // ns = (ticks << shift) * mul >> 32
    let khz = (1_000_000u128 << 32) / u128::from(mul);
    let khz = if shift < 0 { khz << shift.unsigned_abs() } else { khz >> shift };
    u64::try_from(khz).ok().map(|khz| (khz, Source::KvmClock))
}

fn hypervisor_leaf() -> Option<(u64, Source)> {
    let khz = features::hypervisor_tsc_khz()?;
    Some((u64::from(khz), Source::HypervisorLeaf))
}

fn crystal_leaf() -> Option<(u64, Source)> {
    let hz = features::tsc_hz_by_crystal()?;
    Some((hz / 1000, Source::CrystalLeaf))
}

/// TSC kHz, and APIC timer ticks in [`MEASURE_NS`].
fn measure(pm_timer: Option<u16>) -> (u64, u64) {
    apic::count_start();
    let (ticks, hz, apic_ticks, elapsed) = match pm_timer {
        Some(port) => measure_pm(port),
        None => measure_pit(),
    };
    let elapsed = elapsed.max(1);
    let khz = u128::from(ticks) * u128::from(hz) / u128::from(elapsed) / 1000;
    let ns = u128::from(elapsed) * 1_000_000_000 / u128::from(hz);
    let apic_ticks = u128::from(apic_ticks) * u128::from(MEASURE_NS) / ns.max(1);
    (khz as u64, apic_ticks as u64)
}

/// One reading of a counter with the TSC around it; the narrowest of a few counts, since any one may have been interrupted by L0.
fn bracket(mut read: impl FnMut() -> u64) -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..5 {
        let before = tsc();
        let value = read();
        let after = tsc();
        if after - before < best.0 {
            best = (after - before, before + (after - before) / 2, value);
        }
    }
    (best.1, best.2)
}

fn measure_pm(port: u16) -> (u64, u64, u64, u64) {
    // SAFETY: the FADT names this port; reading it has no effect. The upper byte may be absent, so 24 bits are used.
    let mut read = || u64::from(unsafe { Port::<u32>::new(port).read() } & 0xFF_FFFF);
    let apic_start = apic::count_elapsed();
    let (tsc_start, start) = bracket(&mut read);
    let target = PM_TIMER_HZ * MEASURE_NS / 1_000_000_000;
    let mut spins = 0u32;
    while (read().wrapping_sub(start) & 0xFF_FFFF) < target && spins < 10_000_000 {
        spins += 1;
    }
    let (tsc_end, end) = bracket(&mut read);
    let apic_end = apic::count_elapsed();
    (tsc_end - tsc_start, PM_TIMER_HZ, u64::from(apic_end - apic_start), end.wrapping_sub(start) & 0xFF_FFFF)
}

fn measure_pit() -> (u64, u64, u64, u64) {
    // Intel 8254, mode 0 on channel 2: OUT2 (port 0x61 bit 5) rises when the count has run out.
    let target = PIT_HZ * MEASURE_NS / 1_000_000_000;
    // SAFETY: the PIT's own ports; channel 2 drives nothing but the speaker, whose gate stays off.
    unsafe {
        let mut gate = Port::<u8>::new(0x61);
        let value = gate.read() & !0b10 | 0b01;
        gate.write(value);
        Port::<u8>::new(0x43).write(0b1011_0000u8);
        Port::<u8>::new(0x42).write(target as u8);
        Port::<u8>::new(0x42).write((target >> 8) as u8);
        let (start, apic_start) = (tsc(), apic::count_elapsed());
        let mut spins = 0u32;
        while gate.read() & 1 << 5 == 0 && spins < 10_000_000 {
            spins += 1;
        }
        (tsc() - start, PIT_HZ, u64::from(apic::count_elapsed() - apic_start), target)
    }
}
