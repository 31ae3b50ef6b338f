//! The store and the run, from the engine's and from the API's side.

mod artifacts;
mod cancel;
mod followers;
mod random;
mod run;
mod store;
mod workspace;

use alloc::vec;
use proptest::prelude::*;

use super::*;
use crate::agent::{AgentMessage, Failure, Hello, HostMessage, StepCompleted};
use crate::testing::*;
use crate::types::{ArtifactsStatus, Condition, JobRequest, StepConclusion, StepRequest, WorkspaceStatus};

fn store() -> JobStore {
    JobStore::new(Limits::default())
}

fn when(condition: Condition, run: &str) -> StepRequest {
    StepRequest { condition: Some(condition), ..step(run) }
}

fn step_conclusions(job: &Job) -> Vec<StepConclusion> {
    job.steps.iter().filter_map(|step| step.conclusion).collect()
}

/// Runs the step the agent has been told to run to this exit code.
fn run(jobs: &mut JobStore, job: JobId, index: u32, code: i32) {
    say(jobs, job, &started(index), at(0));
    say(jobs, job, &exited(index, code), at(0));
}
