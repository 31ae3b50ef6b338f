//! The protocol between the node and the agent in a guest: frames over one vsock stream.
//!
//! The agent connects from [`GUEST_CID`] to [`HOST_CID`], port [`PORT`], and says [`Hello`]. In a clone of a template the node first
//! sends an [`Identity`], which the agent takes on before it does anything else. Then, for a job with a workspace,
//! the node sends its tar ([`Kind::WorkspaceData`], [`Kind::WorkspaceEnd`]), as fast as the agent unpacks it, and the agent
//! answers with [`WorkspaceUnpacked`] or [`WorkspaceFailed`]. From then on the node sends one [`RunStep`] at a time and the
//! agent answers with [`StepStarted`], any amount of output, and one [`StepCompleted`] after all of that output. Last, for a
//! job with artifacts, the node sends [`ListArtifacts`] once, which [`ArtifactList`] answers, and [`SendArtifacts`] as often as
//! somebody wants them, one at a time, which the artifacts' bytes and [`ArtifactsSent`] answer.
//!
//! Neither direction has acknowledgements of its own: the stream's flow control (virtio 1.2, 5.10.6.3) holds back whoever
//! sends faster than the other end reads.
//!
//! Both ends distrust each other: lengths are checked before anything is kept, and an unknown kind ends the conversation.

mod frame;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use frame::{Decoder, Frame, HEADER_LEN, Kind, MAX_PAYLOAD, MAX_RUN_STEP, ProtocolError, encode, header};

use crate::json;
use crate::types::Artifact;

/// The node's address on a machine's vsock (fixed by the virtio specification, 5.10.4).
pub const HOST_CID: u32 = 2;
/// The guest's address on its vsock. Every machine has the same: machines cannot see each other.
pub const GUEST_CID: u32 = 3;
/// The vsock port the node listens on.
pub const PORT: u32 = 1024;
/// The version of this protocol, as said in [`Hello::protocol`].
pub const PROTOCOL: u32 = 3;

/// Node to agent: what a clone does not share with its template and its other clones.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random bytes that nobody else gets: the kernel's generator starts over with them.
    pub entropy: [u8; 32],
    /// The time, in nanoseconds since 1970-01-01 UTC.
    pub unix_ns: u64,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity {{ unix_ns: {} }}", self.unix_ns)
    }
}

/// Node to agent: run one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStep {
    /// The step's place in the job, from 0.
    pub index: u32,
    /// The shell script to run.
    pub run: String,
    /// Variables added to the agent's base environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Seconds until the agent ends the step by itself; none: as long as it takes.
    #[serde(default)]
    pub timeout_seconds: Option<u32>,
    /// Where the step starts; none: the agent's default work directory.
    #[serde(default)]
    pub working_directory: Option<String>,
}

/// Agent to node: the first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The protocol version the agent speaks; has to be [`PROTOCOL`].
    pub protocol: u32,
    /// The agent's version.
    pub agent: String,
    /// The guest kernel's release, as `uname -r` prints it.
    pub kernel: String,
}

/// Agent to node: a step's process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepStarted {
    /// The step's place in the job, from 0.
    pub index: u32,
}

/// Agent to node: a step's process is gone and all of its output has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepCompleted {
    /// The step's place in the job, from 0.
    pub index: u32,
    /// The exit code, when the process exited.
    #[serde(default)]
    pub exit_code: Option<i32>,
    /// The signal, when one killed the process.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Whether the agent ended the step because of its `timeout_seconds`.
    #[serde(default)]
    pub timed_out: bool,
}

/// Agent to node: the agent cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What happened, for a person to read.
    pub message: String,
}

/// Agent to node: the workspace is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceUnpacked {
    /// Files, directories and links that the tar had.
    pub entries: u64,
}

/// Agent to node: the workspace could not be unpacked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceFailed {
    /// Which entry and why, for a person to read.
    pub message: String,
}

/// Node to agent: find the artifacts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListArtifacts {
    /// Globs relative to the workspace. A directory that matches stands for all files below it.
    pub patterns: Vec<String>,
}

/// Agent to node: the artifacts there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactList {
    /// How many there are.
    pub total_count: u64,
    /// How many bytes they have together.
    pub total_bytes: u64,
    /// The first of them, as many as fit a frame, in the order of their names.
    pub artifacts: Vec<Artifact>,
    /// What a person should know, such as patterns that match nothing.
    #[serde(default)]
    pub message: Option<String>,
}

/// Node to agent: send artifacts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendArtifacts {
    /// The one whose bytes are wanted, as [`ArtifactList`] names it; none: all of them, as a tar.
    #[serde(default)]
    pub name: Option<String>,
}

/// Agent to node: what was asked for by [`SendArtifacts`] has been sent, as far as it could be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactsSent {
    /// Why it is not all of it, for a person to read; none when it is.
    #[serde(default)]
    pub failed: Option<String>,
}

/// A message from the node, typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMessage {
    /// What a clone is from now on.
    Identity(Identity),
    /// Run one step.
    RunStep(RunStep),
    /// End the running step.
    CancelStep,
    /// Bytes of the workspace's tar.
    WorkspaceData(Vec<u8>),
    /// The end of the workspace's tar.
    WorkspaceEnd,
    /// Find the artifacts.
    ListArtifacts(ListArtifacts),
    /// Send artifacts.
    SendArtifacts(SendArtifacts),
    /// Send no more of them.
    StopArtifacts,
}

/// A message from the agent, typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentMessage {
    /// The first message of a connection.
    Hello(Hello),
    /// A step's process runs.
    StepStarted(StepStarted),
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// A step is over.
    StepCompleted(StepCompleted),
    /// The agent cannot go on.
    Failure(Failure),
    /// The workspace is there.
    WorkspaceUnpacked(WorkspaceUnpacked),
    /// The workspace could not be unpacked.
    WorkspaceFailed(WorkspaceFailed),
    /// The artifacts there are.
    ArtifactList(ArtifactList),
    /// Bytes of artifacts.
    ArtifactData(Vec<u8>),
    /// The end of those bytes.
    ArtifactsSent(ArtifactsSent),
}

fn encode_json<T: Serialize>(kind: Kind, message: &T) -> Result<Vec<u8>, ProtocolError> {
    let json = serde_json::to_vec(message).map_err(|error| malformed(kind, &error))?;
    encode(kind, &json)
}

fn decode_json<T: DeserializeOwned>(frame: &Frame) -> Result<T, ProtocolError> {
    json::from_slice(&frame.payload).map_err(|error| malformed(frame.kind, &error))
}

fn malformed(kind: Kind, error: &impl fmt::Display) -> ProtocolError {
    ProtocolError::Malformed { kind, message: json::short(error, json::MAX_MESSAGE) }
}

impl HostMessage {
    /// This message as one frame's bytes.
    ///
    /// # Errors
    /// [`ProtocolError::TooLong`] when a step's JSON exceeds [`MAX_RUN_STEP`], or bytes exceed [`MAX_PAYLOAD`].
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        match self {
            Self::Identity(identity) => encode_json(Kind::Identity, identity),
            Self::RunStep(step) => encode_json(Kind::RunStep, step),
            Self::CancelStep => encode(Kind::CancelStep, &[]),
            Self::WorkspaceData(bytes) => encode(Kind::WorkspaceData, bytes),
            Self::WorkspaceEnd => encode(Kind::WorkspaceEnd, &[]),
            Self::ListArtifacts(list) => encode_json(Kind::ListArtifacts, list),
            Self::SendArtifacts(send) => encode_json(Kind::SendArtifacts, send),
            Self::StopArtifacts => encode(Kind::StopArtifacts, &[]),
        }
    }

    /// The message in a frame that the agent received.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] for an agent's kind, [`ProtocolError::Malformed`] for a payload that does not parse.
    pub fn decode(frame: Frame) -> Result<Self, ProtocolError> {
        match frame.kind {
            Kind::Identity => Ok(Self::Identity(decode_json(&frame)?)),
            Kind::RunStep => Ok(Self::RunStep(decode_json(&frame)?)),
            Kind::CancelStep => Ok(Self::CancelStep),
            Kind::WorkspaceData => Ok(Self::WorkspaceData(frame.payload)),
            Kind::WorkspaceEnd => Ok(Self::WorkspaceEnd),
            Kind::ListArtifacts => Ok(Self::ListArtifacts(decode_json(&frame)?)),
            Kind::SendArtifacts => Ok(Self::SendArtifacts(decode_json(&frame)?)),
            Kind::StopArtifacts => Ok(Self::StopArtifacts),
            other => Err(ProtocolError::Unexpected(other)),
        }
    }
}

impl AgentMessage {
    /// This message as one frame's bytes.
    ///
    /// # Errors
    /// [`ProtocolError::TooLong`] when output or a message exceeds [`MAX_PAYLOAD`].
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        match self {
            Self::Hello(hello) => encode_json(Kind::Hello, hello),
            Self::StepStarted(started) => encode_json(Kind::StepStarted, started),
            Self::Stdout(bytes) => encode(Kind::Stdout, bytes),
            Self::Stderr(bytes) => encode(Kind::Stderr, bytes),
            Self::StepCompleted(completed) => encode_json(Kind::StepCompleted, completed),
            Self::Failure(failure) => encode_json(Kind::Failure, failure),
            Self::WorkspaceUnpacked(unpacked) => encode_json(Kind::WorkspaceUnpacked, unpacked),
            Self::WorkspaceFailed(failed) => encode_json(Kind::WorkspaceFailed, failed),
            Self::ArtifactList(list) => encode_json(Kind::ArtifactList, list),
            Self::ArtifactData(bytes) => encode(Kind::ArtifactData, bytes),
            Self::ArtifactsSent(sent) => encode_json(Kind::ArtifactsSent, sent),
        }
    }

    /// What the frame that carries it says it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::StepStarted(_) => Kind::StepStarted,
            Self::Stdout(_) => Kind::Stdout,
            Self::Stderr(_) => Kind::Stderr,
            Self::StepCompleted(_) => Kind::StepCompleted,
            Self::Failure(_) => Kind::Failure,
            Self::WorkspaceUnpacked(_) => Kind::WorkspaceUnpacked,
            Self::WorkspaceFailed(_) => Kind::WorkspaceFailed,
            Self::ArtifactList(_) => Kind::ArtifactList,
            Self::ArtifactData(_) => Kind::ArtifactData,
            Self::ArtifactsSent(_) => Kind::ArtifactsSent,
        }
    }

    /// The message in a frame that the node received.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] for a node's kind, [`ProtocolError::Malformed`] for a payload that does not parse.
    pub fn decode(frame: Frame) -> Result<Self, ProtocolError> {
        match frame.kind {
            Kind::Hello => Ok(Self::Hello(decode_json(&frame)?)),
            Kind::StepStarted => Ok(Self::StepStarted(decode_json(&frame)?)),
            Kind::Stdout => Ok(Self::Stdout(frame.payload)),
            Kind::Stderr => Ok(Self::Stderr(frame.payload)),
            Kind::StepCompleted => Ok(Self::StepCompleted(decode_json(&frame)?)),
            Kind::Failure => Ok(Self::Failure(decode_json(&frame)?)),
            Kind::WorkspaceUnpacked => Ok(Self::WorkspaceUnpacked(decode_json(&frame)?)),
            Kind::WorkspaceFailed => Ok(Self::WorkspaceFailed(decode_json(&frame)?)),
            Kind::ArtifactList => Ok(Self::ArtifactList(decode_json(&frame)?)),
            Kind::ArtifactData => Ok(Self::ArtifactData(frame.payload)),
            Kind::ArtifactsSent => Ok(Self::ArtifactsSent(decode_json(&frame)?)),
            other => Err(ProtocolError::Unexpected(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;

    #[test]
    fn messages_survive_the_wire() {
        let host = [
            HostMessage::RunStep(RunStep {
                index: 3,
                run: "echo 'ä'\n".into(),
                env: [("A".to_string(), "b c".to_string())].into(),
                timeout_seconds: Some(9),
                working_directory: None,
            }),
            HostMessage::CancelStep,
            HostMessage::WorkspaceData(vec![0, 255]),
            HostMessage::WorkspaceEnd,
            HostMessage::ListArtifacts(ListArtifacts { patterns: vec!["a/**".into()] }),
            HostMessage::SendArtifacts(SendArtifacts { name: Some("a/b".into()) }),
            HostMessage::StopArtifacts,
            HostMessage::Identity(Identity { entropy: [7; 32], unix_ns: 1_800_000_000_000_000_000 }),
        ];
        let agent = [
            AgentMessage::Hello(Hello { protocol: PROTOCOL, agent: "0.1.0".into(), kernel: "6.1".into() }),
            AgentMessage::StepStarted(StepStarted { index: 0 }),
            AgentMessage::Stdout(vec![0, 255, b'\n']),
            AgentMessage::Stderr(vec![]),
            AgentMessage::StepCompleted(StepCompleted {
                index: 0,
                exit_code: None,
                signal: Some(9),
                timed_out: true,
            }),
            AgentMessage::Failure(Failure { message: "no memory".into() }),
            AgentMessage::WorkspaceUnpacked(WorkspaceUnpacked { entries: 3 }),
            AgentMessage::WorkspaceFailed(WorkspaceFailed { message: "entry a".into() }),
            AgentMessage::ArtifactList(ArtifactList {
                total_count: 2,
                total_bytes: 9,
                artifacts: vec![Artifact { name: "a/b".into(), size: 4 }],
                message: Some("c matches nothing".into()),
            }),
            AgentMessage::ArtifactData(vec![0, 255]),
            AgentMessage::ArtifactsSent(ArtifactsSent { failed: None }),
        ];
        let mut decoder = Decoder::new();
        for message in &host {
            decoder.push(&message.encode().unwrap());
            let frame = decoder.next_frame().unwrap().unwrap();
            assert_eq!(&HostMessage::decode(frame).unwrap(), message);
        }
        for message in &agent {
            decoder.push(&message.encode().unwrap());
            let frame = decoder.next_frame().unwrap().unwrap();
            assert_eq!(&AgentMessage::decode(frame).unwrap(), message);
        }
    }

    #[test]
    fn a_message_for_the_other_end_is_refused() {
        let frame = Frame { kind: Kind::CancelStep, payload: vec![] };
        assert_eq!(AgentMessage::decode(frame), Err(ProtocolError::Unexpected(Kind::CancelStep)));
        let frame = Frame { kind: Kind::Stdout, payload: vec![] };
        assert_eq!(HostMessage::decode(frame), Err(ProtocolError::Unexpected(Kind::Stdout)));
    }

    #[test]
    fn a_payload_that_is_not_its_json_is_refused() {
        let frame = Frame { kind: Kind::Hello, payload: b"{}".to_vec() };
        let error = AgentMessage::decode(frame).unwrap_err();
        assert!(error.to_string().starts_with("malformed Hello frame: missing field `protocol`"), "{error}");
    }
}
