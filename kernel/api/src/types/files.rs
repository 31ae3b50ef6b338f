//! What goes into a job's machine and comes out of it: the workspace and the artifacts.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// A job's workspace: a tar that is unpacked in its machine before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    /// How far it is.
    pub status: WorkspaceStatus,
    /// Bytes of the tar that have come so far.
    pub bytes: u64,
    /// Files, directories and links in it; none until it is unpacked.
    pub entries: Option<u64>,
}

/// How far a workspace is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceStatus {
    /// It will be taken once the machine is ready.
    Pending,
    /// The machine is ready for it.
    Awaited,
    /// It is being sent and unpacked.
    Arriving,
    /// All of it is in the machine.
    Unpacked,
    /// It did not come or could not be unpacked.
    Failed,
}

/// A job's artifacts: files its machine keeps for a client after the last step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifacts {
    /// How far they are.
    pub status: ArtifactsStatus,
    /// How many there are.
    pub total_count: u64,
    /// How many bytes they have together.
    pub total_bytes: u64,
    /// What a person should know, such as globs that match nothing, or why they cannot be had.
    pub message: Option<String>,
}

/// How far artifacts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactsStatus {
    /// The steps have not ended.
    Pending,
    /// They are being looked for.
    Gathering,
    /// They can be fetched. The machine is kept for that, for a while.
    Ready,
    /// All of them were fetched.
    Fetched,
    /// Nobody fetched them in time.
    Expired,
    /// No file matches.
    Empty,
    /// They cannot be had: the job ended otherwise.
    Failed,
}

/// `GET /v1/jobs/{id}/artifacts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactList {
    /// How far they are.
    pub status: ArtifactsStatus,
    /// How many there are.
    pub total_count: u64,
    /// How many bytes they have together.
    pub total_bytes: u64,
    /// How many of them are not listed here; the tar has them all.
    pub omitted_count: u64,
    /// What a person should know, such as globs that match nothing, or why they cannot be had.
    pub message: Option<String>,
    /// The first of them, in the order of their names.
    pub artifacts: Vec<Artifact>,
}

/// One file that a job's machine keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Its path in the workspace; bytes that are no UTF-8 are replaced.
    pub name: String,
    /// Its bytes; 0 for a link.
    pub size: u64,
}
