//! An agent in a process of its own, and a node's end of its socket.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nestling_api::agent::{AgentMessage, Decoder, Hello, HostMessage, PROTOCOL, RunStep, StepCompleted};

static AGENTS: AtomicU32 = AtomicU32::new(0);

/// An agent in a process of its own, and the node's end of its socket.
pub struct Agent {
    pub process: Child,
    pub socket: UnixStream,
    pub decoder: Decoder,
    pub folder: PathBuf,
}

/// What a step gave.
#[derive(Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub completed: Option<StepCompleted>,
}

impl Outcome {
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
    pub fn exit_code(&self) -> Option<i32> {
        self.completed.unwrap().exit_code
    }
    pub fn signal(&self) -> Option<i32> {
        self.completed.unwrap().signal
    }
}

impl Agent {
    pub fn start() -> Self {
        let number = AGENTS.fetch_add(1, Ordering::Relaxed);
        let folder =
            std::env::temp_dir().join(format!("nestling-agent-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(folder.join("work")).unwrap();
        let (socket, theirs) = UnixStream::pair().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_nestling-agent"))
            .arg("--stdin")
            .args(["--work".as_ref(), folder.join("work").as_os_str()])
            .args(["--scripts".as_ref(), folder.join("scripts").as_os_str()])
            .args(["--home".as_ref(), folder.as_os_str()])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .env("FROM_OUTSIDE", "1")
            .spawn()
            .unwrap();
        // Only so that a test of a broken agent ends at all.
        socket.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let mut agent = Self { process, socket, decoder: Decoder::new(), folder };
        assert!(matches!(agent.next(), Some(AgentMessage::Hello(Hello { protocol: PROTOCOL, .. }))));
        agent
    }

    pub fn say(&mut self, message: &HostMessage) {
        self.socket.write_all(&message.encode().unwrap()).unwrap();
    }

    /// The next message; none when the agent has closed the connection.
    pub fn next(&mut self) -> Option<AgentMessage> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(AgentMessage::decode(frame).unwrap());
            }
            let mut bytes = [0; 65536];
            match self.socket.read(&mut bytes).unwrap() {
                0 => return None,
                len => self.decoder.push(&bytes[..len]),
            }
        }
    }

    /// Asks for a step and waits until it says that it has started.
    pub fn begin(&mut self, step: RunStep) {
        let index = step.index;
        self.say(&HostMessage::RunStep(step));
        match self.next() {
            Some(AgentMessage::StepStarted(started)) => assert_eq!(started.index, index),
            other => panic!("{other:?}"),
        }
    }

    /// Takes output until the step has completed.
    pub fn finish(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            match self.next().expect("the agent closed the connection") {
                AgentMessage::Stdout(bytes) => outcome.stdout.extend(bytes),
                AgentMessage::Stderr(bytes) => outcome.stderr.extend(bytes),
                AgentMessage::StepCompleted(completed) => {
                    outcome.completed = Some(completed);
                    return outcome;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Takes output until `wanted` has come on stdout.
    pub fn await_output(&mut self, wanted: &str) {
        let mut got = Vec::new();
        while !String::from_utf8_lossy(&got).contains(wanted) {
            match self.next() {
                Some(AgentMessage::Stdout(bytes)) => got.extend(bytes),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The process ids of the agent's children, zombies too.
    pub fn children(&self) -> Vec<String> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().map(str::to_owned).collect()
    }

    pub fn run(&mut self, script: &str) -> Outcome {
        self.begin(step(script));
        self.finish()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub fn step(script: &str) -> RunStep {
    RunStep {
        index: 0,
        run: script.into(),
        env: BTreeMap::new(),
        timeout_seconds: None,
        working_directory: None,
    }
}
