//! A node in this process: the real API on real sockets, with an agent that runs a job's steps on this computer instead of in
//! a machine. What the command does can be tested against it in milliseconds.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nestling_api::agent::{
    AgentMessage, ArtifactList, ArtifactsSent, Decoder, Hello, HostMessage, PROTOCOL, RunStep, StepCompleted,
    StepStarted, WorkspaceFailed, WorkspaceUnpacked,
};
use nestling_api::http::Connection;
use nestling_api::jobs::request::LargestMachine;
use nestling_api::jobs::{ConnectionRecord, JobId, MachineEnd, MachineReport};
use nestling_api::types::{Host, Image, Protocol, Template};
use nestling_api::{Api, ApiConfig, Clock, Node};

/// The token of every fake node.
pub const TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// A step whose script has this word ends its machine.
const POWER_OFF: &str = "fake-power-off";

/// A step whose script has this word connects to one place and is refused another.
const CONNECT: &str = "fake-connect";

/// A workspace in which a file has this name cannot be unpacked.
const UNPACK_FAILS: &str = "fake-unpack-fails";

/// A running node; it ends when dropped.
pub struct FakeNode {
    url: String,
    stop: Arc<AtomicBool>,
    cut: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl FakeNode {
    /// Starts one.
    pub fn start() -> FakeNode {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, cut) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let thread = thread::spawn({
            let (stop, cut) = (Arc::clone(&stop), Arc::clone(&cut));
            move || Loop::new(listener, cut).run(&stop)
        });
        FakeNode { url, stop, cut, thread: Some(thread) }
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// From now on, breaks every connection that follows a log after so many bytes.
    pub fn cut_logs_after(&self, bytes: usize) {
        self.cut.store(bytes, Ordering::SeqCst);
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let result = self.thread.take().unwrap().join();
        if !thread::panicking() {
            result.unwrap();
        }
    }
}

/// One accepted connection.
struct Peer {
    stream: TcpStream,
    connection: Connection,
    followed: usize,
}

/// The job that runs, and the ends of its agent's channels.
struct Running {
    id: JobId,
    to_agent: Sender<Vec<u8>>,
    from_agent: Receiver<Event>,
    agent: JoinHandle<()>,
}

enum Event {
    Bytes(Vec<u8>),
    Connect,
    PowerOff,
}

struct Loop {
    listener: TcpListener,
    cut: Arc<AtomicUsize>,
    api: Api,
    node: Facts,
    peers: Vec<Peer>,
    running: Option<Running>,
    /// Taken from the agent and not yet by the job.
    pending: Vec<u8>,
}

impl Loop {
    fn new(listener: TcpListener, cut: Arc<AtomicUsize>) -> Loop {
        let api = Api::new(ApiConfig { token: Some(TOKEN.to_owned()), ..ApiConfig::default() });
        let node = Facts(Instant::now(), 0);
        Loop { listener, cut, api, node, peers: Vec::new(), running: None, pending: Vec::new() }
    }

    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            let now = self.node.now();
            while let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(true).unwrap();
                self.peers.push(Peer { stream, connection: Connection::new(now), followed: 0 });
            }
            let cut = self.cut.load(Ordering::SeqCst);
            let (api, node) = (&mut self.api, &mut self.node);
            self.peers.retain_mut(|peer| serve(peer, api, node, now, cut));
            self.work(now);
            thread::sleep(Duration::from_millis(1));
        }
        self.end_machine(MachineEnd::Destroyed);
    }

    /// What the kernel's engine does with machines.
    fn work(&mut self, now: Clock) {
        let jobs = &mut self.api.jobs;
        jobs.poll(now);
        let Some(running) = &self.running else {
            if let Some(next) = jobs.next_queued()
                && jobs.start(next.id, now)
            {
                jobs.agent_connected(next.id);
                let ((to_agent, inbox), (outbox, from_agent)) = (channel(), sync_channel(16));
                let agent = thread::spawn(move || agent(&inbox, &outbox));
                self.running = Some(Running { id: next.id, to_agent, from_agent, agent });
            }
            return;
        };
        let bytes = jobs.transmit(running.id).to_vec();
        jobs.transmitted(running.id, bytes.len());
        // An agent that has gone is found out below.
        let _ = running.to_agent.send(bytes);
        let mut ended = None;
        while self.pending.is_empty() {
            match running.from_agent.try_recv() {
                Ok(Event::Bytes(bytes)) => self.pending = bytes,
                Ok(Event::Connect) => jobs.record_connections(running.id, connections(), now),
                Ok(Event::PowerOff) => ended = Some(MachineEnd::PowerOff),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    jobs.agent_disconnected(running.id, now);
                    break;
                }
            }
            if ended.is_some() {
                break;
            }
        }
        let take = jobs.receive_capacity(running.id, now).min(self.pending.len());
        jobs.receive(running.id, &self.pending[..take], now);
        self.pending.drain(..take);
        if jobs.finished(running.id) {
            ended.get_or_insert(MachineEnd::Destroyed);
        }
        if let Some(end) = ended {
            self.end_machine(end);
        }
    }

    fn end_machine(&mut self, end: MachineEnd) {
        self.pending.clear();
        if let Some(Running { id, to_agent, from_agent, agent }) = self.running.take() {
            // The agent ends when either is gone.
            drop((to_agent, from_agent));
            agent.join().unwrap();
            let console_tail = "[    1.000000] the console's\n[    2.000000] last lines".to_owned();
            let exits = BTreeMap::from([("cpuid".to_owned(), 7)]);
            let report = MachineReport { end, console_tail, exits, peak_mib: Some(64), disk_problem: None };
            self.api.jobs.machine_ended(id, report, self.node.now());
        }
    }
}

/// Moves bytes between a socket and its connection; false when it is over.
fn serve(peer: &mut Peer, api: &mut Api, node: &mut Facts, now: Clock, cut: usize) -> bool {
    let mut buffer = [0; 4096];
    while let room @ 1.. = peer.connection.receive_capacity().min(buffer.len()) {
        match peer.stream.read(&mut buffer[..room]) {
            Ok(0) => {
                peer.connection.receive_closed();
                break;
            }
            Ok(length) => assert_eq!(peer.connection.receive(&buffer[..length], now), length),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return false,
        }
    }
    loop {
        peer.connection.advance(api, node, now);
        let following = peer.connection.is_following();
        let bytes = peer.connection.transmit();
        if bytes.is_empty() {
            break;
        }
        let limit = if following && cut > 0 { cut.saturating_sub(peer.followed) } else { bytes.len() };
        match peer.stream.write(&bytes[..limit.min(bytes.len())]) {
            Ok(0) => return false,
            Ok(length) => {
                peer.followed += length;
                peer.connection.transmitted(length, now);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return false,
        }
    }
    !peer.connection.wants_close() && !peer.connection.wants_abort()
}

/// The agent: runs steps on this computer, in a workspace of its own.
fn agent(inbox: &Receiver<Vec<u8>>, outbox: &SyncSender<Event>) {
    let send = |message: AgentMessage| outbox.send(Event::Bytes(message.encode().unwrap())).is_ok();
    let hello = Hello { protocol: PROTOCOL, agent: "0.1.0".into(), kernel: "6.1.0-fake".into() };
    send(AgentMessage::Hello(hello));
    let folder = tempfile::tempdir().unwrap();
    let (mut decoder, mut tar, mut artifacts) = (Decoder::new(), Vec::new(), Vec::new());
    while let Ok(bytes) = inbox.recv() {
        decoder.push(&bytes);
        while let Some(frame) = decoder.next_frame().unwrap() {
            match HostMessage::decode(frame).unwrap() {
                HostMessage::RunStep(step) => {
                    if step.run.contains(POWER_OFF) {
                        let _ = outbox.send(Event::PowerOff);
                        return;
                    }
                    if step.run.contains(CONNECT) {
                        let _ = outbox.send(Event::Connect);
                    }
                    run_step(&step, folder.path(), inbox, outbox);
                }
                HostMessage::WorkspaceData(bytes) => tar.extend(bytes),
                HostMessage::WorkspaceEnd => {
                    tar::Archive::new(tar.as_slice()).unpack(folder.path()).unwrap();
                    send(if folder.path().join(UNPACK_FAILS).exists() {
                        AgentMessage::WorkspaceFailed(WorkspaceFailed { message: "no space left".into() })
                    } else {
                        AgentMessage::WorkspaceUnpacked(WorkspaceUnpacked { entries: 1 })
                    });
                }
                HostMessage::ListArtifacts(list) => {
                    artifacts = files(folder.path(), &list.patterns);
                    let message = artifacts.is_empty().then(|| "nothing matches".to_owned());
                    let total_count = artifacts.len() as u64;
                    send(AgentMessage::ArtifactList(ArtifactList {
                        total_count,
                        message,
                        ..ArtifactList::default()
                    }));
                }
                HostMessage::SendArtifacts(_) => {
                    let mut tar = tar::Builder::new(Vec::new());
                    tar.follow_symlinks(false);
                    for file in &artifacts {
                        tar.append_path_with_name(folder.path().join(file), file).unwrap();
                    }
                    for part in tar.into_inner().unwrap().chunks(1000) {
                        send(AgentMessage::ArtifactData(part.to_vec()));
                    }
                    send(AgentMessage::ArtifactsSent(ArtifactsSent::default()));
                }
                HostMessage::Identity(_) | HostMessage::CancelStep | HostMessage::StopArtifacts => {}
            }
        }
    }
}

/// Files below a folder that match.
fn files(folder: &Path, patterns: &[String]) -> Vec<PathBuf> {
    let found =
        patterns.iter().flat_map(|pattern| glob::glob(folder.join(pattern).to_str().unwrap()).unwrap());
    let files = found.map(Result::unwrap).filter(|path| !path.is_dir());
    files.map(|path| path.strip_prefix(folder).unwrap().to_owned()).collect()
}

fn run_step(step: &RunStep, folder: &Path, inbox: &Receiver<Vec<u8>>, outbox: &SyncSender<Event>) {
    let send = |message: AgentMessage| outbox.send(Event::Bytes(message.encode().unwrap())).is_ok();
    let mut child = Command::new("sh")
        .args(["-e", "-c", &step.run])
        .envs(&step.env)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    send(AgentMessage::StepStarted(StepStarted { index: step.index }));
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let status = thread::scope(|scope| {
        scope.spawn(|| pump(stdout, AgentMessage::Stdout, outbox));
        scope.spawn(|| pump(stderr, AgentMessage::Stderr, outbox));
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            match inbox.recv_timeout(Duration::from_millis(2)) {
                // The only message of any length while a step runs is the one that cancels it.
                Ok(bytes) if bytes.is_empty() => {}
                Ok(_) => kill(&child),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => kill(&child),
            }
        }
    });
    let completed = StepCompleted {
        index: step.index,
        exit_code: status.code(),
        signal: status.signal(),
        timed_out: false,
    };
    send(AgentMessage::StepCompleted(completed));
}

/// One connection that is let through, and one that is not.
fn connections() -> [ConnectionRecord<'static>; 2] {
    let allowed = ConnectionRecord {
        number: 0,
        protocol: Protocol::Tcp,
        name: Some("example.org"),
        address: Some([192, 0, 2, 7].into()),
        port: Some(443),
        bytes_sent: 517,
        bytes_received: 4096,
        refused: None,
    };
    let refused = ConnectionRecord {
        number: 1,
        name: Some("example.com"),
        refused: Some("no egress rule allows it"),
        bytes_sent: 0,
        bytes_received: 0,
        ..allowed.clone()
    };
    [allowed, refused]
}

fn kill(child: &Child) {
    let _ = Command::new("kill")
        .args(["-KILL", "--", &format!("-{}", child.id())])
        .stderr(Stdio::null())
        .status();
}

fn pump(mut from: impl Read, message: fn(Vec<u8>) -> AgentMessage, outbox: &SyncSender<Event>) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        // A node that is gone reads nothing, and the step may still write.
        let _ = outbox.send(Event::Bytes(message(buffer[..length].to_vec()).encode().unwrap()));
    }
}

/// What the fake node says of itself.
struct Facts(Instant, u64);

impl Facts {
    fn now(&self) -> Clock {
        let nanoseconds = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap();
        Clock {
            monotonic_ns: nanoseconds(self.0.elapsed()),
            unix_ns: nanoseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap()),
        }
    }
}

impl Node for Facts {
    fn ready(&self) -> bool {
        true
    }

    fn version(&self) -> &str {
        "0.1.0"
    }

    fn host(&self) -> Host {
        let json = serde_json::json!({
            "name": "fake", "version": "0.1.0", "vendor": "amd", "features": {"nested_paging": true}, "cores": 1,
            "memory": {"total_mib": 2048, "free_frames": 1000, "total_frames": 2000, "heap_used_bytes": 1,
            "heap_total_bytes": 2}, "machines": 0, "uptime_ms": 5, "boot": {"kernel_entry_to_ready_ms": 1.0},
            "exits": {"total": 7}, "uplink": null, "tsc_khz": 1000,
        });
        serde_json::from_value(json).unwrap()
    }

    fn image_problems(&self) -> Vec<String> {
        Vec::new()
    }

    fn images(&self) -> Vec<Image> {
        vec![Image { name: "minimal".into(), ..Image::default() }]
    }

    fn templates(&self) -> Vec<Template> {
        Vec::new()
    }

    fn largest_machine(&self) -> LargestMachine {
        LargestMachine { memory_mib: 1024, vcpus: 4 }
    }

    fn random(&mut self, into: &mut [u8]) {
        self.1 += 1;
        let seed = self.1.to_le_bytes();
        into.iter_mut().zip(seed.iter().cycle()).for_each(|(byte, seed)| *byte = *seed);
    }
}
