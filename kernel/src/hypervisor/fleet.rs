//! All machines of a node, and which of them is on the core.

use super::backend::{Backend, VendorVcpu};
use super::exit::ExitCounts;
use super::machine::{CreateError, End, Machine, Size};
use super::run::{Node, Pause};
use crate::cpu::{self, apic, clock, interrupts};
use crate::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME};
use crate::storage::Storage;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use nestling_machine::platform::linux::LinuxImage;
use nestling_machine::platform::{Entropy, VsockHost};
use nestling_machine::vcpu::{HostCpuid, emulate};
use nestling_storage::volume::Volume;

/// How long machines run at least between two rounds of the service that devices alone ask for.
const LEAST_SLICE_NS: u64 = 300_000;

/// Console lines that a machine leaves behind: a kernel's panic with its trace.
const CONSOLE_LINES: usize = 100;

/// Names a machine for as long as the node runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MachineId(u64);

/// What a machine leaves behind.
#[derive(Debug)]
pub struct Remains {
    /// Why it ended; `None` when it was still running.
    pub end: Option<End>,
    /// Its exits.
    pub exits: ExitCounts,
    /// The most memory it had, in bytes.
    pub peak_bytes: u64,
    /// What went wrong with its disk for want of memory.
    pub disk_problem: Option<String>,
    /// The last of what it printed on its console.
    pub console: String,
}

/// A node's machines, frames and virtualization.
pub struct Fleet<B: Backend> {
    backend: B,
    pool: FramePool,
    storage: Storage,
    entropy: Box<dyn Entropy>,
    host: Arc<HostCpuid>,
    components: u64,
    machines: Vec<(MachineId, Machine<B>)>,
    loaded: Option<MachineId>,
    next: u64,
    /// Exits of machines that are gone.
    past_exits: ExitCounts,
    past_accesses: u64,
    turn: usize,
}

impl<B: Backend> Fleet<B> {
    /// An empty fleet. `components` are the XSAVE components that [`crate::cpu::fpu::init`] found.
    pub fn new(
        backend: B,
        pool: FramePool,
        storage: Storage,
        entropy: Box<dyn Entropy>,
        components: u64,
    ) -> Self {
        let host = Arc::new(HostCpuid::read(|leaf, subleaf| backend.cpuid(leaf, subleaf)));
        emulate::prepare();
        Self {
            backend,
            pool,
            storage,
            entropy,
            host,
            components,
            machines: Vec::new(),
            loaded: None,
            next: 1,
            past_exits: ExitCounts::default(),
            past_accesses: 0,
            turn: 0,
        }
    }

    /// Makes a machine and starts it.
    ///
    /// # Errors
    /// [`CreateError`] when the node has too little memory or the image cannot boot.
    pub fn create(&mut self, image: &LinuxImage<'_>, size: &Size) -> Result<MachineId, CreateError> {
        self.unload();
        let machine =
            Machine::new(&mut self.backend, &mut self.pool, &self.host, self.components, image, size)?;
        let id = MachineId(self.next);
        self.next += 1;
        self.machines.push((id, machine));
        Ok(id)
    }

    /// Ends a machine and takes every frame back; `None` when there is no such machine.
    pub fn destroy(&mut self, id: MachineId) -> Option<Remains> {
        let position = self.machines.iter().position(|(other, _)| *other == id)?;
        if self.loaded == Some(id) {
            self.unload();
        }
        let (_, machine) = self.machines.swap_remove(position);
        let remains = Remains {
            end: machine.end(),
            exits: machine.exits,
            peak_bytes: machine.memory_bytes(),
            disk_problem: machine.volume.as_ref().and_then(Volume::problem),
            console: machine.platform.console().last_lines(CONSOLE_LINES).join("\n"),
        };
        self.past_exits.add(&machine.exits);
        self.past_accesses += machine.hardware.accesses();
        machine.free(&mut self.pool);
        Some(remains)
    }

    fn machine(&mut self, id: MachineId) -> Option<&mut Machine<B>> {
        self.machines.iter_mut().find(|(other, _)| *other == id).map(|(_, machine)| machine)
    }

    fn machine_ref(&self, id: MachineId) -> Option<&Machine<B>> {
        self.machines.iter().find(|(other, _)| *other == id).map(|(_, machine)| machine)
    }

    /// Why a machine ended, once it has.
    pub fn end(&self, id: MachineId) -> Option<End> {
        self.machine_ref(id)?.end()
    }

    /// The host's end of a machine's vsock.
    pub fn vsock(&mut self, id: MachineId) -> Option<&mut VsockHost> {
        self.machine(id).map(|machine| machine.platform.vsock())
    }

    /// A machine's exits so far, and the bytes of memory behind its RAM and the changes on its disk.
    pub fn figures(&self, id: MachineId) -> Option<(ExitCounts, u64)> {
        self.machine_ref(id).map(|machine| (machine.exits, machine.memory_bytes()))
    }

    /// Exits of all machines since boot.
    pub fn total_exits(&self) -> ExitCounts {
        let mut total = self.past_exits;
        for (_, machine) in &self.machines {
            total.add(&machine.exits);
        }
        total
    }

    /// Instructions that read or wrote a control block because of those exits.
    pub fn control_block_accesses(&self) -> u64 {
        self.past_accesses + self.machines.iter().map(|(_, machine)| machine.hardware.accesses()).sum::<u64>()
    }

    /// How many machines there are.
    pub fn len(&self) -> usize {
        self.machines.len()
    }

    /// Free and total memory for machines, in 4 KiB frames.
    pub fn frames(&self) -> (usize, usize) {
        self.pool.counts()
    }

    /// Whether a machine of this size can be made now, with what others may still touch set aside for them.
    pub fn fits(&self, size: &Size) -> bool {
        let promised: u64 = self.machines.iter().map(|(_, machine)| frames_needed(&machine.size)).sum();
        promised + frames_needed(size) <= self.pool.counts().1 as u64
    }

    /// Whether a machine of this size can be made when nothing else runs.
    pub fn ever_fits(&self, size: &Size) -> bool {
        frames_needed(size) <= self.pool.counts().1 as u64
    }

    /// The backend's optional features.
    pub fn features(&self) -> &[(&'static str, bool)] {
        self.backend.features()
    }

    /// Runs machines until `deadline` (nanoseconds since boot), a device interrupt, or something for the service to do; idles
    /// when all of them wait.
    pub fn run(&mut self, deadline: Option<u64>) {
        let earliest = clock::now_ns().saturating_add(LEAST_SLICE_NS);
        for _ in 0..self.machines.len() {
            self.turn = self.turn.wrapping_add(1);
            let position = self.turn % self.machines.len();
            self.switch_to(position);
            // Another machine's timer is a reason to stop this one.
            let others = self.machines.iter().enumerate().filter(|(other, _)| *other != position);
            // Not before this one has had its slice: a timer that is always late must not starve it.
            let others = others.filter_map(|(_, (_, machine))| machine.deadline_ns());
            let wake = others.map(|wake| wake.max(earliest)).chain(deadline).min();
            let Some((_, machine)) = self.machines.get_mut(position) else { continue };
            let mut node = Node {
                pool: &mut self.pool,
                storage: &mut self.storage,
                entropy: self.entropy.as_mut(),
                deadline: wake,
                earliest,
            };
            match machine.run(&mut node) {
                Pause::Halted => {}
                // The service has seen the end and waits for something else, such as a slow reader of the log.
                Pause::Ended if machine.end_seen => {}
                Pause::Ended => {
                    machine.end_seen = true;
                    return;
                }
                Pause::Service => return,
            }
        }
        self.idle(deadline);
    }

    /// Nothing to run: frames are zeroed ahead, then the core waits.
    fn idle(&mut self, deadline: Option<u64>) {
        let timers = self.machines.iter().filter_map(|(_, machine)| machine.deadline_ns());
        let wake = timers.chain(deadline).chain(self.storage.deadline()).min();
        if interrupts::device_pending() || wake.is_some_and(|wake| wake <= clock::now_ns()) {
            return;
        }
        apic::timer_arm(wake);
        if self.pool.clean_one() {
            cpu::take_interrupts();
        } else {
            cpu::idle();
        }
        interrupts::take_timer();
    }

    fn unload(&mut self) {
        let Some(id) = self.loaded.take() else { return };
        if let Some(machine) = self.machine(id) {
            machine.unload();
        }
    }

    fn switch_to(&mut self, position: usize) {
        let Some(&(id, _)) = self.machines.get(position) else { return };
        if self.loaded == Some(id) {
            return;
        }
        self.unload();
        if let Some((_, machine)) = self.machines.get_mut(position) {
            machine.load();
            self.loaded = Some(id);
        }
    }
}

/// Frames of 4 KiB behind a machine at its largest: its RAM, what it may change on its disk, and one large frame split for its nested page tables.
fn frames_needed(size: &Size) -> u64 {
    let overlay = size.disk.map_or(0, |disk| disk.overlay_bytes.next_multiple_of(LARGE_FRAME));
    ((u64::from(size.memory_mib) << 20) + overlay + LARGE_FRAME) / SMALL_FRAME
}
