//! `nestling run`.

use std::collections::BTreeMap;
use std::env;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nestling::client::types::{
    ArtifactsStatus, Conclusion, Job, JobRequest, MachineConfig, Network, Status, StepRequest,
    WorkspaceStatus,
};
use nestling::client::{Client, Egress, EgressRule, Stream};
use nestling::ready::printable;
use nestling::state::{DEFAULT_NODE, State};

use super::files::{self, Fetch};
use super::follow::{self, Outputs, Sink};
use super::interrupt::Interrupt;
use super::jobs::waiting_for;
use super::target::{self, Target};
use super::up;
use crate::cli::{BedChoice, Run, Up};
use crate::terminal::{self, Progress};

/// `timeout`'s exit code of what it ended.
const TIMED_OUT: u8 = 124;
/// The shell's exit code after Ctrl-C.
const CANCELLED: u8 = 130;
/// The shell's exit code of a process that wrote to a closed pipe.
const BROKEN_PIPE: u8 = 141;
/// How long a cancelled job is given to end.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);
/// Most letters of a job's name made from its command.
const NAME_LENGTH: usize = 60;
/// Memory of a node nobody gave options for.
const NODE_MEMORY_MIB: u32 = 2048;
/// How long a node keeps a machine for artifacts that nobody fetches.
const ARTIFACTS_KEPT_S: u32 = 60;
/// How often a spinner's phase is asked for. Every answer takes time from an emulated node's one core.
const PHASE_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) fn run(options: &Run) -> Result<u8> {
    let request = request(options, |name| env::var(name).ok())?;
    // The job to cancel at Ctrl-C, once there is one.
    let running: Arc<Mutex<Option<(Client, String)>>> = Arc::default();
    let interrupt = Interrupt::watch({
        let running = Arc::clone(&running);
        move || cancel_running(&running)
    })?;
    let progress = Progress::new(options.quiet);
    let workspace =
        options.workspace.as_deref().map(|directory| files::scan(directory, &progress)).transpose()?;
    let target = node(options, &interrupt, &progress);
    if let Some(code) = interrupt.exit_code() {
        // What became of the node after that is no failure.
        return Ok(code);
    }
    let target = target?;
    let job = match target.client.create_job_while(&request, || interrupt.exit_code().is_none()) {
        Ok(job) => job,
        Err(error) => return interrupt.exit_code().ok_or(error.into()),
    };
    if options.detach && workspace.is_none() {
        return leave(options, &job.id, &progress);
    }
    progress.phase(&format!("job {} {}", short(&job.id), phase(&job)));
    *running.lock().unwrap_or_else(PoisonError::into_inner) = Some((target.client.clone(), job.id.clone()));
    if interrupt.exit_code().is_some() {
        // It came before there was a job to cancel.
        cancel_running(&running);
    }
    let sent =
        workspace.map_or(Ok(()), |workspace| files::send(&target.client, &job.id, &workspace, &progress));
    if let Err(error) = sent {
        cancel(&target.client, &job.id);
        return Err(error.context(format!("job {}", job.id)));
    }
    if options.detach {
        return leave(options, &job.id, &progress);
    }
    let (result, fetched) = with_artifacts(options, &target, &job.id, &progress);
    // Too late to cancel.
    running.lock().unwrap_or_else(PoisonError::into_inner).take();
    progress.finish();
    let job = match result {
        Ok(job) => job,
        Err(error) if crate::is_broken_pipe(&error) => {
            cancel(&target.client, &job.id);
            if options.rm {
                // A job is deleted only once it is over. If it takes longer, what is said below tells the user.
                let _ = target.client.wait(&job.id, CANCEL_PATIENCE);
                delete(&target.client, &job.id);
            }
            return Ok(BROKEN_PIPE);
        }
        Err(error) => return Err(error.context(format!("job {}", job.id))),
    };
    explain(&job, options.quiet);
    if options.rm {
        delete(&target.client, &job.id);
    }
    match (fetched, exit_code(&job, interrupt.exit_code())) {
        // A job that succeeded without what was asked of it is no success.
        (Err(error), 0) => Err(error.context(format!("job {} succeeded", job.id))),
        (Err(error), code) => {
            terminal::say(format_args!("{error:#}"));
            Ok(code)
        }
        (Ok(()), code) => Ok(code),
    }
}

/// Prints the ID of a job that goes on without us, and what there is to know of its artifacts.
fn leave(options: &Run, id: &str, progress: &Progress) -> Result<u8> {
    if !options.artifact.is_empty() {
        progress.say(&format!(
            "the node keeps the machine for {ARTIFACTS_KEPT_S} s after the command for the artifacts: fetch them with \
             `nestling artifacts {}`, which waits for the job if need be",
            short(id)
        ));
    }
    progress.finish();
    terminal::print(&format!("{id}\n"))?;
    Ok(0)
}

/// What the options ask the node for, with `variable` our environment.
fn request(options: &Run, variable: impl Fn(&str) -> Option<String>) -> Result<JobRequest> {
    let words = options.command.iter().map(String::as_str);
    let command = shlex::try_join(words).context("an argument of the command has a zero byte")?;
    // Else a first word such as `exit` or `if` would be the shell's and not a program's.
    let run = format!("exec {command}");
    let step = StepRequest { name: Some(first_line(&command)), run, ..StepRequest::default() };
    let mut env = BTreeMap::new();
    for setting in &options.env {
        let (name, value) = match setting.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => match variable(setting) {
                Some(value) => (setting.as_str(), value),
                None => bail!(
                    "--env {setting}: there is no such variable in the environment; give --env {setting}=VALUE"
                ),
            },
        };
        env.insert(name.to_owned(), value);
    }
    let default = MachineConfig::default();
    let sized = options.vcpus.is_some() || options.memory.is_some() || options.disk.is_some();
    let machine_config = sized.then(|| MachineConfig {
        vcpu_count: options.vcpus.unwrap_or(default.vcpu_count),
        mem_size_mib: options.memory.unwrap_or(default.mem_size_mib),
        disk_size_mib: options.disk,
    });
    Ok(JobRequest {
        name: options.name.clone(),
        image: options.image.clone(),
        labels: options.label.clone(),
        timeout_seconds: options.timeout.map(|timeout| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX)),
        machine_config,
        steps: vec![step],
        env,
        network: egress(&options.egress)?.map(|egress| Network { egress }),
        workspace: options.workspace.is_some(),
        artifacts: options.artifact.clone(),
        cold: options.cold,
    })
}

/// What `--egress` says, in a list as long as it was given; none when it was not.
fn egress(words: &[String]) -> Result<Option<Egress>> {
    match words {
        [] => Ok(None),
        [word] if word == "none" => Ok(Some(Egress::None)),
        [word] if word == "all" => Ok(Some(Egress::All)),
        rules => {
            let parse =
                |rule: &String| rule.parse::<EgressRule>().with_context(|| format!("--egress {rule}"));
            Ok(Some(Egress::Rules(rules.iter().map(parse).collect::<Result<_>>()?)))
        }
    }
}

/// A command's first line with something on it, cut to what fits a table.
fn first_line(command: &str) -> String {
    let line = command.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let mut letters = printable(line).chars().collect::<Vec<char>>();
    if letters.len() > NAME_LENGTH {
        letters.truncate(NAME_LENGTH);
        letters.push('…');
    }
    letters.into_iter().collect()
}

/// The node to run on, started when there is none.
fn node(options: &Run, interrupt: &Interrupt, progress: &Progress) -> Result<Target> {
    let mut found = target::find(&options.node)?;
    if let Some(local) = found.as_ref().and_then(|target| target.local.as_ref()) {
        // Another command may be starting it: it keeps the lock until the node takes jobs, or has failed to.
        drop(State::of_user()?.node(&local.name)?.lock()?);
        found = target::find(&options.node)?;
    }
    if let Some(target) = found {
        return Ok(target);
    }
    let up = Up {
        bed: BedChoice::Auto,
        memory: NODE_MEMORY_MIB,
        cpus: None,
        port: 0,
        name: DEFAULT_NODE.to_owned(),
        image: None,
        store: None,
        token: options.node.token.clone(),
        no_auth: false,
        quiet: options.quiet,
    };
    let (node, _) = up::start(&up, interrupt, progress).context("no node is up, and starting one failed")?;
    progress.say(&format!("node {} stays up for the next run; stop it with `nestling down`", node.name));
    Target::of_local(node)
}

fn cancel_running(running: &Mutex<Option<(Client, String)>>) {
    let job = running.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((client, id)) = job {
        terminal::say("cancelling the job; once more to leave at once");
        cancel(&client, &id);
    }
}

/// Cancels the job. That it cannot be is no failure of ours: our exit code tells of something else.
fn cancel(client: &Client, id: &str) {
    if let Err(error) = client.cancel(id) {
        // It is over: what we wanted.
        if error.code() != Some("job_completed") {
            terminal::say(format_args!("the job {id} could not be cancelled: {error}"));
        }
    }
}

/// Deletes the job. That it cannot be must not hide how the job ended.
fn delete(client: &Client, id: &str) {
    if let Err(error) = client.delete(id) {
        // Somebody else was first, or the node made room.
        if error.code() != Some("job_not_found") {
            terminal::say(format_args!("the job {id} could not be deleted: {error}"));
        }
    }
}

/// Passes the job's output on until it is over, and brings its artifacts here as soon as they are there.
fn with_artifacts(
    options: &Run,
    target: &Target,
    id: &str,
    progress: &Progress,
) -> (Result<Job>, Result<()>) {
    if options.artifact.is_empty() {
        return (follow(target, id, progress), Ok(()));
    }
    let directory = options.artifact_dir.as_deref().unwrap_or(Path::new("."));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let fetch =
            Fetch { client: &target.client, id, directory, globs: &options.artifact, progress, alone: false };
        let over = &over;
        let fetching = scope.spawn(move || fetch.run(over).map(drop));
        let result = follow(target, id, progress);
        over.store(true, Ordering::SeqCst);
        fetching.thread().unpark();
        (result, fetching.join().unwrap_or_else(|_| Err(anyhow!("fetching the artifacts failed"))))
    })
}

/// Passes the job's output on until it is over, showing its phase until there is output.
fn follow(target: &Target, id: &str, progress: &Progress) -> Result<Job> {
    if !progress.is_live() {
        return follow::follow(target, id, &mut RunSink::new(progress));
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let phases = scope.spawn(|| {
            while progress.is_live() && !over.load(Ordering::SeqCst) {
                if let Ok(job) = target.client.job(id) {
                    progress.phase(&format!("job {} {}", short(id), phase(&job)));
                }
                thread::park_timeout(PHASE_INTERVAL);
            }
        });
        let result = follow::follow(target, id, &mut RunSink::new(progress));
        over.store(true, Ordering::SeqCst);
        phases.thread().unpark();
        result
    })
}

/// Passes the job's output on to ours; the first of it replaces the spinner.
struct RunSink<'a> {
    progress: &'a Progress,
    outputs: Outputs,
}

impl<'a> RunSink<'a> {
    fn new(progress: &'a Progress) -> RunSink<'a> {
        RunSink { progress, outputs: Outputs { stdout: true, stderr: true } }
    }
}

impl Sink for RunSink<'_> {
    fn output(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        self.progress.finish();
        self.outputs.write(stream, data)
    }

    fn dropped(&mut self, bytes: u64) -> io::Result<()> {
        self.progress.say(&follow::dropped(bytes));
        Ok(())
    }

    fn remark(&mut self, text: &str) {
        self.progress.say(text);
    }
}

/// The beginning of an ID, enough to name the job to other commands.
pub(super) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// What a job is at.
pub(super) fn phase(job: &Job) -> String {
    match (job.status, job.queue_position) {
        (Status::Queued, Some(position)) => {
            format!("queued at position {position}{}", waiting_for(job, ", waits for "))
        }
        (Status::Queued, _) => "queued".to_owned(),
        (Status::InProgress, _) if job.timings.agent_ready_ms.is_none() => "booting its machine".to_owned(),
        (Status::InProgress, _) => match (&job.workspace, &job.artifacts) {
            (Some(workspace), _) if workspace.status != WorkspaceStatus::Unpacked => {
                "waits for its workspace".to_owned()
            }
            (_, Some(artifacts)) if artifacts.status == ArtifactsStatus::Ready => {
                "keeps its artifacts".to_owned()
            }
            _ => "running".to_owned(),
        },
        (Status::Completed, _) => "over".to_owned(),
    }
}

/// Says on standard error why a job did not succeed, when its exit code alone would not tell.
fn explain(job: &Job, quiet: bool) {
    let reason = printable(job.failure_reason.as_deref().unwrap_or("no reason given"));
    match job.conclusion {
        Some(Conclusion::Success) => {}
        Some(Conclusion::Failure) if quiet => {}
        Some(Conclusion::Failure) => terminal::say(format_args!("the job failed: {reason}")),
        Some(Conclusion::Cancelled) => terminal::say("the job was cancelled"),
        Some(Conclusion::TimedOut) => terminal::say(format_args!("the job timed out: {reason}")),
        Some(Conclusion::SystemFailure) | None => {
            let mut text = format!("the system failed, not the job: {reason}");
            for line in job.console.iter().flat_map(|console| console.lines()) {
                text.push_str("\n  | ");
                text.push_str(&printable(line));
            }
            terminal::say(text);
        }
    }
    let refused = job.connections.refused;
    if refused > 0 && job.conclusion != Some(Conclusion::Success) && !quiet {
        let (what, them) = if refused == 1 { ("connection was", "it") } else { ("connections were", "them") };
        let id = short(&job.id);
        terminal::say(format_args!("{refused} {what} refused; see {them} with `nestling connections {id}`"));
    }
}

/// Our exit code for a job that is over.
fn exit_code(job: &Job, interrupted: Option<u8>) -> u8 {
    match job.conclusion {
        Some(Conclusion::Success) => 0,
        // A failure never ends with 0, whatever its code.
        Some(Conclusion::Failure) => {
            job.exit_code.and_then(|code| u8::try_from(code).ok()).filter(|&code| code != 0).unwrap_or(1)
        }
        Some(Conclusion::Cancelled) => interrupted.unwrap_or(CANCELLED),
        Some(Conclusion::TimedOut) => TIMED_OUT,
        Some(Conclusion::SystemFailure) | None => crate::SYSTEM_FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn options(arguments: &[&str]) -> Run {
        let arguments = [&["nestling", "run"], arguments].concat();
        let Command::Run(run) = Cli::parse_from(arguments).command else { panic!("not run") };
        run
    }

    fn request_of(arguments: &[&str]) -> Result<JobRequest> {
        request(&options(arguments), |name| (name == "HOME").then(|| "/root".to_owned()))
    }

    #[test]
    fn the_words_of_the_command_come_out_of_a_shell_as_they_went_in() {
        let words =
            ["printf", "%s|", "uname -r; echo hi; exit 7", "it's", "$HOME", "*", "", "\"", "a\nb", "\\", "é"];
        let arguments = [&["--"], &words[..]].concat();
        let script = request_of(&arguments).unwrap().steps[0].run.clone();
        let output = std::process::Command::new("sh").args(["-e", "-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words[2..].join("|") + "|");
    }

    #[test]
    fn a_job_is_named_after_the_first_line_of_its_command() {
        let name = |words: &[&str]| request_of(&[&["--"], words].concat()).unwrap().steps[0].name.clone();
        assert_eq!(name(&["echo", "a b"]).as_deref(), Some("echo 'a b'"));
        assert_eq!(name(&["sh", "-c", "\n\u{1b}make\nmake test"]).as_deref(), Some("sh -c '"));
        let long = name(&[&"é".repeat(100)]).unwrap();
        assert!(long.chars().count() == NAME_LENGTH + 1 && long.ends_with('…'), "{long}");
    }

    #[test]
    fn a_variable_without_a_value_is_taken_from_the_environment() {
        let request = request_of(&["--env", "A=b=c", "-e", "HOME", "--", "true"]).unwrap();
        assert_eq!(
            request.env,
            BTreeMap::from([("A".into(), "b=c".into()), ("HOME".into(), "/root".into())])
        );
        let error = request_of(&["--env", "NOPE", "--", "true"]).unwrap_err().to_string();
        assert!(error.contains("--env NOPE=VALUE"), "{error}");
    }

    #[test]
    fn only_what_was_asked_for_is_sent() {
        let plain = request_of(&["--", "true"]).unwrap();
        let expected = serde_json::json!({"steps": [{"name": "true", "run": "exec true"}]});
        assert_eq!(serde_json::to_value(&plain).unwrap(), expected);
        let full =
            request_of(&["--memory", "512", "--timeout", "10m", "--name", "n", "--label", "l", "--", "true"])
                .unwrap();
        assert_eq!(
            full.machine_config,
            Some(MachineConfig { vcpu_count: 1, mem_size_mib: 512, disk_size_mib: None })
        );
        assert_eq!(
            (full.timeout_seconds, full.name, full.labels),
            (Some(600), Some("n".into()), vec!["l".into()])
        );
        assert!(!plain.cold && request_of(&["--cold", "--", "true"]).unwrap().cold);
        let disk = request_of(&["--disk", "8192", "--", "true"]).unwrap();
        assert_eq!(
            disk.machine_config,
            Some(MachineConfig { disk_size_mib: Some(8192), ..MachineConfig::default() })
        );
    }

    #[test]
    fn egress_is_a_word_or_rules() {
        let egress = |arguments: &[&str]| {
            request_of(&[arguments, &["--", "true"]].concat())
                .map(|request| request.network.map(|network| network.egress))
        };
        assert_eq!(egress(&[]).unwrap(), None);
        assert_eq!(egress(&["--egress", "none"]).unwrap(), Some(Egress::None));
        assert_eq!(egress(&["--egress", "all"]).unwrap(), Some(Egress::All));
        let rules = ["example.org:443", "10.0.0.0/8"].map(|rule| rule.parse().unwrap());
        let both = egress(&["--egress", "example.org:443", "--egress", "10.0.0.0/8"]).unwrap();
        assert_eq!(both, Some(Egress::Rules(rules.into())));
        for (arguments, words) in [
            (&["--egress", "none", "--egress", "a.org"] as &[&str], "--egress none: 'none' is no rule"),
            (&["--egress", "https://a.org"], "is a URL"),
        ] {
            let error = format!("{:#}", egress(arguments).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    fn job(conclusion: Option<Conclusion>, code: Option<i32>) -> Job {
        let json = serde_json::json!({
            "id": "a".repeat(32), "name": "n", "image": "minimal", "labels": [], "status": "completed", "created_at": "",
            "timeout_seconds": 1, "machine_config": {}, "steps": [], "timings": {}, "exits": {}, "memory": {},
            "log": {"bytes": 0, "start_offset": 0, "truncated": false},
        });
        Job { conclusion, exit_code: code, ..serde_json::from_value(json).unwrap() }
    }

    #[test]
    fn the_exit_code_tells_how_the_job_ended() {
        for (conclusion, code, expected) in [
            (Conclusion::Success, Some(0), 0),
            (Conclusion::Failure, Some(7), 7),
            (Conclusion::Failure, Some(137), 137),
            (Conclusion::Failure, Some(0), 1),
            (Conclusion::Failure, None, 1),
            (Conclusion::Failure, Some(256), 1),
            (Conclusion::Failure, Some(-1), 1),
            (Conclusion::TimedOut, None, 124),
            (Conclusion::Cancelled, None, 130),
            (Conclusion::SystemFailure, Some(0), 125),
        ] {
            assert_eq!(exit_code(&job(Some(conclusion), code), None), expected, "{conclusion:?} {code:?}");
        }
        assert_eq!(exit_code(&job(None, None), None), 125);
        assert_eq!(exit_code(&job(Some(Conclusion::Cancelled), None), Some(143)), 143);
        assert_eq!(exit_code(&job(Some(Conclusion::Success), Some(0)), Some(143)), 0);
    }
}
