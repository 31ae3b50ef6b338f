//! Time: the TSC, calibrated once at boot.
//!
//! In order of trust: the rate the hypervisor states (kvm-clock, then CPUID leaf 0x4000_0010), the processor's own
//! leaf 0x15 with a crystal frequency, and otherwise a measurement against the ACPI PM timer (ACPI 6.5, 4.8.2.1) or
//! the PIT.
//!
//! Leaf 0x15 tells of the processor that the VM was given the name of, which need not be the one it runs on: it is
//! believed only when a measurement of a millisecond agrees.

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
/// How long to measure for a rate to rely on: a tick of the PM timer is 0.003 % of it.
const MEASURE_NS: u64 = 10_000_000;
/// How long to measure to check a stated rate.
const CHECK_NS: u64 = 1_000_000;
/// The part of a stated rate by which a measurement of it may differ: 1/32 is 3 %, as in a VM that was not running for
/// a moment.
const TOLERANCE: u64 = 32;
/// TSC ticks for each nanosecond to measure, before a timer is taken for one that stands still: no TSC runs at 100 GHz.
const MOST_TICKS_PER_NS: u64 = 100;
/// The rate where nothing tells or measures it, in kHz.
const ASSUMED_KHZ: u64 = 1_000_000;

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
    /// No timer runs and nothing states a rate.
    Assumed,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KvmClock => "kvm-clock",
            Self::HypervisorLeaf => "the hypervisor's CPUID leaf",
            Self::CrystalLeaf => "CPUID leaf 0x15",
            Self::PmTimer => "the ACPI PM timer",
            Self::Pit => "the PIT",
            Self::Assumed => "assumption, since no timer runs",
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

/// Finds the rates of the TSC and of the APIC timer. `entry_tsc` becomes time zero; `pm_timer` is the I/O port of the
/// PM timer.
pub fn init(entry_tsc: u64, pm_timer: Option<u16>) -> Source {
    BASE.store(entry_tsc, Ordering::Relaxed);
    let (khz, source) = match kvm_clock().or_else(hypervisor_leaf) {
        Some(stated) if features::has_tsc_deadline() => {
            apic::timer_init(0, 1);
            stated
        }
        Some(stated) => {
            init_apic_timer(measure(pm_timer, MEASURE_NS).as_ref());
            stated
        }
        None => checked_or_measured(pm_timer),
    };
    KHZ.store(khz, Ordering::Relaxed);
    NS_PER_TICK.store(((1_000_000u128 << 32) / u128::from(khz.max(1))) as u64, Ordering::Relaxed);
    if let Some((stated, _)) = crystal_leaf()
        && matches!(source, Source::PmTimer | Source::Pit)
    {
        log::warn!(
            "CPUID leaf 0x15 says that the TSC runs at {} MHz, but {source} measures {} MHz, which is used",
            (stated + 500) / 1000,
            (khz + 500) / 1000
        );
    }
    source
}

/// The rate that leaf 0x15 states when a measurement agrees, else the measured one.
fn checked_or_measured(pm_timer: Option<u16>) -> (u64, Source) {
    let stated = crystal_leaf();
    if let Some((khz, _)) = stated
        && features::has_tsc_deadline()
        && measure(pm_timer, CHECK_NS).is_none_or(|measured| agree(khz, measured.khz))
    {
        apic::timer_init(0, 1);
        return (khz, Source::CrystalLeaf);
    }
    let measured = measure(pm_timer, MEASURE_NS);
    init_apic_timer(measured.as_ref());
    match (stated, measured) {
        (Some(stated), Some(measured)) if agree(stated.0, measured.khz) => stated,
        (_, Some(measured)) => (measured.khz, measured.source),
        (Some(stated), None) => stated,
        (None, None) => (ASSUMED_KHZ, Source::Assumed),
    }
}

fn agree(stated: u64, measured: u64) -> bool {
    stated.abs_diff(measured) <= stated / TOLERANCE
}

fn init_apic_timer(measured: Option<&Measurement>) {
    match measured {
        Some(measured) => apic::timer_init(measured.apic_ticks, measured.ns),
        // As fast as the TSC is assumed to be: early firings do no harm.
        None => apic::timer_init(ASSUMED_KHZ, 1_000_000),
    }
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

/// What was counted while a timer of known rate ran.
struct Measurement {
    /// Rate of the TSC.
    khz: u64,
    /// Ticks of the APIC timer in `ns`.
    apic_ticks: u64,
    /// How long it took.
    ns: u64,
    source: Source,
}

impl Measurement {
    /// From differences: of the TSC, of the APIC timer, and of a timer that runs at `hz`.
    fn new(ticks: u64, apic_ticks: u32, elapsed: u64, hz: u64, source: Source) -> Option<Self> {
        let khz = u128::from(ticks) * u128::from(hz) / u128::from(elapsed).checked_mul(1000)?.max(1);
        let ns = u128::from(elapsed) * 1_000_000_000 / u128::from(hz);
        let khz = u64::try_from(khz).ok().filter(|khz| *khz != 0)?;
        Some(Self { khz, apic_ticks: u64::from(apic_ticks), ns: u64::try_from(ns).ok()?, source })
    }
}

/// The rates of the TSC and of the APIC timer by `ns` of the PM timer, or of the PIT where there is none or it stands
/// still.
fn measure(pm_timer: Option<u16>, ns: u64) -> Option<Measurement> {
    pm_timer.and_then(|port| measure_pm(port, ns)).or_else(|| measure_pit(ns))
}

/// One reading of a counter with the TSC around it; the narrowest of a few counts, since any one may have been
/// interrupted by L0.
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

fn measure_pm(port: u16, ns: u64) -> Option<Measurement> {
    // SAFETY: the FADT names this port; reading it has no effect. The upper byte may be absent, so 24 bits are used.
    let read = || u64::from(unsafe { Port::<u32>::new(port).read() });
    measure_by(read, 0xFF_FFFF, PM_TIMER_HZ, Source::PmTimer, ns)
}

fn measure_pit(ns: u64) -> Option<Measurement> {
    // Intel 8254, "Mode 0" and "Counter Latch Command": channel 0 counts down from its highest value, and its
    // interrupt is masked.
    let (mut command, mut data) = (Port::<u8>::new(0x43), Port::<u8>::new(0x40));
    // SAFETY: the PIT's own ports; nothing else uses it.
    unsafe {
        command.write(0b0011_0000u8);
        data.write(0xFFu8);
        data.write(0xFFu8);
    }
    let read = || {
        // SAFETY: as above.
        let count = unsafe {
            command.write(0u8);
            u16::from_le_bytes([data.read(), data.read()])
        };
        u64::from(!count)
    };
    measure_by(read, 0xFFFF, PIT_HZ, Source::Pit, ns)
}

/// Counts while a timer that wraps after `mask` and runs at `hz` passes `ns`; `None` where it stands still.
fn measure_by(
    mut read: impl FnMut() -> u64,
    mask: u64,
    hz: u64,
    source: Source,
    ns: u64,
) -> Option<Measurement> {
    apic::count_start();
    let (tsc_start, start) = bracket(&mut read);
    let passed = |now: u64| now.wrapping_sub(start) & mask;
    while passed(read()) < hz * ns / 1_000_000_000 {
        if tsc().wrapping_sub(tsc_start) > ns.saturating_mul(MOST_TICKS_PER_NS) {
            return None;
        }
    }
    let (tsc_end, end) = bracket(&mut read);
    Measurement::new(tsc_end - tsc_start, apic::count_elapsed(), passed(end), hz, source)
}
