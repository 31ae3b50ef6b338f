//! The network card: moves frames between the guest's queues and the host's end of the cable.
//!
//! Virtio 1.2, 5.1 (network device): 5.1.3 (feature bits), 5.1.4 (configuration), 5.1.6 (device operation).
//!
//! A frame of the guest is copied once, into a queue of the host's that is bounded; when it is full the guest's frames stay in the
//! guest's queue. A frame that is no frame, or asks for what cannot be, is dropped; only a broken queue, or a receive buffer too
//! small for a header, ends the machine.

mod host;
mod offload;

use super::queue::{Chain, Queue, QueueError, Rule};
use super::transport::VirtioDevice;
use crate::memory::GuestMemory;
use crate::platform::Host;
use alloc::vec;
use alloc::vec::Vec;

pub use host::NetworkHost;
pub use offload::{Accepts, Checksum, FRAME_BYTES_MAX, Gso, Offload};

use offload::HEADER_BYTES;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZE: u16 = 256;

const FEATURE_CSUM: u64 = 1 << 0;
const FEATURE_GUEST_CSUM: u64 = 1 << 1;
const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_GUEST_TSO4: u64 = 1 << 7;
const FEATURE_HOST_TSO4: u64 = 1 << 11;
const FEATURE_MERGEABLE_BUFFERS: u64 = 1 << 15;
const FEATURE_STATUS: u64 = 1 << 16;

const CONFIG_BYTES: u32 = 12;
const STATUS_LINK_UP: u8 = 1;

/// What the guest is told of its network card.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetworkConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet in a frame, in bytes: 68 or more.
    pub mtu: u16,
}

/// What the driver's accepted features mean while frames move.
#[derive(Clone, Copy, Default, Debug)]
struct Agreed {
    /// What the guest may send.
    transmit: Accepts,
    /// A frame for the guest may lie in several chains.
    mergeable: bool,
}

/// The network card.
#[derive(Clone, Debug)]
pub(in crate::platform) struct Net {
    /// The host's end.
    pub(in crate::platform) host: NetworkHost,
    config: NetworkConfig,
    agreed: Agreed,
    /// The guest's frames are to be looked for.
    notified: bool,
    /// The guest's frames are to be looked for once the host has taken those it has: until then the guest need not notify.
    deferred: bool,
    /// The guest has too few receive buffers; it will notify when it has more.
    starved: bool,
    chain: Chain,
    /// Receive buffers that were taken from the queue.
    receive: Vec<Chain>,
    spare: Vec<Chain>,
}

impl Net {
    pub(in crate::platform) fn new(config: NetworkConfig) -> Self {
        Self {
            host: NetworkHost::new(config.mtu),
            config,
            agreed: Agreed::default(),
            notified: false,
            deferred: false,
            starved: false,
            chain: Chain::default(),
            receive: Vec::new(),
            spare: Vec::new(),
        }
    }

    fn wants_to_take(&self) -> bool {
        self.notified && self.host.can_send() || self.deferred && !self.host.has_frame()
    }

    /// Takes the guest's frames, as far as there is room for them.
    fn take_frames(&mut self, queue: &mut Queue, memory: &mut dyn GuestMemory) -> Result<(), QueueError> {
        self.notified = true;
        self.deferred = false;
        queue.set_notifications(memory, false)?;
        // A guest that keeps filling the queue must not keep the node here.
        for _ in 0..QUEUE_SIZE {
            if !self.host.can_send() {
                return Ok(());
            }
            if queue.pop(memory, &mut self.chain)? {
                self.take_frame(memory)?;
                queue.push_used(memory, self.chain.head(), 0)?;
            } else if self.host.has_frame() {
                // The host comes for these anyway; what the guest adds until then costs it no exit.
                (self.notified, self.deferred) = (false, true);
                return Ok(());
            } else {
                queue.set_notifications(memory, true)?;
                if !queue.has_available(memory)? {
                    self.notified = false;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn take_frame(&mut self, memory: &dyn GuestMemory) -> Result<(), QueueError> {
        let chain = &self.chain;
        let length = chain.readable_bytes().checked_sub(HEADER_BYTES as u64);
        let Some(length) = length.and_then(|length| usize::try_from(length).ok()) else { return Ok(()) };
        if length > FRAME_BYTES_MAX {
            return Ok(());
        }
        let mut header = [0; HEADER_BYTES];
        let mut frame = vec![0; length];
        chain.read(memory, 0, &mut header)?;
        chain.read(memory, HEADER_BYTES as u64, &mut frame)?;
        if let Some(offload) = Offload::from_header(&header, &frame, self.agreed.transmit, self.host.mtu()) {
            self.host.send(frame, offload);
        }
        Ok(())
    }

    /// Gives the guest the frames that wait for it, as far as it has buffers.
    fn give_frames(&mut self, queue: &mut Queue, memory: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let mut gave = false;
        while let Some((frame, _)) = self.host.next_for_guest() {
            let needed = (HEADER_BYTES + frame.len()) as u64;
            match self.find_buffers(needed, queue, memory)? {
                Buffers::Enough => {
                    self.give_frame(queue, memory)?;
                    gave = true;
                }
                Buffers::TooSmall => self.host.drop_for_guest(),
                Buffers::TooFew => {
                    self.starved = true;
                    break;
                }
            }
        }
        if gave { queue.publish_used(memory) } else { Ok(()) }
    }

    /// Takes chains from the queue until those that were taken have room for `needed` bytes.
    fn find_buffers(
        &mut self,
        needed: u64,
        queue: &mut Queue,
        memory: &mut dyn GuestMemory,
    ) -> Result<Buffers, QueueError> {
        let most = if self.agreed.mergeable { usize::from(QUEUE_SIZE) } else { 1 };
        let mut room: u64 = self.receive.iter().map(Chain::writable_bytes).sum();
        while room < needed {
            if self.receive.len() >= most {
                return Ok(Buffers::TooSmall);
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if queue.pop(memory, &mut chain)? {
                let length = chain.writable_bytes();
                if length < HEADER_BYTES as u64 {
                    let needed = HEADER_BYTES as u64;
                    return Err(chain.error(Rule::BufferTooSmall { head: chain.head(), length, needed }));
                }
                room += length;
                self.receive.push(chain);
            } else {
                self.spare.push(chain);
                queue.set_notifications(memory, true)?;
                if !queue.has_available(memory)? {
                    return Ok(Buffers::TooFew);
                }
            }
        }
        queue.set_notifications(memory, false)?;
        Ok(Buffers::Enough)
    }

    /// Puts the next frame into the chains that were taken, which have room for it.
    fn give_frame(&mut self, queue: &mut Queue, memory: &mut dyn GuestMemory) -> Result<(), QueueError> {
        let Some((mut rest, offload)) = self.host.next_for_guest() else { return Ok(()) };
        let mut used = 0;
        let mut left = HEADER_BYTES + rest.len();
        for chain in &self.receive {
            if left == 0 {
                break;
            }
            let written = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX).min(left);
            let header = if used == 0 { HEADER_BYTES } else { 0 };
            let Some((part, behind)) = rest.split_at_checked(written - header) else { break };
            chain.write(memory, header as u64, part)?;
            queue.put_used(memory, chain.head(), written as u32)?;
            rest = behind;
            left -= written;
            used += 1;
        }
        if let Some(first) = self.receive.first() {
            first.write(memory, 0, &offload.to_header(used as u16))?;
        }
        self.spare.extend(self.receive.drain(..used));
        self.host.drop_for_guest();
        Ok(())
    }
}

/// Whether the guest has receive buffers for a frame.
enum Buffers {
    Enough,
    /// Not yet.
    TooFew,
    /// And as many as a frame may lie in were looked at.
    TooSmall,
}

impl VirtioDevice for Net {
    const NAME: &'static str = "virtio-net";
    const ID: u16 = 1;
    // Network controller, Ethernet.
    const CLASS: [u8; 3] = [0x02, 0x00, 0x00];
    const CONFIG_BYTES: u32 = CONFIG_BYTES;

    fn vectors(&self) -> u16 {
        // The queues share one: each vector costs Linux a dozen exits to set up.
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        FEATURE_CSUM
            | FEATURE_GUEST_CSUM
            | FEATURE_MTU
            | FEATURE_MAC
            | FEATURE_GUEST_TSO4
            | FEATURE_HOST_TSO4
            | FEATURE_MERGEABLE_BUFFERS
            | FEATURE_STATUS
    }

    fn config_byte(&self, offset: u32) -> u8 {
        let [m0, m1, m2, m3, m4, m5] = self.config.mac;
        let [mtu0, mtu1] = self.config.mtu.to_le_bytes();
        let status = if self.host.link() { STATUS_LINK_UP } else { 0 };
        // MAC, status, pairs of queues (there is one, which is not told without a feature bit), MTU.
        let config: [u8; CONFIG_BYTES as usize] = [m0, m1, m2, m3, m4, m5, status, 0, 0, 0, mtu0, mtu1];
        config.get(offset as usize).copied().unwrap_or(0)
    }

    fn start(
        &mut self,
        features: u64,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        let has = |feature| features & feature != 0;
        let accepts = |csum, tso4| Accepts { csum: has(csum), tso4: has(csum) && has(tso4) };
        self.agreed = Agreed {
            transmit: accepts(FEATURE_CSUM, FEATURE_HOST_TSO4),
            mergeable: has(FEATURE_MERGEABLE_BUFFERS),
        };
        self.host.start(accepts(FEATURE_GUEST_CSUM, FEATURE_GUEST_TSO4));
        self.notified = true;
        self.starved = false;
        if let [receive, _] = queues {
            // Buffers are looked for when there is something to put in them.
            receive.set_notifications(memory, false)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.agreed = Agreed::default();
        self.notified = false;
        self.deferred = false;
        self.starved = false;
        self.spare.append(&mut self.receive);
        self.host.reset();
    }

    fn notify(&mut self, queue: u16) {
        match queue {
            RECEIVE => self.starved = false,
            TRANSMIT => self.notified = true,
            _ => {}
        }
    }

    fn has_work(&self) -> bool {
        self.wants_to_take() || !self.starved && self.host.has_frame_for_guest() || self.host.link_changed()
    }

    fn work(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        _host: &mut Host<'_>,
    ) -> Result<(), QueueError> {
        let [receive, transmit] = queues else { return Ok(()) };
        if !self.starved {
            self.give_frames(receive, memory)?;
        }
        if self.wants_to_take() {
            self.take_frames(transmit, memory)?;
        }
        Ok(())
    }

    fn take_config_change(&mut self) -> bool {
        self.host.take_link_change()
    }
}

#[cfg(test)]
mod tests;
