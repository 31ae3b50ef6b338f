//! The virtio network device.
//!
//! Virtual I/O Device specification 1.2: 5.1 (network device), 2.7 (split virtqueues). The rings are the
//! virtio-drivers crate's; this file owns the buffers, so that sending never waits and nothing the device
//! says (a token, a length) is used unchecked.

use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::transport::pci::VIRTIO_VENDOR_ID;

use super::dma::IdentityDma;
use super::nic::{MAX_FRAME_BYTES, Nic};
use super::pci::{ConfigSpace, Function};
use super::virtio_transport::{Doorbell, MsixTransport};
use crate::cpu::interrupts::{self, IrqLine};

const DEVICE_TRANSITIONAL: u16 = 0x1000;
const DEVICE_MODERN: u16 = 0x1041;
/// Frames in each direction that can be under way: a burst of 200 connections arrives as 200 small frames
/// within a millisecond.
const QUEUE_SIZE: usize = 256;
/// A virtio header of 12 bytes and the longest frame, rounded up.
const BUFFER_BYTES: usize = 1536;
/// The queue of frames to send.
const TRANSMIT: u16 = 1;

type Raw = VirtIONetRaw<IdentityDma, MsixTransport, QUEUE_SIZE>;
type Buffer = Box<[u8]>;

/// A driven virtio network device.
pub struct VirtioNet {
    raw: Box<Raw>,
    mac: [u8; 6],
    /// The buffers the device is filling and sending, by the token of their descriptor.
    receiving: Vec<Option<Buffer>>,
    sending: Vec<Option<Buffer>>,
    spare: Vec<Buffer>,
    /// Frames in `sending`.
    under_way: usize,
    line: Option<IrqLine>,
    /// Interrupts are on: no received frame was left when the ring was last looked at.
    is_drained: bool,
    /// Tells the device of frames to send.
    doorbell: Arc<Doorbell>,
    broken: bool,
}

impl VirtioNet {
    /// Whether this driver is the one for a function.
    #[must_use]
    pub fn drives(function: &Function) -> bool {
        function.vendor == VIRTIO_VENDOR_ID && matches!(function.device, DEVICE_TRANSITIONAL | DEVICE_MODERN)
    }

    /// Starts the device with all receive buffers queued.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub fn new(space: ConfigSpace, function: &Function) -> Result<Self, String> {
        let line = interrupts::allocate("virtio-net");
        let mut transport =
            MsixTransport::new(space, function.address, line.as_ref()).map_err(|error| error.to_string())?;
        if virtio_drivers::transport::Transport::max_queue_size(&mut transport, 0) < QUEUE_SIZE as u32 {
            return Err(alloc::format!("its queues have fewer than {QUEUE_SIZE} entries"));
        }
        let interrupting = transport.interrupting();
        let doorbell = transport.give_away_doorbell(TRANSMIT);
        let raw = Raw::new(transport).map_err(|error| error.to_string())?;
        let mac = raw.mac_address();
        let mut nic = Self {
            raw: Box::new(raw),
            mac,
            receiving: (0..QUEUE_SIZE).map(|_| None).collect(),
            sending: (0..QUEUE_SIZE).map(|_| None).collect(),
            spare: Vec::with_capacity(QUEUE_SIZE),
            under_way: 0,
            line: line.filter(|_| interrupting.load(Ordering::Relaxed)),
            is_drained: true,
            doorbell,
            broken: false,
        };
        for _ in 0..QUEUE_SIZE {
            nic.offer(vec![0; BUFFER_BYTES].into_boxed_slice());
        }
        if nic.broken { Err("it takes no receive buffers".into()) } else { Ok(nic) }
    }

    /// Gives the device a buffer to fill.
    fn offer(&mut self, mut buffer: Buffer) {
        // SAFETY: the buffer is kept in `receiving`, untouched, until the device returns its token.
        match unsafe { self.raw.receive_begin(&mut buffer) } {
            Ok(token) => match self.receiving.get_mut(usize::from(token)) {
                Some(place) if place.is_none() => *place = Some(buffer),
                _ => self.fail("a receive descriptor was used twice", buffer),
            },
            Err(error) => self.fail(&error.to_string(), buffer),
        }
    }

    /// The oldest frame that was received. From the first until none is left the device need not interrupt.
    fn next_received(&mut self) -> Option<u16> {
        let token = self.raw.poll_receive();
        if token.is_some() == self.is_drained {
            self.is_drained = token.is_none();
            if !self.is_drained {
                self.raw.disable_interrupts();
            } else {
                self.raw.enable_interrupts();
                // The device must see that before the ring is found empty.
                fence(Ordering::SeqCst);
                return self.raw.poll_receive();
            }
        }
        token
    }

    /// Stops using a device that breaks the rules. Memory it may still write to is never reused.
    fn fail(&mut self, reason: &str, buffer: Buffer) {
        core::mem::forget(buffer);
        if !self.broken {
            log::error!(
                "virtio-net: the device broke the protocol ({reason}); it is no longer used. Restart the node"
            );
            self.broken = true;
        }
    }

    /// Takes back the buffers of frames that are sent.
    fn reap(&mut self) {
        while !self.broken
            && let Some(token) = self.raw.poll_transmit()
        {
            let Some(buffer) = self.sending.get_mut(usize::from(token)).and_then(Option::take) else {
                self.fail("it returned a descriptor it was not given", Box::default());
                return;
            };
            self.under_way -= 1;
            // The length of the buffer as it was queued is the descriptor's own; the crate only wants the
            // same slice. SAFETY: this is the buffer transmit_begin returned this token for.
            match unsafe { self.raw.transmit_complete(token, &buffer) } {
                Ok(_) => self.spare.push(buffer),
                Err(error) => self.fail(&error.to_string(), buffer),
            }
        }
    }
}

impl Nic for VirtioNet {
    fn driver(&self) -> &'static str {
        "virtio-net"
    }

    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        while !self.broken {
            let token = self.next_received()?;
            let Some(mut buffer) = self.receiving.get_mut(usize::from(token)).and_then(Option::take) else {
                self.fail("it filled a descriptor it was not given", Box::default());
                return None;
            };
            // SAFETY: this is the buffer receive_begin returned this token for.
            match unsafe { self.raw.receive_complete(token, &mut buffer) } {
                Ok((header, length)) => {
                    let frame = header.checked_add(length).and_then(|end| buffer.get(header..end));
                    let copied = frame.and_then(|frame| {
                        into.get_mut(..length)?.copy_from_slice(frame);
                        Some(length)
                    });
                    self.offer(buffer);
                    if copied.is_some() {
                        return copied;
                    }
                }
                // The device says it wrote less than a header: the buffer is ours again, the frame is not
                // one.
                Err(virtio_drivers::Error::IoError) => self.offer(buffer),
                Err(error) => self.fail(&error.to_string(), buffer),
            }
        }
        None
    }

    fn transmit_room(&mut self) -> usize {
        self.reap();
        // The crate takes a frame while two descriptors are free and uses one.
        let room = QUEUE_SIZE.saturating_sub(self.under_way + 1);
        if self.broken { 0 } else { room }
    }

    fn transmit(&mut self, frame: &[u8]) -> bool {
        self.reap();
        if self.broken || frame.len() > MAX_FRAME_BYTES || !self.raw.can_send() {
            self.flush();
            return false;
        }
        let mut buffer = self.spare.pop().unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice());
        let Ok(header) = self.raw.fill_buffer_header(&mut buffer) else { return false };
        let Some(room) = header.checked_add(frame.len()).and_then(|end| buffer.get_mut(header..end)) else {
            return false;
        };
        room.copy_from_slice(frame);
        let end = header + frame.len();
        // SAFETY: the buffer is kept in `sending`, untouched, until the device returns its token.
        match unsafe { self.raw.transmit_begin(buffer.get(..end).unwrap_or_default()) } {
            Ok(token) => match self.sending.get_mut(usize::from(token)) {
                Some(place) if place.is_none() => {
                    *place = Some(buffer);
                    self.under_way += 1;
                    true
                }
                _ => {
                    self.fail("a send descriptor was used twice", buffer);
                    false
                }
            },
            Err(_) => {
                self.spare.push(buffer);
                false
            }
        }
    }

    fn flush(&mut self) {
        self.doorbell.ring();
    }

    fn take_interrupt(&mut self) -> bool {
        self.line.as_ref().is_some_and(IrqLine::take_pending)
    }

    fn has_interrupt(&self) -> bool {
        self.line.is_some()
    }
}
