//! A vCPU's turn on a core: deliver what is due, enter the guest, handle its exit.

use super::backend::{Backend, VendorVcpu};
use super::cores::Core;
use super::exit::Exit;
use super::machine::{End, Machine, MachineMemory};
use super::node::Node;
use super::vcpu::{Activity, Own, VcpuCell, VcpuRef};
use crate::cpu::{self, barriers, clock, interrupts};
use core::ops::RangeInclusive;
use nestling_machine::address::GuestTsc;
use nestling_machine::vcpu::Signals;

/// See [`Run::take_interrupts`].
const MANY_EXCEPTIONS: u32 = 16;

/// See [`Run::timer_slack_ns`].
const BOOT_TIMER_SLACK_NS: u64 = 20_000_000;

/// Why a vCPU's turn is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pause {
    /// It waits for an interrupt.
    Resting,
    /// The core is to choose again.
    Preempted,
    /// It waits for another vCPU in a loop, and one of the core's waits for its turn.
    Yielded,
    /// The service has something to do: a device interrupted, the deadline passed, or the guest sent something.
    Service,
    /// The machine has ended.
    Ended,
}

/// What the service, where it shares the core, allows machines.
#[derive(Clone, Copy, Debug)]
pub struct ServiceLimits {
    /// When to come back at the latest, in nanoseconds since boot.
    pub deadline: Option<u64>,
    /// Until when what devices and other cores have is no reason to come back: a flood of packets must not keep machines from running.
    pub earliest: u64,
}

/// How long a turn may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// When the core is to choose again, in nanoseconds since boot.
    pub preempt: Option<u64>,
    /// Where the service shares the core.
    pub service: Option<ServiceLimits>,
    /// Another vCPU waits for its turn.
    pub is_shared: bool,
}

/// A turn.
pub struct Run<'a, B: Backend> {
    pub(super) node: &'a Node<B>,
    core: &'a Core<B>,
    pub(super) machine: &'a Machine<B>,
    pub(super) cell: &'a VcpuCell<B>,
    pub(super) index: usize,
    pub(super) own: &'a mut Own<B>,
    limits: Limits,
    /// The guest has done something that the service has not seen yet.
    pub(super) has_news: bool,
    /// The guest waits in a loop.
    pub(super) yields: bool,
}

impl<'a, B: Backend> Run<'a, B> {
    /// A turn of `vcpu`, which is loaded on this core and whose own state is `own`.
    pub fn new(
        node: &'a Node<B>,
        core: &'a Core<B>,
        vcpu: &'a VcpuRef<B>,
        own: &'a mut Own<B>,
        limits: Limits,
    ) -> Self {
        let (machine, cell, index) = (&*vcpu.machine, vcpu.cell(), vcpu.index);
        Self { node, core, machine, cell, index, own, limits, has_news: false, yields: false }
    }

    /// Runs the vCPU until there is a reason to pause.
    pub fn run(&mut self) -> Pause {
        self.own.hardware.exit_on_pause_loops(self.limits.is_shared);
        loop {
            let kicked = self.core.take_kick();
            self.deliver_interrupts();
            if self.machine.is_over() {
                return if self.limits.service.is_some() { Pause::Service } else { Pause::Ended };
            }
            if let Some(pause) = self.pause(kicked) {
                return pause;
            }
            if self.machine.has_work() {
                self.with_devices(|_| ());
                continue;
            }
            if self.own.activity != Activity::Running {
                return Pause::Resting;
            }
            self.enter();
        }
    }

    /// Why to pause although the guest could go on.
    fn pause(&mut self, kicked: bool) -> Option<Pause> {
        let now = clock::now_ns();
        if let Some(ServiceLimits { deadline, earliest }) = self.limits.service {
            let called = interrupts::device_pending() || self.node.is_service_wanted();
            let is_due = deadline.is_some_and(|deadline| now >= deadline) || called && now >= earliest;
            if self.has_news || is_due {
                return Some(Pause::Service);
            }
            if called {
                // It may be the disk, for which machines wait that could go on.
                self.node.poll_disk();
            }
            if self.node.has_arrived() {
                return Some(Pause::Preempted);
            }
        }
        if self.yields {
            return Some(Pause::Yielded);
        }
        // Who kicked may have woken another of the core's vCPUs, or given it a new one.
        let is_over = self.limits.preempt.is_some_and(|preempt| now >= preempt);
        (is_over || kicked && self.core.load() > 1).then_some(Pause::Preempted)
    }

    /// When the physical timer has to end the guest's run for the sake of others.
    fn wake(&self) -> Option<u64> {
        let service = self.limits.service;
        let called = interrupts::device_pending() || self.node.is_service_wanted();
        let earliest = service.filter(|_| called).map(|service| service.earliest);
        let deadline = service.and_then(|service| service.deadline);
        self.limits.preempt.into_iter().chain(earliest).chain(deadline).min()
    }

    pub(super) fn now(&self) -> GuestTsc {
        self.own.offset.guest(clock::tsc())
    }

    pub(super) fn memory(&self) -> MachineMemory<'a, B> {
        self.machine.memory(self.node)
    }

    /// Ends the machine.
    pub(super) fn end(&self, end: End) {
        self.machine.end(self.node, || end);
    }

    /// Brings the timer and what others have sent to the local APIC, and what that means to the guest.
    fn deliver_interrupts(&mut self) {
        let now = self.now();
        self.own.vcpu.lapic.advance(now);
        if let Some(inbox) = self.machine.router.inbox(self.index).filter(|inbox| inbox.has_any()) {
            let was_stuck = core::mem::take(&mut self.own.is_stuck);
            if was_stuck {
                self.machine.remove_stuck();
            }
            let signals = inbox.take(&mut self.own.vcpu.lapic);
            self.obey(signals);
        }
        match self.own.activity {
            Activity::Halted if self.own.vcpu.lapic.pending().is_some() => {
                self.own.activity = Activity::Running;
            }
            // Nothing is taken in this state, and nothing kept for later.
            Activity::WaitsForStartUp => drop(self.own.vcpu.lapic.take_nmi()),
            _ => {}
        }
        if self.own.vcpu.lapic.take_nmi() {
            self.own.activity = Activity::Running;
            self.own.hardware.inject_nmi();
        }
        self.note_stuck();
    }

    /// INIT and start-up interrupts.
    fn obey(&mut self, signals: Signals) {
        if signals.init {
            let state = self.own.vcpu.init();
            self.own.hardware.reset(&state);
            // The boot processor starts at its reset vector, where firmware would be; alone in its machine it can do nothing there that
            // anybody waits for.
            let starts = self.index == 0 && self.machine.vcpus.len() > 1;
            self.own.activity = if starts { Activity::Running } else { Activity::WaitsForStartUp };
            self.publish();
        }
        if let Some(page) = signals.start_up
            && self.own.activity == Activity::WaitsForStartUp
        {
            let state = self.own.vcpu.start_up(page);
            self.own.hardware.reset(&state);
            self.own.activity = Activity::Running;
        }
    }

    /// Counts the vCPU among those that only others can wake, if it is one.
    fn note_stuck(&mut self) {
        let end = match self.own.activity {
            Activity::Running | Activity::Halted => return,
            Activity::HaltedForGood => End::Halted,
            Activity::WaitsForStartUp if self.machine.vcpus.len() > 1 => End::Halted,
            Activity::WaitsForStartUp => End::WaitsForStartUp,
        };
        if !core::mem::replace(&mut self.own.is_stuck, true) {
            self.machine.add_stuck(self.node, end);
        }
    }

    /// Lets the others know which interrupts the local APIC takes.
    fn publish(&self) {
        self.machine.router.publish(self.index, &self.own.vcpu.lapic);
    }

    fn enter(&mut self) {
        let mut memory = self.memory();
        let own = &mut *self.own;
        own.hardware.set_task_priority(own.vcpu.lapic.tpr() >> 4);
        own.hardware.offer_interrupt(own.vcpu.lapic.pending_at_any_task_priority());
        self.accept_interrupt();
        self.own.vcpu.before_entry(&mut memory);
        let due = self.due(self.wake());
        self.own.hardware.arm(due);
        if self.cell.take_flush() {
            self.own.hardware.flush();
        }
        barriers::before_entry();
        if !self.core.enter_guest() {
            return;
        }
        let exit = self.own.hardware.run();
        self.core.leave_guest();
        self.take_interrupts(exit);
        self.own.last_exit = Some(exit);
        self.cell.exits.count(exit.kind());
        self.own.vcpu.after_exit(&mut memory);
        let priority = self.own.hardware.task_priority();
        if priority != self.own.vcpu.lapic.tpr() >> 4 {
            self.own.vcpu.lapic.set_tpr(priority << 4);
        }
        self.accept_interrupt();
        self.handle(exit);
        self.publish();
        while let Some(vector) = self.own.vcpu.lapic.take_eoi() {
            self.with_devices(|devices| devices.platform.end_of_interrupt(vector));
        }
        while let Some(ipi) = self.own.vcpu.lapic.take_ipi() {
            self.machine.router.post_ipi(&ipi, self.index, |vcpu| self.machine.notify(self.node, vcpu));
        }
    }

    /// Takes the physical interrupts that ended the run. A guest can see to it that an exception ends each of its runs before an interrupt
    /// gets its turn: many in a row are a reason to look.
    fn take_interrupts(&mut self, exit: Exit) {
        self.own.exceptions_in_a_row = match exit {
            Exit::Exception(_) | Exit::Int1 => self.own.exceptions_in_a_row + 1,
            _ => 0,
        };
        if matches!(exit, Exit::Interrupt) || self.own.exceptions_in_a_row >= MANY_EXCEPTIONS {
            self.own.exceptions_in_a_row = 0;
            cpu::take_interrupts();
        }
    }

    /// From when to when the next run has to end: for the guest's timer, which has some slack, or for others at `wake`.
    fn due(&self, wake: Option<u64>) -> Option<RangeInclusive<u64>> {
        let slack = self.timer_slack_ns();
        let timer = self.own.deadline_ns().map(|deadline| (deadline, deadline.saturating_add(slack)));
        let wake = wake.map(|wake| (wake, wake));
        let (earliest, latest) =
            timer.into_iter().chain(wake).reduce(|one, other| (one.0.min(other.0), one.1.min(other.1)))?;
        Some(earliest..=latest)
    }

    /// How late the timer may interrupt a guest that is running. Until the agent has connected nobody waits for anything but the end
    /// of the boot, and every tick costs two exits; Linux makes up for missed ticks by itself. A halted guest is woken in time.
    fn timer_slack_ns(&self) -> u64 {
        if self.machine.is_booting() { BOOT_TIMER_SLACK_NS } else { 0 }
    }

    fn accept_interrupt(&mut self) {
        if let Some(vector) = self.own.hardware.take_accepted() {
            self.own.vcpu.lapic.accept(vector);
        }
    }
}
