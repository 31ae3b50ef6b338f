//! One HTTP connection as a state machine.
//!
//! The owner of the socket loops: [`Connection::receive`] what came, [`Connection::advance`], send [`Connection::transmit`] and
//! say so with [`Connection::transmitted`], again until nothing moves; then close if [`Connection::wants_close`], or come back
//! when the socket has something or takes something, at [`Connection::deadline`], and, while [`Connection::is_following`],
//! when jobs went on. Requests are answered in order, one at a time: the next is not
//! looked at before the last answer is on its way, and a peer that sends more than a head ahead is not read from.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;

use super::body::{Incoming, overloaded, too_large};
use super::request::{self, BodyLength, Head, Method};
use super::response::{Body, Framing, Response};
use super::upload::{Progress, Upload};
use crate::error::{ApiError, ErrorCode};
use crate::jobs::{MIN_ROOM, ReadState};
use crate::router::{self, Route};
use crate::time::{Clock, MILLISECOND, SECOND};
use crate::{Api, Node};

/// Most bytes of a request's head, and most bytes that are taken ahead of being looked at.
pub const MAX_HEAD: usize = 8 * 1024;
/// Bytes of an answer that are made ahead of being sent.
const TX_CHUNK: usize = 16 * 1024;
/// What a chunk of a body costs besides its bytes: four digits, CR LF, CR LF.
const CHUNK_OVERHEAD: usize = 8;

/// How long a head or a body may take to arrive.
const REQUEST_TIMEOUT_NS: u64 = 30 * SECOND;
/// How long a new connection's first head may take. Places are few, and whoever connects has something to say.
const FIRST_HEAD_TIMEOUT_NS: u64 = 10 * SECOND;
/// How long a connection may do nothing between requests.
const IDLE_TIMEOUT_NS: u64 = 60 * SECOND;
/// How long a peer may take nothing of an answer.
const STALL_TIMEOUT_NS: u64 = 60 * SECOND;
/// After a refusal with the request still arriving: how long the peer may send nothing ...
const LINGER_QUIET_NS: u64 = 500 * MILLISECOND;
/// ... and how long and how much it may send, before the connection is closed.
const LINGER_NS: u64 = 10 * SECOND;
const LINGER_BYTES: u64 = 64 * 1024 * 1024;

/// One TCP connection's HTTP. An idle one has no buffers.
#[derive(Debug)]
pub struct Connection {
    /// What came and was not looked at.
    rx: Vec<u8>,
    /// What is to be sent, from `tx_sent` on.
    tx: Vec<u8>,
    tx_sent: usize,
    /// When something of `tx` last went out, or came in when it was empty.
    tx_progress_ns: u64,
    peer_closed: bool,
    standing: Standing,
    state: State,
}

/// What is known of a peer, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// It has sent no head yet.
    New,
    /// It has asked for nothing that needs the token, or did not have it.
    Stranger,
    /// It has shown the token, where one is needed.
    Known,
}

#[derive(Debug)]
enum State {
    /// Between requests, or in the middle of a head.
    Head {
        /// When the last answer was ready.
        idle_ns: u64,
        /// When the head's first byte came.
        first_byte_ns: Option<u64>,
    },
    /// In the middle of a body.
    Body(Box<Incoming>),
    /// In the middle of a body that goes on into a machine.
    Upload(Box<Upload>),
    /// In the middle of an answer.
    Answer(Box<Outgoing>),
    /// The last answer is on its way, and what still comes is thrown away: closing now could make the peer's TCP forget
    /// the answer before its program has read it.
    Linger {
        /// Bytes the peer has yet to send, as far as is known.
        left: Option<u64>,
        discarded: u64,
        quiet_ns: u64,
        since_ns: u64,
    },
    /// Nothing more to do once `tx` is empty.
    Close,
    /// The peer is gone or stuck.
    Abort,
}

/// An answer that is leaving.
#[derive(Debug)]
struct Outgoing {
    body: Body,
    sent: usize,
    framing: Framing,
    after: After,
}

/// What comes after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    NextRequest,
    Close,
    Linger(Option<u64>),
}

impl Connection {
    /// A connection that was accepted just now.
    #[must_use]
    pub fn new(now: Clock) -> Self {
        Self {
            rx: Vec::new(),
            tx: Vec::new(),
            tx_sent: 0,
            tx_progress_ns: now.monotonic_ns,
            peer_closed: false,
            standing: Standing::New,
            state: State::Head { idle_ns: now.monotonic_ns, first_byte_ns: None },
        }
    }

    /// Bytes [`Connection::receive`] takes now; 0 means: leave them in the socket.
    #[must_use]
    pub fn receive_capacity(&self) -> usize {
        match self.state {
            State::Linger { .. } => MAX_HEAD,
            State::Close | State::Abort => 0,
            _ => MAX_HEAD.saturating_sub(self.rx.len()),
        }
    }

    /// Takes bytes from the socket: how many, no more than [`Connection::receive_capacity`].
    pub fn receive(&mut self, bytes: &[u8], now: Clock) -> usize {
        let bytes = bytes.get(..self.receive_capacity()).unwrap_or(bytes);
        if bytes.is_empty() {
            return 0;
        }
        match &mut self.state {
            State::Linger { left, discarded, quiet_ns, .. } => {
                *discarded = discarded.saturating_add(bytes.len() as u64);
                *left = left.map(|left| left.saturating_sub(bytes.len() as u64));
                *quiet_ns = now.monotonic_ns;
            }
            State::Head { first_byte_ns, .. } => {
                first_byte_ns.get_or_insert(now.monotonic_ns);
                self.rx.extend_from_slice(bytes);
            }
            _ => self.rx.extend_from_slice(bytes),
        }
        bytes.len()
    }

    /// The peer will send nothing more. It may still read.
    pub fn receive_closed(&mut self) {
        self.peer_closed = true;
    }

    /// Bytes for the socket.
    #[must_use]
    pub fn transmit(&self) -> &[u8] {
        self.tx.get(self.tx_sent..).unwrap_or_default()
    }

    /// The first `len` bytes of [`Connection::transmit`] are in the socket.
    pub fn transmitted(&mut self, len: usize, now: Clock) {
        if len > 0 {
            self.tx_sent = self.tx_sent.saturating_add(len).min(self.tx.len());
            self.tx_progress_ns = now.monotonic_ns;
        }
        if self.tx_sent >= self.tx.len() {
            self.tx.clear();
            self.tx_sent = 0;
        }
    }

    /// Everything was handed out and nothing more will come: send a FIN.
    #[must_use]
    pub fn wants_close(&self) -> bool {
        matches!(self.state, State::Close) && self.tx.is_empty()
    }

    /// The peer does not take its answer: reset the connection.
    #[must_use]
    pub fn wants_abort(&self) -> bool {
        matches!(self.state, State::Abort)
    }

    /// Whether it may be reset to make room for another: nothing is under way on it, or its peer has not shown the token.
    #[must_use]
    pub fn can_be_evicted(&self) -> bool {
        let idle = matches!(self.state, State::Head { .. }) && self.rx.is_empty() && self.tx.is_empty();
        idle || self.standing < Standing::Known
    }

    /// Whether it waits for a job: call [`Connection::advance`] whenever jobs went on.
    #[must_use]
    pub fn is_following(&self) -> bool {
        match &self.state {
            State::Answer(answer) => match &answer.body {
                Body::Log(reader, _) => reader.follows(),
                Body::Artifacts(_) => true,
                _ => false,
            },
            State::Upload(_) => true,
            _ => false,
        }
    }

    /// When [`Connection::advance`] has to be called at the latest; monotonic nanoseconds.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let stall = (!self.tx.is_empty()).then(|| self.tx_progress_ns.saturating_add(STALL_TIMEOUT_NS));
        let own = match &self.state {
            // The clock of a request that waits for its turn starts when that comes.
            State::Head { .. } if !self.tx.is_empty() => None,
            State::Head { idle_ns, .. } if self.standing == Standing::New => {
                Some(idle_ns.saturating_add(FIRST_HEAD_TIMEOUT_NS))
            }
            State::Head { idle_ns, first_byte_ns } => Some(match first_byte_ns {
                Some(first) => first.saturating_add(REQUEST_TIMEOUT_NS),
                None => idle_ns.saturating_add(IDLE_TIMEOUT_NS),
            }),
            State::Body(incoming) => Some(incoming.since_ns.saturating_add(REQUEST_TIMEOUT_NS)),
            State::Upload(upload) => upload.deadline(),
            State::Linger { left, since_ns, .. } if self.tx.is_empty() => {
                let over = *left == Some(0) || self.peer_closed;
                Some(if over { *since_ns } else { self.linger_ends() })
            }
            _ => None,
        };
        own.into_iter().chain(stall).min()
    }

    /// Bytes of buffers it holds.
    #[cfg(test)]
    pub(super) fn buffered_capacity(&self) -> usize {
        self.rx.capacity() + self.tx.capacity()
    }

    /// Does all that can be done now: reads requests, has them answered, makes more of an answer.
    pub fn advance(&mut self, api: &mut Api, node: &mut dyn Node, now: Clock) {
        let was_empty = self.tx.is_empty();
        self.check_timers(now);
        while self.step(api, node, now) {}
        if was_empty && !self.tx.is_empty() {
            self.tx_progress_ns = now.monotonic_ns;
        }
        // An idle connection keeps no memory.
        if self.rx.is_empty() {
            self.rx = Vec::new();
        }
        if self.tx.is_empty() {
            self.tx = Vec::new();
        }
    }

    fn check_timers(&mut self, now: Clock) {
        let late = |since: u64, limit: u64| now.monotonic_ns >= since.saturating_add(limit);
        if !self.tx.is_empty() {
            if late(self.tx_progress_ns, STALL_TIMEOUT_NS) {
                self.abort();
            }
            if !matches!(self.state, State::Body(_) | State::Upload(_)) {
                return;
            }
        }
        match &self.state {
            State::Head { first_byte_ns, idle_ns }
                if self.standing == Standing::New && late(*idle_ns, FIRST_HEAD_TIMEOUT_NS) =>
            {
                if first_byte_ns.is_some() {
                    let message = "a connection's first request did not arrive within 10 s";
                    self.refuse(&ApiError::new(ErrorCode::RequestTimeout, message), true, None, now);
                } else {
                    self.state = State::Close;
                }
            }
            State::Head { first_byte_ns: Some(first), .. } if late(*first, REQUEST_TIMEOUT_NS) => {
                let message = "the request's head did not arrive within 30 s";
                self.refuse(&ApiError::new(ErrorCode::RequestTimeout, message), true, None, now);
            }
            State::Head { first_byte_ns: None, idle_ns } if late(*idle_ns, IDLE_TIMEOUT_NS) => {
                self.state = State::Close;
            }
            State::Body(incoming) if late(incoming.since_ns, REQUEST_TIMEOUT_NS) => {
                let message = "the request's body did not arrive within 30 s of its head";
                let is_1_1 = incoming.head.is_1_1;
                self.refuse(&ApiError::new(ErrorCode::RequestTimeout, message), is_1_1, None, now);
            }
            State::Linger { left, discarded, .. } => {
                let over = *left == Some(0) || *discarded > LINGER_BYTES || self.peer_closed;
                if over || now.monotonic_ns >= self.linger_ends() {
                    self.state = State::Close;
                }
            }
            _ => {}
        }
    }

    /// When a peer has had the time to read why it was refused.
    fn linger_ends(&self) -> u64 {
        let State::Linger { quiet_ns, since_ns, .. } = self.state else { return 0 };
        let quiet_ns = quiet_ns.max(self.tx_progress_ns);
        quiet_ns.saturating_add(LINGER_QUIET_NS).min(since_ns.saturating_add(LINGER_NS))
    }

    fn abort(&mut self) {
        self.state = State::Abort;
        self.rx = Vec::new();
        self.tx = Vec::new();
        self.tx_sent = 0;
    }

    /// One step; false when there is nothing to do before something comes or goes.
    fn step(&mut self, api: &mut Api, node: &mut dyn Node, now: Clock) -> bool {
        match &self.state {
            State::Head { .. } => self.tx.is_empty() && self.read_head(api, node, now),
            State::Body(_) => self.read_body(api, node, now),
            State::Upload(_) => self.pass_body_on(api, now),
            State::Answer(_) => self.write_body(api, now),
            State::Linger { .. } | State::Close | State::Abort => false,
        }
    }

    fn read_head(&mut self, api: &mut Api, node: &mut dyn Node, now: Clock) -> bool {
        if self.rx.is_empty() {
            if self.peer_closed {
                self.state = State::Close;
            }
            return false;
        }
        let (head, len) = match request::parse(&self.rx) {
            Ok(Some(parsed)) => parsed,
            Ok(None) if self.rx.len() >= MAX_HEAD => {
                let message = format!("the request's line and headers have more than {MAX_HEAD} bytes");
                self.refuse(&ApiError::new(ErrorCode::HeadTooLarge, message), true, None, now);
                return true;
            }
            Ok(None) if self.peer_closed => {
                let message = "the connection was closed in the middle of a request's head";
                self.refuse(&ApiError::new(ErrorCode::MalformedRequest, message), true, None, now);
                return true;
            }
            Ok(None) => {
                if let State::Head { first_byte_ns, .. } = &mut self.state {
                    first_byte_ns.get_or_insert(now.monotonic_ns);
                }
                return false;
            }
            Err(error) => {
                self.refuse(&error, true, None, now);
                return true;
            }
        };
        self.rx.drain(..len.min(self.rx.len()));
        let is_1_1 = head.is_1_1;
        let admitted = router::admit(api, &head);
        let standing = match &admitted {
            Ok(route) if !route.is_public() => Standing::Known,
            _ => Standing::Stranger,
        };
        self.standing = self.standing.max(standing);
        let route = admitted.and_then(|route| {
            let limit = route.body_limit(&api.config.limits);
            match head.body {
                BodyLength::Known(len) if len > limit as u64 => Err(too_large(limit)),
                _ => Ok(route),
            }
        });
        let route = match route {
            Ok(Route::PutWorkspace(id)) => match api.jobs.open_workspace(id, head.body.known()) {
                Ok(sender) => {
                    self.continue_if_expected(&head, now);
                    self.state = State::Upload(Box::new(Upload::new(head, sender)));
                    return true;
                }
                Err(error) => Err(error),
            },
            route => route,
        };
        match (route, head.body) {
            (Ok(route), BodyLength::Known(0)) => self.answer(api, node, &head, &route, &[], now),
            (Err(error), BodyLength::Known(0)) => {
                let after = if head.keep_alive { After::NextRequest } else { After::Close };
                self.send(Response::error(&error), &head, after, now);
            }
            (Ok(route), _) => {
                self.continue_if_expected(&head, now);
                let incoming = Incoming::new(head, route, api.bodies.share(), now.monotonic_ns);
                self.state = State::Body(Box::new(incoming));
            }
            (Err(error), length) => {
                let left = length.known().map(|len| len.saturating_sub(self.rx.len() as u64));
                self.refuse(&error, is_1_1, left, now);
            }
        }
        true
    }

    fn continue_if_expected(&mut self, head: &Head, now: Clock) {
        if head.expects_continue && self.rx.is_empty() {
            self.tx.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.tx_progress_ns = now.monotonic_ns;
        }
    }

    fn pass_body_on(&mut self, api: &mut Api, now: Clock) -> bool {
        let State::Upload(upload) = &mut self.state else { return false };
        let (used, progress) = upload.pass_on(&self.rx, self.peer_closed, api, now);
        self.rx.drain(..used.min(self.rx.len()));
        let (is_1_1, whole) = (upload.head.is_1_1, upload.coding.is_done());
        let (response, head) = match progress {
            Progress::Later => return false,
            // What is left of a body that is not wanted has to be read before another request can be.
            Progress::Failed(error) if !whole => {
                let left = upload.coding.left().map(|left| left.saturating_sub(self.rx.len() as u64));
                self.refuse(&error, is_1_1, left, now);
                return true;
            }
            Progress::Failed(error) => (Response::error(&error), upload.head.clone()),
            Progress::Done(workspace) => (Response::json(200, &workspace), upload.head.clone()),
        };
        let after = if head.keep_alive { After::NextRequest } else { After::Close };
        self.send(response, &head, after, now);
        true
    }

    fn read_body(&mut self, api: &mut Api, node: &mut dyn Node, now: Clock) -> bool {
        let State::Body(incoming) = &mut self.state else { return false };
        let limit = incoming.route.body_limit(&api.config.limits);
        let mut used = 0_usize;
        let result = loop {
            let rest = self.rx.get(used..).unwrap_or_default();
            match incoming.take(rest, limit) {
                Ok(0) => break Ok(incoming.is_done()),
                Ok(taken) => used = used.saturating_add(taken),
                Err(error) => break Err(error),
            }
        };
        self.rx.drain(..used.min(self.rx.len()));
        let is_1_1 = incoming.head.is_1_1;
        match result {
            Ok(true) => {
                let idle = State::Head { idle_ns: now.monotonic_ns, first_byte_ns: None };
                if let State::Body(incoming) = core::mem::replace(&mut self.state, idle) {
                    self.answer(api, node, &incoming.head, &incoming.route, &incoming.body, now);
                }
                true
            }
            Ok(false) if self.peer_closed => {
                let message = "the connection was closed in the middle of a request's body";
                self.refuse(&ApiError::new(ErrorCode::MalformedRequest, message), is_1_1, None, now);
                true
            }
            Ok(false) => false,
            Err(error) => {
                self.refuse(&error, is_1_1, None, now);
                true
            }
        }
    }

    /// Has a request answered that is all there.
    fn answer(
        &mut self,
        api: &mut Api,
        node: &mut dyn Node,
        head: &Head,
        route: &Route,
        body: &[u8],
        now: Clock,
    ) {
        let mut response = match router::handle(api, node, head, route, body, now) {
            Ok(response) => response,
            Err(error) => Response::error(&error),
        };
        if let Body::Bytes(bytes, share) = &mut response.body {
            match api.answers.take(bytes.len()) {
                Some(taken) => *share = Some(taken),
                // A small answer is always given: it says what is wrong.
                None if bytes.len() <= TX_CHUNK => {}
                None => response = Response::error(&overloaded()),
            }
        }
        let after = if head.keep_alive { After::NextRequest } else { After::Close };
        self.send(response, head, after, now);
    }

    fn send(&mut self, response: Response, head: &Head, after: After, now: Clock) {
        let framing = response.framing(head.is_1_1);
        let after = match (framing, after) {
            (Framing::UntilClose, After::NextRequest) => After::Close,
            (_, after) => after,
        };
        response.write_head(&mut self.tx, head.is_1_1, after == After::NextRequest, now);
        // To HEAD, an answer is its head (RFC 9110, 9.3.2).
        let (body, framing) = if head.method == Method::Head {
            (Body::None, Framing::Length)
        } else {
            (response.body, framing)
        };
        self.state = State::Answer(Box::new(Outgoing { body, sent: 0, framing, after }));
    }

    /// Answers a request that cannot be read to its end, and closes.
    fn refuse(&mut self, error: &ApiError, is_1_1: bool, left: Option<u64>, now: Clock) {
        self.rx = Vec::new();
        let response = Response::error(error);
        response.write_head(&mut self.tx, is_1_1, false, now);
        let after = After::Linger(left);
        let outgoing = Outgoing { body: response.body, sent: 0, framing: Framing::Length, after };
        self.state = State::Answer(Box::new(outgoing));
    }

    fn write_body(&mut self, api: &mut Api, now: Clock) -> bool {
        let State::Answer(answer) = &mut self.state else { return false };
        if self.tx_sent > 0 {
            self.tx.drain(..self.tx_sent);
            self.tx_sent = 0;
        }
        let room = TX_CHUNK.saturating_sub(self.tx.len());
        let bytes: &[u8] = match &answer.body {
            Body::None => &[],
            Body::Static(bytes) => bytes,
            Body::Bytes(bytes, _) => bytes,
            Body::Log(..) | Body::Artifacts(_) => {
                let overhead = if answer.framing == Framing::Chunked { CHUNK_OVERHEAD } else { 0 };
                let room = room.saturating_sub(overhead);
                if room < MIN_ROOM {
                    return false;
                }
                let start = self.tx.len();
                if answer.framing == Framing::Chunked {
                    self.tx.extend_from_slice(b"0000\r\n");
                }
                let content = self.tx.len();
                let state = match &mut answer.body {
                    Body::Log(reader, _) => api.jobs.read_log(reader, &mut self.tx, room, now),
                    Body::Artifacts(reader) => api.jobs.read_artifacts(reader, &mut self.tx, room, now),
                    _ => ReadState::Done,
                };
                let len = self.tx.len().saturating_sub(content);
                if len == 0 {
                    self.tx.truncate(start);
                } else if answer.framing == Framing::Chunked {
                    if let Some(size) = self.tx.get_mut(start..start.saturating_add(4)) {
                        size.copy_from_slice(format!("{len:04x}").as_bytes());
                    }
                    self.tx.extend_from_slice(b"\r\n");
                }
                match state {
                    ReadState::More => return len > 0,
                    ReadState::Waiting => return false,
                    // Closing without the last chunk, or short of the promised length, tells the peer that more is missing.
                    ReadState::Lost => {
                        self.state = State::Close;
                        return false;
                    }
                    ReadState::Done => {}
                }
                if answer.framing == Framing::Chunked {
                    self.tx.extend_from_slice(b"0\r\n\r\n");
                }
                &[]
            }
        };
        let rest = bytes.get(answer.sent..).unwrap_or_default();
        let part = rest.get(..room).unwrap_or(rest);
        self.tx.extend_from_slice(part);
        answer.sent = answer.sent.saturating_add(part.len());
        if answer.sent < bytes.len() {
            return false;
        }
        let (idle_ns, since_ns) = (now.monotonic_ns, now.monotonic_ns);
        self.state = match answer.after {
            After::NextRequest => State::Head { idle_ns, first_byte_ns: None },
            After::Close => State::Close,
            After::Linger(left) => State::Linger { left, discarded: 0, quiet_ns: since_ns, since_ns },
        };
        true
    }
}
