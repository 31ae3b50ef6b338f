//! A machine's disk as its block device reaches it.

#![forbid(unsafe_code)]

use crate::memory::frames::PrivateFrame;
use nestling_machine::platform::{Disk, Progress};
use nestling_storage::backing::Backing;
use nestling_storage::volume::{self, Volume};

/// A volume together with what it shares of the node's disk, while the device works.
pub struct MachineDisk<'a> {
    /// The machine's volume; a machine without one has no block device.
    pub volume: Option<&'a mut Volume<PrivateFrame>>,
    /// The cache of the node's disk and the scratch partition.
    pub backing: &'a mut Backing,
}

impl MachineDisk<'_> {
    fn with(
        &mut self,
        access: impl FnOnce(&mut Volume<PrivateFrame>, &mut Backing) -> volume::Progress,
    ) -> Progress {
        match self.volume.as_mut().map(|volume| access(volume, self.backing)) {
            Some(volume::Progress::Done(bytes)) => Progress::Done(bytes),
            Some(volume::Progress::Wait) => Progress::Wait,
            Some(volume::Progress::Failed) | None => Progress::Failed,
        }
    }
}

impl Disk for MachineDisk<'_> {
    fn read(&mut self, at: u64, length: u64, take: &mut dyn FnMut(&[u8])) -> Progress {
        self.with(|volume, backing| volume.read(backing, at, length, take))
    }

    fn write(&mut self, at: u64, length: u64, give: &mut dyn FnMut(&mut [u8])) -> Progress {
        self.with(|volume, backing| volume.write(backing, at, length, give))
    }

    fn write_zeroes(&mut self, at: u64, length: u64) -> Progress {
        self.with(|volume, backing| volume.write_zeroes(backing, at, length))
    }

    fn discard(&mut self, at: u64, length: u64) -> Progress {
        self.with(|volume, backing| volume.discard(backing, at, length))
    }
}
