//! One vCPU: what any core may know of it, and the state that the core has which runs it.

use super::backend::{Backend, TscOffset, VendorVcpu};
use super::exit::{Exit, ExitCounters};
use super::machine::Machine;
use super::schedule::{Entity, Wants};
use crate::cpu::fpu::{self, XsaveArea};
use crate::cpu::guest_registers::{self, BreakpointAddresses};
use crate::cpu::{barriers, clock};
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use nestling_machine::vcpu::Vcpu;
use spin::Mutex;

/// A timer this many ticks ahead (years, at any rate) never fires.
const NEVER_TICKS: u64 = 1 << 60;
/// See [`VcpuCell::wake_ns`].
const NO_WAKE: u64 = u64::MAX;

/// Where a vCPU stands with its core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Place {
    /// It waits for its turn.
    Ready,
    /// It has its turn: the core looks into its inbox before each entry.
    Current,
    /// It has nothing to do until something is in its inbox or its timer is due.
    Resting,
}

/// A vCPU, as any core may see it.
pub struct VcpuCell<B: Backend> {
    /// What it does, which the core that has its turn owns for as long.
    pub own: Mutex<Own<B>>,
    /// A [`Place`].
    place: AtomicU8,
    /// The core in whose queue it is.
    core: AtomicUsize,
    /// Its registers are on that core, or parts of its state in there: no other may take it.
    is_loaded: AtomicBool,
    ran_ns: AtomicU64,
    /// When it wants to run though nothing comes, in nanoseconds since boot, while it rests.
    wake_ns: AtomicU64,
    /// Cached nested translations are to be dropped before the next entry.
    flush: AtomicBool,
    /// Its exits so far.
    pub exits: ExitCounters,
    accesses: AtomicU64,
}

/// What a vCPU waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activity {
    /// Nothing: it runs.
    Running,
    /// HLT: an interrupt.
    Halted,
    /// HLT with interrupts off: an NMI or INIT.
    HaltedForGood,
    /// INIT: a start-up interrupt.
    WaitsForStartUp,
}

/// A vCPU's own state.
pub struct Own<B: Backend> {
    pub(super) hardware: B::Vcpu,
    pub(super) vcpu: Vcpu,
    pub(super) offset: TscOffset,
    pub(super) activity: Activity,
    /// It counts among those that only another vCPU can wake.
    pub(super) is_stuck: bool,
    pub(super) last_exit: Option<Exit>,
    pub(super) exceptions_in_a_row: u32,
    xsave: XsaveArea,
    breakpoints: BreakpointAddresses,
}

/// A vCPU of a template.
pub struct FrozenVcpu<B: Backend> {
    hardware: <B::Vcpu as VendorVcpu>::Snapshot,
    vcpu: Vcpu,
    offset: TscOffset,
    activity: Activity,
    is_stuck: bool,
    xsave: XsaveArea,
    breakpoints: BreakpointAddresses,
}

impl<B: Backend> FrozenVcpu<B> {
    /// Whether it counts among those that only another vCPU can wake.
    pub const fn is_stuck(&self) -> bool {
        self.is_stuck
    }
}

impl<B: Backend> Own<B> {
    /// What it is, to be made again from. It is on no core, and is not run any more.
    pub fn freeze(mut self) -> FrozenVcpu<B> {
        FrozenVcpu {
            hardware: self.hardware.freeze(),
            vcpu: self.vcpu,
            offset: self.offset,
            activity: self.activity,
            is_stuck: self.is_stuck,
            xsave: self.xsave,
            breakpoints: self.breakpoints,
        }
    }
}

impl<B: Backend> VcpuCell<B> {
    /// A vCPU with this state. `components` are the XSAVE components of the node.
    pub fn new(
        mut hardware: B::Vcpu,
        vcpu: Vcpu,
        offset: TscOffset,
        activity: Activity,
        components: u64,
    ) -> Self {
        hardware.set_tsc_offset(offset.0);
        Self::with(Own {
            hardware,
            vcpu,
            offset,
            activity,
            is_stuck: activity != Activity::Running,
            last_exit: None,
            exceptions_in_a_row: 0,
            xsave: XsaveArea::new(components),
            breakpoints: BreakpointAddresses::default(),
        })
    }

    /// A vCPU that goes on where `frozen` stopped, its time-stamp counter included, which the guest finds as it was at `frozen_at` of the host's.
    pub fn thaw(backend: &B, nested_root: u64, frozen: &FrozenVcpu<B>, frozen_at: u64) -> Self {
        let mut hardware = backend.thaw(nested_root, &frozen.hardware);
        let offset = TscOffset(frozen.offset.0.wrapping_add(frozen_at).wrapping_sub(clock::tsc()));
        hardware.set_tsc_offset(offset.0);
        Self::with(Own {
            hardware,
            vcpu: frozen.vcpu.clone(),
            offset,
            activity: frozen.activity,
            is_stuck: frozen.is_stuck,
            last_exit: None,
            exceptions_in_a_row: 0,
            xsave: frozen.xsave.clone(),
            breakpoints: frozen.breakpoints,
        })
    }

    fn with(own: Own<B>) -> Self {
        Self {
            own: Mutex::new(own),
            place: AtomicU8::new(Place::Ready as u8),
            core: AtomicUsize::new(0),
            is_loaded: AtomicBool::new(false),
            ran_ns: AtomicU64::new(0),
            wake_ns: AtomicU64::new(NO_WAKE),
            flush: AtomicBool::new(false),
            exits: ExitCounters::default(),
            accesses: AtomicU64::new(0),
        }
    }

    /// Its state, where no core has it.
    pub fn into_own(self) -> Own<B> {
        self.own.into_inner()
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        match self.place.load(Ordering::SeqCst) {
            0 => Place::Ready,
            1 => Place::Current,
            _ => Place::Resting,
        }
    }

    /// Its turn begins.
    pub fn begin_turn(&self, ran_ns: u64) {
        self.ran_ns.store(ran_ns, Ordering::Relaxed);
        // Before its inbox is looked at: see `Inbox::has_any`.
        self.place.store(Place::Current as u8, Ordering::SeqCst);
    }

    /// Its turn is over after `ran_ns` nanoseconds, counting at least as `at_least_ns` in all.
    pub fn end_turn(&self, own: &Own<B>, ran_ns: u64, at_least_ns: u64) {
        let sum = self.ran_ns.load(Ordering::Relaxed).saturating_add(ran_ns).max(at_least_ns);
        self.ran_ns.store(sum, Ordering::Relaxed);
        self.accesses.store(own.hardware.accesses(), Ordering::Relaxed);
        let place = match own.activity {
            Activity::Running => Place::Ready,
            _ => Place::Resting,
        };
        self.wake_ns.store(own.deadline_ns().unwrap_or(NO_WAKE), Ordering::Relaxed);
        self.place.store(place as u8, Ordering::SeqCst);
    }

    /// The core in whose queue it is.
    pub fn core(&self) -> usize {
        self.core.load(Ordering::SeqCst)
    }

    /// It goes to another core's queue, where everybody has run at least `floor_ns`.
    pub fn move_to(&self, core: usize, floor_ns: u64) {
        self.ran_ns.fetch_max(floor_ns, Ordering::Relaxed);
        self.core.store(core, Ordering::SeqCst);
    }

    /// Whether another core may take it: it waits for its turn and nothing of it is on its core.
    pub fn may_move(&self) -> bool {
        self.place() == Place::Ready && !self.is_loaded.load(Ordering::SeqCst)
    }

    /// See [`super::schedule`]. `has_mail` is whether anything waits for it.
    pub fn entity(&self, has_mail: bool, now_ns: u64) -> Entity {
        let wake = self.wake_ns.load(Ordering::Relaxed);
        let wants = match self.place() {
            Place::Ready | Place::Current => Wants::Run,
            Place::Resting if has_mail || wake <= now_ns => Wants::Wake,
            Place::Resting => Wants::Rest { until: (wake != NO_WAKE).then_some(wake) },
        };
        Entity { ran_ns: self.ran_ns.load(Ordering::Relaxed), wants }
    }

    /// Asks for its cached nested translations to be dropped before it is entered again.
    pub fn want_flush(&self) {
        self.flush.store(true, Ordering::SeqCst);
    }

    /// Whether it has yet to drop them.
    pub fn wants_flush(&self) -> bool {
        self.flush.load(Ordering::SeqCst)
    }

    /// Whether it has to drop them now.
    pub fn take_flush(&self) -> bool {
        self.flush.load(Ordering::Relaxed) && self.flush.swap(false, Ordering::SeqCst)
    }

    /// Instructions that read or wrote its control block up to the end of its last turn.
    pub fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }
}

impl<B: Backend> Own<B> {
    /// When its timer next needs the core, in nanoseconds since boot.
    pub fn deadline_ns(&self) -> Option<u64> {
        let deadline = self.vcpu.lapic.next_deadline()?;
        // A guest may ask for a time that lies centuries ahead and, on the host's counter, beyond its end.
        let left = deadline.0.saturating_sub(self.offset.guest(clock::tsc()).0);
        (left < NEVER_TICKS).then(|| clock::ns_at_tsc(self.offset.host(deadline)))
    }
}

/// A vCPU of a machine, which lives for as long as this.
pub struct VcpuRef<B: Backend> {
    /// The machine.
    pub machine: Arc<Machine<B>>,
    /// Which of its vCPUs.
    pub index: usize,
}

impl<B: Backend> Clone for VcpuRef<B> {
    fn clone(&self) -> Self {
        Self { machine: Arc::clone(&self.machine), index: self.index }
    }
}

impl<B: Backend> VcpuRef<B> {
    /// The vCPU.
    pub fn cell(&self) -> &VcpuCell<B> {
        &self.machine.vcpus[self.index]
    }

    /// Whether it is the same.
    pub fn is(&self, other: &Self) -> bool {
        self.index == other.index && Arc::ptr_eq(&self.machine, &other.machine)
    }

    /// See [`super::schedule`].
    pub fn entity(&self, now_ns: u64) -> Entity {
        let inbox = self.machine.router.inbox(self.index);
        let has_work = self.index == 0 && self.machine.has_work();
        let has_mail = has_work || inbox.is_some_and(|inbox| inbox.has_any());
        self.cell().entity(has_mail, now_ns)
    }

    /// Puts its state on this core.
    pub fn load(&self) {
        let cell = self.cell();
        cell.is_loaded.store(true, Ordering::SeqCst);
        let own = &mut *cell.own.lock();
        barriers::between_machines();
        own.xsave.restore();
        fpu::load_xcr0(own.vcpu.xcr0());
        own.breakpoints.load();
        guest_registers::load_tsc_aux(own.vcpu.tsc_aux());
        own.hardware.load();
    }

    /// A new vCPU leaves the core that made it, so that another one may load it.
    pub fn release(&self) {
        self.cell().own.lock().hardware.release();
    }

    /// Takes its state off this core; with `for_any`, so that another core may load it.
    pub fn unload(&self, for_any: bool) {
        let cell = self.cell();
        let own = &mut *cell.own.lock();
        own.hardware.unload();
        own.breakpoints.save();
        own.vcpu.observe_xcr0(fpu::xcr0());
        own.xsave.save();
        if for_any {
            own.hardware.release();
            cell.is_loaded.store(false, Ordering::SeqCst);
        }
    }
}
