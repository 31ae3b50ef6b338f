//! Interrupts on their way to a vCPU: from other vCPUs, devices and the I/O APIC, posted from any core without a lock.
//!
//! Intel SDM vol. 3, 30.6 (posted-interrupt processing): the shape is that of its descriptor, one bit a vector and one that says that there
//! is anything, and the rest that a local APIC may be told besides.

use super::Lapic;
use crate::address::Vector;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

const NMI: u32 = 1 << 16;
const INIT: u32 = 1 << 17;
const START_UP: u32 = 1 << 18;
const START_UP_PAGE: u32 = 0xFF;

/// What the vCPU has yet to take over.
#[derive(Debug, Default)]
pub struct Inbox {
    vectors: [AtomicU64; 4],
    /// Of the vectors, those that were last sent level-triggered.
    level: [AtomicU64; 4],
    signals: AtomicU32,
    /// Anything was posted since the last [`Self::take`].
    waits: AtomicBool,
}

/// What was taken from an inbox that is not the local APIC's: to be carried out in this order.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Signals {
    /// Reset the processor.
    pub init: bool,
    /// Start the processor at this page, if it waits for that.
    pub start_up: Option<Vector>,
}

impl Clone for Inbox {
    /// What waits at this time; nobody posts and nobody takes meanwhile.
    fn clone(&self) -> Self {
        let words =
            |words: &[AtomicU64; 4]| words.each_ref().map(|word| AtomicU64::new(word.load(Ordering::SeqCst)));
        Self {
            vectors: words(&self.vectors),
            level: words(&self.level),
            signals: AtomicU32::new(self.signals.load(Ordering::SeqCst)),
            waits: AtomicBool::new(self.waits.load(Ordering::SeqCst)),
        }
    }
}

impl Inbox {
    /// Whether anything waits. What was posted before this call shows; whoever posts looks at the vCPU's state afterwards, and the vCPU
    /// looks here after it has changed its state, so that one of the two sees the other.
    pub fn has_any(&self) -> bool {
        self.waits.load(Ordering::SeqCst)
    }

    /// Whether something waits that ends a halt with interrupts off, or a wait for a start-up interrupt.
    pub fn has_signal(&self) -> bool {
        self.signals.load(Ordering::SeqCst) != 0
    }

    /// Posts a vector. True when nothing waited before: otherwise the vCPU has been told already, and has yet to look.
    pub fn post(&self, vector: Vector, level: bool) -> bool {
        let (word, bit) = (usize::from(vector.0 >> 6), 1 << (vector.0 & 63));
        if let (Some(vectors), Some(levels)) = (self.vectors.get(word), self.level.get(word)) {
            if level {
                levels.fetch_or(bit, Ordering::SeqCst);
            } else {
                levels.fetch_and(!bit, Ordering::SeqCst);
            }
            vectors.fetch_or(bit, Ordering::SeqCst);
        }
        self.is_first()
    }

    /// Posts a non-maskable interrupt, otherwise as [`Self::post`].
    pub fn post_nmi(&self) -> bool {
        self.replace_signals(|signals| signals | NMI)
    }

    /// Posts an INIT; a start-up interrupt before it has no effect any more. Otherwise as [`Self::post`].
    pub fn post_init(&self) -> bool {
        self.replace_signals(|signals| signals & !(START_UP | START_UP_PAGE) | INIT)
    }

    /// Posts a start-up interrupt with this page number, otherwise as [`Self::post`].
    pub fn post_start_up(&self, page: Vector) -> bool {
        self.replace_signals(|signals| signals & !START_UP_PAGE | START_UP | u32::from(page.0))
    }

    fn is_first(&self) -> bool {
        !self.waits.swap(true, Ordering::SeqCst)
    }

    fn replace_signals(&self, new: impl Fn(u32) -> u32) -> bool {
        // The closure always gives a value, so that this cannot fail.
        let _ = self.signals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |signals| Some(new(signals)));
        self.is_first()
    }

    /// Hands what waits to the local APIC, and returns the rest.
    pub fn take(&self, lapic: &mut Lapic) -> Signals {
        if !self.waits.load(Ordering::Relaxed) || !self.waits.swap(false, Ordering::SeqCst) {
            return Signals::default();
        }
        for (word, (vectors, levels)) in (0_u8..).zip(self.vectors.iter().zip(&self.level)) {
            let mut set = match vectors.load(Ordering::Relaxed) {
                0 => continue,
                _ => vectors.swap(0, Ordering::SeqCst),
            };
            let levels = levels.load(Ordering::SeqCst);
            while set != 0 {
                let bit = set.trailing_zeros();
                set &= set - 1;
                lapic.raise(Vector(word << 6 | bit as u8), levels & 1 << bit != 0);
            }
        }
        let signals = match self.signals.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.signals.swap(0, Ordering::SeqCst),
        };
        if signals & NMI != 0 {
            lapic.raise_nmi();
        }
        let start_up = (signals & START_UP != 0).then_some(Vector((signals & START_UP_PAGE) as u8));
        Signals { init: signals & INIT != 0, start_up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{GuestTsc, MsrIndex};
    use crate::vcpu::VcpuConfig;
    use alloc::vec::Vec;
    use std::thread;

    fn lapic() -> Lapic {
        let mut lapic = Lapic::new(&VcpuConfig { id: 0, vcpu_count: 2, tsc_khz: 1_000_000 });
        lapic.msr_write(MsrIndex(0x80F), 0x1FF, GuestTsc(0)).unwrap();
        lapic
    }

    #[test]
    fn what_was_posted_is_taken_once() {
        let (inbox, mut lapic) = (Inbox::default(), lapic());
        assert_eq!((inbox.has_any(), inbox.take(&mut lapic)), (false, Signals::default()));
        for vector in [0x21, 0x7F, 0x80, 0xFF] {
            assert_eq!(inbox.post(Vector(vector), false), vector == 0x21, "only the first has to be told");
        }
        assert!(!inbox.post_nmi());
        assert!(inbox.has_any() && inbox.has_signal());
        inbox.take(&mut lapic);
        assert!(!inbox.has_any() && !inbox.has_signal());
        let taken: Vec<u8> = core::iter::from_fn(|| lapic.acknowledge()).map(|vector| vector.0).collect();
        assert_eq!(taken, [0xFF], "the others are of lower classes and wait for its end");
        assert!(lapic.take_nmi());
        let mut again = self::lapic();
        inbox.take(&mut again);
        assert_eq!(again.requested(), None);
    }

    #[test]
    fn a_vector_keeps_the_trigger_it_was_last_sent_with() {
        let (inbox, mut lapic) = (Inbox::default(), lapic());
        inbox.post(Vector(0x40), true);
        inbox.post(Vector(0x41), true);
        inbox.post(Vector(0x41), false);
        inbox.take(&mut lapic);
        let trigger_mode = lapic.msr_read(MsrIndex(0x81A), GuestTsc(0)).unwrap();
        assert_eq!(trigger_mode, 1, "vector 0x40 alone");
    }

    #[test]
    fn an_init_cancels_the_start_up_before_it_and_not_the_one_after() {
        let (inbox, mut lapic) = (Inbox::default(), lapic());
        inbox.post_start_up(Vector(0x10));
        inbox.post_init();
        assert_eq!(inbox.take(&mut lapic), Signals { init: true, start_up: None });
        inbox.post_init();
        inbox.post_start_up(Vector(0x9A));
        inbox.post_start_up(Vector(0x9B));
        assert_eq!(inbox.take(&mut lapic), Signals { init: true, start_up: Some(Vector(0x9B)) });
    }

    #[test]
    fn nothing_is_lost_between_threads_that_post_and_one_that_takes() {
        const ROUNDS: u32 = 2000;
        let inbox = Inbox::default();
        let taken = [AtomicU32::new(0), AtomicU32::new(0)];
        thread::scope(|scope| {
            for (vector, taken) in [0x30, 0x31].into_iter().zip(&taken) {
                let inbox = &inbox;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        inbox.post(Vector(vector), false);
                        // Ends only if every post is taken.
                        while taken.load(Ordering::SeqCst) == round {
                            thread::yield_now();
                        }
                    }
                });
            }
            while taken.iter().any(|taken| taken.load(Ordering::SeqCst) < ROUNDS) {
                let mut lapic = lapic();
                inbox.take(&mut lapic);
                let requested = lapic.msr_read(MsrIndex(0x821), GuestTsc(0)).unwrap() >> 16;
                for (index, taken) in
                    taken.iter().enumerate().filter(|(index, _)| requested & 1 << index != 0)
                {
                    assert!(taken.fetch_add(1, Ordering::SeqCst) < ROUNDS, "vector {index} was taken twice");
                }
                thread::yield_now();
            }
        });
        assert!(!inbox.has_any());
    }
}
