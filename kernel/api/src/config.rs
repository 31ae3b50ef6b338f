//! What a node's operator decides about its API.

use alloc::string::String;
use core::fmt;

/// How the API behaves.
#[derive(Clone, Default)]
pub struct ApiConfig {
    /// The bearer token every request but the public ones has to carry; none: everybody may do everything.
    pub token: Option<String>,
    /// How much memory the API takes at most.
    pub limits: Limits,
}

impl fmt::Debug for ApiConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A token must not end up in a log.
        let token = self.token.as_ref().map(|_| "...");
        f.debug_struct("ApiConfig").field("token", &token).field("limits", &self.limits).finish()
    }
}

/// How much the API keeps at most. Every table and buffer in it is bounded by one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one request's body.
    pub body_bytes: usize,
    /// Bytes of all request bodies that are arriving at once.
    pub bodies_total_bytes: usize,
    /// Bytes of all answers that are leaving at once, logs aside.
    pub answers_total_bytes: usize,
    /// Jobs that wait for a machine.
    pub queued_jobs: usize,
    /// Jobs kept after they are over; the oldest goes first.
    pub completed_jobs: usize,
    /// Bytes of all jobs' descriptions: scripts, names, environments.
    pub jobs_total_bytes: usize,
    /// Bytes of one job's workspace as a tar. None of it is kept.
    pub workspace_bytes: u64,
    /// Bytes of memory for one job's log.
    pub log_bytes: usize,
    /// Bytes of memory for all jobs' logs; those of jobs long over shrink first.
    pub logs_total_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            body_bytes: MIB,
            bodies_total_bytes: 4 * MIB,
            answers_total_bytes: 4 * MIB,
            queued_jobs: 1000,
            completed_jobs: 200,
            jobs_total_bytes: 8 * MIB,
            workspace_bytes: 4 << 30,
            log_bytes: 4 * MIB,
            logs_total_bytes: 64 * MIB,
        }
    }
}
