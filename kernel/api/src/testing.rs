//! What tests of several modules share: a node that is none, a clock that stands still, an agent's words.

use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use crate::agent::{self, AgentMessage, HostMessage};
use crate::jobs::request::LargestMachine;
use crate::jobs::{JobId, JobStore, MachineEnd, MachineReport, request};
use crate::time::{Clock, MILLISECOND, SECOND};
use crate::types::{
    Artifact, BootTimes, Host, HostMemory, Image, Job, JobRequest, MachineConfig, StepRequest, Template,
    Uplink, Vendor,
};
use crate::{ApiConfig, Node};

pub(crate) const TOKEN: &str = "0123456789abcdef";

/// So many milliseconds after the test's start.
pub(crate) fn at(ms: u64) -> Clock {
    Clock { monotonic_ns: SECOND + ms * MILLISECOND, unix_ns: 1_800_000_000 * SECOND + ms * MILLISECOND }
}

pub(crate) struct FakeNode {
    pub(crate) ready: bool,
    random: u8,
}

impl FakeNode {
    pub(crate) fn new() -> Self {
        Self { ready: true, random: 0 }
    }
}

impl Node for FakeNode {
    fn ready(&self) -> bool {
        self.ready
    }

    fn version(&self) -> &str {
        "1.2.3"
    }

    fn host(&self) -> Host {
        Host {
            name: "node".into(),
            version: "1.2.3".into(),
            vendor: Vendor::Amd,
            features: [("nested_paging".to_string(), true)].into(),
            cores: 1,
            memory: HostMemory::default(),
            machines: 0,
            uptime_ms: 1,
            boot: BootTimes::default(),
            exits: [("total".to_string(), 0)].into(),
            uplink: Some(Uplink::default()),
            vmcs_accesses: None,
            tsc_khz: 1,
        }
    }

    fn image_problems(&self) -> Vec<String> {
        vec!["disk.img was cut off".into()]
    }

    fn images(&self) -> Vec<Image> {
        vec![Image { name: "minimal".into(), version: "1".into(), ..Image::default() }]
    }

    fn templates(&self) -> Vec<Template> {
        vec![Template { id: "1".into(), image: "minimal".into(), ..Template::default() }]
    }

    fn largest_machine(&self) -> LargestMachine {
        LargestMachine { memory_mib: 1024, vcpus: 8 }
    }

    fn random(&mut self, into: &mut [u8]) {
        self.random = self.random.wrapping_add(1);
        into.fill(0);
        if let Some(first) = into.first_mut() {
            *first = self.random;
        }
    }
}

pub(crate) fn config() -> ApiConfig {
    ApiConfig { token: Some(TOKEN.into()), ..ApiConfig::default() }
}

pub(crate) fn id(number: u8) -> JobId {
    JobId::from_bytes([number; 16])
}

pub(crate) fn step(run: &str) -> StepRequest {
    StepRequest { run: run.into(), ..StepRequest::default() }
}

pub(crate) fn steps(steps: Vec<StepRequest>) -> JobRequest {
    JobRequest { steps, ..JobRequest::default() }
}

/// Queues a job.
pub(crate) fn create(jobs: &mut JobStore, number: u8, request: JobRequest, now: Clock) -> JobId {
    let plan = request::plan(request, &FakeNode::new().images(), FakeNode::new().largest_machine()).unwrap();
    assert_eq!(plan.machine_config, MachineConfig::default());
    jobs.create(id(number), plan, None, now).unwrap().id()
}

/// Queues and starts a job, and has its agent say hello.
pub(crate) fn begin(jobs: &mut JobStore, number: u8, request: JobRequest, now: Clock) -> JobId {
    let job = create(jobs, number, request, now);
    assert!(jobs.start(job, now));
    jobs.agent_connected(job);
    say(jobs, job, &hello(), now);
    job
}

pub(crate) fn hello() -> AgentMessage {
    AgentMessage::Hello(agent::Hello { protocol: agent::PROTOCOL, agent: "0".into(), kernel: "6.1".into() })
}

pub(crate) fn started(index: u32) -> AgentMessage {
    AgentMessage::StepStarted(agent::StepStarted { index })
}

pub(crate) fn stdout(text: &str) -> AgentMessage {
    AgentMessage::Stdout(text.into())
}

pub(crate) fn exited(index: u32, code: i32) -> AgentMessage {
    let (exit_code, signal, timed_out) = (Some(code), None, false);
    AgentMessage::StepCompleted(agent::StepCompleted { index, exit_code, signal, timed_out })
}

pub(crate) fn unpacked(entries: u64) -> AgentMessage {
    AgentMessage::WorkspaceUnpacked(agent::WorkspaceUnpacked { entries })
}

/// The agent has found these artifacts, each of five bytes.
pub(crate) fn listed(names: &[&str]) -> AgentMessage {
    AgentMessage::ArtifactList(agent::ArtifactList {
        total_count: names.len() as u64,
        total_bytes: 5 * names.len() as u64,
        artifacts: names.iter().map(|name| Artifact { name: name.to_string(), size: 5 }).collect(),
        message: None,
    })
}

pub(crate) fn sent(failed: Option<&str>) -> AgentMessage {
    AgentMessage::ArtifactsSent(agent::ArtifactsSent { failed: failed.map(str::to_string) })
}

/// The agent says something.
pub(crate) fn say(jobs: &mut JobStore, job: JobId, message: &AgentMessage, now: Clock) {
    jobs.receive(job, &message.encode().unwrap(), now);
}

/// What the node told the agent, taken from it.
pub(crate) fn told(jobs: &mut JobStore, job: JobId) -> Vec<HostMessage> {
    let mut decoder = agent::Decoder::new();
    let bytes = jobs.transmit(job).to_vec();
    decoder.push(&bytes);
    jobs.transmitted(job, bytes.len());
    let mut messages = vec![];
    while let Some(frame) = decoder.next_frame().unwrap() {
        messages.push(HostMessage::decode(frame).unwrap());
    }
    assert_eq!(decoder.buffered(), 0);
    messages
}

/// The scripts among it.
pub(crate) fn told_to_run(jobs: &mut JobStore, job: JobId) -> Vec<String> {
    let scripts = told(jobs, job).into_iter().filter_map(|message| match message {
        HostMessage::RunStep(step) => Some(step.run),
        _ => None,
    });
    scripts.collect()
}

/// The machine ends like this; the job as it is then.
pub(crate) fn end(jobs: &mut JobStore, job: JobId, end: MachineEnd, now: Clock) -> Job {
    end_with(jobs, job, end, None, now)
}

/// The machine ends like this, with this to say of its disk; the job as it is then.
pub(crate) fn end_with(
    jobs: &mut JobStore,
    job: JobId,
    end: MachineEnd,
    disk_problem: Option<String>,
    now: Clock,
) -> Job {
    let report = MachineReport {
        disk_problem,
        end,
        console_tail: "last words\n".into(),
        exits: [("hlt".to_string(), 3), ("cpuid".to_string(), 4)].into(),
        peak_mib: Some(77),
    };
    jobs.machine_ended(job, report, now);
    jobs.get(job).unwrap()
}

/// The job has its result: its machine is destroyed.
pub(crate) fn finish(jobs: &mut JobStore, job: JobId, now: Clock) -> Job {
    assert!(jobs.finished(job));
    end(jobs, job, MachineEnd::Destroyed, now)
}
