//! A job's artifacts: files that its machine keeps after the last step until a client has fetched them.
//!
//! The node has no place for files. It keeps the machine instead, with the steps' result decided and safe, for
//! [`RETENTION_NS`] or until all artifacts were fetched; a client's GET makes the agent send them, and no more is taken from
//! the agent than [`BACKLOG`] bytes that the client has yet to take.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use super::reader::ReadState;
use super::record::Record;
use super::{JobId, JobStore, not_found};
use crate::agent::{
    self, AgentMessage, ArtifactsSent, HEADER_LEN, HostMessage, ListArtifacts, MAX_PAYLOAD, SendArtifacts,
};
use crate::error::{ApiError, ErrorCode};
use crate::json::short;
use crate::time::{Clock, SECOND};
use crate::types::{Artifact, ArtifactList, Artifacts, ArtifactsStatus};

/// How long artifacts that nobody fetches are kept.
pub(super) const RETENTION_NS: u64 = 60 * SECOND;
/// How long the agent may take to find them, or send nothing of what it was asked for.
const AGENT_NS: u64 = 60 * SECOND;
/// Bytes that the agent is ahead of the client, a frame's worth at least.
const BACKLOG: usize = MAX_PAYLOAD + HEADER_LEN + 16 * 1024;
/// Most bytes kept of a message the agent wrote.
const MAX_MESSAGE: usize = 1024;
/// Most bytes of an artifact's name that is listed.
const MAX_NAME: usize = 4096;

/// A client that reads artifacts. Dropping it before the end tells the job that the client is gone.
#[derive(Debug)]
pub struct ArtifactReader {
    job: JobId,
    life: Arc<()>,
}

/// A job's artifacts while it is known.
#[derive(Debug)]
pub(super) struct Keeping {
    /// The globs, until the agent has been told.
    patterns: Vec<String>,
    status: ArtifactsStatus,
    list: agent::ArtifactList,
    /// What is being sent.
    transfer: Option<Transfer>,
    /// When what is awaited now is not any more.
    deadline: u64,
}

#[derive(Debug)]
struct Transfer {
    /// All of them, not one.
    all: bool,
    reader: Weak<()>,
    /// From the agent, for the reader.
    bytes: Vec<u8>,
    taken: usize,
    /// The agent has sent all it will.
    sent: Option<ArtifactsSent>,
    /// The reader is gone, and the agent has been told so.
    stopping: bool,
}

impl Transfer {
    fn backlog(&self) -> usize {
        self.bytes.len().saturating_sub(self.taken)
    }
}

impl Keeping {
    pub(super) fn new(patterns: Vec<String>) -> Self {
        Self {
            patterns,
            status: ArtifactsStatus::Pending,
            list: agent::ArtifactList::default(),
            transfer: None,
            deadline: 0,
        }
    }

    /// Bytes of memory it takes, roughly.
    pub(super) fn weight(&self) -> usize {
        let patterns: usize = self.patterns.iter().map(|pattern| pattern.len() + size_of::<String>()).sum();
        let names: usize =
            self.list.artifacts.iter().map(|file| file.name.len() + size_of::<Artifact>()).sum();
        patterns + names + self.list.message.as_ref().map_or(0, String::len)
    }

    fn show(&self) -> Artifacts {
        Artifacts {
            status: self.status,
            total_count: self.list.total_count,
            total_bytes: self.list.total_bytes,
            message: self.list.message.clone(),
        }
    }

    /// The job is over, however far this is.
    pub(super) fn job_ended(&mut self) {
        self.transfer = None;
        let message = match self.status {
            ArtifactsStatus::Pending => "the job ended before its steps had",
            ArtifactsStatus::Gathering | ArtifactsStatus::Ready => {
                "the machine ended before they were fetched"
            }
            _ => return,
        };
        self.status = ArtifactsStatus::Failed;
        self.list.message.get_or_insert_with(|| message.to_string());
    }

    /// Bytes from the agent that are taken now, when artifacts are what it sends.
    pub(super) fn room(&self, buffered: usize) -> Option<usize> {
        let transfer = self.transfer.as_ref()?;
        Some(BACKLOG.saturating_sub(transfer.backlog()).saturating_sub(buffered))
    }

    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }
}

impl JobStore {
    /// What is known of a job's artifacts.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`], [`ErrorCode::ArtifactNotFound`] when it was created without.
    pub fn artifacts(&self, id: JobId) -> Result<ArtifactList, ApiError> {
        let keeping = self.record(id)?.artifacts.as_ref().ok_or_else(|| none_asked_for(id))?;
        let Artifacts { status, total_count, total_bytes, message } = keeping.show();
        let artifacts = keeping.list.artifacts.clone();
        let omitted_count = total_count.saturating_sub(artifacts.len() as u64);
        Ok(ArtifactList { status, total_count, total_bytes, omitted_count, message, artifacts })
    }

    /// A client that reads one artifact's bytes, or all of them as a tar. One reads at a time.
    ///
    /// # Errors
    /// [`ErrorCode::JobNotFound`], [`ErrorCode::ArtifactNotFound`], [`ErrorCode::ArtifactsNotReady`],
    /// [`ErrorCode::ArtifactsGone`].
    pub fn open_artifacts(
        &mut self,
        id: JobId,
        name: Option<String>,
        now: Clock,
    ) -> Result<ArtifactReader, ApiError> {
        let record = self.jobs.get_mut(&id).ok_or_else(|| not_found(&id.to_string()))?;
        let keeping = record.artifacts.as_mut().ok_or_else(|| none_asked_for(id))?;
        let not_ready = |what: &str| {
            let error =
                ApiError::new(ErrorCode::ArtifactsNotReady, format!("the artifacts of job {id} {what}"));
            error.with_header("Retry-After", "1")
        };
        let gone =
            |what: &str| ApiError::new(ErrorCode::ArtifactsGone, format!("the artifacts of job {id} {what}"));
        match keeping.status {
            ArtifactsStatus::Ready => {}
            ArtifactsStatus::Pending | ArtifactsStatus::Gathering => {
                return Err(not_ready("are gathered after its last step; wait until their status is ready"));
            }
            ArtifactsStatus::Empty => return Err(gone("are none: no file matched")),
            ArtifactsStatus::Fetched => return Err(gone("were fetched already, and its machine is gone")),
            ArtifactsStatus::Expired => {
                let seconds = RETENTION_NS / SECOND;
                return Err(gone(&format!("were not fetched within {seconds} s, and its machine is gone")));
            }
            ArtifactsStatus::Failed => {
                let why = keeping.list.message.as_deref().unwrap_or("the job ended otherwise");
                return Err(gone(&format!("cannot be had: {why}")));
            }
        }
        if keeping.transfer.is_some() {
            return Err(not_ready("are being read by another client"));
        }
        if let Some(name) = &name
            && keeping.list.artifacts.len() as u64 == keeping.list.total_count
            && !keeping.list.artifacts.iter().any(|file| file.name == *name)
        {
            let shown = short(name, 128);
            let message =
                format!("job {id} has no artifact '{shown}'; GET /v1/jobs/{id}/artifacts lists them");
            return Err(ApiError::new(ErrorCode::ArtifactNotFound, message));
        }
        let Some(run) = record.run.as_mut().filter(|run| run.verdict().is_none()) else {
            return Err(gone("are gone with its machine"));
        };
        let reader = ArtifactReader { job: id, life: Arc::new(()) };
        keeping.transfer = Some(Transfer {
            all: name.is_none(),
            reader: Arc::downgrade(&reader.life),
            bytes: Vec::new(),
            taken: 0,
            sent: None,
            stopping: false,
        });
        keeping.deadline = now.monotonic_ns.saturating_add(AGENT_NS);
        run.say(&HostMessage::SendArtifacts(SendArtifacts { name }));
        Ok(reader)
    }

    /// Appends the next bytes of artifacts to `out`, at most `room`. Ask again whenever jobs went on.
    pub fn read_artifacts(
        &mut self,
        reader: &ArtifactReader,
        out: &mut Vec<u8>,
        room: usize,
        now: Clock,
    ) -> ReadState {
        let Some(record) = self.jobs.get_mut(&reader.job) else { return ReadState::Lost };
        let Some(keeping) = &mut record.artifacts else { return ReadState::Lost };
        let theirs =
            |transfer: &&mut Transfer| core::ptr::eq(transfer.reader.as_ptr(), Arc::as_ptr(&reader.life));
        let Some(transfer) = keeping.transfer.as_mut().filter(theirs) else { return ReadState::Lost };
        let rest = transfer.bytes.get(transfer.taken..).unwrap_or_default();
        let part = rest.get(..room).unwrap_or(rest);
        out.extend_from_slice(part);
        let more = part.len() < rest.len();
        transfer.taken = transfer.taken.saturating_add(part.len());
        if !part.is_empty() {
            keeping.deadline = now.monotonic_ns.saturating_add(AGENT_NS);
        }
        if more {
            return ReadState::More;
        }
        transfer.bytes.clear();
        transfer.taken = 0;
        let Some(sent) = transfer.sent.take() else { return ReadState::Waiting };
        let all = transfer.all;
        keeping.transfer = None;
        keeping.deadline = now.monotonic_ns.saturating_add(RETENTION_NS);
        if let Some(failed) = sent.failed {
            keeping.list.message = Some(short(&failed, MAX_MESSAGE));
            return ReadState::Lost;
        }
        if all {
            record.keep_no_longer(ArtifactsStatus::Fetched);
        }
        ReadState::Done
    }
}

impl Record {
    /// What the API shows of the artifacts.
    pub(super) fn show_artifacts(&self) -> Option<Artifacts> {
        self.artifacts.as_ref().map(Keeping::show)
    }

    /// The last step has ended: asks for the artifacts, if the job is to have any. Whether it does.
    pub(super) fn gather_artifacts(&mut self, now: Clock) -> bool {
        let (Some(keeping), Some(run)) = (&mut self.artifacts, &mut self.run) else { return false };
        keeping.status = ArtifactsStatus::Gathering;
        keeping.deadline = now.monotonic_ns.saturating_add(AGENT_NS);
        let patterns = core::mem::take(&mut keeping.patterns);
        run.say(&HostMessage::ListArtifacts(ListArtifacts { patterns }));
        true
    }

    /// The agent says something of artifacts. False when it was not asked for that. `room` is what there is for their names, in
    /// bytes.
    pub(super) fn artifacts_said(&mut self, message: AgentMessage, room: usize, now: Clock) -> bool {
        match message {
            AgentMessage::ArtifactList(list) => self.artifacts_listed(list, room, now),
            AgentMessage::ArtifactData(bytes) => self.artifact_data(&bytes, now),
            AgentMessage::ArtifactsSent(sent) => self.artifacts_sent(sent, now),
            _ => false,
        }
    }

    fn artifacts_listed(&mut self, mut list: agent::ArtifactList, room: usize, now: Clock) -> bool {
        let Some(keeping) =
            self.artifacts.as_mut().filter(|keeping| keeping.status == ArtifactsStatus::Gathering)
        else {
            return false;
        };
        list.message = list.message.map(|message| short(&message, MAX_MESSAGE));
        list.total_count = list.total_count.max(list.artifacts.len() as u64);
        list.artifacts.retain(|file| file.name.len() <= MAX_NAME);
        list.artifacts.shrink_to_fit();
        keeping.list = list;
        if keeping.weight() > room {
            keeping.list.artifacts = Vec::new();
        }
        if keeping.list.total_count == 0 {
            self.keep_no_longer(ArtifactsStatus::Empty);
        } else {
            keeping.status = ArtifactsStatus::Ready;
            keeping.deadline = now.monotonic_ns.saturating_add(RETENTION_NS);
        }
        self.weight = self.weigh();
        true
    }

    fn artifact_data(&mut self, bytes: &[u8], now: Clock) -> bool {
        let Some(keeping) = &mut self.artifacts else { return false };
        let Some(transfer) = keeping.transfer.as_mut().filter(|transfer| transfer.sent.is_none()) else {
            return false;
        };
        if !transfer.stopping {
            if transfer.taken > 0 {
                transfer.bytes.drain(..transfer.taken.min(transfer.bytes.len()));
                transfer.taken = 0;
            }
            transfer.bytes.extend_from_slice(bytes);
            keeping.deadline = now.monotonic_ns.saturating_add(AGENT_NS);
        }
        true
    }

    fn artifacts_sent(&mut self, sent: ArtifactsSent, now: Clock) -> bool {
        let Some(keeping) = &mut self.artifacts else { return false };
        let Some(transfer) = keeping.transfer.as_mut().filter(|transfer| transfer.sent.is_none()) else {
            return false;
        };
        keeping.deadline = now.monotonic_ns.saturating_add(RETENTION_NS);
        if transfer.stopping {
            keeping.transfer = None;
        } else {
            transfer.sent = Some(sent);
        }
        true
    }

    /// Ends what has taken too long, and what nobody wants any more.
    pub(super) fn artifact_timers(&mut self, now: Clock) {
        let (Some(keeping), Some(run)) = (&mut self.artifacts, &mut self.run) else { return };
        let after = |ns: u64| now.monotonic_ns.saturating_add(ns);
        if let Some(transfer) = keeping.transfer.as_mut().filter(|transfer| !transfer.stopping)
            && transfer.reader.strong_count() == 0
        {
            if transfer.sent.is_some() {
                keeping.transfer = None;
                keeping.deadline = after(RETENTION_NS);
            } else {
                (transfer.stopping, transfer.bytes, transfer.taken) = (true, Vec::new(), 0);
                keeping.deadline = after(AGENT_NS);
                run.say(&HostMessage::StopArtifacts);
            }
        }
        if now.monotonic_ns < keeping.deadline {
            return;
        }
        match &keeping.transfer {
            None if keeping.status == ArtifactsStatus::Ready => self.keep_no_longer(ArtifactsStatus::Expired),
            // A slow client is its connection's business, which has a limit of its own.
            Some(transfer) if transfer.backlog() > 0 || transfer.sent.is_some() => {
                keeping.deadline = after(AGENT_NS)
            }
            _ => {
                let seconds = AGENT_NS / SECOND;
                keeping.list.message = Some(format!("the agent said nothing of them for {seconds} s"));
                self.keep_no_longer(ArtifactsStatus::Failed);
            }
        }
    }

    /// The machine is not needed any more: the job ends with what its steps gave.
    fn keep_no_longer(&mut self, status: ArtifactsStatus) {
        if let Some(keeping) = &mut self.artifacts {
            keeping.status = status;
        }
        self.end_with_result();
    }
}

fn none_asked_for(id: JobId) -> ApiError {
    let message = format!("job {id} has no artifacts; create it with \"artifacts\": [\"GLOB\", ...]");
    ApiError::new(ErrorCode::ArtifactNotFound, message)
}
