//! Non-maskable interrupts, of which processors without virtual NMI do not keep track.
//!
//! AMD APM vol. 2, 8.1.2 and 8.2.3 (NMIs are blocked from the delivery of one to the next IRET), 15.20 (injection), 13.1.4 (single
//! stepping). The IRET that ends the handler is intercepted. If another NMI waits by then, it has to come after that instruction, not
//! before it, and on a stack that it has left: IRET is stepped over by the trap flag, and the trap is not the guest's to see.

use super::vmcb::{self, Vmcb, exit_code, intercept1};

const VECTOR: u64 = 2;
const RFLAGS_TF: u64 = 1 << 8;
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR6: breakpoints 0-3, access to a debug register, task switch.
const DR6_OTHER_CAUSES: u64 = 0xA00F;
const DEBUG_EXCEPTION: u32 = exit_code::EXCP_BASE + 1;

/// What the guest is to find in its registers again after the step over IRET.
#[derive(Clone, Copy)]
struct Step {
    /// The guest was single-stepping itself.
    own: bool,
    dr6: u64,
}

#[derive(Clone, Copy)]
enum Phase {
    /// The next NMI can be delivered.
    Open,
    /// One was delivered; IRET is intercepted.
    Blocked,
    /// IRET is about to run at `rip`, under the trap flag when another NMI waits for it.
    Returning { rip: u64, step: Option<Step> },
}

/// What became of an NMI before an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// There is none, or it waits for an exit that is sure to come.
    None,
    /// It waits for another event or a shadow to pass: the entry is to end as soon as possible.
    Soon,
}

/// One vCPU's NMIs.
#[derive(Clone, Copy)]
pub struct Nmi {
    pending: bool,
    phase: Phase,
}

impl Nmi {
    /// None pending, none blocked.
    pub const fn new() -> Self {
        Self { pending: false, phase: Phase::Open }
    }

    /// One has arrived; while it is pending, further ones are the same.
    pub const fn send(&mut self) {
        self.pending = true;
    }

    /// Delivers a pending one if the guest can take it. `rip` and `rflags` are what the guest is entered with.
    pub fn deliver(&mut self, b: &mut Vmcb, rip: u64, rflags: &mut u64) -> Delivery {
        if !self.pending {
            return Delivery::None;
        }
        match self.phase {
            Phase::Open if b.event_inject & vmcb::EVENT_VALID != 0 || b.interrupt_shadow & 1 != 0 => {
                return Delivery::Soon;
            }
            Phase::Open => {
                b.event_inject = VECTOR | vmcb::EVENT_NMI | vmcb::EVENT_VALID;
                b.intercept1 |= intercept1::IRET;
                *self = Self { pending: false, phase: Phase::Blocked };
            }
            Phase::Returning { rip: at, step: None } if at == rip => {
                let step = Step { own: *rflags & RFLAGS_TF != 0, dr6: b.dr6 };
                self.phase = Phase::Returning { rip, step: Some(step) };
                *rflags |= RFLAGS_TF;
                b.dr6 = DR6_RESET;
            }
            Phase::Blocked | Phase::Returning { .. } => {}
        }
        Delivery::None
    }

    /// Looks at an exit with `code`, after which the guest is at `rip`. True when the exit is not for the guest.
    pub fn after_exit(&mut self, b: &mut Vmcb, code: u32, rip: u64) -> bool {
        match self.phase {
            Phase::Blocked if code == exit_code::IRET => {
                b.intercept1 &= !intercept1::IRET;
                self.phase = Phase::Returning { rip, step: None };
                true
            }
            Phase::Returning { step: Some(step), .. } if code == DEBUG_EXCEPTION => {
                self.phase = Phase::Open;
                let causes = b.dr6 & DR6_OTHER_CAUSES | if step.own { DR6_SINGLE_STEP } else { 0 };
                b.dr6 = step.dr6 | causes;
                causes == 0
            }
            // IRET has returned, or raised an exception, which ends the blocking as well.
            Phase::Returning { rip: at, step } if at != rip => {
                self.phase = Phase::Open;
                if let Some(step) = step {
                    b.dr6 = step.dr6;
                }
                false
            }
            _ => false,
        }
    }
}
