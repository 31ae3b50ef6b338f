//! A machine's PCI configuration space as memory that it can read: most of what Linux does to it is to read the same capabilities again
//! and again, and a read from memory is no exit. Writes still are, and show in the memory afterwards.
//!
//! PCI Express Base specification, 7.2.2 (enhanced configuration access mechanism).

use super::nested::NestedEntry;
use super::pages::Pages;
use crate::memory::frames::{FramePool, SMALL_FRAME, SmallFrame};
use alloc::vec::Vec;
use core::ptr;
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::{ECAM_BASE, ECAM_SIZE};
use nestling_machine::platform::{ConfigPage, Platform};

/// A page that reads as no function does.
#[repr(align(4096))]
struct Ones([u8; SMALL_FRAME as usize]);

static ONES: Ones = Ones([0xFF; SMALL_FRAME as usize]);

/// From one device's function 0 to the next one's. Other functions are looked for only where function 0 says that there are any.
const DEVICE_STEP: u64 = 8 * SMALL_FRAME;

/// The pages of functions that exist, by their offset in ECAM.
pub struct ConfigSpace {
    pages: Vec<Page>,
}

/// A function's page.
struct Page {
    /// Offset in ECAM.
    offset: u64,
    /// The page; a clone that has not changed it reads its template's.
    frame: Option<SmallFrame>,
    /// The guest reads it; otherwise its reads are emulated, for good: no driver that sets the window to the BARs up gives it up again.
    is_mapped: bool,
}

/// There was no frame for a page or a table.
#[derive(Debug)]
pub struct OutOfFrames;

const fn guest_address(offset: u64) -> GuestPhysAddr {
    GuestPhysAddr(ECAM_BASE + offset)
}

/// Whether an address lies in configuration space.
pub fn contains(at: GuestPhysAddr) -> bool {
    at.0.checked_sub(ECAM_BASE).is_some_and(|offset| offset < ECAM_SIZE)
}

impl ConfigSpace {
    /// Nothing is mapped yet.
    pub const fn new() -> Self {
        Self { pages: Vec::new() }
    }

    /// The pages of a clone, whose template's these are and which inherits their mappings.
    pub fn share(&self) -> Self {
        let inherit = |page: &Page| Page { offset: page.offset, frame: None, is_mapped: page.is_mapped };
        Self { pages: self.pages.iter().map(inherit).collect() }
    }

    /// Maps what `platform` has. False when the pool is empty; what was mapped stays until [`Self::free`].
    pub fn map<E: NestedEntry>(&mut self, platform: &Platform, pages: &Pages<E>, pool: &FramePool) -> bool {
        (0..ECAM_SIZE).step_by(DEVICE_STEP as usize).all(|offset| match platform.config_page(offset) {
            ConfigPage::HasEffects => true,
            ConfigPage::Nothing => {
                pages.map_device(guest_address(offset), &raw const ONES.0 as u64, pool).is_some()
            }
            ConfigPage::Bytes(bytes) => {
                let Some(frame) = pool.small() else { return false };
                show(&frame, bytes);
                let mapped = pages.map_device(guest_address(offset), frame.address(), pool);
                self.pages.push(Page { offset, frame: Some(frame), is_mapped: true });
                mapped.is_some()
            }
        })
    }

    /// Shows what a write has changed. Reads that do more than read are emulated: true when a page moved or is mapped no more, so that cached
    /// translations have to be dropped.
    ///
    /// # Errors
    /// [`OutOfFrames`].
    pub fn update<E: NestedEntry>(
        &mut self,
        platform: &Platform,
        pages: &Pages<E>,
        pool: &FramePool,
    ) -> Result<bool, OutOfFrames> {
        let mut has_moved = false;
        for page in self.pages.iter_mut().filter(|page| page.is_mapped) {
            let at = guest_address(page.offset);
            match (platform.config_page(page.offset), &page.frame) {
                (ConfigPage::Bytes(bytes), Some(frame)) => show(frame, bytes),
                (ConfigPage::Bytes(bytes), None) => {
                    let frame = pool.small().ok_or(OutOfFrames)?;
                    show(&frame, bytes);
                    let mapped = pages.map_device(at, frame.address(), pool);
                    page.frame = Some(frame);
                    mapped.ok_or(OutOfFrames)?;
                    has_moved = true;
                }
                _ => {
                    pages.unmap_device(at, pool).ok_or(OutOfFrames)?;
                    page.is_mapped = false;
                    has_moved = true;
                }
            }
        }
        Ok(has_moved)
    }

    /// Gives the frames back. The vCPUs that read them are gone.
    pub fn free(self, pool: &FramePool) {
        for frame in self.pages.into_iter().filter_map(|page| page.frame) {
            pool.free_small(frame);
        }
    }
}

/// Copies a function's registers into its page.
fn show(frame: &SmallFrame, bytes: &[u8]) {
    let length = bytes.len().min(SMALL_FRAME as usize);
    // SAFETY: the frame is the machine's own, identity-mapped and a page long; `bytes` is L1's. Another of the machine's vCPUs
    // may read it meanwhile, and finds the old or the new of each register, as it may on a bus.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), frame.address() as *mut u8, length) };
}
