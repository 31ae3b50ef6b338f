//! The core's local APIC: acknowledging interrupts and the one-shot timer.
//!
//! Intel SDM vol. 3, 11.4 (xAPIC registers), 11.5.4 (timer), 11.12 (x2APIC); AMD APM vol. 2, 16.

use super::{clock, features, interrupts, pic};
use crate::memory::map_mmio;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use x86_64::registers::model_specific::Msr;

const APIC_BASE: u32 = 0x1B;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const TSC_DEADLINE: u32 = 0x6E0;
const X2APIC_FIRST: u32 = 0x800;

/// Register numbers: xAPIC offset divided by 16, x2APIC MSR minus 0x800.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Register {
    Id = 0x02,
    TaskPriority = 0x08,
    EndOfInterrupt = 0x0B,
    Spurious = 0x0F,
    LvtTimer = 0x32,
    LvtLint0 = 0x35,
    LvtLint1 = 0x36,
    TimerInitial = 0x38,
    TimerCurrent = 0x39,
    TimerDivide = 0x3E,
}

const SOFTWARE_ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;
const MODE_TSC_DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const MODE_MMIO: u8 = 0;
const MODE_X2APIC: u8 = 1;

static MODE: AtomicU8 = AtomicU8::new(MODE_MMIO);
static REGISTERS: AtomicPtr<u32> = AtomicPtr::new(ptr::null_mut());
static ID: AtomicU32 = AtomicU32::new(0);
/// Timer ticks in 2^20 ns; zero while the timer is TSC-deadline.
static TICKS_PER_MIB_NS: AtomicU64 = AtomicU64::new(0);
/// The deadline now in the hardware, ns; zero when the timer is off.
static ARMED: AtomicU64 = AtomicU64::new(0);

fn read(register: Register) -> u32 {
    if MODE.load(Ordering::Relaxed) == MODE_X2APIC {
        // SAFETY: an x2APIC register of this core, and the mode is on.
        unsafe { Msr::new(X2APIC_FIRST + register as u32).read() as u32 }
    } else {
        let address = REGISTERS.load(Ordering::Relaxed).wrapping_add(register as usize * 4);
        // SAFETY: `init` mapped the register page.
        unsafe { ptr::read_volatile(address) }
    }
}

fn write(register: Register, value: u32) {
    if MODE.load(Ordering::Relaxed) == MODE_X2APIC {
        // SAFETY: an x2APIC register of this core, and the mode is on.
        unsafe { Msr::new(X2APIC_FIRST + register as u32).write(u64::from(value)) };
    } else {
        let address = REGISTERS.load(Ordering::Relaxed).wrapping_add(register as usize * 4);
        // SAFETY: `init` mapped the register page.
        unsafe { ptr::write_volatile(address, value) };
    }
}

/// Enables the APIC, in x2APIC mode where there is one, and silences the legacy PICs.
pub fn init() {
    let mut base = Msr::new(APIC_BASE);
    // SAFETY: every 64-bit processor has this MSR; enabling its own APIC affects nothing else.
    unsafe {
        let value = base.read() | APIC_BASE_ENABLE;
        if features::has_x2apic() {
            base.write(value | APIC_BASE_X2APIC);
            MODE.store(MODE_X2APIC, Ordering::Relaxed);
        } else {
            base.write(value);
            REGISTERS.store(map_mmio(value & 0xF_FFFF_F000, 4096).cast(), Ordering::Relaxed);
        }
    }
    pic::silence();
    let id = read(Register::Id);
    ID.store(if is_x2apic() { id } else { id >> 24 }, Ordering::Relaxed);
    write(Register::TaskPriority, 0);
    write(Register::LvtLint0, MASKED);
    write(Register::LvtLint1, DELIVER_NMI);
    write(Register::LvtTimer, MASKED);
    write(Register::Spurious, SOFTWARE_ENABLE | u32::from(interrupts::SPURIOUS));
}

/// Whether the APIC runs in x2APIC mode.
pub fn is_x2apic() -> bool {
    MODE.load(Ordering::Relaxed) == MODE_X2APIC
}

/// Lets the 8259s interrupt this core; they give the vector.
pub fn accept_legacy_interrupts() {
    write(Register::LvtLint0, DELIVER_EXTINT);
}

/// This core's APIC ID.
pub fn id() -> u32 {
    ID.load(Ordering::Relaxed)
}

/// Acknowledges the interrupt in service.
pub fn end_of_interrupt() {
    write(Register::EndOfInterrupt, 0);
}

/// Starts the counter for calibration; reads by [`count_elapsed`].
pub fn count_start() {
    write(Register::LvtTimer, MASKED);
    write(Register::TimerDivide, DIVIDE_BY_1);
    write(Register::TimerInitial, u32::MAX);
}

/// Ticks since [`count_start`].
pub fn count_elapsed() -> u32 {
    u32::MAX - read(Register::TimerCurrent)
}

/// Sets the timer up, once its rate is known: `ticks` in `ns`.
pub fn timer_init(ticks: u64, ns: u64) {
    write(Register::TimerInitial, 0);
    if features::has_tsc_deadline() {
        write(Register::LvtTimer, MODE_TSC_DEADLINE | u32::from(interrupts::TIMER));
    } else {
        // Zero would mean TSC-deadline mode; a timer that did not count is taken for the slowest.
        TICKS_PER_MIB_NS.store(((ticks << 20) / ns.max(1)).max(1), Ordering::Relaxed);
        write(Register::LvtTimer, u32::from(interrupts::TIMER));
    }
}

/// Called when the timer has fired, which may be before its deadline: the next [`timer_arm`] arms it again.
pub fn timer_fired() {
    ARMED.store(0, Ordering::Relaxed);
}

/// Makes the timer fire at `deadline` (ns since boot), or not at all. Early firings are possible: look at the clock.
pub fn timer_arm(deadline: Option<u64>) {
    // Zero means off.
    let target = deadline.map_or(0, |deadline| deadline.max(1));
    let now = clock::now_ns();
    let armed = ARMED.load(Ordering::Relaxed);
    if armed == target && (armed == 0 || armed > now) {
        return;
    }
    ARMED.store(target, Ordering::Relaxed);
    let ticks_per_mib = TICKS_PER_MIB_NS.load(Ordering::Relaxed);
    if ticks_per_mib == 0 {
        let tsc = if target == 0 { 0 } else { clock::tsc_at(target.max(now)) };
        // SAFETY: the timer is in TSC-deadline mode, see `timer_init`.
        unsafe { Msr::new(TSC_DEADLINE).write(tsc) };
    } else if target == 0 {
        write(Register::TimerInitial, 0);
    } else {
        let ticks = (u128::from(target.saturating_sub(now)) * u128::from(ticks_per_mib)) >> 20;
        write(Register::TimerInitial, ticks.clamp(1, u128::from(u32::MAX)) as u32);
    }
}
