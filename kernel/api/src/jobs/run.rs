//! One job while it has a machine: what the agent says, which step is next, and how it ends.
//!
//! The node decides everything: order, conditions, timeouts, cancellation, conclusion. The agent only runs what it is told
//! to, and is believed only in what a step's result was. A run without an explicit result is a system failure.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::record::Record;
use super::workspace::BEGIN_NS;
use crate::agent::{AgentMessage, Decoder, HostMessage, Identity, PROTOCOL, RunStep, StepCompleted};
use crate::json::short;
use crate::log::Stream;
use crate::time::{Clock, SECOND, rfc3339};
use crate::types::{Conclusion, Condition, Status, StepConclusion};

/// How long a machine may take until its agent says hello.
const AGENT_TIMEOUT_NS: u64 = 120 * SECOND;
/// How long after a cancel the agent may take to end the running step.
const CANCEL_STEP_NS: u64 = 10 * SECOND;
/// How long steps that run even after a cancel may take, all together.
const CANCEL_STEPS_NS: u64 = 30 * SECOND;
/// How long after a step's own timeout the node waits for the agent to end it.
const STEP_BACKSTOP_NS: u64 = 15 * SECOND;
/// How long after its agent hung up a machine may take to say why (a kernel panic, a power-off).
const HANG_UP_NS: u64 = 2 * SECOND;
/// How long readers of its log may hold a job back, all together. What they have not read after that they may lose.
const HOLD_NS: u64 = 60 * SECOND;
/// Bytes from the agent that are taken at once. More than a frame, so that a frame always gets through.
pub(super) const WINDOW: usize = 128 * 1024;
/// Linux's signals end here (`SIGRTMAX`).
const LAST_SIGNAL: i32 = 64;
/// Most bytes kept of a message the agent wrote.
const MAX_MESSAGE: usize = 1024;

/// How a job ended, before its machine is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) conclusion: Conclusion,
    pub(super) exit_code: Option<i32>,
    pub(super) reason: Option<String>,
}

/// The first step that failed.
#[derive(Clone, Debug)]
struct FirstFailure {
    timed_out: bool,
    exit_code: Option<i32>,
    reason: String,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Until the agent says hello.
    Booting { deadline: u64 },
    /// The machine is ready for the workspace, which a client has to begin to send.
    Workspace { begin_by: u64 },
    /// A step is with the agent.
    Step { index: usize, started: bool, backstop: Option<u64> },
    /// The steps are over, and the machine is kept for their artifacts.
    Artifacts,
    /// The verdict is there.
    Over,
}

/// A cancel that has yet to take effect.
#[derive(Clone, Copy, Debug)]
struct Cancel {
    /// When to stop waiting.
    deadline: u64,
    /// Whether the step that ran has ended, and those that run even after a cancel do now.
    cleaning_up: bool,
}

/// A job's run.
#[derive(Debug)]
pub(super) struct Run {
    phase: Phase,
    connected: bool,
    /// What a clone's randomness starts from, until its agent has been told.
    entropy: Option<[u8; 32]>,
    pub(super) decoder: Decoder,
    outgoing: Vec<u8>,
    sent: usize,
    job_deadline: u64,
    cancel: Option<Cancel>,
    hang_up_deadline: Option<u64>,
    /// How long readers of the log have held the job back so far, and since when they do now.
    held_ns: u64,
    held_since: Option<u64>,
    failed: Option<FirstFailure>,
    /// What the steps gave, while the machine is kept for their artifacts: it stands, whatever happens after.
    result: Option<Verdict>,
    verdict: Option<Verdict>,
}

impl Run {
    pub(super) fn new(timeout_seconds: u32, now: Clock) -> Self {
        let after = |ns: u64| now.monotonic_ns.saturating_add(ns);
        Self {
            phase: Phase::Booting { deadline: after(AGENT_TIMEOUT_NS) },
            connected: false,
            entropy: None,
            decoder: Decoder::new(),
            outgoing: Vec::new(),
            sent: 0,
            job_deadline: after(u64::from(timeout_seconds).saturating_mul(SECOND)),
            cancel: None,
            hang_up_deadline: None,
            held_ns: 0,
            held_since: None,
            failed: None,
            result: None,
            verdict: None,
        }
    }

    pub(super) fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// What the steps gave, while the machine is kept for their artifacts.
    pub(super) fn result(&self) -> Option<&Verdict> {
        self.result.as_ref()
    }

    /// Whether the machine is kept for artifacts.
    pub(super) fn keeps_artifacts(&self) -> bool {
        matches!(self.phase, Phase::Artifacts)
    }

    /// The machine is a clone, whose agent is to be told who it is now.
    pub(super) fn is_clone(&mut self, entropy: [u8; 32]) {
        self.entropy = Some(entropy);
    }

    /// Tells it, if it is a clone's.
    fn say_identity(&mut self, now: Clock) {
        if let Some(entropy) = self.entropy.take() {
            self.say(&HostMessage::Identity(Identity { entropy, unix_ns: now.unix_ns }));
        }
    }

    pub(super) fn agent_connected(&mut self) {
        self.connected = true;
    }

    /// Whether the workspace is what the machine is ready for.
    pub(super) fn takes_workspace(&self) -> bool {
        matches!(self.phase, Phase::Workspace { .. })
    }

    /// Has something for the agent. What is too long for a frame was refused when the job was created.
    pub(super) fn say(&mut self, message: &HostMessage) {
        if self.sent > 0 {
            self.outgoing.drain(..self.sent.min(self.outgoing.len()));
            self.sent = 0;
        }
        match message.encode() {
            Ok(frame) => self.outgoing.extend_from_slice(&frame),
            Err(error) => {
                self.end(Conclusion::SystemFailure, None, Some(format!("the agent cannot be told: {error}")))
            }
        }
    }

    /// Bytes for the agent.
    pub(super) fn transmit(&self) -> &[u8] {
        self.outgoing.get(self.sent..).unwrap_or_default()
    }

    pub(super) fn transmitted(&mut self, len: usize) {
        self.sent = self.sent.saturating_add(len);
        if self.sent >= self.outgoing.len() {
            self.outgoing = Vec::new();
            self.sent = 0;
        }
    }

    /// When [`Record::run_timers`] next has something to do.
    pub(super) fn deadline(&self) -> Option<u64> {
        let phase = match self.phase {
            Phase::Booting { deadline } => Some(deadline),
            Phase::Workspace { begin_by } => Some(begin_by),
            Phase::Artifacts => return self.hang_up_deadline,
            Phase::Step { backstop, .. } => {
                let hold = if self.held_since.is_some() { self.hold_left() } else { 0 };
                backstop.map(|backstop| backstop.saturating_add(hold))
            }
            Phase::Over => return None,
        };
        let hold = self.held_since.map(|since| since.saturating_add(self.hold_left()));
        let others = [phase, self.cancel.map(|cancel| cancel.deadline), self.hang_up_deadline, hold];
        others.into_iter().flatten().chain([self.job_deadline]).min()
    }

    fn hold_left(&self) -> u64 {
        HOLD_NS.saturating_sub(self.held_ns)
    }

    /// How long the job is being held back now.
    fn held_for(&self, now: Clock) -> u64 {
        let held = self.held_since.map_or(0, |since| now.monotonic_ns.saturating_sub(since));
        held.min(self.hold_left())
    }

    /// Whether readers of the log may still hold the job back.
    pub(super) fn may_be_held(&self, now: Clock) -> bool {
        self.held_for(now) < self.hold_left()
    }

    /// Readers of the log hold the job back, or do no longer. A step's backstop waits meanwhile: its result may be among
    /// what the agent cannot say.
    pub(super) fn set_held(&mut self, held: bool, now: Clock) {
        if held {
            self.held_since.get_or_insert(now.monotonic_ns);
            return;
        }
        let held_for = self.held_for(now);
        self.held_ns = self.held_ns.saturating_add(held_for);
        self.held_since = None;
        if let Phase::Step { backstop: Some(backstop), .. } = &mut self.phase {
            *backstop = backstop.saturating_add(held_for);
        }
    }

    /// The place of the step the agent has, from 0.
    fn step(&self) -> Option<usize> {
        match self.phase {
            Phase::Step { index, .. } => Some(index),
            _ => None,
        }
    }

    pub(super) fn end(&mut self, conclusion: Conclusion, exit_code: Option<i32>, reason: Option<String>) {
        if self.verdict.is_none() {
            let result = self.result.take();
            self.verdict = Some(result.unwrap_or(Verdict { conclusion, exit_code, reason }));
        }
        self.phase = Phase::Over;
        self.decoder = Decoder::new();
        self.outgoing = Vec::new();
        self.sent = 0;
    }
}

impl Record {
    /// Takes bytes from the agent. `room` is what its list of artifacts may take, in bytes.
    pub(super) fn agent_sent(&mut self, bytes: &[u8], room: usize, now: Clock) {
        if let Some(run) = &mut self.run
            && run.verdict.is_none()
        {
            run.decoder.push(bytes);
        }
        while let Some(run) = self.run.as_mut().filter(|run| run.verdict.is_none()) {
            let message = match run.decoder.next_frame() {
                Ok(Some(frame)) => AgentMessage::decode(frame),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match message {
                Ok(message) => self.agent_said(message, room, now),
                Err(error) => self.protocol_broken(&error.to_string()),
            }
        }
    }

    fn agent_said(&mut self, message: AgentMessage, room: usize, now: Clock) {
        let Some(phase) = self.run.as_ref().map(|run| run.phase) else { return };
        match (message, phase) {
            (AgentMessage::Hello(hello), Phase::Booting { .. }) => {
                if hello.protocol == PROTOCOL {
                    self.job.timings.agent_ready_ms = Some(self.elapsed_ms(now));
                    if let Some(run) = &mut self.run {
                        run.say_identity(now);
                    }
                    match &mut self.run {
                        Some(run) if self.workspace.is_some() => {
                            let begin_by = now.monotonic_ns.saturating_add(BEGIN_NS);
                            run.phase = Phase::Workspace { begin_by };
                        }
                        _ => self.next_step(0, now),
                    }
                } else {
                    let theirs = hello.protocol;
                    self.system_failure(format!(
                        "the image's agent speaks protocol {theirs}, this node {PROTOCOL}; rebuild the image"
                    ));
                }
            }
            (AgentMessage::StepStarted(said), Phase::Step { index, started: false, backstop })
                if said.index as usize == index =>
            {
                if let Some(run) = &mut self.run {
                    run.phase = Phase::Step { index, started: true, backstop };
                }
            }
            (AgentMessage::Stdout(bytes), Phase::Step { started: true, .. }) => {
                self.output(Stream::Stdout, &bytes, now);
            }
            (AgentMessage::Stderr(bytes), Phase::Step { started: true, .. }) => {
                self.output(Stream::Stderr, &bytes, now);
            }
            (AgentMessage::StepCompleted(said), Phase::Step { index, started: true, .. })
                if said.index as usize == index =>
            {
                self.step_completed(index, said, now);
            }
            (AgentMessage::WorkspaceUnpacked(said), Phase::Workspace { .. }) => {
                if self.workspace_unpacked(said) {
                    self.next_step(0, now);
                } else {
                    self.protocol_broken("WorkspaceUnpacked before the workspace's end");
                }
            }
            (AgentMessage::WorkspaceFailed(failed), Phase::Workspace { .. }) => {
                self.workspace_failed(&short(&failed.message, MAX_MESSAGE));
            }
            (
                said @ (AgentMessage::ArtifactList(_)
                | AgentMessage::ArtifactData(_)
                | AgentMessage::ArtifactsSent(_)),
                Phase::Artifacts,
            ) => {
                let kind = said.kind();
                if !self.artifacts_said(said, room, now) {
                    self.protocol_broken(&format!("{kind:?} that was not asked for"));
                }
            }
            (AgentMessage::Failure(failure), _) => {
                let message = short(&failure.message, MAX_MESSAGE);
                let place = self.place();
                self.system_failure(format!("the agent gave up{place}: {message}"));
            }
            (message, phase) => {
                let name = message.kind();
                let when = match phase {
                    Phase::Booting { .. } => "before Hello",
                    Phase::Workspace { .. } => "before the workspace was there",
                    Phase::Artifacts => "after the last step",
                    Phase::Step { started: false, .. } => "before the step started",
                    _ => "in the middle of a step",
                };
                self.protocol_broken(&format!("unexpected {name:?} {when}"));
            }
        }
    }

    fn output(&mut self, stream: Stream, bytes: &[u8], now: Clock) {
        if bytes.is_empty() {
            return;
        }
        if self.job.timings.first_output_ms.is_none() {
            self.job.timings.first_output_ms = Some(self.elapsed_ms(now));
        }
        let end = self.log.end();
        for follower in self.followers.iter().filter_map(alloc::sync::Weak::upgrade) {
            // One that has read everything has not been slow: its patience counts from the output it has yet to read.
            if follower.cursor() >= end {
                follower.made_progress(now);
            }
        }
        self.log.push(stream, bytes);
    }

    fn step_completed(&mut self, index: usize, said: StepCompleted, now: Clock) {
        let timeout = self.script.steps.get(index).and_then(|step| step.timeout_seconds);
        if said.timed_out && timeout.is_none() {
            return self.protocol_broken("a StepCompleted with timed_out for a step without timeout_seconds");
        }
        let code = match (said.exit_code, said.signal) {
            (_, Some(signal)) if !(1..=LAST_SIGNAL).contains(&signal) => {
                let what = format!("a StepCompleted with signal {signal}; there are 1 to {LAST_SIGNAL}");
                return self.protocol_broken(&what);
            }
            (_, Some(signal)) => signal.saturating_add(128),
            (Some(code), None) => code,
            (None, None) => return self.protocol_broken("a StepCompleted with neither exit_code nor signal"),
        };
        let name = self.step_name(index);
        let cancel = self.run.as_ref().and_then(|run| run.cancel);
        let cancelled = cancel.is_some_and(|cancel| !cancel.cleaning_up);
        let (conclusion, failed) = if said.timed_out {
            let limit = timeout.unwrap_or(self.job.timeout_seconds);
            let reason = format!("{name} ran longer than its timeout_seconds of {limit}");
            (StepConclusion::TimedOut, Some(FirstFailure { timed_out: true, exit_code: None, reason }))
        } else if code == 0 {
            (StepConclusion::Success, None)
        } else if cancelled {
            (StepConclusion::Cancelled, None)
        } else {
            let reason = match (said.signal, code) {
                (Some(signal), _) => format!("{name} was killed by signal {signal}{}", signal_name(signal)),
                (None, 127) => format!("{name} exited with 127 (command not found)"),
                (None, code) => format!("{name} exited with {code}"),
            };
            (StepConclusion::Failure, Some(FirstFailure { timed_out: false, exit_code: Some(code), reason }))
        };
        self.end_step(conclusion, now);
        if let Some(step) = self.job.steps.get_mut(index) {
            step.exit_code = if said.timed_out { None } else { Some(code) };
        }
        if let Some(run) = &mut self.run
            && run.failed.is_none()
        {
            run.failed = failed;
        }
        self.next_step(index.saturating_add(1), now);
    }

    /// Starts the first step from `index` on whose condition holds, or ends the run.
    fn next_step(&mut self, mut index: usize, now: Clock) {
        loop {
            let Some(run) = &mut self.run else { return };
            let (failed, cancelled) = (run.failed.is_some(), run.cancel.is_some());
            let Some(step) = self.script.steps.get(index) else { return self.last_step_done(now) };
            let runs = match step.condition.unwrap_or_default() {
                Condition::Always => true,
                Condition::Success => !failed && !cancelled,
                Condition::Failure => failed && !cancelled,
            };
            let Some(shown) = self.job.steps.get_mut(index) else { return };
            if !runs {
                shown.status = Status::Completed;
                shown.conclusion =
                    Some(if cancelled { StepConclusion::Cancelled } else { StepConclusion::Skipped });
                index = index.saturating_add(1);
                continue;
            }
            let mut env = self.script.env.clone();
            env.extend(step.env.iter().map(|(name, value)| (name.clone(), value.clone())));
            let message = HostMessage::RunStep(RunStep {
                index: u32::try_from(index).unwrap_or(u32::MAX),
                run: step.run.clone(),
                env,
                timeout_seconds: step.timeout_seconds,
                working_directory: None,
            });
            shown.status = Status::InProgress;
            shown.started_at = Some(rfc3339(now.unix_ns));
            run.say(&message);
            if run.verdict.is_some() {
                return;
            }
            let limit = step.timeout_seconds.map(|seconds| u64::from(seconds).saturating_mul(SECOND));
            let backstop =
                limit.map(|limit| now.monotonic_ns.saturating_add(limit).saturating_add(STEP_BACKSTOP_NS));
            run.phase = Phase::Step { index, started: false, backstop };
            if let Some(cancel) = run.cancel.as_mut().filter(|cancel| !cancel.cleaning_up) {
                cancel.cleaning_up = true;
                cancel.deadline = now.monotonic_ns.saturating_add(CANCEL_STEPS_NS);
            }
            return;
        }
    }

    fn last_step_done(&mut self, now: Clock) {
        let Some(run) = &mut self.run else { return };
        if run.cancel.is_some() {
            return run.end(Conclusion::Cancelled, None, Some(CANCELLED.to_string()));
        }
        let (conclusion, exit_code, reason) = match run.failed.take() {
            None => (Conclusion::Success, Some(0), None),
            Some(failure) if failure.timed_out => (Conclusion::TimedOut, None, Some(failure.reason)),
            Some(failure) => (Conclusion::Failure, failure.exit_code, Some(failure.reason)),
        };
        run.result = Some(Verdict { conclusion, exit_code, reason });
        run.phase = Phase::Artifacts;
        if !self.gather_artifacts(now) {
            self.end_with_result();
        }
    }

    /// Ends a run whose steps are over with what they gave.
    pub(super) fn end_with_result(&mut self) {
        // `end` takes the result for what is said here.
        self.system_failure("the steps have no result".to_string());
    }

    /// Somebody cancelled the job while it runs.
    pub(super) fn cancel_run(&mut self, now: Clock) {
        let Some(run) = &mut self.run else { return };
        if run.verdict.is_some() || run.cancel.is_some() {
            return;
        }
        if run.step().is_none() {
            return run.end(Conclusion::Cancelled, None, Some(CANCELLED.to_string()));
        }
        let deadline = now.monotonic_ns.saturating_add(CANCEL_STEP_NS);
        run.cancel = Some(Cancel { deadline, cleaning_up: false });
        run.say(&HostMessage::CancelStep);
    }

    /// The agent's connection is gone. Its machine may yet say why.
    pub(super) fn agent_hung_up(&mut self, now: Clock) {
        if let Some(run) = &mut self.run
            && run.verdict.is_none()
        {
            run.hang_up_deadline.get_or_insert(now.monotonic_ns.saturating_add(HANG_UP_NS));
        }
    }

    /// Ends what has taken too long.
    pub(super) fn run_timers(&mut self, now: Clock) {
        let place = self.place();
        let (timeout, step) = (self.job.timeout_seconds, self.run.as_ref().and_then(Run::step));
        let step_name = step.map(|index| self.step_name(index));
        match self.run.as_ref().filter(|run| run.verdict.is_none()).map(|run| run.phase) {
            Some(Phase::Workspace { begin_by }) => self.workspace_timers(begin_by, now),
            Some(Phase::Artifacts) => self.artifact_timers(now),
            _ => {}
        }
        let Some(run) = self.run.as_mut().filter(|run| run.verdict.is_none()) else { return };
        let due = |deadline: Option<u64>| deadline.is_some_and(|deadline| deadline <= now.monotonic_ns);
        if due(run.cancel.map(|cancel| cancel.deadline)) {
            run.end(Conclusion::Cancelled, None, Some(CANCELLED.to_string()));
        } else if due(Some(run.job_deadline)) && run.result.is_none() {
            let reason = format!("the job ran longer than its timeout_seconds of {timeout}");
            run.end(Conclusion::TimedOut, None, Some(reason));
        } else if due(run.hang_up_deadline) {
            run.end(Conclusion::SystemFailure, None, Some(format!("the agent closed its connection{place}")));
        } else if let Phase::Booting { deadline } = run.phase
            && due(Some(deadline))
        {
            let seconds = AGENT_TIMEOUT_NS / SECOND;
            let what = if run.connected { "say hello" } else { "connect" };
            let reason = format!("the agent did not {what} within {seconds} s of the machine's start");
            run.end(Conclusion::SystemFailure, None, Some(reason));
        } else if let Phase::Step { index, backstop, .. } = run.phase
            && due(backstop.map(|backstop| backstop.saturating_add(run.held_for(now))))
        {
            let limit = self.script.steps.get(index).and_then(|step| step.timeout_seconds).unwrap_or(timeout);
            let name = step_name.unwrap_or_default();
            let reason = format!("{name} ran longer than its timeout_seconds of {limit}");
            run.end(Conclusion::TimedOut, None, Some(reason));
        }
    }

    fn protocol_broken(&mut self, what: &str) {
        let place = self.place();
        self.system_failure(format!("the agent broke its protocol{place}: {}", short(&what, MAX_MESSAGE)));
    }

    fn system_failure(&mut self, reason: String) {
        if let Some(run) = &mut self.run {
            run.end(Conclusion::SystemFailure, None, Some(reason));
        }
    }

    /// ` during step 2 (build)`, ` before its first step` or nothing, to go on a reason.
    pub(super) fn place(&self) -> String {
        match self.run.as_ref().map(|run| run.phase) {
            Some(Phase::Step { index, .. }) => format!(" during {}", self.step_name(index)),
            Some(Phase::Booting { .. }) => " before the agent was ready".to_string(),
            Some(Phase::Workspace { .. }) => " before the workspace was there".to_string(),
            _ => String::new(),
        }
    }

    fn step_name(&self, index: usize) -> String {
        let name = self.job.steps.get(index).map_or("", |step| step.name.as_str());
        format!("step {} ({name})", index.saturating_add(1))
    }
}

pub(super) const CANCELLED: &str = "cancelled through the API";

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => " (SIGHUP)",
        2 => " (SIGINT)",
        3 => " (SIGQUIT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        13 => " (SIGPIPE)",
        15 => " (SIGTERM)",
        24 => " (SIGXCPU)",
        25 => " (SIGXFSZ)",
        31 => " (SIGSYS)",
        _ => "",
    }
}
