//! Our side: the kernel in the same emulated machine as the peer's L1, asked over HTTP.

use super::loads::Marks;
use super::machine::Machine;
use super::rows::Samples;
use anyhow::{Context, Result, bail};
use nestling_api::types::{Conclusion, Host, Job, JobRequest, MachineConfig, Status, StepRequest};
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use ureq::Agent;

/// The node's files.
pub(super) struct Node {
    /// The kernel's ELF.
    pub(super) kernel: PathBuf,
    /// The bundle of images.
    pub(super) images: PathBuf,
}

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(120);

impl Node {
    /// Boots a node and, if `jobs` says so, runs two jobs on it one after another.
    pub(super) fn run(&self, jobs: bool) -> Result<Samples> {
        let mut running = Running::start(&self.kernel, |command| {
            command.arg("-initrd").arg(&self.images);
        })?;
        let host: Host = running.client.get("/v1/host")?;
        let (machine, ready) = (&running.machine, running.ready);
        let mut samples = Samples {
            cold: Some(ready.duration_since(machine.started).as_secs_f64()),
            boot: machine.first_byte.map(|first| ready.saturating_duration_since(first).as_secs_f64()),
            entry: host.boot.kernel_entry_to_ready_ms.map(|milliseconds| milliseconds / 1e3),
            ..Samples::default()
        };
        if jobs {
            let measured = measure_jobs(&running.client, &mut samples);
            running.explain(measured)?;
        }
        Ok(samples)
    }
}

/// Runs `command` in a machine of the image `loads` of the store `store`, which stays as it is.
pub(super) fn run_loads(kernel: &Path, store: &Path, command: &str) -> Result<Marks> {
    let mut running = Running::start(kernel, |qemu| {
        qemu.arg("-drive").arg(format!("if=none,id=d0,format=raw,readonly=on,file={}", store.display()));
        qemu.args(["-device", "virtio-blk-pci,drive=d0"]);
    })?;
    let marks = measure_loads(&running.client, command);
    running.explain(marks)
}

/// A node that answers.
struct Running {
    machine: Machine,
    client: Client,
    ready: Instant,
}

impl Running {
    fn start(kernel: &Path, more: impl FnOnce(&mut Command)) -> Result<Self> {
        // A port that is free now; QEMU takes it a moment later.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Machine::qemu(2048);
        command.arg("-kernel").arg(kernel).args(["-append", "auth=off"]);
        command.arg("-netdev").arg(format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:8080"));
        command.args(["-device", "virtio-net-pci,netdev=n0,romfile="]);
        more(&mut command);
        let mut machine = Machine::start(command)?;
        let client = Client::new(port);
        let ready = wait_ready(&mut machine, &client)?;
        Ok(Self { machine, client, ready })
    }

    /// Adds what the node said last to an error.
    fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        self.machine.drain();
        result.with_context(|| format!("the node's last lines:\n{}", self.machine.tail()))
    }
}

/// When the API answered for the first time. The serial log tells when asking begins to make sense, so that no connection hangs in a
/// machine whose network does not stand.
fn wait_ready(machine: &mut Machine, client: &Client) -> Result<Instant> {
    while !machine.next_line(LIMIT)?.1.contains("http://") {}
    let asked = Instant::now();
    while asked.elapsed() < LIMIT && machine.runs() {
        if client.agent.get(client.url("/readyz")).call().is_ok() {
            return Ok(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    machine.drain();
    bail!("the node never became ready; its last lines:\n{}", machine.tail())
}

/// One job that prints a word, for the times, and one that powers its machine off, for the exits.
fn measure_jobs(client: &Client, samples: &mut Samples) -> Result<()> {
    let asked = Instant::now();
    let job = client.create("echo READY")?;
    let mut log = client.agent.get(client.url(&format!("/v1/jobs/{}/logs?follow=true", job.id))).call()?;
    let mut reader = log.body_mut().as_reader();
    let mut first = [0];
    reader.read_exact(&mut first).context("the job ended without output")?;
    samples.first_output = Some(asked.elapsed().as_secs_f64());
    std::io::copy(&mut reader, &mut std::io::sink())?;
    let job = client.wait(&job.id)?;
    let ready = job.timings.agent_ready_ms.context("the job has no agent_ready_ms")?;
    samples.job = Some(Duration::from_millis(ready).as_secs_f64());

    let job = client.create("poweroff -f")?;
    let job = client.wait(&job.id)?;
    let exits = *job.exits.get("total").context("the job has no exits.total")?;
    samples.exits = Some(f64::from(u32::try_from(exits)?));
    Ok(())
}

/// Follows the loads' output, and asks at each mark for the exits of all machines, of which there is one.
fn measure_loads(client: &Client, command: &str) -> Result<Marks> {
    let job = client.create_request(&JobRequest {
        image: Some("loads".to_owned()),
        machine_config: Some(MachineConfig { mem_size_mib: 512, ..MachineConfig::default() }),
        steps: vec![StepRequest { run: command.to_owned(), ..StepRequest::default() }],
        cold: true,
        ..JobRequest::default()
    })?;
    let mut log = client.agent.get(client.url(&format!("/v1/jobs/{}/logs?follow=true", job.id))).call()?;
    let mut marks = Marks::default();
    let mut lines = BufReader::new(log.body_mut().as_reader());
    let (mut line, mut output) = (String::new(), String::new());
    while lines.read_line(&mut line)? > 0 {
        output.push_str(&line);
        let is_mark = marks.line(Instant::now(), &line).with_context(|| output.clone())?;
        if is_mark {
            let host: Host = client.get("/v1/host")?;
            let exits = host.exits.get("total").copied().unwrap_or_default();
            marks.exits(f64::from(u32::try_from(exits)?));
        }
        line.clear();
    }
    let job = client.wait(&job.id)?;
    if job.conclusion != Some(Conclusion::Success) {
        bail!("the loads' job ended as {:?} ({:?}) after\n{output}", job.conclusion, job.failure_reason);
    }
    Ok(marks)
}

/// The node's API.
struct Client {
    agent: Agent,
    port: u16,
}

impl Client {
    fn new(port: u16) -> Self {
        let config = Agent::config_builder()
            .timeout_connect(Some(LIMIT))
            .timeout_recv_response(Some(LIMIT))
            .proxy(None);
        Self { agent: config.build().new_agent(), port }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let text = self
            .agent
            .get(self.url(path))
            .call()
            .with_context(|| format!("GET {path}"))?
            .body_mut()
            .read_to_string()?;
        serde_json::from_str(&text).with_context(|| format!("GET {path} answered {text}"))
    }

    /// Creates a job of one step.
    fn create(&self, run: &str) -> Result<Job> {
        self.create_request(&JobRequest {
            steps: vec![StepRequest { run: run.to_owned(), ..StepRequest::default() }],
            // What is measured here is a machine that boots.
            cold: true,
            ..JobRequest::default()
        })
    }

    fn create_request(&self, request: &JobRequest) -> Result<Job> {
        let mut answer = self
            .agent
            .post(self.url("/v1/jobs"))
            .header("content-type", "application/json")
            .send(serde_json::to_vec(request)?)
            .context("POST /v1/jobs")?;
        Ok(serde_json::from_str(&answer.body_mut().read_to_string()?)?)
    }

    /// Waits until the job is over.
    fn wait(&self, id: &str) -> Result<Job> {
        let began = Instant::now();
        while began.elapsed() < LIMIT {
            let job: Job = self.get(&format!("/v1/jobs/{id}"))?;
            if job.status == Status::Completed {
                return Ok(job);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("job {id} was not over after {} s", LIMIT.as_secs())
    }
}
