//! The local APIC's timer.
//!
//! Intel SDM vol. 3, 11.5.4 (APIC timer, TSC-deadline mode). The counter runs at 1 GHz, which CPUID leaf 0x40000010 tells the guest.

use crate::address::GuestTsc;

/// How the timer runs, from bits 17-18 of its LVT entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    pub(super) const fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// Shortest period honoured in nanoseconds: a guest that asks for less would have the node do nothing but interrupt it.
const SHORTEST_PERIOD_NS: u64 = 200_000;

/// The timer: its registers but the LVT entry, and when it next fires.
#[derive(Clone, Debug)]
pub(super) struct Timer {
    tsc_khz: u32,
    initial_count: u32,
    divide_configuration: u32,
    deadline: Option<u64>,
}

impl Timer {
    pub(super) const fn new(tsc_khz: u32) -> Self {
        Self { tsc_khz, initial_count: 0, divide_configuration: 0, deadline: None }
    }

    /// When the timer fires, if it runs.
    pub(super) fn deadline(&self) -> Option<GuestTsc> {
        self.deadline.map(GuestTsc)
    }

    /// Stops the timer.
    pub(super) fn stop(&mut self) {
        self.deadline = None;
        self.initial_count = 0;
    }

    /// True once for each time that the timer fired up to `now`; missed periods count as one.
    pub(super) fn expire(&mut self, mode: Mode, now: GuestTsc) -> bool {
        let Some(deadline) = self.deadline.filter(|&at| at <= now.0) else { return false };
        self.deadline = match mode {
            Mode::Periodic => {
                let period = self.period();
                let missed = (now.0 - deadline) / period;
                Some(deadline.saturating_add(period.saturating_mul(missed.saturating_add(1))))
            }
            _ => None,
        };
        true
    }

    pub(super) const fn initial_count(&self) -> u32 {
        self.initial_count
    }

    /// Writes the initial count, which starts the timer; 0 stops it.
    pub(super) fn set_initial_count(&mut self, count: u32, mode: Mode, now: GuestTsc) {
        self.initial_count = count;
        self.deadline = match mode {
            Mode::OneShot if count != 0 => Some(now.0.saturating_add(self.ticks(count))),
            Mode::Periodic if count != 0 => Some(now.0.saturating_add(self.period())),
            _ => None,
        };
    }

    /// What is left of the count.
    pub(super) fn current_count(&self, mode: Mode, now: GuestTsc) -> u32 {
        let (Some(deadline), Mode::OneShot | Mode::Periodic) = (self.deadline, mode) else { return 0 };
        let nanoseconds =
            u128::from(deadline.saturating_sub(now.0)) * 1_000_000 / u128::from(self.tsc_khz.max(1));
        let count = nanoseconds.div_ceil(u128::from(self.divisor()));
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial_count)
    }

    pub(super) const fn divide_configuration(&self) -> u32 {
        self.divide_configuration
    }

    /// Writes the divide configuration; a running count goes on from where it is at the new rate.
    pub(super) fn set_divide_configuration(&mut self, value: u32, mode: Mode, now: GuestTsc) {
        let count = self.current_count(mode, now);
        self.divide_configuration = value & 0xB;
        if self.deadline.is_some() && matches!(mode, Mode::OneShot | Mode::Periodic) {
            self.deadline = Some(now.0.saturating_add(self.ticks(count)));
        }
    }

    /// Reads IA32_TSC_DEADLINE.
    pub(super) fn tsc_deadline(&self, mode: Mode) -> u64 {
        match mode {
            Mode::TscDeadline => self.deadline.unwrap_or(0),
            _ => 0,
        }
    }

    /// Writes IA32_TSC_DEADLINE; 0 stops the timer, and outside its mode a write has no effect.
    pub(super) fn set_tsc_deadline(&mut self, value: u64, mode: Mode) {
        if mode == Mode::TscDeadline {
            self.deadline = (value != 0).then_some(value);
        }
    }

    /// The guest moved its time-stamp counter: a count in progress is not to be disturbed by that, a TSC deadline is.
    pub(super) fn shift(&mut self, delta: i64, mode: Mode) {
        if mode != Mode::TscDeadline {
            self.deadline = self.deadline.map(|at| at.wrapping_add_signed(delta));
        }
    }

    fn divisor(&self) -> u32 {
        let encoded = self.divide_configuration & 3 | self.divide_configuration >> 1 & 4;
        1 << (encoded.wrapping_add(1) & 7)
    }

    /// `count` at the current rate, in ticks of the guest's TSC; at least 1.
    fn ticks(&self, count: u32) -> u64 {
        let nanoseconds = u128::from(count) * u128::from(self.divisor());
        let ticks = nanoseconds * u128::from(self.tsc_khz) / 1_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX).max(1)
    }

    fn period(&self) -> u64 {
        let shortest = SHORTEST_PERIOD_NS * u64::from(self.tsc_khz) / 1_000_000;
        self.ticks(self.initial_count).max(shortest).max(1)
    }
}
