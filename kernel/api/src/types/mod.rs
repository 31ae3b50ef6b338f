//! What travels over HTTP, as JSON: requests, jobs, the host, images and errors.
//!
//! Job words are GitHub's (`queued`, `in_progress`, `completed`, conclusions), machine words are Firecracker's
//! (`machine_config`, `vcpu_count`, `mem_size_mib`). A node refuses unknown fields in what it is sent; a client ignores
//! unknown fields in what it gets, so that it works with a newer node.

mod connections;
mod files;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::egress::Egress;

pub use connections::{Connection, ConnectionCounts, ConnectionList, Protocol, Verdict};
pub use files::{Artifact, ArtifactList, Artifacts, ArtifactsStatus, Workspace, WorkspaceStatus};

/// `POST /v1/jobs`: what a user asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobRequest {
    /// A name for people, at most 256 bytes; default: the first step's name or command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The image the machine boots; default: `minimal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Labels for people and schedulers, at most 100.
    #[serde(default, deserialize_with = "bounded::list", skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// Seconds the job may run once started, 1..=86400; default: 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// The machine to run in; default: [`MachineConfig::default`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_config: Option<MachineConfig>,
    /// What to run, in order, 1..=100 steps.
    #[serde(deserialize_with = "bounded::list")]
    pub steps: Vec<StepRequest>,
    /// Environment of every step.
    #[serde(default, deserialize_with = "bounded::env", skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// What the machine may reach; default: [`Network::default`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Whether the steps wait for a workspace, which `PUT /v1/jobs/{id}/workspace` brings.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub workspace: bool,
    /// Files to keep for a client after the last step: at most 100 globs relative to the workspace.
    #[serde(default, deserialize_with = "bounded::list", skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<String>,
    /// The machine boots though the node has a template of it.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub cold: bool,
}

/// A machine's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// What it may reach: `none`, `all`, or a list of rules; default: `all`.
    #[serde(default)]
    pub egress: Egress,
}

/// A machine's size, in Firecracker's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Virtual CPUs, 1 up to the node's limit, at most 32.
    #[serde(default = "one")]
    pub vcpu_count: u32,
    /// Memory in MiB, even, 64 up to the node's limit.
    #[serde(default = "default_mem_size_mib")]
    pub mem_size_mib: u32,
    /// Free space on the machine's disk in MiB, for images that have one; default: what the image says, as far as the node has memory for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size_mib: Option<u32>,
}

const fn one() -> u32 {
    1
}

const fn default_mem_size_mib() -> u32 {
    256
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self { vcpu_count: one(), mem_size_mib: default_mem_size_mib(), disk_size_mib: None }
    }
}

/// One step of a [`JobRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRequest {
    /// A name for people, at most 256 bytes; default: the first line of `run`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The shell script, run by `sh -e`, at most 256 KiB.
    pub run: String,
    /// Environment of this step, over the job's.
    #[serde(default, deserialize_with = "bounded::env", skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Seconds this step may run, 1..=86400; default: as long as the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// When the step runs; default: [`Condition::Success`].
    #[serde(default, rename = "if", skip_serializing_if = "Option::is_none")]
    pub condition: Option<Condition>,
}

/// When a step runs, given how the steps before it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    /// Whatever happened, also after a cancel.
    #[serde(rename = "always()")]
    Always,
    /// When no step before has failed and the job is not cancelled.
    #[default]
    #[serde(rename = "success()")]
    Success,
    /// When a step before has failed and the job is not cancelled.
    #[serde(rename = "failure()")]
    Failure,
}

/// Where a job or a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waits for its turn.
    Queued,
    /// Has a machine (a job) or a process (a step).
    InProgress,
    /// Is over; it has a conclusion.
    Completed,
}

impl Status {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
        }
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Conclusion {
    /// Every step that ran succeeded.
    Success,
    /// A step failed.
    Failure,
    /// Somebody cancelled it.
    Cancelled,
    /// It ran longer than its `timeout_seconds`, or a step did.
    TimedOut,
    /// The machine or its agent ended without a result. Never the job's doing alone, never a success.
    SystemFailure,
}

impl Conclusion {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::SystemFailure => "system_failure",
        }
    }
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepConclusion {
    /// It exited with 0.
    Success,
    /// It exited with another code or was killed by a signal, or its machine was lost.
    Failure,
    /// It was ended, or never ran, because the job was cancelled.
    Cancelled,
    /// It ran longer than it was allowed to.
    TimedOut,
    /// Its `if` condition did not hold.
    Skipped,
}

/// A job as the node reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// 32 lower-case hexadecimal digits, unique for ever.
    pub id: String,
    /// The name for people.
    pub name: String,
    /// The image its machine boots.
    pub image: String,
    /// Its labels as sent.
    pub labels: Vec<String>,
    /// Where it stands.
    pub status: Status,
    /// How it ended; none until `completed`.
    pub conclusion: Option<Conclusion>,
    /// The first failing step's exit code, 128 + n when signal n killed it; 0 on success; none when there is none.
    pub exit_code: Option<i32>,
    /// Why it did not succeed, for a person to read; none on success.
    pub failure_reason: Option<String>,
    /// The last lines of the machine's console, after a `system_failure`.
    pub console: Option<String>,
    /// When it was accepted, RFC 3339 in UTC.
    pub created_at: String,
    /// When it got its machine.
    pub started_at: Option<String>,
    /// When it was over.
    pub completed_at: Option<String>,
    /// Seconds it may run once started.
    pub timeout_seconds: u32,
    /// Its machine's size.
    pub machine_config: MachineConfig,
    /// Its machine's network.
    #[serde(default)]
    pub network: Network,
    /// Its steps, in order.
    pub steps: Vec<Step>,
    /// How long its phases took.
    pub timings: Timings,
    /// Exits of its machine's vCPUs to the node, by kind, and their sum as `total`.
    pub exits: BTreeMap<String, u64>,
    /// What memory its machine used.
    pub memory: JobMemory,
    /// What is kept of its output.
    pub log: LogInfo,
    /// Its workspace; none for a job without one.
    #[serde(default)]
    pub workspace: Option<Workspace>,
    /// Its artifacts; none for a job without any.
    #[serde(default)]
    pub artifacts: Option<Artifacts>,
    /// How many connections it made, or tried to.
    #[serde(default)]
    pub connections: ConnectionCounts,
    /// Its place in the queue, from 1; none once it has started.
    pub queue_position: Option<u32>,
    /// What a queued job waits for, as far as that is known; none once it has started.
    #[serde(default)]
    pub waiting_for: Option<WaitingFor>,
}

/// What a queued job waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitingFor {
    /// Its turn: jobs that came before it wait too.
    EarlierJobs,
    /// Memory for its machine, which machines that run have.
    Memory,
    /// Cores for its machine, which machines that run have.
    Cores,
    /// A place for its machine: as many run as the node has places for.
    Machines,
}

impl WaitingFor {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EarlierJobs => "earlier_jobs",
            Self::Memory => "memory",
            Self::Cores => "cores",
            Self::Machines => "machines",
        }
    }
}

/// One step of a [`Job`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The name for people.
    pub name: String,
    /// Its place in the job, from 1.
    pub number: u32,
    /// Where it stands.
    pub status: Status,
    /// How it ended; none until `completed`.
    pub conclusion: Option<StepConclusion>,
    /// Its exit code, 128 + n when signal n killed it.
    pub exit_code: Option<i32>,
    /// When it started, RFC 3339 in UTC.
    pub started_at: Option<String>,
    /// When it was over.
    pub completed_at: Option<String>,
}

/// A job's phases, each in milliseconds since it was created; none until it has come to pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Until it left the queue and got its machine.
    pub queued_ms: Option<u64>,
    /// Until it got a clone of a template for its machine; none for a machine that booted.
    #[serde(default)]
    pub cloned_ms: Option<u64>,
    /// Until its machine had booted and the agent said hello.
    pub agent_ready_ms: Option<u64>,
    /// Until the first byte of output.
    pub first_output_ms: Option<u64>,
    /// Until it was over.
    pub completed_ms: Option<u64>,
}

/// What memory a job's machine used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobMemory {
    /// Most MiB of the node's memory that backed the machine at once; none until known.
    pub peak_mib: Option<u64>,
}

/// What is kept of a job's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogInfo {
    /// Bytes of output so far, dropped ones included: the offset the next byte will have.
    pub bytes: u64,
    /// The offset of the first byte that is still kept.
    pub start_offset: u64,
    /// Whether earlier output was dropped to stay within the node's limits.
    pub truncated: bool,
}

/// `GET /v1/jobs`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {
    /// Jobs that match, on all pages.
    pub total_count: u64,
    /// This page of them, newest first.
    pub jobs: Vec<Job>,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// The node's name.
    pub name: String,
    /// The node's version.
    pub version: String,
    /// Whose virtualization extensions the node uses.
    pub vendor: Vendor,
    /// Processor features the node looks for, and whether they are there.
    pub features: BTreeMap<String, bool>,
    /// Processor cores the node uses.
    pub cores: u32,
    /// The node's memory.
    pub memory: HostMemory,
    /// Machines that exist now.
    pub machines: u32,
    /// Milliseconds since the node's kernel was entered.
    pub uptime_ms: u64,
    /// How long booting took.
    pub boot: BootTimes,
    /// Exits of all machines' vCPUs since boot, by kind, and their sum as `total`.
    pub exits: BTreeMap<String, u64>,
    /// VMREAD and VMWRITE instructions that those exits took; none on AMD, whose control block is plain memory.
    #[serde(default)]
    pub vmcs_accesses: Option<u64>,
    /// The node's network; none without a network card.
    pub uplink: Option<Uplink>,
    /// The timestamp counter's frequency in kHz.
    pub tsc_khz: u64,
}

/// Whose virtualization extensions a node uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vendor {
    /// AMD's SVM.
    Amd,
    /// Intel's VMX.
    Intel,
}

/// A node's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// All of it, in MiB.
    pub total_mib: u64,
    /// Frames of 4 KiB that machines could take now.
    pub free_frames: u64,
    /// Frames of 4 KiB in the pool for machines.
    pub total_frames: u64,
    /// Bytes in use on the node's own heap.
    pub heap_used_bytes: u64,
    /// Bytes the node's own heap has.
    pub heap_total_bytes: u64,
}

/// How long a node's boot took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BootTimes {
    /// Milliseconds from the kernel's first instruction until it could answer `/readyz`; none before that.
    pub kernel_entry_to_ready_ms: Option<f64>,
}

/// A node's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// The network card's driver.
    pub driver: String,
    /// Its hardware address, `52:54:00:12:34:56`.
    pub mac: String,
    /// Its address and prefix, `10.0.2.15/24`; none until configured.
    pub address: Option<String>,
    /// The default gateway, if there is one.
    pub gateway: Option<String>,
}

/// An image machines can boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// What a job's `image` names.
    pub name: String,
    /// The image's version.
    pub version: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// Bytes of kernel, initramfs and disk.
    pub size_bytes: u64,
    /// SHA-256 of each file, in hexadecimal.
    pub sha256: BTreeMap<String, String>,
}

/// `GET /v1/images`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageList {
    /// Images on this node.
    pub total_count: u64,
    /// They themselves, by name.
    pub images: Vec<Image>,
    /// What kept other images from being listed, for people.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A machine that was frozen after its boot, of which jobs get clones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// What names it as long as the node runs.
    pub id: String,
    /// The image it booted.
    pub image: String,
    /// The size of its clones.
    pub machine_config: MachineConfig,
    /// Bytes of memory that its clones share.
    pub shared_bytes: u64,
    /// Clones that exist.
    pub clones_alive: u64,
    /// Clones ever made.
    pub clones_made: u64,
    /// Pages that are copied before a clone runs.
    pub working_set_pages: u64,
    /// Pages that the first clone, which had no working set, copied one exit each.
    pub first_clone_copies: u64,
    /// Pages that later clones copied one exit each, on average over those that have ended.
    pub later_clone_copies: u64,
}

/// `GET /v1/templates`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateList {
    /// Templates on this node.
    pub total_count: u64,
    /// They themselves, the one used last first.
    pub templates: Vec<Template>,
}

/// `GET /version`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// `nestling`.
    pub name: String,
    /// The node's version.
    pub version: String,
    /// The API's version, as in its paths: `v1`.
    pub api: String,
}

/// The body of every answer that is not a success, in GitHub's shape.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong and what to do, for a person to read.
    pub message: String,
    /// What is wrong, for a program to read; never changes its meaning.
    pub code: String,
    /// Where the API is described.
    pub documentation_url: String,
    /// The HTTP status as a string, as GitHub has it.
    pub status: String,
    /// Every field that is wrong, for a request that did not validate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

/// One wrong field of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// The field's path, `steps[2].run`.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub message: String,
}
