//! Bytes that can be read at any place: a module in memory, a disk, a partition of one.

use alloc::format;
use alloc::string::String;

/// Something with a length that is read by position.
pub trait Source {
    /// Its length.
    fn bytes(&self) -> u64;

    /// Fills `into` from position `at` on.
    ///
    /// # Errors
    /// Why not, for people: the range does not lie within, or the device failed.
    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String>;
}

impl Source for &[u8] {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String> {
        let start = usize::try_from(at).ok();
        let end = start.and_then(|start| start.checked_add(into.len()));
        match start.zip(end).and_then(|(start, end)| self.get(start..end)) {
            Some(from) => {
                into.copy_from_slice(from);
                Ok(())
            }
            None => Err(outside(at, into.len(), self.len() as u64)),
        }
    }
}

/// A range of another source.
pub struct Part<'a, S> {
    /// The whole.
    pub whole: &'a mut S,
    /// Where the part starts in it.
    pub at: u64,
    /// How long the part is.
    pub bytes: u64,
}

impl<S: Source> Source for Part<'_, S> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String> {
        let inside = at.checked_add(into.len() as u64).is_some_and(|end| end <= self.bytes);
        match self.at.checked_add(at) {
            Some(at) if inside => self.whole.read(at, into),
            _ => Err(outside(at, into.len(), self.bytes)),
        }
    }
}

fn outside(at: u64, length: usize, bytes: u64) -> String {
    format!("{length} bytes at byte {at} do not lie within {bytes} bytes")
}
