//! The host's end of one vsock stream connection.
//!
//! Virtio 1.2, 5.10.6 (packet header, operations, buffer space management). Pure: packets go in and come out as headers and
//! bytes; the queues are the device's business.

use alloc::collections::VecDeque;

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The port on which the host takes the agent's connection.
pub const AGENT_PORT: u32 = 1024;
/// Bytes from the guest that are held until the host reads them; advertised as `buf_alloc`.
pub const RECEIVE_BUFFER_BYTES: usize = 128 * 1024;
/// Bytes to the guest that are held until the guest has room for them.
pub const SEND_BUFFER_BYTES: usize = 64 * 1024;
/// Replies that wait for receive buffers of the guest; when reached, its packets are left in its queue.
pub(super) const REPLIES_MAX: usize = 32;
/// Length of a packet header in bytes.
pub(super) const HEADER_BYTES: usize = 44;

const TYPE_STREAM: u16 = 1;
const SHUTDOWN_RECEIVE: u32 = 1 << 0;
const SHUTDOWN_SEND: u32 = 1 << 1;
const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Decodes a header.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        let mut field = |length: usize| {
            let (head, tail) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            rest = tail;
            head.iter().rev().fold(0_u64, |value, &byte| value << 8 | u64::from(byte))
        };
        Self {
            src_cid: field(8),
            dst_cid: field(8),
            src_port: field(4) as u32,
            dst_port: field(4) as u32,
            len: field(4) as u32,
            kind: field(2) as u16,
            op: field(2) as u16,
            flags: field(4) as u32,
            buf_alloc: field(4) as u32,
            fwd_cnt: field(4) as u32,
        }
    }

    /// Encodes the header.
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = (self.src_cid.to_le_bytes().into_iter())
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(byte, value)| *byte = value);
        bytes
    }
}

/// Where the one connection of a machine stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VsockState {
    /// No connection was made yet.
    Listening,
    /// The agent is connected.
    Connected,
    /// The connection has ended; bytes that came before can still be received. A machine has no second one.
    Closed,
}

/// The host's end of the machine's one vsock connection, made by the guest to CID 2, port 1024.
#[derive(Clone, Debug)]
pub struct VsockHost {
    state: VsockState,
    guest_cid: u64,
    guest_port: u32,
    received: VecDeque<u8>,
    to_send: VecDeque<u8>,
    replies: VecDeque<Header>,
    /// Bytes the host has consumed since the connection began, modulo 2^32.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    forwarded_told: u32,
    /// Bytes sent since the connection began, modulo 2^32.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// `SHUTDOWN_*` flags that the guest has sent so far.
    guest_shutdown: u32,
    shutdown: LocalShutdown,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LocalShutdown {
    No,
    /// To be told once everything is sent.
    Wanted,
    Told,
}

impl VsockHost {
    pub(in crate::platform) fn new(guest_cid: u64) -> Self {
        Self {
            state: VsockState::Listening,
            guest_cid,
            guest_port: 0,
            received: VecDeque::new(),
            to_send: VecDeque::new(),
            replies: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            guest_shutdown: 0,
            shutdown: LocalShutdown::No,
        }
    }

    /// Where the connection stands.
    pub const fn state(&self) -> VsockState {
        self.state
    }

    /// Bytes that [`Self::receive`] can give at once.
    pub fn readable(&self) -> usize {
        self.received.len()
    }

    /// Whether the guest has said that it will send nothing more.
    pub const fn guest_finished(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0 || matches!(self.state, VsockState::Closed)
    }

    /// Takes received bytes; returns how many.
    pub fn receive(&mut self, into: &mut [u8]) -> usize {
        let count = take_front(&mut self.received, into);
        self.forwarded = self.forwarded.wrapping_add(count as u32);
        count
    }

    /// Bytes that [`Self::send`] would take now: none unless connected.
    pub fn send_capacity(&self) -> usize {
        let open = self.state == VsockState::Connected
            && self.shutdown == LocalShutdown::No
            && self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        if open { SEND_BUFFER_BYTES.saturating_sub(self.to_send.len()) } else { 0 }
    }

    /// Queues bytes to the guest; returns how many were taken, which is less than asked when the buffer is full.
    pub fn send(&mut self, from: &[u8]) -> usize {
        let from = from.get(..self.send_capacity()).unwrap_or(from);
        self.to_send.extend(from);
        from.len()
    }

    /// Bytes queued by [`Self::send`] that the guest has not been given yet.
    pub fn unsent(&self) -> usize {
        self.to_send.len()
    }

    /// Ends the connection once everything queued is sent.
    pub fn shutdown(&mut self) {
        if self.state == VsockState::Connected && self.shutdown == LocalShutdown::No {
            self.shutdown = LocalShutdown::Wanted;
        }
    }

    /// The driver has reset the device: a connection is lost, a listener stays.
    pub(super) fn device_reset(&mut self) {
        self.replies.clear();
        if self.state == VsockState::Connected {
            self.close();
        }
    }

    fn close(&mut self) {
        self.state = VsockState::Closed;
        self.to_send.clear();
        self.shutdown = LocalShutdown::No;
    }

    /// Whether packets of the guest may be handled: there is room for a reply.
    pub(super) fn can_reply(&self) -> bool {
        self.replies.len() < REPLIES_MAX
    }

    /// Bytes the guest may still be sent.
    fn guest_credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Whether [`Self::next_packet`] has a packet to give.
    pub(super) fn has_packet(&self) -> bool {
        !self.replies.is_empty()
            || self.state == VsockState::Connected
                && (self.credit_update_due()
                    || !self.to_send.is_empty() && self.guest_credit() > 0
                    || self.to_send.is_empty() && self.shutdown == LocalShutdown::Wanted)
    }

    /// Tell the guest of room when half of the buffer was consumed since it last heard.
    fn credit_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.forwarded_told) as usize >= RECEIVE_BUFFER_BYTES / 2
    }

    /// The next packet to the guest. Its payload, `len` bytes and at most `payload_max`, must be taken by [`Self::take_payload`].
    pub(super) fn next_packet(&mut self, payload_max: usize) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            // A reply tells the credit of the moment it goes out.
            return Some(if reply.op == op::RST { reply } else { self.with_credit(reply) });
        }
        if self.state != VsockState::Connected {
            return None;
        }
        let len = self.to_send.len().min(self.guest_credit()).min(payload_max);
        if len > 0 {
            self.sent = self.sent.wrapping_add(len as u32);
            let header = Header { len: len as u32, ..self.header(op::RW) };
            return Some(self.with_credit(header));
        }
        if self.to_send.is_empty() && self.shutdown == LocalShutdown::Wanted {
            self.shutdown = LocalShutdown::Told;
            let header = Header { flags: SHUTDOWN_BOTH, ..self.header(op::SHUTDOWN) };
            return Some(self.with_credit(header));
        }
        if self.credit_update_due() {
            let header = self.header(op::CREDIT_UPDATE);
            return Some(self.with_credit(header));
        }
        None
    }

    /// Moves the first bytes of the payload announced by [`Self::next_packet`] to `into`.
    pub(super) fn take_payload(&mut self, into: &mut [u8]) {
        take_front(&mut self.to_send, into);
    }

    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: AGENT_PORT,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }

    fn with_credit(&mut self, header: Header) -> Header {
        self.forwarded_told = self.forwarded;
        Header { buf_alloc: RECEIVE_BUFFER_BYTES as u32, fwd_cnt: self.forwarded, ..header }
    }

    fn reply(&mut self, header: Header) {
        if self.can_reply() {
            self.replies.push_back(header);
        }
    }

    /// Refuses a packet: the answer to anything but a reset is a reset.
    fn refuse(&mut self, packet: &Header) {
        if packet.op != op::RST {
            self.reply(Header {
                src_cid: packet.dst_cid,
                dst_cid: packet.src_cid,
                src_port: packet.dst_port,
                dst_port: packet.src_port,
                kind: packet.kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    /// Handles a packet's header. Returns whether its payload is wanted: then all `len` bytes of it must be given to
    /// [`Self::put_payload`], otherwise none.
    pub(super) fn handle(&mut self, packet: &Header) -> bool {
        if packet.src_cid != self.guest_cid || packet.dst_cid != HOST_CID || packet.kind != TYPE_STREAM {
            self.refuse(packet);
            return false;
        }
        if packet.op == op::REQUEST {
            if self.state == VsockState::Listening && packet.dst_port == AGENT_PORT {
                self.state = VsockState::Connected;
                self.guest_port = packet.src_port;
                self.learn_credit(packet);
                let response = self.header(op::RESPONSE);
                self.reply(response);
            } else {
                self.refuse(packet);
            }
            return false;
        }
        let ours = self.state == VsockState::Connected
            && packet.dst_port == AGENT_PORT
            && packet.src_port == self.guest_port;
        if !ours {
            self.refuse(packet);
            return false;
        }
        self.learn_credit(packet);
        match packet.op {
            op::RW => {
                let room = RECEIVE_BUFFER_BYTES.saturating_sub(self.received.len());
                let allowed = self.guest_shutdown & SHUTDOWN_SEND == 0 && packet.len as usize <= room;
                if !allowed {
                    // The guest ignored its credit or its own shutdown.
                    self.refuse(packet);
                    self.close();
                }
                return allowed;
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => {
                let update = self.header(op::CREDIT_UPDATE);
                self.reply(update);
            }
            op::SHUTDOWN => {
                self.guest_shutdown |= packet.flags & SHUTDOWN_BOTH;
                if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
                    self.to_send.clear();
                }
                if self.guest_shutdown == SHUTDOWN_BOTH {
                    self.refuse(packet);
                    self.close();
                }
            }
            op::RST => self.close(),
            _ => {
                self.refuse(packet);
                self.close();
            }
        }
        false
    }

    /// Appends payload of a packet for which [`Self::handle`] returned true.
    pub(super) fn put_payload(&mut self, from: &[u8]) {
        self.received.extend(from);
    }

    fn learn_credit(&mut self, packet: &Header) {
        self.guest_buf_alloc = packet.buf_alloc;
        self.guest_fwd_cnt = packet.fwd_cnt;
    }
}

/// Moves bytes from the front of `queue` to `into`; returns how many. Copies by slices: logs of any size pass here.
fn take_front(queue: &mut VecDeque<u8>, into: &mut [u8]) -> usize {
    let mut taken = 0;
    let (first, second) = queue.as_slices();
    for part in [first, second] {
        let rest = into.get_mut(taken..).unwrap_or_default();
        let count = part.len().min(rest.len());
        if let (Some(to), Some(from)) = (rest.get_mut(..count), part.get(..count)) {
            to.copy_from_slice(from);
            taken += count;
        }
    }
    queue.drain(..taken);
    taken
}

#[cfg(test)]
mod tests;
