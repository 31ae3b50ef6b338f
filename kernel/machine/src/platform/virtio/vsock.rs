//! The vsock device: moves packets between the guest's queues and the host's end of the connection.
//!
//! Virtio 1.2, 5.10 (socket device).

use super::connection::{HEADER_BYTES, Header, VsockHost};
use super::queue::{Chain, Queue, QueueError, Rule};
use super::transport::VirtioDevice;
use crate::memory::GuestMemory;
use crate::platform::Host;

const RECEIVE: u16 = 0;
const QUEUE_SIZE: u16 = 256;
/// The most payload of a packet to the guest; Linux' buffers take 4 KiB.
const PAYLOAD_MAX: usize = 64 * 1024;
/// How often one poll turns from taking packets to giving them.
const TURNS_MAX: usize = 8;
/// Bytes copied at a time.
const COPY_BYTES: usize = 2048;

/// The vsock device.
#[derive(Clone, Debug)]
pub(in crate::platform) struct Vsock {
    /// The host's end.
    pub(in crate::platform) host: VsockHost,
    guest_cid: u64,
    notified: bool,
    /// The guest has no receive buffer; it will notify when it has.
    starved: bool,
    chain: Chain,
}

impl Vsock {
    /// A device whose guest has the context id `guest_cid`.
    pub(in crate::platform) fn new(guest_cid: u64) -> Self {
        Self {
            host: VsockHost::new(guest_cid),
            guest_cid,
            notified: false,
            starved: false,
            chain: Chain::default(),
        }
    }

    /// Handles packets from the guest. Returns whether some had to be left because replies wait for receive buffers.
    fn take_packets(&mut self, queue: &mut Queue, memory: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        // A guest that keeps filling the queue must not keep the node here.
        for _ in 0..QUEUE_SIZE {
            if !self.host.can_reply() {
                return Ok(true);
            }
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_notifications(memory, true)?;
                if !queue.has_available(memory)? {
                    return Ok(false);
                }
                continue;
            }
            self.take_packet(memory)?;
            queue.push_used(memory, self.chain.head(), 0)?;
        }
        self.notified = true;
        Ok(false)
    }

    fn take_packet(&mut self, memory: &dyn GuestMemory) -> Result<(), QueueError> {
        let chain = &self.chain;
        let mut header = [0; HEADER_BYTES];
        chain.read(memory, 0, &mut header)?;
        let header = Header::from_bytes(&header);
        let mut offset = HEADER_BYTES as u64;
        let mut left = header.len as usize;
        if chain.readable_bytes() < offset + u64::from(header.len) {
            let reason = "a packet's length is more than its buffers hold";
            return Err(chain.error(Rule::Request { head: chain.head(), reason }));
        }
        if self.host.handle(&header) {
            let mut buffer = [0; COPY_BYTES];
            while let Some(part) = buffer.get_mut(..left.min(COPY_BYTES)).filter(|part| !part.is_empty()) {
                chain.read(memory, offset, part)?;
                self.host.put_payload(part);
                offset += part.len() as u64;
                left -= part.len();
            }
        }
        Ok(())
    }

    /// Gives the guest the packets that wait for it. Returns whether it gave any.
    fn give_packets(&mut self, queue: &mut Queue, memory: &mut dyn GuestMemory) -> Result<bool, QueueError> {
        let mut gave = false;
        while self.host.has_packet() {
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_notifications(memory, true)?;
                if queue.has_available(memory)? {
                    continue;
                }
                self.starved = true;
                break;
            }
            let written = self.give_packet(memory)?;
            queue.push_used(memory, self.chain.head(), written)?;
            gave = true;
        }
        Ok(gave)
    }

    fn give_packet(&mut self, memory: &mut dyn GuestMemory) -> Result<u32, QueueError> {
        let chain = &self.chain;
        let length = chain.writable_bytes();
        let needed = HEADER_BYTES as u64 + 1;
        let payload_max = match length.checked_sub(HEADER_BYTES as u64) {
            None | Some(0) => {
                return Err(chain.error(Rule::BufferTooSmall { head: chain.head(), length, needed }));
            }
            Some(room) => usize::try_from(room).unwrap_or(usize::MAX).min(PAYLOAD_MAX),
        };
        let Some(header) = self.host.next_packet(payload_max) else { return Ok(0) };
        chain.write(memory, 0, &header.to_bytes())?;
        let mut offset = HEADER_BYTES as u64;
        let mut left = header.len as usize;
        let mut buffer = [0; COPY_BYTES];
        while let Some(part) = buffer.get_mut(..left.min(COPY_BYTES)).filter(|part| !part.is_empty()) {
            self.host.take_payload(part);
            chain.write(memory, offset, part)?;
            offset += part.len() as u64;
            left -= part.len();
        }
        Ok(HEADER_BYTES as u32 + header.len)
    }
}

impl VirtioDevice for Vsock {
    const NAME: &'static str = "virtio-vsock";
    const ID: u16 = 19;
    // Communication controller, other.
    const CLASS: [u8; 3] = [0x07, 0x80, 0x00];
    const CONFIG_BYTES: u32 = 8;

    fn vectors(&self) -> u16 {
        // The queues share one: each vector costs Linux a dozen exits to set up.
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        // Receive, transmit, event.
        &[QUEUE_SIZE, QUEUE_SIZE, 16]
    }

    fn config_byte(&self, offset: u32) -> u8 {
        self.guest_cid.to_le_bytes().get(offset as usize).copied().unwrap_or(0)
    }

    fn start(
        &mut self,
        _features: u64,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        self.notified = true;
        self.starved = false;
        if let [receive, transmit, event] = queues {
            // Buffers are looked for when there is something to put in them.
            receive.set_notifications(memory, false)?;
            event.set_notifications(memory, false)?;
            transmit.set_notifications(memory, true)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.notified = false;
        self.starved = false;
        self.host.device_reset();
    }

    fn notify(&mut self, queue: u16) {
        self.notified = true;
        if queue == RECEIVE {
            self.starved = false;
        }
    }

    fn has_work(&self) -> bool {
        self.notified || !self.starved && self.host.has_packet()
    }

    fn work(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        _host: &mut Host<'_>,
    ) -> Result<(), QueueError> {
        self.notified = false;
        let [receive, transmit, _event] = queues else { return Ok(()) };
        // Handing out replies makes room for more packets.
        for _ in 0..TURNS_MAX {
            let stalled = self.take_packets(transmit, memory)?;
            let gave = self.give_packets(receive, memory)?;
            if !(stalled && gave) {
                return Ok(());
            }
        }
        self.notified = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
