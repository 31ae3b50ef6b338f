//! The job engine's side of the store: which job is next, what its agent and its machine do, when it is over.
//!
//! A job's way: [`JobStore::next_queued`], a machine is made, [`JobStore::start`], bytes are carried between the agent and
//! [`JobStore::receive`] and [`JobStore::transmit`], [`JobStore::poll`] at [`JobStore::deadline`], until
//! [`JobStore::finished`] or the machine ends by itself; then the machine is destroyed and [`JobStore::machine_ended`] called.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Weak;
use alloc::vec::Vec;

use super::artifacts::Keeping;
use super::reader::Follower;
use super::record::Record;
use super::run::{Run, WINDOW};
use super::{JobId, JobStore};
use crate::agent::{HEADER_LEN, MAX_PAYLOAD};
use crate::egress::Egress;
use crate::time::{Clock, rfc3339};
use crate::types::{Conclusion, MachineConfig, Status, WaitingFor};

/// Bytes of console kept with a job that lost its machine.
const MAX_CONSOLE: usize = 4096;
/// Below this room for output the agent is held back altogether.
const LEAST_ROOM: usize = MAX_PAYLOAD + HEADER_LEN;

/// The job that is next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuedJob {
    /// The job.
    pub id: JobId,
    /// The image its machine boots.
    pub image: String,
    /// Its machine's size.
    pub machine_config: MachineConfig,
    /// What its machine may reach.
    pub egress: Egress,
    /// Its machine is to boot though there is a template.
    pub cold: bool,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The engine destroyed it, once [`JobStore::finished`] said so.
    Destroyed,
    /// The guest powered it off.
    PowerOff,
    /// The guest reset it, as its kernel does after a panic.
    Reset,
    /// Its processor shut down after a fault it could not handle.
    TripleFault,
    /// A device was driven in a way that cannot be served.
    DeviceFault(String),
    /// The node could not go on with it.
    InternalError(String),
}

/// What is known of a machine that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineReport {
    /// How it ended.
    pub end: MachineEnd,
    /// The last lines of its console.
    pub console_tail: String,
    /// Exits of its vCPUs by kind; their sum is added as `total` when it is not there.
    pub exits: BTreeMap<String, u64>,
    /// Most MiB of the node's memory that backed it at once.
    pub peak_mib: Option<u64>,
    /// What went wrong with its disk, which may be why a step failed.
    pub disk_problem: Option<String>,
}

impl JobStore {
    /// The job that is next, if one waits. It stays queued until [`JobStore::start`].
    #[must_use]
    pub fn next_queued(&self) -> Option<QueuedJob> {
        let record = self.jobs.get(self.queue.front()?)?;
        Some(QueuedJob {
            id: record.id,
            image: record.job.image.clone(),
            machine_config: record.job.machine_config,
            egress: record.job.network.egress.clone(),
            cold: record.cold,
        })
    }

    /// The job that is next cannot have its machine yet, for want of this.
    pub fn waits_for(&mut self, id: JobId, what: WaitingFor) {
        if let Some(record) = self.jobs.get_mut(&id).filter(|record| record.job.status == Status::Queued) {
            record.job.waiting_for = Some(what);
        }
    }

    /// A queued job has got its machine. False when it is not queued (any more): destroy the machine then.
    pub fn start(&mut self, id: JobId, now: Clock) -> bool {
        let Some(record) = self.jobs.get_mut(&id).filter(|record| record.job.status == Status::Queued) else {
            return false;
        };
        record.job.status = Status::InProgress;
        record.job.waiting_for = None;
        record.job.started_at = Some(rfc3339(now.unix_ns));
        record.job.timings.queued_ms = Some(record.elapsed_ms(now));
        record.run = Some(Run::new(record.job.timeout_seconds, now));
        self.queue.retain(|queued| *queued != id);
        self.running.push(id);
        true
    }

    /// A job in progress has got a clone of a template for its machine, whose randomness is to start from `entropy`.
    pub fn cloned(&mut self, id: JobId, entropy: [u8; 32], now: Clock) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let elapsed = record.elapsed_ms(now);
        if let Some(run) = &mut record.run {
            run.is_clone(entropy);
            record.job.timings.cloned_ms = Some(elapsed);
        }
    }

    /// What a job's machine may reach.
    #[must_use]
    pub fn egress(&self, id: JobId) -> Egress {
        self.jobs.get(&id).map(|record| record.job.network.egress.clone()).unwrap_or_default()
    }

    /// A job that cannot get a machine: it ends as a system failure for this reason.
    pub fn fail(&mut self, id: JobId, reason: &str, now: Clock) {
        if self.jobs.get(&id).is_some_and(|record| record.job.status != Status::Completed) {
            self.conclude(id, Conclusion::SystemFailure, reason, now);
        }
    }

    /// Jobs in progress.
    pub fn running(&self) -> impl Iterator<Item = JobId> {
        self.running.iter().copied()
    }

    /// The agent of a job's machine has connected. It still has to say hello.
    pub fn agent_connected(&mut self, id: JobId) {
        if let Some(run) = self.jobs.get_mut(&id).and_then(|record| record.run.as_mut()) {
            run.agent_connected();
        }
    }

    /// The agent's connection is gone.
    pub fn agent_disconnected(&mut self, id: JobId, now: Clock) {
        if let Some(record) = self.jobs.get_mut(&id) {
            record.agent_hung_up(now);
        }
    }

    /// Bytes from the agent that [`JobStore::receive`] takes now; 0 holds the agent, and with it the job, back.
    ///
    /// A reader that follows the log and cannot keep up makes it smaller as long as it reads at all, and no more than a
    /// minute of a job in all.
    #[must_use]
    pub fn receive_capacity(&mut self, id: JobId, now: Clock) -> usize {
        let Some(record) = self.jobs.get_mut(&id) else { return 0 };
        let Some(run) = record.run.as_ref().filter(|run| run.verdict().is_none()) else { return 0 };
        let buffered = run.decoder.buffered();
        let files = record.artifacts.as_ref().and_then(|keeping| keeping.room(buffered));
        let mut capacity = WINDOW.saturating_sub(buffered).min(files.unwrap_or(WINDOW));
        let mut held = false;
        for follower in lagging(record, now).filter(|_| run.may_be_held(now)) {
            let kept = record.log.memory_from(follower);
            // A byte on the wire takes up to three in the log when the streams alternate, and vectors grow by doubling.
            // What the decoder keeps enters the log whole once its frame is complete, so a frame's room is kept free.
            let room = self.limits.log_bytes.saturating_sub(kept) / 4;
            held |= room < LEAST_ROOM;
            capacity = capacity.min(room.saturating_sub(buffered));
        }
        if let Some(run) = &mut record.run {
            run.set_held(held, now);
        }
        if held { 0 } else { capacity }
    }

    /// Takes bytes from the agent, no more than [`JobStore::receive_capacity`].
    pub fn receive(&mut self, id: JobId, bytes: &[u8], now: Clock) {
        let room = self.limits.jobs_total_bytes.saturating_sub(self.weight());
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let before = record.log.memory();
        record.agent_sent(bytes, room, now);
        self.bound_logs(id, before);
    }

    /// Bytes for the agent.
    #[must_use]
    pub fn transmit(&self, id: JobId) -> &[u8] {
        let run = self.jobs.get(&id).and_then(|record| record.run.as_ref());
        run.map(Run::transmit).unwrap_or_default()
    }

    /// The first `len` bytes of [`JobStore::transmit`] are on their way.
    pub fn transmitted(&mut self, id: JobId, len: usize) {
        if let Some(run) = self.jobs.get_mut(&id).and_then(|record| record.run.as_mut()) {
            run.transmitted(len);
        }
    }

    /// Figures of a machine that runs, for those who look at the job meanwhile.
    pub fn update(&mut self, id: JobId, exits: BTreeMap<String, u64>, peak_mib: Option<u64>) {
        if let Some(record) = self.jobs.get_mut(&id).filter(|record| record.run.is_some()) {
            set_figures(record, exits, peak_mib);
        }
    }

    /// Ends what has taken too long.
    pub fn poll(&mut self, now: Clock) {
        for id in &self.running {
            if let Some(record) = self.jobs.get_mut(id) {
                record.run_timers(now);
            }
        }
    }

    /// When [`JobStore::poll`] next has something to do, or a held back agent may send again; monotonic nanoseconds.
    #[must_use]
    pub fn deadline(&self, now: Clock) -> Option<u64> {
        let records = self.running.iter().filter_map(|id| self.jobs.get(id));
        let deadline = |record: &Record| {
            let patience = record.followers.iter().filter_map(Weak::upgrade).filter_map(|follower| {
                let ends = follower.patience_ends();
                (follower.cursor() < record.log.end() && ends > now.monotonic_ns).then_some(ends)
            });
            let run = record.run.as_ref();
            let files = record.artifacts.as_ref().filter(|_| run.is_some_and(Run::keeps_artifacts));
            let others = files.map(Keeping::deadline).into_iter().chain(patience);
            run.and_then(Run::deadline).into_iter().chain(others).min()
        };
        records.filter_map(deadline).min()
    }

    /// Whether a job's result is known, so that its machine can go.
    #[must_use]
    pub fn finished(&self, id: JobId) -> bool {
        self.jobs.get(&id).is_none_or(|record| record.run.as_ref().is_none_or(|run| run.verdict().is_some()))
    }

    /// A job's machine is gone: the job is over, with the result it had or without one.
    pub fn machine_ended(&mut self, id: JobId, report: MachineReport, now: Clock) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        let Some(run) = &record.run else { return };
        let verdict = run.verdict().or(run.result()).cloned();
        let place = record.place();
        set_figures(record, report.exits, report.peak_mib);
        let (conclusion, reason) = match verdict {
            Some(verdict) => {
                record.job.exit_code = verdict.exit_code;
                (verdict.conclusion, verdict.reason.unwrap_or_default())
            }
            None => (Conclusion::SystemFailure, format!("{}{place}", describe(&report.end))),
        };
        let reason = match report.disk_problem {
            Some(problem) if conclusion != Conclusion::Success && reason.is_empty() => problem,
            Some(problem) if conclusion != Conclusion::Success => format!("{reason}; {problem}"),
            _ => reason,
        };
        if conclusion == Conclusion::SystemFailure && !report.console_tail.is_empty() {
            record.job.console = Some(tail(&report.console_tail));
        }
        self.conclude(id, conclusion, &reason, now);
    }
}

/// The offsets of readers that are behind, and still hold the job back.
fn lagging(record: &Record, now: Clock) -> impl Iterator<Item = u64> {
    let alive: Vec<_> = record.followers.iter().filter_map(Weak::upgrade).collect();
    let end = record.log.end();
    let held_back = move |follower: &alloc::sync::Arc<Follower>| {
        follower.cursor() < end && follower.patience_ends() > now.monotonic_ns
    };
    alive.into_iter().filter(held_back).map(|follower| follower.cursor())
}

fn set_figures(record: &mut Record, mut exits: BTreeMap<String, u64>, peak_mib: Option<u64>) {
    if !exits.contains_key("total") {
        let total = exits.values().fold(0_u64, |total, count| total.saturating_add(*count));
        exits.insert("total".to_string(), total);
    }
    record.job.exits = exits;
    if peak_mib.is_some() {
        record.job.memory.peak_mib = peak_mib;
    }
}

fn describe(end: &MachineEnd) -> String {
    match end {
        MachineEnd::Destroyed => "the machine was destroyed".to_string(),
        MachineEnd::PowerOff => "the machine powered itself off".to_string(),
        MachineEnd::Reset => "the machine reset itself, as after a kernel panic,".to_string(),
        MachineEnd::TripleFault => "the machine's processor shut down after a triple fault".to_string(),
        MachineEnd::DeviceFault(what) => format!("the machine drove a device wrongly ({what})"),
        MachineEnd::InternalError(what) => format!("the node could not go on with the machine ({what})"),
    }
}

/// The end of a console, from the start of a line.
fn tail(console: &str) -> String {
    let mut start = console.len().saturating_sub(MAX_CONSOLE);
    while !console.is_char_boundary(start) {
        start = start.saturating_add(1);
    }
    let kept = console.get(start..).unwrap_or_default();
    let line = if start > 0 { kept.find('\n').map_or(0, |newline| newline.saturating_add(1)) } else { 0 };
    kept.get(line..).unwrap_or(kept).to_string()
}
