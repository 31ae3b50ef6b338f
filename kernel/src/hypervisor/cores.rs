//! One core and the vCPUs that take turns on it.
//!
//! A core runs to completion: it chooses a vCPU, runs it until there is a reason not to, and chooses again; with nothing to run it halts. What
//! others have for it they leave where it looks, and kick it: the interrupt is sent only when the core is in a guest or halted.

use super::backend::Backend;
use super::node::Node;
use super::run::{Limits, Pause, Run, ServiceLimits};
use super::schedule::{self, Wants};
use super::vcpu::{Place, VcpuRef};
use crate::cpu::local::this_core;
use crate::cpu::{self, apic, clock, interrupts};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use spin::Mutex;

/// L1's code runs, which looks at [`Core::kicked`] before it halts or enters a guest.
const BUSY: u8 = 0;
/// In a guest, or about to enter.
const IN_GUEST: u8 = 1;
/// Halted, or about to halt.
const IDLE: u8 = 2;

/// How long machines run at least after a long round of the service before devices and guests alone bring on the next.
const LEAST_SLICE_NS: u64 = schedule::LEAST_NS;

/// The vCPUs of a core.
pub struct Queue<B: Backend> {
    vcpus: Vec<VcpuRef<B>>,
    /// See [`schedule::choose`].
    floor_ns: u64,
}

/// A core, as the others see it.
pub struct Core<B: Backend> {
    index: usize,
    apic_id: u32,
    queue: Mutex<Queue<B>>,
    activity: AtomicU8,
    kicked: AtomicBool,
}

impl<B: Backend> Core<B> {
    /// A core with nothing to do.
    pub fn new(index: usize, apic_id: u32) -> Self {
        Self {
            index,
            apic_id,
            queue: Mutex::new(Queue { vcpus: Vec::new(), floor_ns: 0 }),
            activity: AtomicU8::new(BUSY),
            kicked: AtomicBool::new(false),
        }
    }

    /// How many vCPUs it has.
    pub fn load(&self) -> usize {
        self.queue.lock().vcpus.len()
    }

    /// Gives it a vCPU to run.
    pub fn add(&self, vcpu: VcpuRef<B>) {
        {
            let mut queue = self.queue.lock();
            vcpu.cell().move_to(self.index, queue.floor_ns);
            queue.vcpus.push(vcpu);
        }
        self.kick();
    }

    /// Makes the core look at what was left for it. What was written before this call is seen by the core after its next
    /// [`Self::take_kick`].
    pub fn kick(&self) {
        if !self.kicked.swap(true, Ordering::SeqCst)
            && self.activity.load(Ordering::SeqCst) != BUSY
            && !self.is_this()
        {
            apic::send_wake(self.apic_id);
        }
    }

    /// Whether the calling core is this one.
    pub fn is_this(&self) -> bool {
        this_core().index == self.index
    }

    /// Whether it has nothing to do.
    pub fn is_idle(&self) -> bool {
        self.activity.load(Ordering::Relaxed) == IDLE
    }

    /// Whether a guest may be running on it.
    pub fn is_in_guest(&self) -> bool {
        self.activity.load(Ordering::SeqCst) == IN_GUEST
    }

    /// The core itself looks now: whether it was kicked since it last did.
    pub fn take_kick(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) && self.kicked.swap(false, Ordering::SeqCst)
    }

    /// The core is about to enter a guest; false when it has been kicked and must look first.
    pub fn enter_guest(&self) -> bool {
        self.begin(IN_GUEST)
    }

    /// The core has left the guest, or has not entered it after all.
    pub fn leave_guest(&self) {
        self.activity.store(BUSY, Ordering::Release);
    }

    fn begin(&self, activity: u8) -> bool {
        // Before the look: whoever kicks does it the other way round. An interrupt sent from here on ends the halt or the guest's run,
        // because this core takes none before.
        self.activity.store(activity, Ordering::SeqCst);
        if self.kicked.load(Ordering::SeqCst) {
            self.leave_guest();
            return false;
        }
        true
    }

    /// Takes a vCPU that waits here while another has its turn, and may go elsewhere.
    fn give_away(&self) -> Option<VcpuRef<B>> {
        let mut queue = self.queue.lock();
        if !queue.vcpus.iter().any(|vcpu| vcpu.cell().place() == Place::Current) {
            return None;
        }
        let position = queue.vcpus.iter().position(|vcpu| vcpu.cell().may_move())?;
        Some(queue.vcpus.swap_remove(position))
    }
}

/// A vCPU's turn.
struct Turn<B: Backend> {
    vcpu: VcpuRef<B>,
    choice: schedule::Choice,
}

/// What a core does: its own side of [`Core`].
pub struct Runner<B: Backend> {
    node: &'static Node<B>,
    core: &'static Core<B>,
    /// Whose state is on the core.
    loaded: Option<VcpuRef<B>>,
    /// When the service's round began, in nanoseconds since boot.
    round_began: u64,
}

impl<B: Backend> Runner<B> {
    /// For the core that calls this, which is the only one ever to use it.
    pub fn new(node: &'static Node<B>, index: usize) -> Self {
        Self { node, core: &node.cores[index], loaded: None, round_began: 0 }
    }

    /// Runs machines for ever.
    pub fn run_forever(&mut self) -> ! {
        loop {
            self.core.take_kick();
            match self.choose() {
                Some(turn) => drop(self.take_turn(turn, None)),
                None if self.take_over_one() => {}
                None => self.idle(None),
            }
        }
    }

    /// Runs machines until `deadline` (nanoseconds since boot), a device interrupt, or something for the service to do; idles when all of
    /// them wait. `wake_disks` tells them that something has arrived from the node's disk.
    pub fn run_until_service(&mut self, deadline: Option<u64>, wake_disks: impl Fn()) {
        // Machines get as much time as the round took: a few frames are answered at once, a flood does not keep machines from running.
        let now = clock::now_ns();
        let round = now.saturating_sub(self.round_began).min(LEAST_SLICE_NS);
        self.run_machines(ServiceLimits { deadline, earliest: now.saturating_add(round) }, wake_disks);
        self.round_began = clock::now_ns();
    }

    fn run_machines(&mut self, limits: ServiceLimits, wake_disks: impl Fn()) {
        loop {
            self.core.take_kick();
            self.node.poll_disk();
            if self.node.take_arrived() {
                wake_disks();
            }
            let Some(turn) = self.choose() else {
                if interrupts::device_pending() || self.node.is_service_wanted() {
                    return;
                }
                if self.take_over_one() {
                    continue;
                }
                return self.idle(limits.deadline.into_iter().chain(self.node.disk_deadline()).min());
            };
            if self.take_turn(turn, Some(limits)) == Pause::Service {
                return;
            }
        }
    }

    /// The vCPU whose turn it is. Those of machines that have ended leave the core.
    fn choose(&mut self) -> Option<Turn<B>> {
        if self.loaded.as_ref().is_some_and(|vcpu| vcpu.machine.is_over()) {
            self.unload();
        }
        let now = clock::now_ns();
        let mut queue = self.core.queue.lock();
        let Queue { vcpus, floor_ns } = &mut *queue;
        vcpus.retain(|vcpu| !vcpu.machine.is_over());
        let choice = schedule::choose(vcpus.iter().map(|vcpu| vcpu.entity(now)), floor_ns)?;
        let vcpu = vcpus.get(choice.index)?.clone();
        // Under the lock: from here on nobody takes it over.
        vcpu.cell().begin_turn(choice.ran_ns);
        Some(Turn { vcpu, choice })
    }

    fn take_turn(&mut self, turn: Turn<B>, service: Option<ServiceLimits>) -> Pause {
        let Turn { vcpu, choice } = turn;
        if choice.next_ran_ns.is_some() {
            self.node.offer_work();
        }
        self.switch_to(&vcpu);
        let start = clock::now_ns();
        let shared = choice.slice_ns.map(|slice| start.saturating_add(slice));
        // The timer of one that rests is a reason to choose again, but not so often that nobody gets anywhere.
        let rested = choice.next_wake_ns.map(|wake| wake.max(start.saturating_add(schedule::LEAST_NS)));
        let preempt = shared.into_iter().chain(rested).min();
        let cell = vcpu.cell();
        let mut own = cell.own.lock();
        let limits = Limits { preempt, service, is_shared: choice.next_ran_ns.is_some() };
        let pause = Run::new(self.node, self.core, &vcpu, &mut own, limits).run();
        let at_least = match pause {
            Pause::Yielded => choice.next_ran_ns.map_or(0, |next| next.saturating_add(1)),
            _ => 0,
        };
        cell.end_turn(&own, clock::now_ns().saturating_sub(start), at_least);
        pause
    }

    /// Nothing to run here: another core may have more than it can run at once.
    fn take_over_one(&mut self) -> bool {
        let others = self.node.cores.iter().filter(|core| !core.is_this());
        match others.filter_map(Core::give_away).next() {
            Some(vcpu) => {
                self.core.add(vcpu);
                true
            }
            None => false,
        }
    }

    /// Nothing to run: frames are zeroed ahead, then the core waits.
    fn idle(&mut self, deadline: Option<u64>) {
        let now = clock::now_ns();
        let rests = |vcpu: &VcpuRef<B>| match vcpu.entity(now).wants {
            Wants::Rest { until } => until,
            // It has been woken since the choice.
            Wants::Run | Wants::Wake => Some(now),
        };
        let wakes = self.core.queue.lock().vcpus.iter().filter_map(rests).min();
        let wake = wakes.into_iter().chain(deadline).min();
        if wake.is_some_and(|wake| wake <= clock::now_ns()) {
            return;
        }
        apic::timer_arm(wake);
        if self.node.pool.clean_one() {
            cpu::take_interrupts();
        } else if self.core.begin(IDLE) {
            cpu::idle();
            self.core.leave_guest();
        }
    }

    /// Takes whatever is on the core off it.
    pub fn unload(&mut self) {
        if let Some(vcpu) = self.loaded.take() {
            // Where there is no other core the state may stay half on this one, which is cheaper.
            vcpu.unload(self.node.cores.len() > 1);
        }
    }

    /// Takes the vCPUs of machines that have ended off the core.
    pub fn leave_ended(&mut self) {
        if self.loaded.as_ref().is_some_and(|vcpu| vcpu.machine.is_over()) {
            self.unload();
        }
        self.core.queue.lock().vcpus.retain(|vcpu| !vcpu.machine.is_over());
    }

    fn switch_to(&mut self, vcpu: &VcpuRef<B>) {
        if self.loaded.as_ref().is_some_and(|loaded| loaded.is(vcpu)) {
            return;
        }
        self.unload();
        vcpu.load();
        self.loaded = Some(vcpu.clone());
    }
}
