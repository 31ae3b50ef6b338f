//! The virtio block device.
//!
//! Virtual I/O Device specification 1.2: 5.2 (block device), 2.7 (split virtqueues). The queue is the virtio-drivers crate's; this file
//! owns the buffers of accesses that are under way, so that nothing waits and nothing the device says is used unchecked.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::pci::VIRTIO_VENDOR_ID;

use super::disk::{Buffer, Completion, Disk};
use super::dma::IdentityDma;
use super::pci::{ConfigSpace, Function};
use super::virtio_transport::MsixTransport;
use crate::cpu::clock;
use crate::cpu::interrupts::{self, IrqLine};

const DEVICE_TRANSITIONAL: u16 = 0x1001;
const DEVICE_MODERN: u16 = 0x1042;
/// How long the device may take for an access.
const TIMEOUT_NS: u64 = 30_000_000_000;

type Raw = VirtIOBlk<IdentityDma, MsixTransport>;

/// What the device reads and writes besides the data.
#[derive(Default)]
struct Frame {
    request: BlkReq,
    response: BlkResp,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// An access under way.
struct Flight {
    tag: usize,
    direction: Direction,
    frame: Box<Frame>,
    buffer: Buffer,
    length: usize,
    deadline: u64,
    /// Its end was reported, as a failure.
    given_up: bool,
}

/// A driven virtio block device.
pub struct VirtioBlk {
    raw: Box<Raw>,
    bytes: u64,
    /// Accesses under way by the token of their descriptor.
    flights: Vec<Option<Flight>>,
    ended: VecDeque<Completion>,
    line: Option<IrqLine>,
    broken: Option<&'static str>,
}

impl VirtioBlk {
    /// Whether this driver is the one for a function.
    #[must_use]
    pub fn drives(function: &Function) -> bool {
        function.vendor == VIRTIO_VENDOR_ID && matches!(function.device, DEVICE_TRANSITIONAL | DEVICE_MODERN)
    }

    /// Starts the device.
    ///
    /// # Errors
    /// Why the device cannot be used.
    pub fn new(space: ConfigSpace, function: &Function) -> Result<Self, String> {
        let line = interrupts::allocate("virtio-blk");
        let transport =
            MsixTransport::new(space, function.address, line.as_ref()).map_err(|error| error.to_string())?;
        let interrupting = transport.interrupting();
        let raw = Raw::new(transport).map_err(|error| error.to_string())?;
        let bytes = raw.capacity().saturating_mul(SECTOR_SIZE as u64);
        let size = usize::from(raw.virt_queue_size());
        Ok(Self {
            raw: Box::new(raw),
            bytes,
            flights: (0..size).map(|_| None).collect(),
            ended: VecDeque::with_capacity(size),
            line: line.filter(|_| interrupting.load(Ordering::Relaxed)),
            broken: None,
        })
    }

    /// Stops using a device that breaks the rules. Memory it may still reach is never used again.
    fn fail(&mut self, reason: &'static str) {
        log::error!("virtio-blk: {reason}; the disk is no longer used. Restart the node");
        self.broken = Some(reason);
        for flight in self.flights.iter_mut().filter_map(Option::take) {
            if !flight.given_up {
                self.ended.push_back(Completion {
                    tag: flight.tag,
                    buffer: None,
                    outcome: Err(reason.into()),
                });
            }
            core::mem::forget(flight.frame);
        }
    }

    /// Takes the next access back that the device is done with.
    fn reap(&mut self) -> bool {
        // The ring tells the device to interrupt for the next access by a store that must be seen before the ring is found empty.
        fence(Ordering::SeqCst);
        let Some(token) = self.raw.peek_used() else { return false };
        let Some(mut flight) = self.flights.get_mut(usize::from(token)).and_then(Option::take) else {
            self.fail("the device returned a descriptor it was not given");
            return false;
        };
        let Frame { request, response } = &mut *flight.frame;
        let part = flight.buffer.get_mut(..flight.length).unwrap_or_default();
        let completed = match flight.direction {
            // SAFETY: these are the buffers read_blocks_nb returned this token for.
            Direction::Read => unsafe { self.raw.complete_read_blocks(token, request, part, response) },
            // SAFETY: these are the buffers write_blocks_nb returned this token for.
            Direction::Write => unsafe { self.raw.complete_write_blocks(token, request, part, response) },
        };
        let outcome = match completed {
            Ok(()) => Ok(()),
            Err(virtio_drivers::Error::IoError | virtio_drivers::Error::Unsupported) => {
                Err(alloc::format!("the disk answered {:?}", response.status()))
            }
            Err(_) => {
                self.flights[usize::from(token)] = Some(flight);
                self.fail("the device broke the protocol");
                return false;
            }
        };
        if !flight.given_up {
            self.ended.push_back(Completion { tag: flight.tag, buffer: Some(flight.buffer), outcome });
        }
        true
    }

    fn start(
        &mut self,
        direction: Direction,
        at: u64,
        length: usize,
        buffer: Buffer,
        tag: usize,
    ) -> Result<(), Buffer> {
        let whole = at.is_multiple_of(SECTOR_SIZE as u64) && length.is_multiple_of(SECTOR_SIZE) && length > 0;
        let inside =
            at.checked_add(length as u64).is_some_and(|end| end <= self.bytes) && length <= buffer.len();
        let refusal = match self.broken {
            Some(reason) => Some(reason),
            None if !(whole && inside) => Some("the range is not on the disk"),
            None => None,
        };
        if let Some(reason) = refusal {
            self.ended.push_back(Completion { tag, buffer: Some(buffer), outcome: Err(reason.into()) });
            return Ok(());
        }
        let mut frame = Box::<Frame>::default();
        let Frame { request, response } = &mut *frame;
        let part = buffer.get_mut(..length).unwrap_or_default();
        let sector = (at / SECTOR_SIZE as u64) as usize;
        let started = match direction {
            // SAFETY: frame and buffer are kept in `flights`, untouched, until the device returns the token, or for ever.
            Direction::Read => unsafe { self.raw.read_blocks_nb(sector, request, part, response) },
            // SAFETY: as above.
            Direction::Write => unsafe { self.raw.write_blocks_nb(sector, request, part, response) },
        };
        match started {
            Ok(token) => {
                let deadline = clock::now_ns().saturating_add(TIMEOUT_NS);
                let flight = Flight { tag, direction, frame, buffer, length, deadline, given_up: false };
                match self.flights.get_mut(usize::from(token)) {
                    Some(place) if place.is_none() => *place = Some(flight),
                    _ => {
                        self.ended.push_back(Completion {
                            tag,
                            buffer: None,
                            outcome: Err("a descriptor twice".into()),
                        });
                        core::mem::forget(flight.frame);
                        self.fail("a descriptor was used twice");
                    }
                }
                Ok(())
            }
            Err(_) => Err(buffer),
        }
    }
}

impl Disk for VirtioBlk {
    fn driver(&self) -> &'static str {
        "virtio-blk"
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.raw.readonly()
    }

    fn read(&mut self, at: u64, length: usize, buffer: Buffer, tag: usize) -> Result<(), Buffer> {
        self.start(Direction::Read, at, length, buffer, tag)
    }

    fn write(&mut self, at: u64, length: usize, buffer: Buffer, tag: usize) -> Result<(), Buffer> {
        self.start(Direction::Write, at, length, buffer, tag)
    }

    fn completed(&mut self, now: u64) -> Option<Completion> {
        while self.broken.is_none() && self.reap() {}
        if let Some(ended) = self.ended.pop_front() {
            return Some(ended);
        }
        let late =
            self.flights.iter_mut().flatten().find(|flight| !flight.given_up && flight.deadline <= now)?;
        // The device may still answer; until then the buffer stays here.
        late.given_up = true;
        let outcome = Err(alloc::format!("the disk has not answered for {} s", TIMEOUT_NS / 1_000_000_000));
        Some(Completion { tag: late.tag, buffer: None, outcome })
    }

    fn deadline(&self) -> Option<u64> {
        self.flights.iter().flatten().filter(|flight| !flight.given_up).map(|flight| flight.deadline).min()
    }

    fn take_interrupt(&mut self) -> bool {
        self.line.as_ref().is_none_or(IrqLine::take_pending)
    }

    fn has_interrupt(&self) -> bool {
        self.line.is_some()
    }
}
