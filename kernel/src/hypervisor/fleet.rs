//! All machines of a node, as its service sees them: made, watched and ended from the first core.

use super::backend::Backend;
use super::cores::Runner;
use super::exit::ExitCounts;
use super::figures::TemplateFigures;
use super::machine::{CreateError, End, Machine, Size};
use super::node::Node;
use super::schedule;
use super::settings::Settings;
use super::template::Template;
use super::vcpu::{VcpuCell, VcpuRef};
use crate::cpu::clock;
use crate::memory::frames::{LARGE_FRAME, SMALL_FRAME, SMALL_PER_LARGE};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use nestling_machine::platform::linux::LinuxImage;
use nestling_machine::platform::{NetworkHost, VsockHost};
use nestling_machine::vcpu::{HostCpuid, emulate};

/// Console lines that a machine leaves behind: a kernel's panic with its trace.
const CONSOLE_LINES: usize = 100;

/// The most vCPUs of a machine.
const VCPUS_MAX: usize = 32;

/// Names a machine for as long as the node runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MachineId(u64);

/// Names a template for as long as the node runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TemplateId(pub u64);

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

/// A node's machines, with the core that also runs the service.
pub struct Fleet<B: Backend> {
    node: &'static Node<B>,
    runner: Runner<B>,
    host: HostCpuid,
    components: u64,
    /// How many vCPUs there may be at once for each core.
    vcpus_per_core: usize,
    machines: Vec<(MachineId, Arc<Machine<B>>)>,
    templates: Vec<(TemplateId, Arc<Template<B>>)>,
    /// See [`super::settings::Settings::clone_reserve_bytes`].
    clone_reserve_bytes: Option<u64>,
    /// See [`super::settings::Settings::check_templates`].
    check_templates: bool,
    next: u64,
    /// Exits of machines that are gone.
    past_exits: ExitCounts,
    past_accesses: u64,
}

impl<B: Backend> Fleet<B> {
    /// An empty fleet, on the node's first core. `components` are the XSAVE components that [`crate::cpu::fpu::init`] found.
    pub fn new(node: &'static Node<B>, components: u64, settings: &Settings) -> Self {
        let host = HostCpuid::read(|leaf, subleaf| node.backend.cpuid(leaf, subleaf));
        emulate::prepare();
        Self {
            node,
            runner: Runner::new(node, 0),
            host,
            components,
            vcpus_per_core: settings.vcpus_per_core,
            machines: Vec::new(),
            templates: Vec::new(),
            clone_reserve_bytes: settings.clone_reserve_bytes,
            check_templates: settings.check_templates,
            next: 1,
            past_exits: ExitCounts::default(),
            past_accesses: 0,
        }
    }

    /// Makes a machine and starts it. Each of its vCPUs goes to the core that has the fewest.
    ///
    /// # Errors
    /// [`CreateError`] when the node has too little memory or the image cannot boot.
    pub fn create(&mut self, image: &LinuxImage<'_>, size: &Size) -> Result<MachineId, CreateError> {
        self.runner.unload();
        let machine = Machine::new(self.node, &self.host, self.components, image, size)?;
        let id = MachineId(self.next);
        self.next += 1;
        self.start(id, machine);
        Ok(id)
    }

    /// Gives a machine's vCPUs to cores.
    fn start(&mut self, id: MachineId, machine: Machine<B>) {
        let machine = Arc::new(machine);
        self.machines.push((id, Arc::clone(&machine)));
        for index in 0..machine.vcpus.len() {
            let core = &self.node.cores[schedule::place(self.node.cores.iter().map(|core| core.load()))];
            let vcpu = VcpuRef { machine: Arc::clone(&machine), index };
            // Any core may come to run it.
            if self.node.cores.len() > 1 {
                vcpu.release();
            }
            core.add(vcpu);
        }
    }

    /// Takes a machine off all cores and out of the fleet; `None` when there is no such machine.
    fn take_off(&mut self, id: MachineId) -> Option<Machine<B>> {
        let position = self.machines.iter().position(|(other, _)| *other == id)?;
        let (_, mut machine) = self.machines.swap_remove(position);
        machine.stop(self.node);
        self.runner.leave_ended();
        // The other cores leave it as soon as they look, which takes them a few microseconds and no lock of this core's.
        loop {
            match Arc::try_unwrap(machine) {
                Ok(machine) => return Some(machine),
                Err(shared) => machine = shared,
            }
            core::hint::spin_loop();
        }
    }

    /// Ends a machine and takes every frame back; `None` when there is no such machine.
    pub fn destroy(&mut self, id: MachineId) -> Option<Remains> {
        let machine = self.take_off(id)?;
        let remains = Remains {
            end: machine.ended().cloned(),
            exits: exits(&machine),
            peak_bytes: machine.memory_bytes(),
            disk_problem: machine.disk_problem(),
            console: machine.console(CONSOLE_LINES).join("\n"),
        };
        self.past_exits.add(&remains.exits);
        self.past_accesses += accesses(&machine);
        let template = machine.template().filter(|_| self.check_templates).cloned();
        machine.free(self.node);
        if let Some(template) = template {
            template.check();
        }
        Some(remains)
    }

    /// Makes a template of a machine, which is no more then. It goes on as it was when it is not at rest.
    ///
    /// # Errors
    /// Why the machine could not be frozen: it is not at rest, or no more.
    pub fn freeze(&mut self, id: MachineId) -> Result<TemplateId, &'static str> {
        if let Some(reason) = self.machine(id).ok_or("there is no such machine")?.unrest() {
            return Err(reason);
        }
        self.runner.unload();
        let machine = self.take_off(id).ok_or("there is no such machine")?;
        // What came between the look and the stop.
        let reason = if machine.ended().is_some() { Some("the machine has ended") } else { machine.unrest() };
        if let Some(reason) = reason {
            if machine.ended().is_none() {
                machine.resume();
            }
            self.start(id, machine);
            return Err(reason);
        }
        let machine_exits = exits(&machine);
        self.past_exits.add(&machine_exits);
        self.past_accesses += accesses(&machine);
        let template = TemplateId(self.next);
        self.next += 1;
        self.templates.push((template, Arc::new(Template::new(machine, self.node, self.check_templates))));
        Ok(template)
    }

    /// Makes a clone of a template and starts it.
    ///
    /// # Errors
    /// [`CreateError::OutOfFrames`] when the node has too little memory, or there is no such template.
    pub fn clone_template(&mut self, id: TemplateId) -> Result<MachineId, CreateError> {
        self.runner.unload();
        let start = clock::tsc();
        let template = self.template(id).ok_or(CreateError::OutOfFrames)?;
        let machine = template.clone_machine()?;
        let (ticks, bytes) = (clock::tsc().wrapping_sub(start), machine.memory_bytes());
        let id = MachineId(self.next);
        self.next += 1;
        self.start(id, machine);
        log::debug!("clone: {ticks} ticks, {} KiB private", bytes / 1024);
        Ok(id)
    }

    /// Gives a template up. Its memory comes back with the end of its last clone.
    pub fn drop_template(&mut self, id: TemplateId) {
        self.templates.retain(|(other, _)| *other != id);
    }

    fn template(&self, id: TemplateId) -> Option<&Arc<Template<B>>> {
        self.templates.iter().find(|(other, _)| *other == id).map(|(_, template)| template)
    }

    /// What a template costs and has brought; `None` when there is no such template.
    pub fn template_figures(&self, id: TemplateId) -> Option<TemplateFigures> {
        let template = self.template(id)?;
        let is_clone =
            |machine: &Machine<B>| machine.template().is_some_and(|other| Arc::ptr_eq(other, template));
        let alive = self.machines.iter().filter(|(_, machine)| is_clone(machine)).count() as u64;
        Some(template.figures(id.0, alive))
    }

    /// Whether a machine waits for something on all its vCPUs, so that it is worth being frozen.
    pub fn is_idle(&self, id: MachineId) -> bool {
        self.machine(id).is_some_and(Machine::is_idle)
    }

    /// Whether there is room for a clone of a machine once it was frozen: what it has by then stays with the template.
    pub fn fits_beside_template(&self, id: MachineId) -> bool {
        self.machine(id).is_some_and(|machine| {
            let template = machine.memory_bytes() / SMALL_FRAME;
            let scratch: u64 = self.machines.iter().map(|(_, machine)| scratch_needed(&machine.size)).sum();
            self.committed() + template <= self.frames().1 as u64 && scratch <= self.scratch_bytes()
        })
    }

    /// How many vCPUs a clone of a template has; `None` when there is no such template.
    pub fn template_vcpus(&self, id: TemplateId) -> Option<usize> {
        self.template(id).map(|template| template.size().vcpu_count as usize)
    }

    /// Whether a clone of a template can be made now.
    pub fn fits_clone(&self, id: TemplateId) -> bool {
        self.template(id).is_some_and(|template| {
            let size = template.size();
            let most = frames_needed(size);
            let frames = self.clone_reserve_bytes.map_or(most, |reserve| most.min(reserve / SMALL_FRAME));
            self.fits_frames(frames, scratch_needed(size))
        })
    }

    /// Where clones do not count with their whole size, what machines that boot may yet take is not theirs.
    fn keep_promises(&self) {
        if self.clone_reserve_bytes.is_some() {
            let left = |machine: &Machine<B>| {
                frames_needed(&machine.size).saturating_sub(machine.memory_bytes() / SMALL_FRAME)
            };
            let booted = self.machines.iter().filter(|(_, machine)| machine.template().is_none());
            let promised: u64 = booted.map(|(_, machine)| left(machine)).sum();
            self.node.pool.promise(usize::try_from(promised).unwrap_or(usize::MAX));
        }
    }

    /// Frames that machines may come to need, and those that templates have.
    fn committed(&self) -> u64 {
        let machines = self.machines.iter().map(|(_, machine)| {
            let most = frames_needed(&machine.size);
            match (machine.template(), self.clone_reserve_bytes) {
                (Some(_), Some(reserve)) => most.min((machine.memory_bytes() + reserve) / SMALL_FRAME),
                _ => most,
            }
        });
        let templates = self.templates.iter().map(|(_, template)| template.shared_bytes() / SMALL_FRAME);
        machines.chain(templates).sum()
    }

    fn machine(&self, id: MachineId) -> Option<&Machine<B>> {
        self.machines.iter().find(|(other, _)| *other == id).map(|(_, machine)| &**machine)
    }

    /// Why a machine ended, once it has.
    pub fn end(&self, id: MachineId) -> Option<End> {
        self.machine(id)?.ended().cloned()
    }

    /// Lets `work` use the host's end of a machine's connection with its agent; afterwards the guest is told what came of it.
    pub fn with_vsock<R>(&self, id: MachineId, work: impl FnOnce(&mut VsockHost) -> R) -> Option<R> {
        let machine = self.machine(id)?;
        Some(machine.with_devices_for_service(self.node, |platform| work(platform.vsock())))
    }

    /// The same for the host's end of its network card's cable; `None` also when it has no card.
    pub fn with_network<R>(&self, id: MachineId, work: impl FnOnce(&mut NetworkHost) -> R) -> Option<R> {
        let machine = self.machine(id)?;
        machine.with_devices_beside_agent(self.node, |platform| platform.network().map(work))
    }

    /// A machine's exits so far, and the bytes of memory behind its RAM and the changes on its disk.
    pub fn figures(&self, id: MachineId) -> Option<(ExitCounts, u64)> {
        self.machine(id).map(|machine| (exits(machine), machine.memory_bytes()))
    }

    /// Exits of all machines since boot.
    pub fn total_exits(&self) -> ExitCounts {
        let mut total = self.past_exits;
        for (_, machine) in &self.machines {
            total.add(&exits(machine));
        }
        total
    }

    /// Instructions that read or wrote a control block because of those exits.
    pub fn control_block_accesses(&self) -> u64 {
        self.past_accesses + self.machines.iter().map(|(_, machine)| accesses(machine)).sum::<u64>()
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.machines.iter().map(|(_, machine)| machine.vcpus.len()).sum()
    }

    /// How many vCPUs there may be at once.
    pub fn max_vcpus(&self) -> usize {
        self.cores() * self.vcpus_per_core
    }

    /// How many vCPUs a machine can ever have.
    pub fn max_machine_vcpus(&self) -> usize {
        self.max_vcpus().min(VCPUS_MAX)
    }

    /// Cores in use.
    pub fn cores(&self) -> usize {
        self.node.cores.len()
    }

    /// Free and total memory for machines, in 4 KiB frames.
    pub fn frames(&self) -> (usize, usize) {
        self.node.pool.counts()
    }

    /// Whether a machine of this size can be made now, with what others may still touch set aside for them.
    pub fn fits(&self, size: &Size) -> bool {
        self.fits_frames(frames_needed(size), scratch_needed(size))
    }

    fn fits_frames(&self, frames: u64, scratch: u64) -> bool {
        let used: u64 = self.machines.iter().map(|(_, machine)| scratch_needed(&machine.size)).sum();
        self.committed() + frames <= self.frames().1 as u64 && used + scratch <= self.scratch_bytes()
    }

    /// Whether a machine of this size can be made when nothing else runs.
    pub fn ever_fits(&self, size: &Size) -> bool {
        frames_needed(size) <= self.frames().1 as u64 && scratch_needed(size) <= self.scratch_bytes()
    }

    /// The scratch partition's size; zero without one.
    pub fn scratch_bytes(&self) -> u64 {
        self.node.scratch_bytes
    }

    /// The backend's optional features.
    pub fn features(&self) -> &[(&'static str, bool)] {
        self.node.backend.features()
    }

    /// Runs machines until `deadline` (nanoseconds since boot), a device interrupt, or something for the service to do; idles
    /// when all of them wait. Returns whether machines have more for the service than frames.
    pub fn run(&mut self, deadline: Option<u64>) -> bool {
        self.keep_promises();
        let Self { node, runner, machines, .. } = self;
        let wake_disks = || machines.iter().for_each(|(_, machine)| machine.wake_disk(node));
        runner.run_until_service(deadline, wake_disks);
        // Before the service looks: what calls it meanwhile is for its next round.
        self.node.take_calls()
    }
}

fn exits<B: Backend>(machine: &Machine<B>) -> ExitCounts {
    let mut sum = ExitCounts::default();
    machine.vcpus.iter().for_each(|vcpu| sum.add(&vcpu.exits.counts()));
    sum
}

fn accesses<B: Backend>(machine: &Machine<B>) -> u64 {
    machine.vcpus.iter().map(VcpuCell::accesses).sum()
}

/// Room on the scratch partition that a machine may need.
fn scratch_needed(size: &Size) -> u64 {
    size.disk.map_or(0, |disk| disk.scratch_bytes)
}

/// Frames of 4 KiB behind a machine at its largest: its RAM, what it may change on its disk, and its nested page tables, which a clone may need down
/// to pages of 4 KiB.
fn frames_needed(size: &Size) -> u64 {
    let overlay = size.disk.map_or(0, |disk| disk.overlay_bytes.next_multiple_of(LARGE_FRAME));
    let ram = u64::from(size.memory_mib) << 20;
    let tables = (ram / SMALL_PER_LARGE as u64).next_multiple_of(LARGE_FRAME);
    (ram + overlay + tables) / SMALL_FRAME
}
