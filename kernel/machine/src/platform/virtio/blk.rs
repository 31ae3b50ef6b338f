//! The block device: a machine's disk.
//!
//! Virtio 1.2, 5.2 (block device): 5.2.3 (feature bits), 5.2.4 (configuration), 5.2.6 (requests).
//!
//! The device copies between the guest's buffers and the [`Disk`] behind it, as far as the disk is at hand; a request that
//! has to wait is kept and goes on when the disk has woken the device. A request that asks for what cannot be is answered with an
//! error; only one that leaves no place for an answer, or a broken queue, ends the machine.
//!
//! What is written is in the disk when its request is completed, so a flush has nothing left to do.

use super::queue::{Chain, Queue, QueueError, Rule};
use super::transport::VirtioDevice;
use crate::memory::{GuestMemory, MemoryError};
use crate::platform::Host;
use alloc::vec;
use alloc::vec::Vec;

/// Bytes of a sector, the unit of all positions and lengths.
const SECTOR_BYTES: u64 = 512;
/// What the disk keeps together: the physical block.
const BLOCK_SECTORS: u32 = 8;
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

const QUEUE_SIZE: u16 = 128;
/// The most queues: one for each vCPU up to here.
const QUEUES_MAX: u16 = 8;
/// Data segments of a request: a queue's descriptors without header and status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The most requests that are taken from the queues and wait for the disk; others wait in their queues.
const WAITING_MAX: usize = 64;
/// Bytes that are copied in one call of `work`, so that the node is not kept here.
const WORK_BYTES: u64 = 1 << 20;
/// Bytes that are asked of the disk at once.
const PIECE_BYTES: u64 = 256 << 10;

const HEADER_BYTES: u64 = 16;
const SEGMENT_BYTES: u64 = 16;
const SERIAL_BYTES: usize = 20;
const CONFIG_BYTES: u32 = 60;
/// The most sectors of one discard or write-zeroes request: 2 GiB.
const RANGE_SECTORS_MAX: u32 = 4 << 20;

const FEATURE_SEGMENTS_MAX: u64 = 1 << 2;
const FEATURE_BLOCK_SIZE: u64 = 1 << 6;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_TOPOLOGY: u64 = 1 << 10;
const FEATURE_QUEUES: u64 = 1 << 12;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const FLAG_UNMAP: u32 = 1 << 0;

/// How a request ended, as its last byte says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// How far a [`Disk`] got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// This many bytes from the start of the range on are done, at least one sector, at most all.
    Done(u64),
    /// Nothing yet. [`crate::platform::Platform::wake_disk`] says when to ask again.
    Wait,
    /// Never.
    Failed,
}

/// What stands behind a machine's disk. Every range lies within the disk, is made of whole sectors and is not empty.
pub trait Disk {
    /// Hands the bytes from `at` on to `take`, in one or several pieces, in order.
    fn read(&mut self, at: u64, length: u64, take: &mut dyn FnMut(&[u8])) -> Progress;

    /// Lets `give` fill the bytes from `at` on, in one or several pieces, in order. What `give` finds in a piece means nothing.
    fn write(&mut self, at: u64, length: u64, give: &mut dyn FnMut(&mut [u8])) -> Progress;

    /// Makes the range read as zeros.
    fn write_zeroes(&mut self, at: u64, length: u64) -> Progress;

    /// The guest no longer needs what the range holds; it may read as anything that is the guest's to see.
    fn discard(&mut self, at: u64, length: u64) -> Progress;
}

/// What the guest is told of its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// Its size in bytes; a last part of a sector is left out.
    pub bytes: u64,
    /// Request queues: one for each vCPU is best. At least one and at most eight are made.
    pub queues: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Read,
    Write,
    Discard,
    WriteZeroes,
}

/// What a request asks of the disk: an operation on a range in bytes.
#[derive(Clone, Copy, Debug)]
struct Transfer {
    operation: Operation,
    at: u64,
    length: u64,
}

/// How a request is answered: its status, and bytes of data written before it.
type Answer = (Status, u64);

/// A request that is under way.
#[derive(Clone, Debug)]
struct Request {
    chain: Chain,
    queue: usize,
    transfer: Transfer,
    done: u64,
}

/// The block device.
#[derive(Clone, Debug)]
pub(in crate::platform) struct Blk {
    sectors: u64,
    queue_sizes: Vec<u16>,
    /// A bit for each queue that may hold requests.
    notified: u16,
    /// The disk has something for waiting requests.
    woken: bool,
    waiting: Vec<Request>,
    spare: Vec<Chain>,
}

impl Blk {
    pub(in crate::platform) fn new(config: DiskConfig) -> Self {
        let queues = config.queues.clamp(1, QUEUES_MAX);
        Self {
            sectors: config.bytes / SECTOR_BYTES,
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            notified: 0,
            woken: false,
            waiting: Vec::new(),
            spare: Vec::new(),
        }
    }

    /// The disk has something for requests that wait.
    pub(in crate::platform) fn wake(&mut self) {
        self.woken = true;
    }

    /// Whether requests are under way.
    pub(in crate::platform) const fn has_requests(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The device's configuration (5.2.4).
    fn config(&self) -> [u8; CONFIG_BYTES as usize] {
        let mut bytes = [0; CONFIG_BYTES as usize];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
        };
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXPONENT]);
        // Least and best size of an access, in sectors.
        put(26, &(BLOCK_SECTORS as u16).to_le_bytes());
        put(28, &BLOCK_SECTORS.to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        // Discard: sectors, segments, alignment. Write-zeroes: sectors, segments, whether they may unmap.
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &BLOCK_SECTORS.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        bytes
    }

    /// Starts on the request in `chain`: it is completed, or among the waiting ones with nothing done.
    fn begin(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        chain: Chain,
        memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        if chain.writable_bytes() == 0 {
            return Err(chain.error(Rule::BufferTooSmall { head: chain.head(), length: 0, needed: 1 }));
        }
        match self.parse(&chain, memory)? {
            Ok(transfer) => {
                self.waiting.push(Request { chain, queue, transfer, done: 0 });
                Ok(())
            }
            Err(answer) => self.complete(queue, queues, chain, answer, memory),
        }
    }

    /// What the request asks of the disk, or its answer where the disk is not needed.
    fn parse(
        &self,
        chain: &Chain,
        memory: &mut dyn GuestMemory,
    ) -> Result<Result<Transfer, Answer>, QueueError> {
        let mut header = [0; HEADER_BYTES as usize];
        if let Some(status) = status_for(chain.read(memory, 0, &mut header))? {
            return Ok(Err((status, 0)));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let given = chain.readable_bytes() - HEADER_BYTES;
        let wanted = chain.writable_bytes() - 1;
        let transfer = match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_READ if given == 0 => self.transfer(Operation::Read, sector, wanted),
            TYPE_WRITE if wanted == 0 => self.transfer(Operation::Write, sector, given),
            TYPE_FLUSH => return Ok(Err((Status::Ok, 0))),
            TYPE_GET_ID => return self.identify(chain, memory).map(Err),
            TYPE_DISCARD if wanted == 0 => self.segment(Operation::Discard, chain, memory, given)?,
            TYPE_WRITE_ZEROES if wanted == 0 => self.segment(Operation::WriteZeroes, chain, memory, given)?,
            TYPE_READ | TYPE_WRITE | TYPE_DISCARD | TYPE_WRITE_ZEROES => Err(Status::IoError),
            _ => Err(Status::Unsupported),
        };
        Ok(transfer.map_err(|status| (status, 0)))
    }

    /// An operation on `length` bytes from `sector` on, if they are whole sectors within the disk.
    fn transfer(&self, operation: Operation, sector: u64, length: u64) -> Result<Transfer, Status> {
        let whole = length > 0 && length.is_multiple_of(SECTOR_BYTES);
        let end = sector.checked_add(length / SECTOR_BYTES);
        if whole && end.is_some_and(|end| end <= self.sectors) {
            Ok(Transfer { operation, at: sector * SECTOR_BYTES, length })
        } else {
            Err(Status::IoError)
        }
    }

    /// The one segment of a discard or write-zeroes request (5.2.6.2).
    fn segment(
        &self,
        operation: Operation,
        chain: &Chain,
        memory: &mut dyn GuestMemory,
        given: u64,
    ) -> Result<Result<Transfer, Status>, QueueError> {
        if given != SEGMENT_BYTES {
            return Ok(Err(Status::IoError));
        }
        let mut segment = [0; SEGMENT_BYTES as usize];
        if let Some(status) = status_for(chain.read(memory, HEADER_BYTES, &mut segment))? {
            return Ok(Err(status));
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = segment;
        let known = if operation == Operation::WriteZeroes { FLAG_UNMAP } else { 0 };
        if u32::from_le_bytes(flags) & !known != 0 {
            return Ok(Err(Status::Unsupported));
        }
        let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
        if sectors > RANGE_SECTORS_MAX {
            return Ok(Err(Status::IoError));
        }
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        Ok(self.transfer(operation, sector, u64::from(sectors) * SECTOR_BYTES))
    }

    /// Writes the disk's serial number, which is the same for every machine.
    fn identify(&self, chain: &Chain, memory: &mut dyn GuestMemory) -> Result<Answer, QueueError> {
        let serial: [u8; SERIAL_BYTES] = *b"nestling\0\0\0\0\0\0\0\0\0\0\0\0";
        let room = (chain.writable_bytes() - 1).min(SERIAL_BYTES as u64);
        let written = chain.write(memory, 0, serial.get(..room as usize).unwrap_or_default());
        Ok(match status_for(written)? {
            None => (Status::Ok, room),
            Some(status) => (status, 0),
        })
    }

    /// Goes on with a waiting request. Returns its status once it has one, and the bytes that were copied.
    fn go_on(
        request: &mut Request,
        memory: &mut dyn GuestMemory,
        disk: &mut dyn Disk,
        budget: u64,
    ) -> Result<(Option<Status>, u64), QueueError> {
        let Request { chain, transfer, done, .. } = request;
        let mut copied = 0;
        while *done < transfer.length {
            if copied >= budget {
                return Ok((None, copied));
            }
            let at = transfer.at + *done;
            let left = transfer.length - *done;
            let mut failure = None;
            let progress = match transfer.operation {
                Operation::Read => {
                    let mut offset = *done;
                    disk.read(at, left.min(PIECE_BYTES), &mut |bytes| {
                        if failure.is_none() {
                            failure = chain.write(memory, offset, bytes).err();
                        }
                        offset += bytes.len() as u64;
                    })
                }
                Operation::Write => {
                    let mut offset = HEADER_BYTES + *done;
                    disk.write(at, left.min(PIECE_BYTES), &mut |place| {
                        if failure.is_none() {
                            failure = chain.read(memory, offset, place).err();
                        }
                        offset += place.len() as u64;
                    })
                }
                Operation::Discard => disk.discard(at, left),
                Operation::WriteZeroes => disk.write_zeroes(at, left),
            };
            if let Some(error) = failure
                && let Some(status) = status_for(Err(error))?
            {
                return Ok((Some(status), copied));
            }
            match progress {
                // A disk that makes no progress would be asked for ever.
                Progress::Done(0) | Progress::Failed => return Ok((Some(Status::IoError), copied)),
                Progress::Done(bytes) => {
                    let bytes = bytes.min(left);
                    *done += bytes;
                    copied += match transfer.operation {
                        Operation::Read | Operation::Write => bytes,
                        // Nothing is copied, but tables are gone through.
                        Operation::Discard | Operation::WriteZeroes => bytes / SECTOR_BYTES,
                    };
                }
                Progress::Wait => return Ok((None, copied)),
            }
        }
        Ok((Some(Status::Ok), copied))
    }

    /// Writes a request's status and gives its chain back.
    fn complete(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        chain: Chain,
        (status, written): Answer,
        memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        chain.write(memory, chain.writable_bytes() - 1, &[status as u8])?;
        // The used length covers what was written from the start of the chain without a gap.
        let all = written + 1 == chain.writable_bytes();
        let used = if all { written + 1 } else { written };
        if let Some(queue) = queues.get_mut(queue) {
            queue.push_used(memory, chain.head(), used as u32)?;
        }
        self.spare.push(chain);
        Ok(())
    }

    /// Goes on with the waiting request at `index`. Returns whether it still waits.
    fn step(
        &mut self,
        index: usize,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        disk: &mut dyn Disk,
        budget: &mut u64,
    ) -> Result<bool, QueueError> {
        let Some(request) = self.waiting.get_mut(index) else { return Ok(false) };
        let (status, copied) = Self::go_on(request, memory, disk, *budget)?;
        *budget = budget.saturating_sub(copied);
        let Some(status) = status else {
            // What waits for nothing but its turn is not woken by the disk.
            self.woken |= *budget == 0;
            return Ok(true);
        };
        let request = self.waiting.remove(index);
        let read = request.transfer.operation == Operation::Read && status == Status::Ok;
        let written = if read { request.done } else { 0 };
        self.complete(request.queue, queues, request.chain, (status, written), memory)?;
        Ok(false)
    }

    /// Goes on with what waits, as far as the disk and `budget` let it.
    fn go_on_with_all(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        disk: &mut dyn Disk,
        budget: &mut u64,
    ) -> Result<(), QueueError> {
        let mut index = 0;
        while index < self.waiting.len() {
            if *budget == 0 {
                self.woken = true;
                break;
            }
            index += usize::from(self.step(index, queues, memory, disk, budget)?);
        }
        Ok(())
    }
}

/// What a request is answered when its buffers could not be reached: an error, unless it is the node that has no memory left.
fn status_for(result: Result<(), QueueError>) -> Result<Option<Status>, QueueError> {
    match result {
        Ok(()) => Ok(None),
        Err(error) if matches!(error.rule, Rule::Memory(MemoryError::OutOfFrames)) => Err(error),
        Err(_) => Ok(Some(Status::IoError)),
    }
}

impl VirtioDevice for Blk {
    const NAME: &'static str = "virtio-blk";
    const ID: u16 = 2;
    // Mass storage controller, other.
    const CLASS: [u8; 3] = [0x01, 0x80, 0x00];
    const CONFIG_BYTES: u32 = CONFIG_BYTES;

    fn vectors(&self) -> u16 {
        1 + self.queue_sizes.len() as u16
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let several = if self.queue_sizes.len() > 1 { FEATURE_QUEUES } else { 0 };
        FEATURE_SEGMENTS_MAX
            | FEATURE_BLOCK_SIZE
            | FEATURE_FLUSH
            | FEATURE_TOPOLOGY
            | FEATURE_DISCARD
            | FEATURE_WRITE_ZEROES
            | several
    }

    fn config_byte(&self, offset: u32) -> u8 {
        self.config().get(offset as usize).copied().unwrap_or(0)
    }

    fn start(
        &mut self,
        _features: u64,
        queues: &mut [Queue],
        _memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        (0..queues.len() as u16).for_each(|queue| self.notify(queue));
        Ok(())
    }

    fn reset(&mut self) {
        self.notified = 0;
        self.woken = false;
        self.waiting.clear();
    }

    fn notify(&mut self, queue: u16) {
        self.notified |= 1_u16.checked_shl(queue.into()).unwrap_or(0);
    }

    fn has_work(&self) -> bool {
        let may_take = self.notified != 0 && self.waiting.len() < WAITING_MAX;
        may_take || self.woken && !self.waiting.is_empty()
    }

    fn work(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        host: &mut Host<'_>,
    ) -> Result<(), QueueError> {
        let mut budget = WORK_BYTES;
        if core::mem::take(&mut self.woken) {
            self.go_on_with_all(queues, memory, host.disk, &mut budget)?;
        }
        for index in 0..queues.len() {
            let bit = 1_u16.checked_shl(index as u32).unwrap_or(0);
            if self.notified & bit == 0 {
                continue;
            }
            // A guest that keeps filling the queue must not keep the node here.
            for _ in 0..QUEUE_SIZE {
                if budget == 0 || self.waiting.len() >= WAITING_MAX {
                    return Ok(());
                }
                let mut chain = self.spare.pop().unwrap_or_default();
                let Some(queue) = queues.get_mut(index) else { break };
                if !queue.pop(memory, &mut chain)? {
                    self.spare.push(chain);
                    queue.set_notifications(memory, true)?;
                    if queue.has_available(memory)? {
                        continue;
                    }
                    self.notified &= !bit;
                    break;
                }
                let last = self.waiting.len();
                self.begin(index, queues, chain, memory)?;
                self.step(last, queues, memory, host.disk, &mut budget)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
