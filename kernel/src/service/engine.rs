//! The job engine: gives queued jobs machines, carries bytes between a job and its agent, and takes machines
//! down.
//!
//! What a job is and how it ends is [`JobStore`]'s; what a machine is, the hypervisor's. This file only joins
//! them.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use nestling_api::Clock;
use nestling_api::jobs::{JobId, JobStore, QueuedJob};
use nestling_api::time::MILLISECOND;
use nestling_api::types::{self, MachineConfig, WaitingFor};

use super::entropy::RandomSource;
use super::images::Image;
use super::machines::{AgentLink, CreateError, DiskSpec, MachineSpec, Machines};
use super::network::{self, MachineNetwork};
use super::templates::{Key, Templates, Way, not_frozen};

/// How many bytes are carried in one step.
const CHUNK: usize = 32 * 1024;
/// How often a running job's exit counts and memory are brought up to date.
const FIGURES_INTERVAL_NS: u64 = 500 * MILLISECOND;
/// How long a machine whose agent has connected may go on until it is idle; then it is frozen as it is, once its devices are at rest.
const SETTLE_NS: u64 = 1000 * MILLISECOND;
/// How long its devices may take to come to rest. Then the job goes on in the machine itself.
const FREEZE_NS: u64 = 3000 * MILLISECOND;
/// How often to look.
const LOOK_NS: u64 = 5 * MILLISECOND;
/// Frames of 4 KiB in a MiB.
const FRAMES_PER_MIB: u64 = 256;

/// A machine that is to become a template.
struct Warming {
    key: Key,
    /// When its agent had connected, monotonic nanoseconds.
    since: Option<u64>,
}

/// A job with its machine.
struct Run<Id> {
    job: JobId,
    /// The machine is to be frozen before the job begins.
    warming: Option<Warming>,
    machine: Id,
    connected: bool,
    hung_up: bool,
    figures_due: u64,
}

/// The jobs that have machines.
pub struct Engine<Id, T> {
    runs: Vec<Run<Id>>,
    templates: Templates<T>,
    /// For clones to start from.
    random: RandomSource,
    buffer: Box<[u8]>,
}

impl<Id: Copy, T: Copy + PartialEq> Engine<Id, T> {
    /// No jobs, and no templates; without `with_templates` there never will be one.
    #[must_use]
    pub fn new(with_templates: bool, random: RandomSource) -> Self {
        Self {
            runs: Vec::new(),
            templates: Templates::new(with_templates),
            random,
            buffer: vec![0; CHUNK].into_boxed_slice(),
        }
    }

    /// Jobs that have a machine now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.runs.len()
    }

    /// The templates there are.
    #[must_use]
    pub fn templates<M: Machines<Id = Id, Template = T>>(&self, machines: &M) -> Vec<types::Template> {
        self.templates.describe(machines)
    }

    /// When [`Self::poll`] next has something to do that nobody else tells of, monotonic nanoseconds.
    #[must_use]
    pub fn deadline(&self, now: Clock) -> Option<u64> {
        let is_settling = |run: &Run<Id>| run.warming.as_ref().is_some_and(|warming| warming.since.is_some());
        self.runs.iter().any(is_settling).then(|| now.monotonic_ns.saturating_add(LOOK_NS))
    }

    /// Does all there is to do now.
    pub fn poll<M: Machines<Id = Id, Template = T>>(
        &mut self,
        jobs: &mut JobStore,
        images: &[Image],
        machines: &mut M,
        network: &mut MachineNetwork<Id>,
        now: Clock,
    ) {
        jobs.poll(now);
        let Self { runs, templates, random, buffer } = self;
        runs.retain_mut(|run| {
            run.warm(templates, random, jobs, machines, network, now);
            let machine = run.machine;
            if run.warming.is_none() {
                machines.with_agent(machine, |agent| run.carry(jobs, agent, buffer, now));
            }
            if now.monotonic_ns >= run.figures_due {
                run.figures_due = now.monotonic_ns.saturating_add(FIGURES_INTERVAL_NS);
                let (exits, peak_mib) = machines.figures(run.machine);
                jobs.update(run.job, exits, peak_mib);
            }
            // A machine that has ended by itself may have left output that a slow reader of the log does not
            // let through yet.
            let unread = machines.with_agent(run.machine, |agent| agent.readable());
            let drained = unread.is_none_or(|bytes| bytes == 0) || run.warming.is_some();
            let over = jobs.finished(run.job) || (drained && machines.ended(run.machine).is_some());
            if over {
                if let Some(warming) = run.warming.take() {
                    templates.abandon(&warming.key);
                }
                network.remove(run.job);
                let report = machines.destroy(run.machine);
                log::debug!("job {}: machine ended: {:?}", run.job, report.end);
                jobs.machine_ended(run.job, report, now);
            }
            !over
        });
        while let Some(job) = jobs.next_queued() {
            if self.runs.len() >= machines.limit() {
                jobs.waits_for(job.id, WaitingFor::Machines);
                break;
            }
            match make(&job, images, &mut self.templates, machines) {
                Ok((machine, warming)) if jobs.start(job.id, now) => {
                    log::debug!(
                        "job {}: machine of {} MiB from image {}",
                        job.id,
                        job.machine_config.mem_size_mib,
                        job.image
                    );
                    network.add(machine, job.id, job.egress);
                    let warming = match warming {
                        Origin::Clone => {
                            jobs.cloned(job.id, self.random.seed(), now);
                            None
                        }
                        Origin::Boot => None,
                        Origin::BootAndFreeze(key) => {
                            self.templates.begin(&key).then_some(Warming { key, since: None })
                        }
                    };
                    self.runs.push(Run {
                        job: job.id,
                        warming,
                        machine,
                        connected: false,
                        hung_up: false,
                        figures_due: now.monotonic_ns,
                    });
                }
                Ok((machine, _)) => drop(machines.destroy(machine)),
                // What nobody uses goes before anybody waits.
                Err(CreateError::Busy(WaitingFor::Memory)) if self.templates.evict(machines) => {}
                // Another machine's end makes room.
                Err(CreateError::Busy(what)) if !self.runs.is_empty() => {
                    jobs.waits_for(job.id, what);
                    break;
                }
                Err(CreateError::Busy(what)) => {
                    let reason = cannot_wait(&job, what, machines);
                    log::warn!("job {}: no machine: {reason}", job.id);
                    jobs.fail(job.id, &reason, now);
                }
                Err(CreateError::Impossible(reason)) => {
                    log::warn!("job {}: no machine: {reason}", job.id);
                    jobs.fail(job.id, &reason, now);
                }
            }
        }
    }
}

/// Where a job's machine came from.
enum Origin {
    Clone,
    Boot,
    BootAndFreeze(Key),
}

/// A machine for a job: a clone, or one that boots.
fn make<M: Machines>(
    job: &QueuedJob,
    images: &[Image],
    templates: &mut Templates<M::Template>,
    machines: &mut M,
) -> Result<(M::Id, Origin), CreateError> {
    let key = images.iter().find(|image| image.name == job.image).filter(|_| !job.cold);
    let Some(key) = key.map(|image| Key::new(image, job.machine_config)) else {
        return Ok((create(job, images, machines)?, Origin::Boot));
    };
    match templates.choose(&key) {
        Way::Clone(template) => Ok((machines.clone_template(template)?, Origin::Clone)),
        Way::Boot => Ok((create(job, images, machines)?, Origin::Boot)),
        Way::BootAndFreeze => Ok((create(job, images, machines)?, Origin::BootAndFreeze(key))),
    }
}

impl<Id: Copy> Run<Id> {
    /// Freezes the machine when it is ready for that, and gives the job a clone of it.
    fn warm<M: Machines<Id = Id>>(
        &mut self,
        templates: &mut Templates<M::Template>,
        random: &mut RandomSource,
        jobs: &mut JobStore,
        machines: &mut M,
        network: &mut MachineNetwork<Id>,
        now: Clock,
    ) {
        let Some(warming) = &mut self.warming else { return };
        if jobs.finished(self.job) {
            return;
        }
        // What the agent says first stays unread: each clone's job hears it.
        let has_spoken = machines.with_agent(self.machine, |agent| {
            agent.has_connected() && (agent.readable() > 0 || agent.has_finished())
        });
        if has_spoken != Some(true) {
            return;
        }
        let since = *warming.since.get_or_insert(now.monotonic_ns);
        let waited = now.monotonic_ns.saturating_sub(since);
        if !machines.is_idle(self.machine) && waited < SETTLE_NS {
            return;
        }
        let outcome = if machines.fits_beside_template(self.machine) {
            machines.freeze(self.machine)
        } else {
            Err("the node has too little memory for a template and a machine")
        };
        let key = warming.key.clone();
        match outcome {
            Ok(template) => {
                self.warming = None;
                network.remove(self.job);
                match machines.clone_template(template) {
                    Ok(machine) => {
                        self.machine = machine;
                        network.add(machine, self.job, jobs.egress(self.job));
                        jobs.cloned(self.job, random.seed(), now);
                        templates.ready(&key, template);
                        templates.keep_budget(machines);
                    }
                    Err(_) => {
                        machines.drop_template(template);
                        templates.refuse(&key);
                        jobs.fail(
                            self.job,
                            "the node has too little memory for a clone of its template",
                            now,
                        );
                    }
                }
            }
            Err(_) if waited < FREEZE_NS => {}
            Err(reason) => {
                log::warn!("{}", not_frozen(key.image(), reason));
                templates.refuse(&key);
                self.warming = None;
            }
        }
    }

    /// Moves bytes both ways for as long as both sides take them.
    fn carry(&mut self, jobs: &mut JobStore, agent: &mut dyn AgentLink, buffer: &mut [u8], now: Clock) {
        if !self.connected && agent.has_connected() {
            self.connected = true;
            jobs.agent_connected(self.job);
        }
        loop {
            let room = jobs.receive_capacity(self.job, now).min(buffer.len());
            let Some(place) = buffer.get_mut(..room).filter(|place| !place.is_empty()) else { break };
            let count = agent.receive(place);
            let Some(bytes) = place.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
            jobs.receive(self.job, bytes, now);
        }
        loop {
            let count = agent.send(jobs.transmit(self.job));
            if count == 0 {
                break;
            }
            jobs.transmitted(self.job, count);
        }
        if self.connected && !self.hung_up && agent.has_finished() && agent.readable() == 0 {
            self.hung_up = true;
            jobs.agent_disconnected(self.job, now);
        }
    }
}

/// Why a job that no other machine's end would help has no machine.
fn cannot_wait<M: Machines>(job: &QueuedJob, what: WaitingFor, machines: &M) -> String {
    let MachineConfig { mem_size_mib, vcpu_count, .. } = job.machine_config;
    let report = machines.report();
    match what {
        WaitingFor::Cores => alloc::format!(
            "the machine is to have {vcpu_count} vCPUs and the node, on which no other runs, has {} cores; ask for less in \
             machine_config.vcpu_count",
            report.cores
        ),
        _ => alloc::format!(
            "the machine is to have {mem_size_mib} MiB and the node, on which no other runs, has {} MiB free; ask for less \
             in machine_config.mem_size_mib",
            report.memory.free_frames / FRAMES_PER_MIB
        ),
    }
}

fn create<M: Machines>(job: &QueuedJob, images: &[Image], machines: &mut M) -> Result<M::Id, CreateError> {
    let image = images.iter().find(|image| image.name == job.image).ok_or_else(|| {
        let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
        let names = if names.is_empty() { String::from("none") } else { names.join(", ") };
        CreateError::Impossible(alloc::format!("this node has no image '{}'; it has: {names}", job.image))
    })?;
    machines.create(&MachineSpec {
        kernel: image.kernel,
        initramfs: image.initramfs,
        command_line: &network::command_line(&image.command_line),
        mem_size_mib: job.machine_config.mem_size_mib,
        vcpu_count: job.machine_config.vcpu_count,
        network: Some(network::CARD),
        disk: image.disk.map(|disk| DiskSpec {
            base: disk.base,
            free_mib: job.machine_config.disk_size_mib.unwrap_or(disk.free_mib),
            asked_for: job.machine_config.disk_size_mib.is_some(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{FakeMachines, at, image, queue_job};
    use super::*;
    use nestling_api::Limits;
    use nestling_api::agent::{AgentMessage, Hello, PROTOCOL, StepCompleted, StepStarted};
    use nestling_api::jobs::MachineEnd;
    use nestling_api::types::{Conclusion, Status};

    struct Bench {
        engine: Engine<u32, u32>,
        jobs: JobStore,
        machines: FakeMachines,
        network: MachineNetwork<u32>,
        images: Vec<Image>,
    }

    impl Bench {
        fn new() -> Self {
            let jobs = JobStore::new(Limits::default());
            Self {
                engine: Engine::new(false, RandomSource::gather(&[])),
                jobs,
                machines: FakeMachines::default(),
                network: MachineNetwork::new([1; 32]),
                images: vec![image("minimal")],
            }
        }

        fn with_templates() -> Self {
            let machines = FakeMachines { limit: 4, ..FakeMachines::default() };
            Self { engine: Engine::new(true, RandomSource::gather(&[])), machines, ..Self::new() }
        }

        /// The job's machine runs it to its end.
        fn finish(&mut self, machine: u32, ms: u64) {
            self.say(machine, &AgentMessage::StepStarted(StepStarted { index: 0 }));
            self.say(machine, &completed(0));
            self.poll(ms);
        }

        fn poll(&mut self, ms: u64) {
            let Self { engine, jobs, machines, network, images } = self;
            engine.poll(jobs, images, machines, network, at(ms));
        }

        fn say(&mut self, machine: u32, message: &AgentMessage) {
            self.machines.alive.get_mut(&machine).unwrap().say(message);
        }

        fn hello(&mut self, machine: u32) {
            self.say(
                machine,
                &AgentMessage::Hello(Hello { protocol: PROTOCOL, agent: "0".into(), kernel: "6".into() }),
            );
        }
    }

    fn completed(code: i32) -> AgentMessage {
        AgentMessage::StepCompleted(StepCompleted {
            index: 0,
            exit_code: Some(code),
            signal: None,
            timed_out: false,
        })
    }

    #[test]
    fn a_job_gets_a_machine_runs_and_gives_it_back_with_its_figures() {
        let mut bench = Bench::new();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        assert_eq!(bench.jobs.get(id).unwrap().status, Status::InProgress);
        bench.hello(1);
        bench.poll(1);
        assert!(!bench.machines.alive[&1].from_node.is_empty(), "the agent was given its step");
        bench.say(1, &AgentMessage::StepStarted(StepStarted { index: 0 }));
        bench.say(1, &AgentMessage::Stdout(b"hi".to_vec()));
        bench.say(1, &completed(7));
        bench.poll(2);
        let job = bench.jobs.get(id).unwrap();
        assert_eq!((job.conclusion, job.exit_code, job.log.bytes), (Some(Conclusion::Failure), Some(7), 2));
        assert_eq!((job.exits["cpuid"], job.memory.peak_mib), (3, Some(64)));
        assert!(bench.machines.alive.is_empty());
        assert_eq!(bench.engine.running(), 0);
    }

    #[test]
    fn jobs_run_one_after_another_where_one_machine_may_exist() {
        let mut bench = Bench::new();
        let ids = [queue_job(&mut bench.jobs, 1), queue_job(&mut bench.jobs, 2)];
        bench.poll(0);
        bench.poll(1);
        assert_eq!(bench.machines.made, 1);
        bench.hello(1);
        bench.say(1, &AgentMessage::StepStarted(StepStarted { index: 0 }));
        bench.say(1, &completed(0));
        bench.poll(2);
        assert_eq!(bench.jobs.get(ids[0]).unwrap().conclusion, Some(Conclusion::Success));
        assert_eq!(bench.jobs.get(ids[1]).unwrap().status, Status::InProgress);
        assert_eq!(bench.machines.made, 2, "the next machine is made in the round that ended the one before");
    }

    #[test]
    fn a_machine_that_ends_by_itself_makes_a_system_failure_with_its_console() {
        let mut bench = Bench::new();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.machines.ended.insert(1, MachineEnd::TripleFault);
        bench.poll(1);
        let job = bench.jobs.get(id).unwrap();
        assert_eq!(job.conclusion, Some(Conclusion::SystemFailure));
        assert!(job.failure_reason.unwrap().contains("triple fault"));
        assert_eq!(job.console.as_deref(), Some("the last line"));
        assert!(bench.machines.alive.is_empty());
    }

    #[test]
    fn a_result_that_was_on_its_way_counts_though_the_machine_has_ended() {
        let mut bench = Bench::new();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.hello(1);
        bench.poll(1);
        bench.say(1, &AgentMessage::StepStarted(StepStarted { index: 0 }));
        bench.say(1, &completed(0));
        bench.machines.ended.insert(1, MachineEnd::PowerOff);
        bench.poll(2);
        assert_eq!(bench.jobs.get(id).unwrap().conclusion, Some(Conclusion::Success));
    }

    #[test]
    fn an_agent_that_hangs_up_makes_a_system_failure() {
        let mut bench = Bench::new();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.hello(1);
        bench.poll(1);
        bench.machines.alive.get_mut(&1).unwrap().finished = true;
        bench.poll(2);
        let due = bench.jobs.deadline(at(2)).unwrap() / 1_000_000 + 1;
        bench.poll(due);
        assert_eq!(bench.jobs.get(id).unwrap().conclusion, Some(Conclusion::SystemFailure));
        assert!(bench.machines.alive.is_empty());
    }

    #[test]
    fn an_image_that_is_not_there_or_does_not_boot_ends_the_job_with_the_reason() {
        let mut bench = Bench::new();
        bench.images.clear();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        let reason = bench.jobs.get(id).unwrap().failure_reason.unwrap();
        assert_eq!(reason, "this node has no image 'minimal'; it has: none");
        let mut bench = Bench::new();
        bench.machines.refuse = Some(CreateError::Impossible("not a bzImage".into()));
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        assert_eq!(bench.jobs.get(id).unwrap().failure_reason.as_deref(), Some("not a bzImage"));
    }

    #[test]
    fn a_busy_node_without_machines_refuses_the_job_rather_than_wait_for_ever() {
        let mut bench = Bench::new();
        bench.machines.refuse = Some(CreateError::Busy(WaitingFor::Memory));
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        let job = bench.jobs.get(id).unwrap();
        assert_eq!(job.conclusion, Some(Conclusion::SystemFailure));
        let reason = job.failure_reason.unwrap();
        assert!(reason.contains("256 MiB") && reason.contains("machine_config.mem_size_mib"), "{reason}");
    }

    #[test]
    fn a_job_that_has_to_wait_says_for_what() {
        let mut bench = Bench::new();
        queue_job(&mut bench.jobs, 1);
        let second = queue_job(&mut bench.jobs, 2);
        bench.poll(0);
        let waits = |bench: &Bench| {
            let job = bench.jobs.get(second).unwrap();
            (job.status, job.queue_position, job.waiting_for)
        };
        assert_eq!(waits(&bench), (Status::Queued, Some(1), Some(WaitingFor::Machines)));
        bench.machines.limit = 2;
        bench.machines.refuse = Some(CreateError::Busy(WaitingFor::Memory));
        bench.poll(1);
        assert_eq!(waits(&bench), (Status::Queued, Some(1), Some(WaitingFor::Memory)));
        bench.machines.refuse = None;
        bench.poll(2);
        assert_eq!(waits(&bench), (Status::InProgress, None, None));
    }

    #[test]
    fn a_cancelled_job_loses_its_machine_before_its_agent_was_ready() {
        let mut bench = Bench::new();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.jobs.cancel(id, at(1)).unwrap();
        bench.poll(1);
        assert_eq!(bench.jobs.get(id).unwrap().conclusion, Some(Conclusion::Cancelled));
        assert!(bench.machines.alive.is_empty());
    }

    #[test]
    fn the_first_machine_becomes_a_template_whose_clones_take_the_jobs_on_from_the_agents_hello() {
        let mut bench = Bench::with_templates();
        let first = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.poll(5);
        assert!(bench.machines.templates.is_empty(), "nobody has connected");
        bench.hello(1);
        bench.poll(10);
        assert_eq!((bench.machines.templates.len(), bench.machines.alive.len()), (1, 1));
        bench.poll(11);
        let timings = bench.jobs.get(first).unwrap().timings;
        assert_eq!(
            (timings.queued_ms, timings.cloned_ms, timings.agent_ready_ms),
            (Some(0), Some(10), Some(10))
        );
        let second = queue_job(&mut bench.jobs, 2);
        bench.poll(20);
        bench.poll(21);
        assert_eq!((bench.machines.clones[&2], bench.machines.clones[&3]), (1, 1));
        bench.finish(2, 22);
        bench.finish(3, 23);
        for job in [first, second] {
            assert_eq!(bench.jobs.get(job).unwrap().conclusion, Some(Conclusion::Success));
        }
        assert!(bench.machines.alive.is_empty() && bench.machines.templates.len() == 1);
    }

    #[test]
    fn a_machine_that_does_not_come_to_rest_is_the_jobs_own_and_the_next_ones_boot() {
        let mut bench = Bench::with_templates();
        bench.machines.unrest = Some("the disk has requests");
        let first = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.hello(1);
        bench.poll(1);
        bench.poll(2000);
        assert!(bench.machines.alive[&1].from_node.is_empty(), "it still may");
        bench.poll(3100);
        bench.poll(3101);
        bench.finish(1, 3102);
        let job = bench.jobs.get(first).unwrap();
        assert_eq!((job.conclusion, job.timings.cloned_ms), (Some(Conclusion::Success), None));
        bench.machines.unrest = None;
        queue_job(&mut bench.jobs, 2);
        bench.poll(3200);
        bench.hello(2);
        bench.poll(3201);
        assert!(bench.machines.templates.is_empty());
    }

    #[test]
    fn a_busy_machine_is_given_a_while_to_settle_and_then_frozen_all_the_same() {
        let mut bench = Bench::with_templates();
        bench.machines.busy = true;
        queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.hello(1);
        bench.poll(1);
        assert!(bench.machines.templates.is_empty() && bench.engine.deadline(at(1)).is_some());
        bench.poll(1100);
        assert_eq!(bench.machines.templates.len(), 1);
        assert_eq!(bench.engine.deadline(at(1100)), None);
    }

    #[test]
    fn a_job_that_ends_while_its_machine_boots_leaves_no_template_and_no_trace_of_one() {
        let mut bench = Bench::with_templates();
        let id = queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.jobs.cancel(id, at(1)).unwrap();
        bench.poll(1);
        assert!(bench.machines.alive.is_empty());
        queue_job(&mut bench.jobs, 2);
        bench.poll(2);
        bench.hello(2);
        bench.poll(3);
        assert_eq!(bench.machines.templates.len(), 1, "the next one makes it");
    }

    #[test]
    fn templates_nobody_uses_go_when_a_machine_needs_their_memory_or_others_their_budget() {
        let mut bench = Bench::with_templates();
        bench.images.push(image("other"));
        bench.images[1].sha256.insert("kernel".into(), "1".into());
        queue_job(&mut bench.jobs, 1);
        bench.poll(0);
        bench.hello(1);
        bench.poll(1);
        bench.poll(2);
        bench.finish(2, 3);
        assert_eq!(bench.machines.templates.len(), 1);
        // Another digest of the same image is another template: together they are over the budget.
        bench.images[0].sha256.insert("kernel".into(), "2".into());
        queue_job(&mut bench.jobs, 2);
        bench.poll(4);
        bench.hello(3);
        bench.poll(5);
        bench.poll(6);
        assert_eq!(bench.machines.templates.keys().copied().collect::<Vec<_>>(), [3]);
        bench.finish(4, 7);
        bench.machines.refuse = Some(CreateError::Busy(WaitingFor::Memory));
        let refused = queue_job(&mut bench.jobs, 3);
        bench.poll(8);
        assert!(bench.machines.templates.is_empty());
        assert_eq!(bench.jobs.get(refused).unwrap().conclusion, Some(Conclusion::SystemFailure));
    }
}
