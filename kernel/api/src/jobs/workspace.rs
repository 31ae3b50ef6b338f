//! A job's workspace on its way from a client into the machine.
//!
//! The tar goes through in small pieces: what has come is framed for the agent at once, and no more is taken from the client
//! than [`AHEAD`] bytes that the machine has yet to take. So the node never holds a workspace, however large, and a client
//! sends as fast as the machine unpacks. The client is known by a [`WorkspaceSender`]: when that is dropped before the tar's
//! end, the client is gone.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};

use super::record::Record;
use super::{JobId, JobStore, not_found};
use crate::agent::{HostMessage, MAX_PAYLOAD, WorkspaceUnpacked};
use crate::error::{ApiError, ErrorCode};
use crate::time::{Clock, SECOND};
use crate::types::{Conclusion, Status, Workspace, WorkspaceStatus};

/// How long a machine that is ready waits for a client to begin.
pub(super) const BEGIN_NS: u64 = 60 * SECOND;
/// Bytes of the tar that are taken ahead of the machine.
const AHEAD: usize = MAX_PAYLOAD;

/// The client that sends a job's workspace. Dropping it before the end tells the job that the client is gone.
#[derive(Debug)]
pub struct WorkspaceSender {
    job: JobId,
    /// Lives as long as the sender.
    life: Arc<()>,
}

/// What a sender has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upload {
    /// Wait: the job has no machine yet, or the machine is busy with what it has, or unpacks the last of it.
    Waiting,
    /// Send so many bytes.
    Wanted(usize),
    /// Nothing: the workspace is in the machine.
    Unpacked(Workspace),
}

/// A workspace while its job lives.
#[derive(Debug, Default)]
pub(super) struct Arrival {
    stage: Stage,
    bytes: u64,
    sender: Weak<()>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing has come.
    #[default]
    Awaited,
    /// Some of it has come.
    Arriving,
    /// All of it has come; the agent unpacks the last of it.
    Sent,
    Unpacked {
        entries: u64,
    },
    /// It could not be unpacked, or the rest will not come.
    Failed,
    /// The job ended otherwise.
    Late,
}

impl Arrival {
    fn show(&self, machine_is_ready: bool) -> Workspace {
        let (status, entries) = match self.stage {
            Stage::Awaited if machine_is_ready => (WorkspaceStatus::Awaited, None),
            Stage::Awaited => (WorkspaceStatus::Pending, None),
            Stage::Arriving | Stage::Sent => (WorkspaceStatus::Arriving, None),
            Stage::Unpacked { entries } => (WorkspaceStatus::Unpacked, Some(entries)),
            Stage::Failed | Stage::Late => (WorkspaceStatus::Failed, None),
        };
        Workspace { status, bytes: self.bytes, entries }
    }

    fn has_sender(&self) -> bool {
        self.sender.strong_count() > 0
    }

    /// The job is over.
    pub(super) fn job_ended(&mut self) {
        if !matches!(self.stage, Stage::Unpacked { .. } | Stage::Failed) {
            self.stage = Stage::Late;
        }
    }
}

impl JobStore {
    /// A client that will send a job's workspace, so many bytes of it if it knows.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`], [`ErrorCode::JobCompleted`], [`ErrorCode::WorkspaceNotExpected`] when the job takes none or
    /// already has one, [`ErrorCode::BodyTooLarge`].
    pub fn open_workspace(&mut self, id: JobId, length: Option<u64>) -> Result<WorkspaceSender, ApiError> {
        let limit = self.limits.workspace_bytes;
        let record = self.jobs.get_mut(&id).ok_or_else(|| not_found(&id.to_string()))?;
        if record.job.status == Status::Completed {
            return Err(record.workspace_error());
        }
        let refused = |what: &str| ApiError::new(ErrorCode::WorkspaceNotExpected, format!("job {id} {what}"));
        let Some(arrival) = &mut record.workspace else {
            return Err(refused("takes no workspace; create it with \"workspace\": true"));
        };
        // A client that was gone before it sent anything leaves its place to another.
        if arrival.stage != Stage::Awaited || arrival.has_sender() {
            return Err(refused("was given a workspace already; it takes one"));
        }
        if let Some(length) = length.filter(|length| *length > limit) {
            return Err(too_large(length, limit));
        }
        let sender = WorkspaceSender { job: id, life: Arc::new(()) };
        arrival.sender = Arc::downgrade(&sender.life);
        Ok(sender)
    }

    /// What the sender has to do next. Ask again whenever jobs went on.
    ///
    /// # Errors
    /// Why the workspace will never be in the machine: [`ErrorCode::WorkspaceFailed`] or [`ErrorCode::JobCompleted`], with the
    /// job's reason.
    pub fn upload(&self, sender: &WorkspaceSender) -> Result<Upload, ApiError> {
        let record = self.record(sender.job)?;
        let Some(arrival) = &record.workspace else { return Err(record.workspace_error()) };
        if matches!(arrival.stage, Stage::Unpacked { .. }) {
            return Ok(Upload::Unpacked(arrival.show(true)));
        }
        if record.job.status == Status::Completed || arrival.stage == Stage::Failed {
            return Err(record.workspace_error());
        }
        let run = record.run.as_ref();
        if run.is_some_and(|run| run.verdict().is_some()) {
            return Err(record.workspace_error());
        }
        let room =
            run.filter(|run| run.takes_workspace()).map(|run| AHEAD.saturating_sub(run.transmit().len()));
        Ok(match room {
            Some(room @ 1..) if arrival.stage != Stage::Sent => Upload::Wanted(room),
            _ => Upload::Waiting,
        })
    }

    /// The next bytes of the tar, no more than were [`Upload::Wanted`].
    ///
    /// # Errors
    /// [`ErrorCode::BodyTooLarge`]: the job ends with that reason.
    pub fn push_workspace(&mut self, sender: &WorkspaceSender, bytes: &[u8]) -> Result<(), ApiError> {
        let limit = self.limits.workspace_bytes;
        let Some(record) = self.jobs.get_mut(&sender.job) else { return Ok(()) };
        let (Some(arrival), Some(run)) = (&mut record.workspace, &mut record.run) else { return Ok(()) };
        if bytes.is_empty() || !run.takes_workspace() {
            return Ok(());
        }
        arrival.stage = Stage::Arriving;
        arrival.bytes = arrival.bytes.saturating_add(bytes.len() as u64);
        if arrival.bytes > limit {
            let error = too_large(arrival.bytes, limit);
            record.workspace_failed(&error.message);
            return Err(error);
        }
        for part in bytes.chunks(MAX_PAYLOAD) {
            run.say(&HostMessage::WorkspaceData(part.to_vec()));
        }
        Ok(())
    }

    /// That was the whole tar.
    pub fn end_workspace(&mut self, sender: &WorkspaceSender) {
        let Some(record) = self.jobs.get_mut(&sender.job) else { return };
        if let (Some(arrival), Some(run)) = (&mut record.workspace, &mut record.run)
            && run.takes_workspace()
            && matches!(arrival.stage, Stage::Awaited | Stage::Arriving)
        {
            arrival.stage = Stage::Sent;
            run.say(&HostMessage::WorkspaceEnd);
        }
    }

    /// The sender will not go on, for this reason. A job that has some of the tar ends with it.
    pub fn abort_workspace(&mut self, sender: WorkspaceSender, why: &str) {
        if let Some(record) = self.jobs.get_mut(&sender.job) {
            record.sender_is_gone(why);
        }
    }
}

impl Record {
    /// What the API shows of the workspace.
    pub(super) fn show_workspace(&self) -> Option<Workspace> {
        let ready = self.run.as_ref().is_some_and(super::run::Run::takes_workspace);
        self.workspace.as_ref().map(|arrival| arrival.show(ready))
    }

    /// The agent has unpacked it all. False when it cannot have.
    pub(super) fn workspace_unpacked(&mut self, said: WorkspaceUnpacked) -> bool {
        match &mut self.workspace {
            Some(arrival) if arrival.stage == Stage::Sent => {
                arrival.stage = Stage::Unpacked { entries: said.entries };
                true
            }
            _ => false,
        }
    }

    /// The job ends without having run: its workspace is not there.
    pub(super) fn workspace_failed(&mut self, why: &str) {
        if let Some(arrival) = &mut self.workspace {
            arrival.stage = Stage::Failed;
        }
        let reason = format!("the workspace could not be unpacked: {why}");
        if let Some(run) = &mut self.run {
            run.end(Conclusion::Failure, None, Some(reason));
        }
    }

    /// Ends a job whose workspace will not come (any further).
    pub(super) fn workspace_timers(&mut self, begin_by: u64, now: Clock) {
        let Some(arrival) = &self.workspace else { return };
        if arrival.has_sender() {
            return;
        }
        if arrival.stage == Stage::Arriving {
            self.sender_is_gone("its connection was closed");
        } else if arrival.stage == Stage::Awaited && now.monotonic_ns >= begin_by {
            let seconds = BEGIN_NS / SECOND;
            self.workspace_failed(&format!(
                "nobody sent it within {seconds} s of the machine's being ready; PUT it to /v1/jobs/{}/workspace",
                self.id
            ));
        }
    }

    fn sender_is_gone(&mut self, why: &str) {
        let Some(arrival) = &mut self.workspace else { return };
        arrival.sender = Weak::new();
        if arrival.stage == Stage::Arriving {
            let bytes = arrival.bytes;
            self.workspace_failed(&format!("the client that sent it was gone after {bytes} bytes: {why}"));
        }
    }

    /// The answer to a client whose workspace is not wanted (any more).
    fn workspace_error(&self) -> ApiError {
        let failed = self.workspace.as_ref().is_some_and(|arrival| arrival.stage == Stage::Failed);
        let verdict = self.run.as_ref().and_then(|run| run.verdict());
        let reason =
            verdict.and_then(|verdict| verdict.reason.clone()).or_else(|| self.job.failure_reason.clone());
        let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
        let code = if failed { ErrorCode::WorkspaceFailed } else { ErrorCode::JobCompleted };
        ApiError::new(code, format!("job {} is over{reason}", self.id))
    }
}

fn too_large(bytes: u64, limit: u64) -> ApiError {
    let message = format!(
        "the workspace has {bytes} bytes or more as a tar; this node takes {limit} ({} MiB) at most: leave out what the job \
         does not need",
        limit >> 20
    );
    ApiError::new(ErrorCode::BodyTooLarge, message)
}
