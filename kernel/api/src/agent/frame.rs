//! Frames: how messages lie in a stream of bytes, and how they come out of it.
//!
//! A frame is a little-endian `u32` payload length, one byte of [`Kind`], and the payload.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// Bytes before a payload: its length and its kind.
pub const HEADER_LEN: usize = 5;
/// Most payload bytes in any frame but [`Kind::RunStep`] and [`Kind::ListArtifacts`].
pub const MAX_PAYLOAD: usize = 64 * 1024;
/// Most payload bytes in a [`Kind::RunStep`] or [`Kind::ListArtifacts`] frame.
pub const MAX_RUN_STEP: usize = 1024 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Node to agent: a [`RunStep`](super::RunStep) as JSON.
    RunStep = 0x01,
    /// Node to agent, empty: end the running step (SIGTERM to its process group, SIGKILL 2.5 s later).
    CancelStep = 0x02,
    /// Node to agent: the next bytes of the workspace's tar. No step runs before it is unpacked.
    WorkspaceData = 0x03,
    /// Node to agent, empty: that was all of the tar.
    WorkspaceEnd = 0x04,
    /// Node to agent, after the last step: a [`ListArtifacts`](super::ListArtifacts) as JSON.
    ListArtifacts = 0x05,
    /// Node to agent: a [`SendArtifacts`](super::SendArtifacts) as JSON.
    SendArtifacts = 0x06,
    /// Node to agent, empty: nobody wants the rest of what is being sent.
    StopArtifacts = 0x07,
    /// Node to agent, before anything else, in a clone: an [`Identity`](super::Identity) as JSON.
    Identity = 0x08,
    /// Agent to node, once, first: a [`Hello`](super::Hello) as JSON.
    Hello = 0x81,
    /// Agent to node: a [`StepStarted`](super::StepStarted) as JSON.
    StepStarted = 0x82,
    /// Agent to node: bytes of the running step's standard output.
    Stdout = 0x83,
    /// Agent to node: bytes of the running step's standard error.
    Stderr = 0x84,
    /// Agent to node, after all of a step's output: a [`StepCompleted`](super::StepCompleted) as JSON.
    StepCompleted = 0x85,
    /// Agent to node: a [`Failure`](super::Failure) as JSON. The agent cannot go on.
    Failure = 0x86,
    /// Agent to node, once the whole tar is unpacked: a [`WorkspaceUnpacked`](super::WorkspaceUnpacked) as JSON.
    WorkspaceUnpacked = 0x87,
    /// Agent to node: a [`WorkspaceFailed`](super::WorkspaceFailed) as JSON. What still comes of the tar is thrown away.
    WorkspaceFailed = 0x88,
    /// Agent to node: an [`ArtifactList`](super::ArtifactList) as JSON.
    ArtifactList = 0x89,
    /// Agent to node: the next bytes of what was asked for by `SendArtifacts`.
    ArtifactData = 0x8a,
    /// Agent to node: an [`ArtifactsSent`](super::ArtifactsSent) as JSON. Nothing more comes of it.
    ArtifactsSent = 0x8b,
}

impl Kind {
    /// The kind with this code, if there is one.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x01 => Self::RunStep,
            0x02 => Self::CancelStep,
            0x03 => Self::WorkspaceData,
            0x04 => Self::WorkspaceEnd,
            0x05 => Self::ListArtifacts,
            0x06 => Self::SendArtifacts,
            0x07 => Self::StopArtifacts,
            0x08 => Self::Identity,
            0x81 => Self::Hello,
            0x82 => Self::StepStarted,
            0x83 => Self::Stdout,
            0x84 => Self::Stderr,
            0x85 => Self::StepCompleted,
            0x86 => Self::Failure,
            0x87 => Self::WorkspaceUnpacked,
            0x88 => Self::WorkspaceFailed,
            0x89 => Self::ArtifactList,
            0x8a => Self::ArtifactData,
            0x8b => Self::ArtifactsSent,
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
        match self {
            Self::RunStep | Self::ListArtifacts => MAX_RUN_STEP,
            _ => MAX_PAYLOAD,
        }
    }
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
