//! The protocol between the node and the agent in a guest: frames over one vsock stream.
//!
//! A frame is a little-endian `u32` payload length, one byte of [`Kind`], and the payload. The agent connects from
//! [`GUEST_CID`] to [`HOST_CID`], port [`PORT`], and says [`Hello`]; from then on the node sends one [`RunStep`] at a time and
//! the agent answers with [`StepStarted`], any amount of output, and one [`StepCompleted`] after all of that output.
//!
//! Both ends distrust each other: lengths are checked before anything is kept, and an unknown kind ends the conversation.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::json;

/// The node's address on a machine's vsock (fixed by the virtio specification, 5.10.4).
pub const HOST_CID: u32 = 2;
/// The guest's address on its vsock. Every machine has the same: machines cannot see each other.
pub const GUEST_CID: u32 = 3;
/// The vsock port the node listens on.
pub const PORT: u32 = 1024;
/// The version of this protocol, as said in [`Hello::protocol`].
pub const PROTOCOL: u32 = 1;

/// Bytes before a payload: its length and its kind.
pub const HEADER_LEN: usize = 5;
/// Most payload bytes in any frame but [`Kind::RunStep`].
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Most payload bytes in a [`Kind::RunStep`] frame.
pub const MAX_RUN_STEP: usize = 1024 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Node to agent: a [`RunStep`] as JSON.
    RunStep = 0x01,
    /// Node to agent, empty: end the running step (SIGTERM to its process group, SIGKILL 2.5 s later).
    CancelStep = 0x02,
    /// Agent to node, once, first: a [`Hello`] as JSON.
    Hello = 0x81,
    /// Agent to node: a [`StepStarted`] as JSON.
    StepStarted = 0x82,
    /// Agent to node: bytes of the running step's standard output.
    Stdout = 0x83,
    /// Agent to node: bytes of the running step's standard error.
    Stderr = 0x84,
    /// Agent to node, after all of a step's output: a [`StepCompleted`] as JSON.
    StepCompleted = 0x85,
    /// Agent to node: a [`Failure`] as JSON. The agent cannot go on.
    Failure = 0x86,
}

impl Kind {
    /// The kind with this code, if there is one.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x01 => Self::RunStep,
            0x02 => Self::CancelStep,
            0x81 => Self::Hello,
            0x82 => Self::StepStarted,
            0x83 => Self::Stdout,
            0x84 => Self::Stderr,
            0x85 => Self::StepCompleted,
            0x86 => Self::Failure,
            _ => return None,
        })
    }

    /// The code of this kind on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// Most payload bytes a frame of this kind may have.
    #[must_use]
    pub fn max_payload(self) -> usize {
        if self == Self::RunStep { MAX_RUN_STEP } else { MAX_PAYLOAD }
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

/// A message from the node, typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMessage {
    /// Run one step.
    RunStep(RunStep),
    /// End the running step.
    CancelStep,
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
}

/// Why a stream of frames cannot be read on. The connection is of no more use after one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// A frame's kind is not one of [`Kind`].
    UnknownKind(u8),
    /// A frame says it is longer than its kind allows.
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// The length it claims, in bytes.
        len: usize,
    },
    /// A kind that this end sends and never receives.
    Unexpected(Kind),
    /// A payload that is not the JSON its kind asks for.
    Malformed {
        /// The frame's kind.
        kind: Kind,
        /// What the JSON parser said.
        message: String,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKind(code) => write!(f, "unknown frame kind {code:#04x}"),
            Self::TooLong { kind, len } => {
                write!(f, "{kind:?} frame of {len} bytes; at most {} are allowed", kind.max_payload())
            }
            Self::Unexpected(kind) => write!(f, "unexpected {kind:?} frame"),
            Self::Malformed { kind, message } => write!(f, "malformed {kind:?} frame: {message}"),
        }
    }
}

impl core::error::Error for ProtocolError {}

/// One frame: a kind within its length limit, and its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is.
    pub kind: Kind,
    /// The payload, at most [`Kind::max_payload`] bytes.
    pub payload: Vec<u8>,
}

/// One frame as bytes for the stream.
///
/// # Errors
/// [`ProtocolError::TooLong`] when the payload exceeds its kind's limit.
pub fn encode(kind: Kind, payload: &[u8]) -> Result<Vec<u8>, ProtocolError> {
    let mut bytes = Vec::with_capacity(HEADER_LEN.saturating_add(payload.len().min(kind.max_payload())));
    bytes.extend_from_slice(&header(kind, payload.len())?);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// The [`HEADER_LEN`] bytes before a payload of `len` bytes, for a sender that keeps its payload in a buffer of its own.
///
/// # Errors
/// [`ProtocolError::TooLong`] when `len` exceeds the kind's limit.
pub fn header(kind: Kind, len: usize) -> Result<[u8; HEADER_LEN], ProtocolError> {
    let wire_len = u32::try_from(len).ok().filter(|_| len <= kind.max_payload());
    let [a, b, c, d] = wire_len.ok_or(ProtocolError::TooLong { kind, len })?.to_le_bytes();
    Ok([a, b, c, d, kind.code()])
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
    /// [`ProtocolError::TooLong`] when a step's JSON exceeds [`MAX_RUN_STEP`].
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        match self {
            Self::RunStep(step) => encode_json(Kind::RunStep, step),
            Self::CancelStep => encode(Kind::CancelStep, &[]),
        }
    }

    /// The message in a frame that the agent received.
    ///
    /// # Errors
    /// [`ProtocolError::Unexpected`] for an agent's kind, [`ProtocolError::Malformed`] for a payload that does not parse.
    pub fn decode(frame: &Frame) -> Result<Self, ProtocolError> {
        match frame.kind {
            Kind::RunStep => Ok(Self::RunStep(decode_json(frame)?)),
            Kind::CancelStep => Ok(Self::CancelStep),
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
            other => Err(ProtocolError::Unexpected(other)),
        }
    }
}

/// Frames out of a stream of bytes, however the stream was cut up.
///
/// What is kept between calls is at most one frame and whatever the last [`Decoder::push`] brought beyond it, so take every
/// frame out before pushing more. After an error the decoder gives that error for ever.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
    failed: Option<ProtocolError>,
}

impl Decoder {
    /// An empty decoder. Allocates nothing until bytes come.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        self.compact();
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes kept that have not yet come out as a frame.
    #[must_use]
    pub fn buffered(&self) -> usize {
        self.bytes.len().saturating_sub(self.taken)
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// [`ProtocolError::UnknownKind`] and [`ProtocolError::TooLong`], as soon as a frame's header shows it.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, ProtocolError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((&[a, b, c, d, code], _)) = rest.split_first_chunk::<HEADER_LEN>() else {
            self.compact();
            return Ok(None);
        };
        let kind = Kind::from_code(code).ok_or(ProtocolError::UnknownKind(code));
        let kind = kind.map_err(|error| self.fail(error))?;
        let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if len > kind.max_payload() {
            return Err(self.fail(ProtocolError::TooLong { kind, len }));
        }
        let Some(payload) =
            self.bytes.get(self.taken..).and_then(|rest| rest.get(HEADER_LEN..HEADER_LEN + len))
        else {
            self.compact();
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken = self.taken.saturating_add(HEADER_LEN + len);
        Ok(Some(Frame { kind, payload }))
    }

    fn fail(&mut self, error: ProtocolError) -> ProtocolError {
        self.bytes = Vec::new();
        self.taken = 0;
        self.failed = Some(error.clone());
        error
    }

    /// Forgets what has been taken, and gives memory back once all of it has.
    fn compact(&mut self) {
        if self.taken >= self.bytes.len() {
            self.bytes.clear();
            if self.bytes.capacity() > MAX_PAYLOAD + HEADER_LEN {
                self.bytes = Vec::new();
            }
        } else if self.taken > 0 {
            self.bytes.drain(..self.taken);
        }
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    fn drain(decoder: &mut Decoder) -> Result<Vec<Frame>, ProtocolError> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn a_frame_has_a_little_endian_length_a_kind_and_its_payload() {
        assert_eq!(encode(Kind::Stdout, b"hi").unwrap(), [2, 0, 0, 0, 0x83, b'h', b'i']);
    }

    #[test]
    fn every_kind_survives_its_code() {
        for code in 0..=u8::MAX {
            if let Some(kind) = Kind::from_code(code) {
                assert_eq!(kind.code(), code);
            }
        }
    }

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
        ];
        let agent = [
            AgentMessage::Hello(Hello { protocol: 1, agent: "0.1.0".into(), kernel: "6.1".into() }),
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
        ];
        let mut decoder = Decoder::new();
        for message in &host {
            decoder.push(&message.encode().unwrap());
            let frame = decoder.next_frame().unwrap().unwrap();
            assert_eq!(&HostMessage::decode(&frame).unwrap(), message);
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
        assert_eq!(HostMessage::decode(&frame), Err(ProtocolError::Unexpected(Kind::Stdout)));
    }

    #[test]
    fn a_payload_that_is_not_its_json_is_refused() {
        let frame = Frame { kind: Kind::Hello, payload: b"{}".to_vec() };
        let error = AgentMessage::decode(frame).unwrap_err();
        assert!(error.to_string().starts_with("malformed Hello frame: missing field `protocol`"), "{error}");
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_from_its_header_alone() {
        let mut decoder = Decoder::new();
        decoder.push(&[0xff, 0xff, 0xff, 0xff, 0x83]);
        let error = ProtocolError::TooLong { kind: Kind::Stdout, len: 0xffff_ffff };
        assert_eq!(decoder.next_frame(), Err(error.clone()));
        decoder.push(&encode(Kind::Stdout, b"hi").unwrap());
        assert_eq!(decoder.next_frame(), Err(error), "an error is for ever");
        assert_eq!(decoder.buffered(), 0);
    }

    #[test]
    fn a_payload_beyond_the_limit_cannot_be_sent() {
        let payload = vec![0; MAX_PAYLOAD + 1];
        assert!(encode(Kind::Stdout, &payload).is_err());
        assert!(encode(Kind::RunStep, &payload).is_ok());
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let mut decoder = Decoder::new();
        decoder.push(&[0, 0, 0, 0, 0x7f]);
        assert_eq!(decoder.next_frame(), Err(ProtocolError::UnknownKind(0x7f)));
    }

    proptest! {
        #[test]
        fn any_split_of_a_stream_gives_the_same_frames(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cuts in prop::collection::vec(1_usize..50, 1..20),
        ) {
            let mut stream = Vec::new();
            for payload in &payloads {
                stream.extend(encode(Kind::Stderr, payload).unwrap());
            }
            let (mut decoder, mut frames, mut rest, mut cuts) = (Decoder::new(), vec![], &stream[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, tail) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                decoder.push(chunk);
                frames.extend(drain(&mut decoder).unwrap());
                rest = tail;
            }
            let got: Vec<_> = frames.into_iter().map(|frame| frame.payload).collect();
            prop_assert_eq!(got, payloads);
            prop_assert_eq!(decoder.buffered(), 0);
        }

        #[test]
        fn random_bytes_never_panic_and_never_pile_up(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..40),
        ) {
            let mut decoder = Decoder::new();
            for chunk in chunks {
                decoder.push(&chunk);
                let _ = drain(&mut decoder);
                prop_assert!(decoder.buffered() <= MAX_RUN_STEP + HEADER_LEN);
            }
        }
    }
}
