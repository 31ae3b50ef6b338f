//! Jobs for tests, and running them.

use nestling::bed::RunningBed;
use nestling::client::types::{Conclusion, Condition, Job, JobRequest, Status, StepRequest};
use nestling::client::{ClientError, Finished};
use std::time::Duration;

/// Longest wait for anything a job does, in QEMU; only a node that hangs takes that long.
pub const LIMIT: Duration = Duration::from_secs(180);

/// A step that runs `run`.
pub fn step(run: &str) -> StepRequest {
    StepRequest { run: run.to_owned(), ..StepRequest::default() }
}

/// A step that runs `run` when `condition` holds.
pub fn step_if(condition: Condition, run: &str) -> StepRequest {
    StepRequest { condition: Some(condition), ..step(run) }
}

/// A job of one step.
pub fn job(run: &str) -> JobRequest {
    steps([step(run)])
}

/// A job of these steps.
pub fn steps(steps: impl IntoIterator<Item = StepRequest>) -> JobRequest {
    JobRequest { steps: steps.into_iter().collect(), ..JobRequest::default() }
}

/// Runs a job to its end and takes all its output.
///
/// # Panics
/// When the node refuses it or does not answer.
pub fn run(node: &RunningBed, request: &JobRequest) -> Finished {
    node.client().run(request).unwrap_or_else(|error| panic!("running {request:?}: {error}"))
}

/// Runs a job of nothing on the image and the machine of `request`: what the node keeps for later ones, a template above all, it has then.
///
/// # Panics
/// As [`run`], and when the job fails.
pub fn warm_up(node: &RunningBed, request: &JobRequest) {
    let nothing = JobRequest { steps: vec![step("true")], ..request.clone() };
    let finished = run(node, &nothing);
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{:?}", finished.job);
}

/// Creates a job.
///
/// # Panics
/// When the node refuses it or does not answer.
pub fn create(node: &RunningBed, request: &JobRequest) -> Job {
    node.client().create_job(request).unwrap_or_else(|error| panic!("creating {request:?}: {error}"))
}

/// Waits until the job is over.
///
/// # Panics
/// When it is not over after [`LIMIT`], or the node does not answer.
pub fn wait(node: &RunningBed, id: &str) -> Job {
    let limit = node.patience(LIMIT);
    match node.client().wait(id, limit) {
        Ok(Some(job)) => job,
        Ok(None) => panic!("the job is not over after {} s: {:?}", limit.as_secs(), node.client().job(id)),
        Err(error) => panic!("asking for job {id}: {error}"),
    }
}

/// Waits until `holds` of the job.
///
/// # Panics
/// When the job is over first, or does not get there within [`LIMIT`].
pub fn wait_until(node: &RunningBed, id: &str, holds: impl Fn(&Job) -> bool) -> Job {
    let began = std::time::Instant::now();
    loop {
        let job = node.client().job(id).unwrap_or_else(|error| panic!("asking for job {id}: {error}"));
        if holds(&job) {
            return job;
        }
        assert!(job.status != Status::Completed, "the job was over first: {job:?}");
        assert!(began.elapsed() < node.patience(LIMIT), "the job did not get there: {job:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The code of a refusal.
///
/// # Panics
/// When it was none.
pub fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(error) if error.code().is_some() => error.code().unwrap_or_default().to_owned(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}
