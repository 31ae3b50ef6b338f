//! The disk a machine sees: a base that many machines share, free space behind it, and the machine's own changes over both.
//!
//! Nothing waits here. What is not at hand is asked of the cache, and memory that is missing is asked of the kernel by
//! [`Volume::wants_slab`]; the machine's device then tries again.

mod spill;

use crate::BLOCK_BYTES;
use crate::backing::Backing;
use crate::cache::Lookup;
use crate::overlay::{BLOCKS_PER_TABLE, FrozenOverlay, Overlay, Place, Shortage, Slot};
use alloc::format;
use alloc::string::String;
use spill::Spill;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// The most blocks whose entries are changed by one call of [`Volume::discard`] or [`Volume::write_zeroes`].
const CLEAR_BLOCKS_MAX: u64 = 64 << 8;

/// What lies under a machine's changes. Behind its end are zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Memory of the node.
    Memory(&'static [u8]),
    /// A range of the node's disk.
    Disk {
        /// Where it starts, in bytes, a multiple of the sector.
        at: u64,
        /// Its length in bytes.
        bytes: u64,
    },
}

impl Base {
    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        match self {
            Self::Memory(memory) => memory.len() as u64,
            Self::Disk { bytes, .. } => *bytes,
        }
    }
}

/// How far an access got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes from the start on are done.
    Done(u64),
    /// Not yet: it waits for the disk or for memory.
    Wait,
    /// Never. [`Volume::problem`] or [`Volume::fault`] says why.
    Failed,
}

/// A machine's disk.
#[derive(Debug)]
pub struct Volume<S> {
    base: Base,
    bytes: u64,
    overlay: Overlay<S>,
    wants_slab: bool,
    out_of_memory: bool,
    spill: Spill,
    /// A write has failed for want of room.
    refused: bool,
    fault: Option<String>,
}

/// The disk of a machine that was frozen.
#[derive(Debug)]
pub struct FrozenVolume<S> {
    base: Base,
    bytes: u64,
    overlay: FrozenOverlay<S>,
}

impl<S> FrozenVolume<S> {
    /// A clone's disk. `id` tells it from others on the scratch partition.
    #[must_use]
    pub fn share(&self, id: u64) -> Volume<S> {
        Volume {
            base: self.base,
            bytes: self.bytes,
            overlay: self.overlay.share(),
            wants_slab: false,
            out_of_memory: false,
            spill: Spill::new(id),
            refused: false,
            fault: None,
        }
    }

    /// Slabs that it does not share with a template of its own.
    #[must_use]
    pub const fn own_slabs(&self) -> usize {
        self.overlay.own_slabs()
    }

    /// The slabs that nobody shares any more.
    pub fn into_slabs(self) -> impl Iterator<Item = S> {
        self.overlay.into_slabs()
    }
}

/// Why a block's content cannot be had now.
enum Obstacle {
    Wait,
    Failed,
}

impl From<Obstacle> for Progress {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Wait => Self::Wait,
            Obstacle::Failed => Self::Failed,
        }
    }
}

impl<S: AsRef<[u8]> + AsMut<[u8]>> Volume<S> {
    /// A disk of `bytes` over `base`, of which at most `overlay_bytes` of memory hold changes. `id` tells it from others on the scratch partition.
    #[must_use]
    pub fn new(id: u64, base: Base, bytes: u64, overlay_bytes: u64) -> Self {
        let limit = u32::try_from(overlay_bytes / BLOCK).unwrap_or(u32::MAX);
        Self {
            base,
            bytes,
            overlay: Overlay::new(bytes.div_ceil(BLOCK), limit),
            wants_slab: false,
            out_of_memory: false,
            spill: Spill::new(id),
            refused: false,
            fault: None,
        }
    }

    /// Why it cannot be frozen now, if it cannot.
    #[must_use]
    pub fn unrest(&self) -> Option<&'static str> {
        if self.fault.is_some() || self.refused {
            Some("something went wrong with the disk")
        } else if self.wants_slab || !self.spill.is_unused() {
            Some("changes of the disk are on the scratch partition, or wait for memory")
        } else {
            None
        }
    }

    /// Ends all changes: what there are is for clones to read. [`Self::unrest`] is `None`.
    #[must_use]
    pub fn freeze(self) -> FrozenVolume<S> {
        FrozenVolume { base: self.base, bytes: self.bytes, overlay: self.overlay.freeze() }
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of memory that hold changes, the map of them included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.overlay.used()) * BLOCK
    }

    /// Slabs of memory it has.
    #[must_use]
    pub fn slabs(&self) -> usize {
        self.overlay.slabs()
    }

    /// Whether something waits for another slab.
    #[must_use]
    pub const fn wants_slab(&self) -> bool {
        self.wants_slab
    }

    /// Gives it a slab, or tells it that the node has none: then what needs one fails.
    pub fn give_slab(&mut self, slab: Option<S>) {
        self.wants_slab = false;
        match slab {
            Some(slab) => self.overlay.add_slab(slab),
            None => self.out_of_memory = true,
        }
    }

    /// Ends it: its places on the scratch partition are free again. Returns all memory it had.
    pub fn into_slabs(mut self, backing: &mut Backing) -> impl Iterator<Item = S> + use<S> {
        self.leave_scratch(backing);
        self.overlay.into_slabs()
    }

    /// Why the node could not read the base, if it could not: the machine has no disk any more.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// What went wrong for want of memory, for people.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let written = mib(self.used_bytes() + self.spill.bytes());
        if !self.refused {
            return None;
        }
        Some(if self.spill.is_full() {
            format!(
                "overlay full: {written} MiB written; memory for it and the node's scratch partition are used up"
            )
        } else if self.out_of_memory {
            format!("overlay full: {written} MiB written; the node has no memory left for more")
        } else {
            let limit = mib(u64::from(self.overlay.limit()) * BLOCK);
            format!(
                "overlay full: {written} MiB written; the node keeps {limit} MiB of changes for this machine, ask for more in \
                 machine_config.disk_size_mib"
            )
        })
    }

    fn short(&mut self, shortage: Shortage, backing: &Backing) -> Obstacle {
        if shortage == Shortage::Slab && !self.out_of_memory {
            self.wants_slab = true;
            return Obstacle::Wait;
        }
        if backing.scratch.is_some() && !self.spill.is_full() {
            self.spill.want();
            return Obstacle::Wait;
        }
        self.refused = true;
        Obstacle::Failed
    }

    /// Hands the bytes from `at` on to `take`: all of `length`, or as many as are at hand. Behind the disk's end are zeros.
    pub fn read(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        take: &mut dyn FnMut(&[u8]),
    ) -> Progress {
        in_parts(at, length, |at, length| self.read_part(backing, at, length, take))
    }

    fn read_part(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<u64, Obstacle> {
        let (block, offset) = (at / BLOCK, at % BLOCK);
        match self.overlay.place(block) {
            Place::Memory(slot) | Place::Shared(slot) => {
                let blocks = self.run(block, slot, (offset + length).div_ceil(BLOCK));
                let bytes = (blocks * BLOCK - offset).min(length);
                let pages = self.overlay.pages(slot, blocks as usize);
                take(pages.get(offset as usize..(offset + bytes) as usize).unwrap_or_default());
                Ok(bytes)
            }
            Place::Zero => {
                let bytes = (BLOCK - offset).min(length);
                take_zeros(bytes, take);
                Ok(bytes)
            }
            Place::Base => {
                let blocks = self.run_of_base(block, (offset + length).div_ceil(BLOCK));
                self.read_base(backing, at, (blocks * BLOCK - offset).min(length), take)
            }
            Place::Scratch(number) => {
                let blocks = self.run_on_scratch(block, number, (offset + length).div_ceil(BLOCK));
                let at = backing.scratch.as_ref().map_or(u64::MAX, |scratch| scratch.position(number));
                let length = (blocks * BLOCK - offset).min(length);
                self.read_disk(backing, at.saturating_add(offset), length, take)
            }
        }
    }

    /// How many blocks from `block` on, at most `most`, lie in slots behind each other from `slot` on.
    fn run(&self, block: u64, slot: Slot, most: u64) -> u64 {
        let (mut blocks, mut last) = (1, slot);
        while blocks < most
            && let Some(next) = last.next()
            && matches!(self.overlay.place(block.saturating_add(blocks)), Place::Memory(slot) | Place::Shared(slot) if slot == next)
        {
            (blocks, last) = (blocks + 1, next);
        }
        blocks
    }

    /// How many blocks from `block` on, at most `most`, lie behind each other on the scratch partition from block `number` of it on.
    fn run_on_scratch(&self, block: u64, number: u32, most: u64) -> u64 {
        let mut blocks = 1;
        while blocks < most
            && let Some(next) = number.checked_add(blocks as u32)
            && self.overlay.place(block.saturating_add(blocks)) == Place::Scratch(next)
        {
            blocks += 1;
        }
        blocks
    }

    /// How many blocks from `block` on, at most `most`, were not changed.
    fn run_of_base(&self, block: u64, most: u64) -> u64 {
        let mut blocks = 1;
        while blocks < most && self.overlay.place(block.saturating_add(blocks)) == Place::Base {
            blocks += 1;
        }
        blocks
    }

    fn read_base(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<u64, Obstacle> {
        let inside = self.base.bytes().saturating_sub(at).min(length);
        if inside == 0 {
            take_zeros(length, take);
            return Ok(length);
        }
        match self.base {
            Base::Memory(memory) => {
                let start = usize::try_from(at).unwrap_or(usize::MAX);
                let part = memory.get(start..start.saturating_add(inside as usize)).unwrap_or_default();
                take(part);
                Ok(inside)
            }
            Base::Disk { at: start, .. } => self.read_disk(backing, start.saturating_add(at), inside, take),
        }
    }

    fn read_disk(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<u64, Obstacle> {
        match backing.cache.read(at, length) {
            Lookup::Hit(bytes) => {
                take(bytes);
                Ok(bytes.len() as u64)
            }
            Lookup::Miss => Err(Obstacle::Wait),
            Lookup::Failed(reason) => {
                self.fault.get_or_insert(reason);
                Err(Obstacle::Failed)
            }
        }
    }

    /// Lets `give` fill the bytes from `at` on: all of `length`, or as many as there is room for now.
    pub fn write(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        give: &mut dyn FnMut(&mut [u8]),
    ) -> Progress {
        in_parts(at, length, |at, length| self.write_part(backing, at, length, give))
    }

    fn write_part(
        &mut self,
        backing: &mut Backing,
        at: u64,
        length: u64,
        give: &mut dyn FnMut(&mut [u8]),
    ) -> Result<u64, Obstacle> {
        let (block, offset) = (at / BLOCK, at % BLOCK);
        if offset == 0 && length >= BLOCK {
            let slot = self.slot_to_overwrite(backing, block)?;
            let (mut blocks, mut last) = (1, slot);
            while blocks < length / BLOCK
                && let Some(next) = last.next()
                && self.overwrites_in(backing, block.saturating_add(blocks), next)
            {
                (blocks, last) = (blocks + 1, next);
            }
            give(self.overlay.pages_mut(slot, blocks as usize));
            return Ok(blocks * BLOCK);
        }
        let bytes = (BLOCK - offset).min(length);
        let slot = self.slot_to_change(backing, block)?;
        give(
            self.overlay
                .pages_mut(slot, 1)
                .get_mut(offset as usize..(offset + bytes) as usize)
                .unwrap_or_default(),
        );
        Ok(bytes)
    }

    /// A slot for the whole of a block, whose old content is lost.
    fn slot_to_overwrite(&mut self, backing: &mut Backing, block: u64) -> Result<Slot, Obstacle> {
        if let Place::Memory(slot) = self.overlay.place(block) {
            self.spill.changed(block);
            return Ok(slot);
        }
        let slot = self.overlay.prepare(block).and_then(|()| self.overlay.allocate());
        let slot = slot.map_err(|shortage| self.short(shortage, backing))?;
        self.set(backing, block, Place::Memory(slot));
        Ok(slot)
    }

    /// Changes where a block's content is.
    fn set(&mut self, backing: &mut Backing, block: u64, place: Place) {
        self.spill.changed(block);
        if let Place::Scratch(number) = self.overlay.place(block) {
            self.spill.left(1);
            if let Some(scratch) = &mut backing.scratch {
                scratch.release(number);
            }
        }
        self.overlay.set(block, place);
    }

    /// Whether a block is, or can be put, in this very slot, so that one copy fills several blocks.
    fn overwrites_in(&mut self, backing: &mut Backing, block: u64, slot: Slot) -> bool {
        match self.overlay.place(block) {
            Place::Memory(place) => {
                self.spill.changed(block);
                place == slot
            }
            _ if !self.overlay.is_prepared(block) => false,
            _ => match self.overlay.allocate() {
                Ok(free) if free == slot => {
                    self.set(backing, block, Place::Memory(slot));
                    true
                }
                Ok(free) => {
                    self.overlay.free(free);
                    false
                }
                Err(_) => false,
            },
        }
    }

    /// A slot with a block's content.
    fn slot_to_change(&mut self, backing: &mut Backing, block: u64) -> Result<Slot, Obstacle> {
        let place = self.overlay.place(block);
        if let Place::Memory(slot) = place {
            self.spill.changed(block);
            return Ok(slot);
        }
        let mut content = [0; BLOCK_BYTES];
        if place != Place::Zero {
            self.copy_block(backing, block, &mut content)?;
        }
        let slot = self.slot_to_overwrite(backing, block)?;
        self.overlay.pages_mut(slot, 1).copy_from_slice(&content);
        Ok(slot)
    }

    fn copy_block(
        &mut self,
        backing: &mut Backing,
        block: u64,
        content: &mut [u8; BLOCK_BYTES],
    ) -> Result<(), Obstacle> {
        let mut done = 0;
        while done < BLOCK_BYTES {
            let at = block.saturating_mul(BLOCK).saturating_add(done as u64);
            let mut copied = 0;
            self.read_part(backing, at, (BLOCK_BYTES - done) as u64, &mut |bytes| {
                if let Some(place) = content.get_mut(done + copied..done + copied + bytes.len()) {
                    place.copy_from_slice(bytes);
                }
                copied += bytes.len();
            })?;
            done += copied;
        }
        Ok(())
    }

    /// The guest no longer needs the range. Whole blocks of it read as the base again.
    pub fn discard(&mut self, backing: &mut Backing, at: u64, length: u64) -> Progress {
        let first = at.div_ceil(BLOCK);
        let last = at.saturating_add(length) / BLOCK;
        let end = last.min(first.saturating_add(CLEAR_BLOCKS_MAX));
        let mut block = first;
        while block < end {
            // What is the template's takes none of this machine's memory, so nothing is won by forgetting it.
            if self.overlay.is_prepared(block) {
                self.set(backing, block, Place::Base);
                block += 1;
            } else {
                block = (block / BLOCKS_PER_TABLE + 1) * BLOCKS_PER_TABLE;
            }
        }
        // The rest of a last block is left as it is, and done with.
        Progress::Done(if end >= last { length } else { end.saturating_mul(BLOCK) - at })
    }

    /// Makes the range read as zeros.
    pub fn write_zeroes(&mut self, backing: &mut Backing, at: u64, length: u64) -> Progress {
        let mut done = 0;
        let mut blocks = 0;
        while done < length && blocks < CLEAR_BLOCKS_MAX {
            match self.zero_part(backing, at.saturating_add(done), length - done) {
                Ok(bytes) => done += bytes,
                Err(_) if done > 0 => break,
                Err(obstacle) => return obstacle.into(),
            }
            blocks += 1;
        }
        Progress::Done(done)
    }

    fn zero_part(&mut self, backing: &mut Backing, at: u64, length: u64) -> Result<u64, Obstacle> {
        let (block, offset) = (at / BLOCK, at % BLOCK);
        let behind_base = block.saturating_mul(BLOCK) >= self.base.bytes();
        if behind_base && !self.overlay.has_table(block) {
            // Zeros already, up to where another table begins.
            let next = (block / BLOCKS_PER_TABLE + 1) * BLOCKS_PER_TABLE;
            return Ok((next.saturating_mul(BLOCK) - at).min(length));
        }
        if offset == 0 && length >= BLOCK {
            self.overlay.prepare(block).map_err(|shortage| self.short(shortage, backing))?;
            self.set(backing, block, if behind_base { Place::Base } else { Place::Zero });
            return Ok(BLOCK);
        }
        let bytes = (BLOCK - offset).min(length);
        let slot = self.slot_to_change(backing, block)?;
        let page = self.overlay.pages_mut(slot, 1);
        page.get_mut(offset as usize..(offset + bytes) as usize).unwrap_or_default().fill(0);
        Ok(bytes)
    }
}

/// Goes through a range by as much as `part` does of the rest each time, until all is done or something is in the way.
fn in_parts(at: u64, length: u64, mut part: impl FnMut(u64, u64) -> Result<u64, Obstacle>) -> Progress {
    let mut done = 0;
    while done < length {
        match part(at.saturating_add(done), length - done) {
            Ok(bytes) => done += bytes,
            Err(_) if done > 0 => break,
            Err(obstacle) => return obstacle.into(),
        }
    }
    Progress::Done(done)
}

fn take_zeros(length: u64, take: &mut dyn FnMut(&[u8])) {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let mut left = length;
    while left > 0 {
        let part = left.min(BLOCK);
        take(ZEROS.get(..part as usize).unwrap_or_default());
        left -= part;
    }
}

#[cfg(test)]
mod tests;
