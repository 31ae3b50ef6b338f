//! Jobs: what was asked for, what runs, what became of it.
//!
//! [`JobStore`] is one table with two sides. The HTTP side ([`JobStore::create`], [`JobStore::get`], [`JobStore::cancel`], ...)
//! is in this file, the job engine's side ([`JobStore::start`], [`JobStore::receive`], [`JobStore::machine_ended`], ...)
//! in `engine.rs`. A job becomes `completed` only when its machine is gone, so whoever sees that sees the memory back too.

mod artifacts;
mod connections;
mod engine;
mod id;
mod reader;
mod record;
pub mod request;
mod run;
#[cfg(test)]
mod tests;
mod workspace;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

pub use artifacts::ArtifactReader;
pub use connections::ConnectionRecord;
pub use engine::{MachineEnd, MachineReport, QueuedJob};
pub use id::JobId;
pub use reader::{LogReader, MIN_ROOM, ReadOptions, ReadState, Streams};
pub use workspace::{Upload, WorkspaceSender};

use record::Record;
use request::Plan;

use crate::config::Limits;
use crate::error::{ApiError, ErrorCode};
use crate::time::Clock;
use crate::types::{Conclusion, Job, LogInfo, Status, WaitingFor};

/// Most readers of one job's log that can hold it back.
const MAX_FOLLOWERS: usize = 64;

/// All jobs of a node.
#[derive(Debug)]
pub struct JobStore {
    limits: Limits,
    jobs: BTreeMap<JobId, Record>,
    /// All jobs, oldest first.
    order: VecDeque<JobId>,
    /// Those that wait, next first.
    queue: VecDeque<JobId>,
    /// Those that are over, first over first.
    completed: VecDeque<JobId>,
    /// Those that run.
    running: Vec<JobId>,
    idempotency_keys: BTreeMap<String, (JobId, u64)>,
    logs_total: usize,
}

/// What [`JobStore::create`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// There is a new job.
    New(JobId),
    /// The same request came before, under the same `Idempotency-Key`; this is its job.
    Before(JobId),
}

impl Created {
    /// The job, new or not.
    #[must_use]
    pub fn id(self) -> JobId {
        match self {
            Self::New(id) | Self::Before(id) => id,
        }
    }
}

impl JobStore {
    /// No jobs.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            jobs: BTreeMap::new(),
            order: VecDeque::new(),
            queue: VecDeque::new(),
            completed: VecDeque::new(),
            running: Vec::new(),
            idempotency_keys: BTreeMap::new(),
            logs_total: 0,
        }
    }

    /// The job a request with this key made before.
    ///
    /// # Errors
    /// [`ErrorCode::IdempotencyKeyReused`] when that request was another one, going by its fingerprint.
    pub fn created_before(&self, key: &str, fingerprint: u64) -> Result<Option<JobId>, ApiError> {
        match self.idempotency_keys.get(key) {
            None => Ok(None),
            Some((id, known)) if *known == fingerprint => Ok(Some(*id)),
            Some((id, _)) => {
                let message = format!(
                    "this Idempotency-Key was used for another request, which made job {id}; use a new key for a new job"
                );
                Err(ApiError::new(ErrorCode::IdempotencyKeyReused, message))
            }
        }
    }

    /// Queues a job.
    ///
    /// # Errors
    /// [`ErrorCode::IdempotencyKeyReused`], [`ErrorCode::QueueFull`], and [`ErrorCode::Internal`] should `id` be taken.
    pub fn create(
        &mut self,
        id: JobId,
        plan: Plan,
        key: Option<(String, u64)>,
        now: Clock,
    ) -> Result<Created, ApiError> {
        if let Some((key, fingerprint)) = &key
            && let Some(id) = self.created_before(key, *fingerprint)?
        {
            return Ok(Created::Before(id));
        }
        if self.jobs.contains_key(&id) {
            return Err(ApiError::new(ErrorCode::Internal, "the node's random numbers repeat; try again"));
        }
        if self.queue.len() >= self.limits.queued_jobs {
            return Err(queue_full(&format!("{} jobs are queued already", self.queue.len())));
        }
        let record = Record::new(id, plan, key.as_ref().map(|(key, _)| key.clone()), now);
        self.make_room_for(record.weight)?;
        if let Some((key, fingerprint)) = key {
            self.idempotency_keys.insert(key, (id, fingerprint));
        }
        self.jobs.insert(id, record);
        self.order.push_back(id);
        self.queue.push_back(id);
        Ok(Created::New(id))
    }

    /// Drops completed jobs, oldest first, until the descriptions of all have room for one more.
    fn make_room_for(&mut self, weight: usize) -> Result<(), ApiError> {
        let total = self.weight().saturating_add(weight);
        let Some(mut excess) = total.checked_sub(self.limits.jobs_total_bytes) else { return Ok(()) };
        let mut in_the_way = 0_usize;
        for id in &self.completed {
            if excess == 0 {
                break;
            }
            excess = excess.saturating_sub(self.jobs.get(id).map_or(0, |record| record.weight));
            in_the_way = in_the_way.saturating_add(1);
        }
        // Nothing is dropped for a job that is refused all the same.
        if excess > 0 {
            return Err(queue_full("the descriptions of queued jobs take all the memory there is for them"));
        }
        for _ in 0..in_the_way {
            let Some(oldest) = self.completed.front().copied() else { break };
            self.remove(oldest);
        }
        Ok(())
    }

    /// Bytes that all jobs' descriptions take, roughly.
    fn weight(&self) -> usize {
        self.jobs.values().fold(0, |total, record| total.saturating_add(record.weight))
    }

    /// How many jobs there are, of this status or all.
    #[must_use]
    pub fn count(&self, status: Option<Status>) -> usize {
        match status {
            None => self.jobs.len(),
            Some(Status::Queued) => self.queue.len(),
            Some(Status::InProgress) => self.running.len(),
            Some(Status::Completed) => self.completed.len(),
        }
    }

    /// Jobs of this status or all, newest first.
    pub fn list(&self, status: Option<Status>) -> impl Iterator<Item = JobId> {
        let wanted = move |id: &&JobId| {
            status.is_none_or(|status| self.jobs.get(id).is_some_and(|record| record.job.status == status))
        };
        self.order.iter().rev().filter(wanted).copied()
    }

    /// A job as the API shows it.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`].
    pub fn get(&self, id: JobId) -> Result<Job, ApiError> {
        let record = self.record(id)?;
        let mut job = record.job.clone();
        job.log = record.log.info();
        job.workspace = record.show_workspace();
        job.artifacts = record.show_artifacts();
        job.connections = record.connections.counts();
        if job.status == Status::Queued {
            let position = self.queue.iter().zip(1..).find(|(queued, _)| **queued == id);
            job.queue_position = position.map(|(_, position)| position);
            if position.is_some_and(|(_, position)| position > 1) {
                job.waiting_for = Some(WaitingFor::EarlierJobs);
            }
        }
        Ok(job)
    }

    /// What is kept of a job's log.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`].
    pub fn log_info(&self, id: JobId) -> Result<LogInfo, ApiError> {
        self.record(id).map(|record| record.log.info())
    }

    /// Where a job stands.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`].
    pub fn status(&self, id: JobId) -> Result<Status, ApiError> {
        self.record(id).map(|record| record.job.status)
    }

    /// Cancels a job: at once while it is queued, in its own time while it runs. Cancelling twice is the same as once.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`], [`ErrorCode::JobCompleted`].
    pub fn cancel(&mut self, id: JobId, now: Clock) -> Result<(), ApiError> {
        match self.record(id)?.job.status {
            Status::Completed => {
                let message = format!("job {id} is completed; there is nothing to cancel");
                return Err(ApiError::new(ErrorCode::JobCompleted, message));
            }
            Status::Queued => self.conclude(id, Conclusion::Cancelled, run::CANCELLED, now),
            Status::InProgress => {
                if let Some(record) = self.jobs.get_mut(&id) {
                    record.cancel_run(now);
                }
            }
        }
        Ok(())
    }

    /// Forgets a job that is over, and its log.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`], [`ErrorCode::JobNotCompleted`].
    pub fn delete(&mut self, id: JobId) -> Result<(), ApiError> {
        let status = self.record(id)?.job.status;
        if status != Status::Completed {
            let status = status.as_str();
            let message = format!("job {id} is {status}; cancel it and wait until it is completed");
            return Err(ApiError::new(ErrorCode::JobNotCompleted, message));
        }
        self.remove(id);
        Ok(())
    }

    /// A reader of a job's log. One that follows holds the job back when it cannot keep up.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`].
    pub fn open_log(&mut self, id: JobId, options: ReadOptions, now: Clock) -> Result<LogReader, ApiError> {
        let record = self.jobs.get_mut(&id).ok_or_else(|| not_found(&id.to_string()))?;
        let reader = LogReader::new(id, options, now);
        if let Some(follower) = &reader.follower
            && record.job.status != Status::Completed
        {
            record.followers.retain(|follower| follower.strong_count() > 0);
            if record.followers.len() < MAX_FOLLOWERS {
                record.followers.push(Arc::downgrade(follower));
            }
        }
        Ok(reader)
    }

    /// Appends the next part of a log to `out`, at most `room` bytes (no less than [`MIN_ROOM`]).
    pub fn read_log(&self, reader: &mut LogReader, out: &mut Vec<u8>, room: usize, now: Clock) -> ReadState {
        match self.jobs.get(&reader.id) {
            Some(record) => reader.read(&record.log, record.job.status == Status::Completed, out, room, now),
            None => ReadState::Lost,
        }
    }

    fn record(&self, id: JobId) -> Result<&Record, ApiError> {
        self.jobs.get(&id).ok_or_else(|| not_found(&id.to_string()))
    }

    /// Ends a job that has no machine (any more).
    fn conclude(&mut self, id: JobId, conclusion: Conclusion, reason: &str, now: Clock) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        if !reason.is_empty() {
            record.job.failure_reason = Some(reason.to_string());
        }
        record.complete(conclusion, now);
        self.queue.retain(|queued| *queued != id);
        self.running.retain(|running| *running != id);
        self.completed.push_back(id);
        while self.completed.len() > self.limits.completed_jobs {
            let Some(oldest) = self.completed.front().copied() else { break };
            self.remove(oldest);
        }
    }

    fn remove(&mut self, id: JobId) {
        let Some(record) = self.jobs.remove(&id) else { return };
        self.logs_total = self.logs_total.saturating_sub(record.log.memory());
        if let Some(key) = &record.idempotency_key {
            self.idempotency_keys.remove(key);
        }
        self.order.retain(|other| *other != id);
        self.completed.retain(|other| *other != id);
    }

    /// Keeps one job's log, and then all logs together, within their limits. Logs of jobs long over shrink first.
    fn bound_logs(&mut self, id: JobId, memory_before: usize) {
        let Some(record) = self.jobs.get_mut(&id) else { return };
        record.log.shrink_to(self.limits.log_bytes);
        self.logs_total = self.logs_total.saturating_add(record.log.memory()).saturating_sub(memory_before);
        let victims = self.completed.iter().chain(&self.running);
        for victim in victims {
            let Some(excess) = self.logs_total.checked_sub(self.limits.logs_total_bytes) else { break };
            let Some(record) = self.jobs.get_mut(victim) else { continue };
            let before = record.log.memory();
            record.log.shrink_to(before.saturating_sub(excess));
            self.logs_total = self.logs_total.saturating_add(record.log.memory()).saturating_sub(before);
        }
    }
}

/// The error for a job that is not there, named as the client named it.
pub(crate) fn not_found(id: &str) -> ApiError {
    let message =
        format!("there is no job '{id}'; it may have been deleted or dropped to make room for newer ones");
    ApiError::new(ErrorCode::JobNotFound, message)
}

fn queue_full(why: &str) -> ApiError {
    let message = format!("{why}; try again when some have run");
    ApiError::new(ErrorCode::QueueFull, message).with_header("Retry-After", "5")
}
