//! What the node needs of a disk, and the search for one.

use alloc::boxed::Box;
use alloc::string::String;

use super::pci::Bus;
use super::virtio_blk::VirtioBlk;

/// Memory that a disk reads into or writes from. While an access is under way it is the driver's.
pub type Buffer = &'static mut [u8];

/// How an access ended.
#[derive(Debug)]
pub struct Completion {
    /// As it was given with the access.
    pub tag: usize,
    /// The access's buffer; `None` if the device may still reach it.
    pub buffer: Option<Buffer>,
    /// Why it failed, if it did.
    pub outcome: Result<(), String>,
}

/// A disk. No call waits for the device. Positions and lengths are in bytes, multiples of 512.
pub trait Disk {
    /// The driver's name for people.
    fn driver(&self) -> &'static str;

    /// Its size.
    fn bytes(&self) -> u64;

    /// Starts to read the first `length` bytes of `buffer`.
    ///
    /// # Errors
    /// Gives the buffer back when too many accesses are under way.
    fn read(&mut self, at: u64, length: usize, buffer: Buffer, tag: usize) -> Result<(), Buffer>;

    /// Whether it takes no writes.
    fn is_read_only(&self) -> bool;

    /// Starts to write the first `length` bytes of `buffer`.
    ///
    /// # Errors
    /// Gives the buffer back when too many accesses are under way.
    fn write(&mut self, at: u64, length: usize, buffer: Buffer, tag: usize) -> Result<(), Buffer>;

    /// The next access that has ended, or has waited for too long at `now` (nanoseconds since boot).
    fn completed(&mut self, now: u64) -> Option<Completion>;

    /// When the oldest access under way has waited for too long, in nanoseconds since boot.
    fn deadline(&self) -> Option<u64>;

    /// Whether the disk has raised an interrupt since the last call, or raises none and has to be asked.
    fn take_interrupt(&mut self) -> bool;

    /// Whether the disk raises interrupts; otherwise it has to be polled.
    fn has_interrupt(&self) -> bool;
}

/// The first usable disk. A node may have none.
///
/// # Errors
/// Why the only disks there are cannot be used.
pub fn find(bus: Option<&Bus>) -> Result<Option<Box<dyn Disk + Send>>, String> {
    let Some(Bus { space, functions }) = bus else { return Ok(None) };
    let mut failure = None;
    for function in functions.iter().filter(|function| VirtioBlk::drives(function)) {
        match VirtioBlk::new(*space, function) {
            Ok(disk) => return Ok(Some(Box::new(disk))),
            Err(error) => failure = Some(alloc::format!("virtio-blk {function}: {error}")),
        }
    }
    failure.map_or(Ok(None), Err)
}
