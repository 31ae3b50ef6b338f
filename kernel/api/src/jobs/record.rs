//! What the store keeps of one job.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Weak;
use alloc::vec::Vec;

use super::artifacts::Keeping;
use super::connections::ConnectionLog;
use super::id::JobId;
use super::reader::Follower;
use super::request::Plan;
use super::run::Run;
use super::workspace::Arrival;
use crate::log::LogRing;
use crate::time::{Clock, MILLISECOND, rfc3339};
use crate::types::{
    Conclusion, ConnectionCounts, Job, JobMemory, LogInfo, Network, Status, Step, StepConclusion,
    StepRequest, Timings,
};

/// What is needed to run a job, and no longer once it is over.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub(super) steps: Vec<StepRequest>,
    pub(super) env: BTreeMap<String, String>,
}

/// One job.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) id: JobId,
    pub(super) created_ns: u64,
    /// What the API shows. What else is kept here, such as `log`, is filled in when it is shown.
    pub(super) job: Job,
    pub(super) script: Script,
    pub(super) log: LogRing,
    pub(super) connections: ConnectionLog,
    /// There for a job with a workspace.
    pub(super) workspace: Option<Arrival>,
    /// Its machine is to boot.
    pub(super) cold: bool,
    /// There for a job with artifacts.
    pub(super) artifacts: Option<Keeping>,
    /// There while the job is in progress.
    pub(super) run: Option<Run>,
    /// Those who read the log as it grows, as long as they live.
    pub(super) followers: Vec<Weak<Follower>>,
    /// The `Idempotency-Key` it was created with.
    pub(super) idempotency_key: Option<String>,
    /// Bytes its description takes, roughly.
    pub(super) weight: usize,
}

/// What one entry of a map costs besides its contents: its share of a node that may be little more than half empty.
const ENTRY_OVERHEAD: usize = 4 * size_of::<String>();
/// What a job costs besides itself and its strings: its places in the store's tables, its times, its machine's figures.
const JOB_OVERHEAD: usize = size_of::<Record>() + 1024;
/// A step's two times.
const STEP_TIMES: usize = 2 * 32;

impl Record {
    pub(super) fn new(id: JobId, plan: Plan, idempotency_key: Option<String>, now: Clock) -> Self {
        let steps = plan.steps.iter().zip(1..).map(|(step, number)| Step {
            name: step.name.clone().unwrap_or_default(),
            number,
            status: Status::Queued,
            conclusion: None,
            exit_code: None,
            started_at: None,
            completed_at: None,
        });
        let job = Job {
            id: id.to_string(),
            name: plan.name,
            image: plan.image,
            labels: plan.labels,
            status: Status::Queued,
            conclusion: None,
            exit_code: None,
            failure_reason: None,
            console: None,
            created_at: rfc3339(now.unix_ns),
            started_at: None,
            completed_at: None,
            timeout_seconds: plan.timeout_seconds,
            machine_config: plan.machine_config,
            network: Network { egress: plan.egress },
            steps: steps.collect(),
            timings: Timings::default(),
            exits: BTreeMap::from([("total".to_string(), 0)]),
            memory: JobMemory::default(),
            log: LogInfo::default(),
            workspace: None,
            artifacts: None,
            connections: ConnectionCounts::default(),
            queue_position: None,
            waiting_for: None,
        };
        let mut record = Self {
            id,
            created_ns: now.monotonic_ns,
            job,
            script: Script { steps: plan.steps, env: plan.env },
            log: LogRing::new(),
            connections: ConnectionLog::default(),
            workspace: plan.workspace.then(Arrival::default),
            cold: plan.cold,
            artifacts: (!plan.artifacts.is_empty()).then(|| Keeping::new(plan.artifacts)),
            run: None,
            followers: Vec::new(),
            idempotency_key,
            weight: 0,
        };
        record.weight = record.weigh();
        record
    }

    /// Bytes its description takes, roughly.
    pub(super) fn weigh(&self) -> usize {
        let env = |env: &BTreeMap<String, String>| -> usize {
            env.iter().map(|(name, value)| name.len() + value.len() + ENTRY_OVERHEAD).sum()
        };
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let job = &self.job;
        let names = job.name.len() + job.image.len() + text(&job.console) + text(&job.failure_reason);
        let labels: usize = job.labels.iter().map(|label| label.len() + size_of::<String>()).sum();
        let steps: usize =
            job.steps.iter().map(|step| step.name.len() + size_of::<Step>() + STEP_TIMES).sum();
        let scripts = self
            .script
            .steps
            .iter()
            .map(|step| size_of::<StepRequest>() + text(&step.name) + step.run.len() + env(&step.env));
        let scripts: usize = scripts.sum();
        let key = self.idempotency_key.as_ref().map_or(0, |key| 2 * key.len() + ENTRY_OVERHEAD);
        let files = self.artifacts.as_ref().map_or(0, Keeping::weight);
        let network = job.network.egress.weight() + self.connections.weight();
        JOB_OVERHEAD + names + labels + steps + scripts + env(&self.script.env) + key + files + network
    }

    /// Milliseconds since the job was created.
    pub(super) fn elapsed_ms(&self, now: Clock) -> u64 {
        now.monotonic_ns.saturating_sub(self.created_ns) / MILLISECOND
    }

    /// Ends the job: nothing of it changes after this but its log shrinking.
    pub(super) fn complete(&mut self, conclusion: Conclusion, now: Clock) {
        let unfinished = match conclusion {
            Conclusion::Cancelled => StepConclusion::Cancelled,
            _ => StepConclusion::Skipped,
        };
        self.end_step(
            match conclusion {
                Conclusion::Cancelled => StepConclusion::Cancelled,
                Conclusion::TimedOut => StepConclusion::TimedOut,
                _ => StepConclusion::Failure,
            },
            now,
        );
        for step in self.job.steps.iter_mut().filter(|step| step.status == Status::Queued) {
            step.status = Status::Completed;
            step.conclusion = Some(unfinished);
        }
        self.job.status = Status::Completed;
        self.job.waiting_for = None;
        self.job.conclusion = Some(conclusion);
        self.job.completed_at = Some(rfc3339(now.unix_ns));
        self.job.timings.completed_ms = Some(self.elapsed_ms(now));
        self.run = None;
        if let Some(arrival) = &mut self.workspace {
            arrival.job_ended();
        }
        if let Some(keeping) = &mut self.artifacts {
            keeping.job_ended();
        }
        self.script = Script::default();
        self.followers = Vec::new();
        self.weight = self.weigh();
    }

    /// Ends the step that is running, if one is.
    pub(super) fn end_step(&mut self, conclusion: StepConclusion, now: Clock) {
        for step in self.job.steps.iter_mut().filter(|step| step.status == Status::InProgress) {
            step.status = Status::Completed;
            step.conclusion = Some(conclusion);
            step.completed_at = Some(rfc3339(now.unix_ns));
        }
    }
}
