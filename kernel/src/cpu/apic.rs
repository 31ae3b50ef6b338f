//! The core's local APIC: acknowledging interrupts, sending them to other cores, and the one-shot timer.
//!
//! Intel SDM vol. 3, 11.4 (xAPIC registers), 11.5.4 (timer), 11.6 (interprocessor interrupts), 11.12 (x2APIC); AMD APM vol. 2, 16.

use super::local::this_core;
use super::{clock, features, interrupts, pic};
use crate::memory::map_mmio;
use core::arch::asm;
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
    InterruptCommand = 0x30,
    InterruptCommandHigh = 0x31,
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
const DELIVER_INIT: u32 = 5 << 8;
const DELIVER_START_UP: u32 = 6 << 8;
const SEND_PENDING: u32 = 1 << 12;
const ASSERT: u32 = 1 << 14;
const DELIVER_EXTINT: u32 = 7 << 8;
const MODE_TSC_DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const MODE_MMIO: u8 = 0;
const MODE_X2APIC: u8 = 1;

static MODE: AtomicU8 = AtomicU8::new(MODE_MMIO);
static REGISTERS: AtomicPtr<u32> = AtomicPtr::new(ptr::null_mut());
/// Of the core that booted.
static BOOT_ID: AtomicU32 = AtomicU32::new(0);
/// Timer ticks in 2^20 ns; zero while the timer is TSC-deadline.
static TICKS_PER_MIB_NS: AtomicU64 = AtomicU64::new(0);

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

/// Enables the APIC of the core that booted, in x2APIC mode where there is one, and silences the legacy PICs.
pub fn init() {
    enable();
    pic::silence();
    set_up();
    BOOT_ID.store(own_id(), Ordering::Relaxed);
}

/// Enables the APIC of another core, in the same mode, with the timer set up.
pub fn init_secondary() {
    enable();
    set_up();
    timer_set_up();
}

fn enable() {
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
}

fn own_id() -> u32 {
    let id = read(Register::Id);
    if is_x2apic() { id } else { id >> 24 }
}

fn set_up() {
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

/// The APIC ID of the core that booted, which takes devices' interrupts.
pub fn boot_id() -> u32 {
    BOOT_ID.load(Ordering::Relaxed)
}

/// Whether an APIC with this ID can be sent to.
pub fn is_reachable(id: u32) -> bool {
    is_x2apic() || id < 0xFF
}

/// Makes the core with APIC ID `target` look at what others have left for it.
pub fn send_wake(target: u32) {
    send(target, u32::from(interrupts::WAKE));
}

/// Resets the core with APIC ID `target`; it then waits for a start-up interrupt.
pub fn send_init(target: u32) {
    send(target, DELIVER_INIT | ASSERT);
}

/// Starts a core that waits for it in real mode at physical address `page` * 4 KiB.
pub fn send_start_up(target: u32, page: u8) {
    send(target, DELIVER_START_UP | ASSERT | u32::from(page));
}

fn send(target: u32, command: u32) {
    // What was written before is to be seen by who is interrupted; a write of an x2APIC register alone does not see to that (11.12.3).
    core::sync::atomic::fence(Ordering::SeqCst);
    if is_x2apic() {
        // SAFETY: the interrupt command register, in x2APIC mode; the targets are cores that L1 has started or starts.
        unsafe {
            asm!("lfence", options(nostack, preserves_flags));
            Msr::new(X2APIC_FIRST + Register::InterruptCommand as u32)
                .write(u64::from(target) << 32 | u64::from(command));
        }
    } else {
        while read(Register::InterruptCommand) & SEND_PENDING != 0 {
            core::hint::spin_loop();
        }
        write(Register::InterruptCommandHigh, target << 24);
        write(Register::InterruptCommand, command);
    }
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
    if !features::has_tsc_deadline() {
        // Zero would mean TSC-deadline mode; a timer that did not count is taken for the slowest.
        TICKS_PER_MIB_NS.store(((ticks << 20) / ns.max(1)).max(1), Ordering::Relaxed);
    }
    timer_set_up();
}

fn timer_set_up() {
    write(Register::TimerDivide, DIVIDE_BY_1);
    write(Register::TimerInitial, 0);
    let mode = if features::has_tsc_deadline() { MODE_TSC_DEADLINE } else { 0 };
    write(Register::LvtTimer, mode | u32::from(interrupts::TIMER));
}

/// Called when the timer has fired, which may be before its deadline: the next [`timer_arm`] arms it again.
pub fn timer_fired() {
    this_core().timer_armed.store(0, Ordering::Relaxed);
}

/// Makes the timer fire at `deadline` (ns since boot), or not at all. Early firings are possible: look at the clock.
pub fn timer_arm(deadline: Option<u64>) {
    // Zero means off.
    let target = deadline.map_or(0, |deadline| deadline.max(1));
    let now = clock::now_ns();
    let timer = &this_core().timer_armed;
    let armed = timer.load(Ordering::Relaxed);
    if armed == target && (armed == 0 || armed > now) {
        return;
    }
    timer.store(target, Ordering::Relaxed);
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
