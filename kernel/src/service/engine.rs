//! The job engine: gives queued jobs machines, carries bytes between a job and its agent, and takes machines down.
//!
//! What a job is and how it ends is [`JobStore`]'s; what a machine is, the hypervisor's. This file only joins them.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use nestling_api::Clock;
use nestling_api::jobs::{JobId, JobStore, QueuedJob};
use nestling_api::time::MILLISECOND;

use super::images::Image;
use super::machines::{CreateError, MachineSpec, Machines};

/// How many bytes are carried in one step.
const CHUNK: usize = 32 * 1024;
/// How often a running job's exit counts and memory are brought up to date.
const FIGURES_INTERVAL_NS: u64 = 500 * MILLISECOND;

/// A job with its machine.
struct Run<Id> {
    job: JobId,
    machine: Id,
    connected: bool,
    hung_up: bool,
    figures_due: u64,
}

/// The jobs that have machines.
pub struct Engine<Id> {
    runs: Vec<Run<Id>>,
    buffer: Box<[u8]>,
}

impl<Id: Copy> Engine<Id> {
    /// No jobs.
    #[must_use]
    pub fn new() -> Self {
        Self { runs: Vec::new(), buffer: vec![0; CHUNK].into_boxed_slice() }
    }

    /// Jobs that have a machine now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.runs.len()
    }

    /// Does all there is to do now.
    pub fn poll<M: Machines<Id = Id>>(
        &mut self,
        jobs: &mut JobStore,
        images: &[Image],
        machines: &mut M,
        now: Clock,
    ) {
        jobs.poll(now);
        let Self { runs, buffer } = self;
        runs.retain_mut(|run| {
            run.carry(jobs, machines, buffer, now);
            if now.monotonic_ns >= run.figures_due {
                run.figures_due = now.monotonic_ns.saturating_add(FIGURES_INTERVAL_NS);
                let (exits, peak_mib) = machines.figures(run.machine);
                jobs.update(run.job, exits, peak_mib);
            }
            // A machine that has ended by itself may have left output that a slow reader of the log does not let through yet.
            let drained = machines.agent(run.machine).is_none_or(|agent| agent.readable() == 0);
            let over = jobs.finished(run.job) || (drained && machines.ended(run.machine).is_some());
            if over {
                let report = machines.destroy(run.machine);
                log::debug!("job {}: machine ended: {:?}", run.job, report.end);
                jobs.machine_ended(run.job, report, now);
            }
            !over
        });
        while self.runs.len() < machines.limit()
            && let Some(job) = jobs.next_queued()
        {
            match create(&job, images, machines) {
                Ok(machine) if jobs.start(job.id, now) => {
                    log::debug!(
                        "job {}: machine of {} MiB from image {}",
                        job.id,
                        job.machine_config.mem_size_mib,
                        job.image
                    );
                    self.runs.push(Run {
                        job: job.id,
                        machine,
                        connected: false,
                        hung_up: false,
                        figures_due: now.monotonic_ns,
                    });
                }
                Ok(machine) => drop(machines.destroy(machine)),
                // Another machine's end makes room.
                Err(CreateError::Busy) if !self.runs.is_empty() => break,
                Err(CreateError::Busy) => {
                    let reason = "the node has too little free memory for this machine although no other runs; ask for less in machine_config.mem_size_mib";
                    jobs.fail(job.id, reason, now);
                }
                Err(CreateError::Impossible(reason)) => {
                    log::warn!("job {}: no machine: {reason}", job.id);
                    jobs.fail(job.id, &reason, now);
                }
            }
        }
    }
}

impl<Id: Copy> Run<Id> {
    /// Moves bytes both ways for as long as both sides take them.
    fn carry<M: Machines<Id = Id>>(
        &mut self,
        jobs: &mut JobStore,
        machines: &mut M,
        buffer: &mut [u8],
        now: Clock,
    ) {
        let Some(agent) = machines.agent(self.machine) else { return };
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

fn create<M: Machines>(job: &QueuedJob, images: &[Image], machines: &mut M) -> Result<M::Id, CreateError> {
    let image = images.iter().find(|image| image.name == job.image).ok_or_else(|| {
        let names: Vec<_> = images.iter().map(|image| image.name.as_str()).collect();
        let names = if names.is_empty() { String::from("none") } else { names.join(", ") };
        CreateError::Impossible(alloc::format!("this node has no image '{}'; it has: {names}", job.image))
    })?;
    machines.create(&MachineSpec {
        kernel: image.kernel,
        initramfs: image.initramfs,
        command_line: &image.command_line,
        mem_size_mib: job.machine_config.mem_size_mib,
        vcpu_count: job.machine_config.vcpu_count,
    })
}
