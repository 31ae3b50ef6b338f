//! The preemption timer, which counts down while the guest runs and then ends the run.
//!
//! Intel SDM vol. 3, 26.5.1.

use crate::cpu::clock;
use core::ops::RangeInclusive;

/// How late it may fire for having stood still during exits, less than what an interrupt through L0 costs.
const TOLERANCE_NS: u64 = 20_000;

/// The timer. Times are values of the TSC.
pub(super) struct Timer {
    /// It counts once every 2 to the power of this many TSC ticks.
    shift: u32,
    /// An exit saves it and an entry goes on with it; otherwise every entry starts it anew from the field.
    is_saved: bool,
    tolerance: u64,
    /// What was last written to the field, in TSC ticks.
    ticks: u64,
    /// When it will have counted down, if nothing stops it.
    fires: u64,
    /// When it last stopped, at an exit.
    stopped: u64,
    /// It has counted down; also before the first entry. A stopped timer of value 0 ends the next run at once.
    expired: bool,
}

impl Timer {
    /// A timer that was never set; its field holds 0.
    pub(super) fn new(shift: u32, is_saved: bool) -> Self {
        let tolerance = clock::tsc_at(TOLERANCE_NS).saturating_sub(clock::tsc_at(0));
        Self { shift, is_saved, tolerance, ticks: 0, fires: 0, stopped: 0, expired: true }
    }

    /// Notes an exit.
    pub(super) fn stop(&mut self) {
        self.stopped = clock::tsc();
    }

    /// Notes that the exit was the timer's.
    pub(super) fn expire(&mut self) {
        self.expired = true;
    }

    /// What to write to the field so that it fires within `due`, in nanoseconds since boot; `None` if what it holds will do.
    pub(super) fn arm(&mut self, due: Option<RangeInclusive<u64>>) -> Option<u64> {
        let now = clock::tsc();
        // What lies beyond the field's range is looked at again when half of the range has passed.
        let far = now.saturating_add(1 << 31 << self.shift);
        let (due_from, due_to) = match due {
            Some(due) => (clock::tsc_at(*due.start()).min(far), clock::tsc_at(*due.end())),
            None => (far, u64::MAX),
        };
        if !self.is_saved {
            self.fires = now.saturating_add(self.ticks);
        } else if !self.expired {
            // It stood still since the exit.
            self.fires = self.fires.saturating_add(now.saturating_sub(self.stopped));
        }
        // A little later will do: not every exit is worth a write.
        let tolerance = (due_to.saturating_sub(due_from) / 8).max(self.tolerance);
        if !self.expired && (due_from..=due_to.saturating_add(tolerance)).contains(&self.fires) {
            return None;
        }
        let count = (due_to.saturating_sub(now) >> self.shift).min(u64::from(u32::MAX));
        self.expired = false;
        self.ticks = count << self.shift;
        self.fires = now.saturating_add(self.ticks);
        Some(count)
    }
}
