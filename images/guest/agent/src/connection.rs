//! The stream of frames to the node.
//!
//! The stream never blocks: what cannot be sent yet is kept, and no more output is read from a step until it has gone. So a
//! slow reader slows the step, while timeouts and cancellation still work.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nestling_api::agent::{self, AgentMessage, Decoder, Failure, HEADER_LEN, HostMessage, Kind};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

/// Most bytes of output in one frame.
const MAX_OUTPUT: usize = 32 * 1024;
/// How long the agent tries to reach the node, and waits between tries.
const CALL_FOR: Duration = Duration::from_secs(10);
const CALL_EVERY: Duration = Duration::from_millis(20);
/// How long the agent tries to get its last words through, in milliseconds.
const LAST_WORDS_MS: u16 = 2000;

/// The connection to the node.
pub(crate) struct Connection {
    stream: OwnedFd,
    decoder: Decoder,
    outgoing: Vec<u8>,
    sent: usize,
}

/// What a pipe gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forwarded {
    /// This many bytes.
    Bytes(usize),
    /// Nothing, for now.
    Nothing,
    /// Its end: every writer has closed it.
    End,
}

impl Connection {
    /// A connection over a stream socket or a character device.
    pub(crate) fn new(stream: OwnedFd) -> Result<Self, String> {
        never_block(&stream).map_err(|error| format!("cannot set the connection up: {error}"))?;
        Ok(Self { stream, decoder: Decoder::new(), outgoing: Vec::new(), sent: 0 })
    }

    /// Whether everything has been sent, so that there is room for output.
    pub(crate) fn is_drained(&self) -> bool {
        self.sent >= self.outgoing.len()
    }

    /// Takes a message to send.
    pub(crate) fn say(&mut self, message: &AgentMessage) -> Result<(), String> {
        self.outgoing.extend(message.encode().map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Reads once from `pipe` and takes what came as one frame of `kind`. Call it only when [`Connection::is_drained`].
    pub(crate) fn forward(&mut self, kind: Kind, pipe: BorrowedFd<'_>) -> Forwarded {
        let start = self.outgoing.len();
        let payload = start.saturating_add(HEADER_LEN);
        self.outgoing.resize(payload.saturating_add(MAX_OUTPUT), 0);
        let read = nix::unistd::read(pipe, self.outgoing.get_mut(payload..).unwrap_or_default());
        let len = *read.as_ref().unwrap_or(&0);
        self.outgoing.truncate(payload.saturating_add(len));
        match (read, agent::header(kind, len)) {
            (Ok(1..), Ok(header)) => {
                if let Some(place) = self.outgoing.get_mut(start..payload) {
                    place.copy_from_slice(&header);
                }
                Forwarded::Bytes(len)
            }
            (Err(Errno::EAGAIN | Errno::EINTR), _) => {
                self.outgoing.truncate(start);
                Forwarded::Nothing
            }
            _ => {
                self.outgoing.truncate(start);
                Forwarded::End
            }
        }
    }

    /// Sends what can be sent now. Errors when the node is gone.
    pub(crate) fn send(&mut self) -> Result<(), Errno> {
        while let Some(rest) = self.outgoing.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match nix::unistd::write(&self.stream, rest) {
                Ok(len) => self.sent = self.sent.saturating_add(len),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.outgoing.clear();
        self.sent = 0;
        Ok(())
    }

    /// Receives what has come. False when the node has closed the connection.
    pub(crate) fn receive(&mut self) -> bool {
        let mut bytes = [0; 32 * 1024];
        match nix::unistd::read(&self.stream, &mut bytes) {
            Ok(len @ 1..) => {
                self.decoder.push(bytes.get(..len).unwrap_or_default());
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Ok(0) | Err(_) => false,
        }
    }

    /// The next whole message that has come.
    pub(crate) fn next_message(&mut self) -> Result<Option<HostMessage>, String> {
        let told = |error: agent::ProtocolError| format!("the node broke the protocol: {error}");
        let Some(frame) = self.decoder.next_frame().map_err(told)? else { return Ok(None) };
        HostMessage::decode(frame).map(Some).map_err(told)
    }

    /// Tells the node why the agent cannot go on, if it still listens.
    pub(crate) fn say_failure(&mut self, message: &str) {
        if self.say(&AgentMessage::Failure(Failure { message: message.to_owned() })).is_err() {
            return;
        }
        while self.send().is_ok() && !self.is_drained() {
            let mut stream = [PollFd::new(self.stream.as_fd(), PollFlags::POLLOUT)];
            if !matches!(poll(&mut stream, PollTimeout::from(LAST_WORDS_MS)), Ok(1..)) {
                return;
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Makes reads and writes of `descriptor` return at once, with what there is.
pub(crate) fn never_block(descriptor: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// Connects to the node over vsock. The device may appear a moment after its module is loaded, so this tries for a while.
pub(crate) fn call_the_node() -> Result<Connection, String> {
    let start = Instant::now();
    loop {
        match try_vsock() {
            Ok(stream) => return Connection::new(stream),
            Err(_) if start.elapsed() < CALL_FOR => std::thread::sleep(CALL_EVERY),
            Err(error) => {
                let (cid, port) = (agent::HOST_CID, agent::PORT);
                return Err(format!("cannot reach the node at vsock {cid}:{port}: {}", error.desc()));
            }
        }
    }
}

fn try_vsock() -> Result<OwnedFd, Errno> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(agent::HOST_CID, agent::PORT))?;
    Ok(stream)
}

/// Opens a character device as the connection; a terminal is made raw, so that every byte passes.
pub(crate) fn open_device(path: &Path) -> Result<Connection, String> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NOCTTY).open(path);
    let device = OwnedFd::from(device.map_err(|error| format!("cannot open {}: {error}", path.display()))?);
    if let Ok(mut terminal) = tcgetattr(&device) {
        cfmakeraw(&mut terminal);
        let set = tcsetattr(&device, SetArg::TCSANOW, &terminal);
        set.map_err(|error| format!("cannot make {} raw: {error}", path.display()))?;
    }
    Connection::new(device)
}
