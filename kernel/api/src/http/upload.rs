//! A request's body that goes on into a machine as it arrives, and is never here as a whole.

use alloc::format;

use super::body::Coding;
use super::request::Head;
use crate::Api;
use crate::error::{ApiError, ErrorCode};
use crate::jobs::{self, WorkspaceSender};
use crate::time::{Clock, SECOND};
use crate::types::Workspace;

/// How long a client may send nothing while the machine would take something.
pub(super) const STALL_NS: u64 = 30 * SECOND;

/// A body that is passed on.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) head: Head,
    pub(super) coding: Coding,
    /// None once the job has been told that it will not get the rest.
    sender: Option<WorkspaceSender>,
    /// Since when the client keeps the machine waiting; none when it does not.
    waiting_since: Option<u64>,
    /// The job has been told of the body's end.
    ended: bool,
}

/// How far a body is.
#[derive(Debug)]
pub(super) enum Progress {
    /// It goes on when something comes, or the machine has taken something.
    Later,
    /// The machine has it all.
    Done(Workspace),
    /// It will not be passed on any further.
    Failed(ApiError),
}

impl Upload {
    /// The body of a request that was just admitted.
    pub(super) fn new(head: Head, sender: WorkspaceSender) -> Self {
        let coding = Coding::new(head.body);
        Self { head, coding, sender: Some(sender), waiting_since: None, ended: false }
    }

    /// When the client has kept the machine waiting for too long.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.waiting_since.map(|since| since.saturating_add(STALL_NS))
    }

    /// Passes on what the machine takes of `input`: how many bytes that used up.
    pub(super) fn pass_on(
        &mut self,
        input: &[u8],
        closed: bool,
        api: &mut Api,
        now: Clock,
    ) -> (usize, Progress) {
        let mut used = 0_usize;
        loop {
            let Some(sender) = &self.sender else { return (used, Progress::Later) };
            let room = match api.jobs.upload(sender) {
                Ok(jobs::Upload::Unpacked(workspace)) => return (used, Progress::Done(workspace)),
                Ok(jobs::Upload::Wanted(room)) => room,
                Ok(jobs::Upload::Waiting) => {
                    self.waiting_since = None;
                    return (used, Progress::Later);
                }
                Err(error) => return (used, Progress::Failed(error)),
            };
            if self.coding.is_done() {
                if !self.ended {
                    self.ended = true;
                    api.jobs.end_workspace(sender);
                }
                self.waiting_since = None;
                return (used, Progress::Later);
            }
            let rest = input.get(used..).unwrap_or_default();
            if rest.is_empty() {
                return (used, self.wait(closed, api, now));
            }
            self.waiting_since = None;
            let passed = match self.coding.take(rest.get(..room).unwrap_or(rest)) {
                Ok((taken, data)) => {
                    used = used.saturating_add(taken);
                    api.jobs.push_workspace(sender, data)
                }
                Err(error) => Err(self.give_up(error, api)),
            };
            if let Err(error) = passed {
                return (used, Progress::Failed(error));
            }
        }
    }

    /// The machine would take something and nothing is there.
    fn wait(&mut self, closed: bool, api: &mut Api, now: Clock) -> Progress {
        let since = *self.waiting_since.get_or_insert(now.monotonic_ns);
        let error = if closed {
            let message = "the connection was closed in the middle of the workspace";
            ApiError::new(ErrorCode::MalformedRequest, message)
        } else if now.monotonic_ns >= since.saturating_add(STALL_NS) {
            let message = format!("nothing came of the workspace for {} s", STALL_NS / SECOND);
            ApiError::new(ErrorCode::RequestTimeout, message)
        } else {
            return Progress::Later;
        };
        Progress::Failed(self.give_up(error, api))
    }

    fn give_up(&mut self, error: ApiError, api: &mut Api) -> ApiError {
        if let Some(sender) = self.sender.take() {
            api.jobs.abort_workspace(sender, &error.message);
        }
        error
    }
}
