//! What a machine has changed on its disk: a map from blocks to pages of memory, or to places on the scratch partition.
//!
//! Memory comes in slabs of 2 MiB, each of 512 slots of 4 KiB. A slot holds a block's content or a table of the map, so that the map
//! costs nothing but what is counted, however the guest scatters its writes. Slots that become free are used again by this machine; slabs
//! go back when it ends.

use crate::BLOCK_BYTES;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

/// Bytes of a slab.
pub const SLAB_BYTES: usize = 2 << 20;
/// Slots of a slab.
pub const SLOTS_PER_SLAB: u32 = (SLAB_BYTES / BLOCK_BYTES) as u32;

const ENTRY_BYTES: usize = 4;
/// Blocks that one table maps: 4 MiB of disk.
pub const BLOCKS_PER_TABLE: u64 = (BLOCK_BYTES / ENTRY_BYTES) as u64;

const ENTRY_BASE: u32 = 0;
const ENTRY_ZERO: u32 = 1;
/// Entries from here on are slots.
const ENTRY_FIRST_SLOT: u32 = 2;
/// Set in entries that are places on the scratch partition.
const ENTRY_SCRATCH: u32 = 1 << 31;

/// Where the content of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The machine has not changed it.
    Base,
    /// It is all zeros.
    Zero,
    /// In a slot.
    Memory(Slot),
    /// On the scratch partition: the number of a block there.
    Scratch(u32),
}

/// 4 KiB of an overlay's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u32);

impl Slot {
    /// The slot behind this one, if both are in one slab.
    pub(crate) fn next(self) -> Option<Self> {
        let next = self.0 + 1;
        (!next.is_multiple_of(SLOTS_PER_SLAB)).then_some(Self(next))
    }
}

/// Why there is no free slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// Another slab has to be added first.
    Slab,
    /// The overlay has as many slots as it may have.
    Limit,
}

/// A machine's changes. `S` is a slab: at least [`SLAB_BYTES`] of memory.
#[derive(Debug)]
pub struct Overlay<S> {
    /// For each table's blocks: zero, or the table's slot and one.
    tables: Vec<u32>,
    slabs: Vec<S>,
    /// The first free slot that was used before and one; each holds the next one's number and one. Zero ends the list.
    free: u32,
    /// Slots that were ever used.
    touched: u32,
    used: u32,
    limit: u32,
}

impl<S: AsRef<[u8]> + AsMut<[u8]>> Overlay<S> {
    /// No changes to a disk of `blocks`; at most `limit` slots, tables included.
    #[must_use]
    pub fn new(blocks: u64, limit: u32) -> Self {
        let tables = usize::try_from(blocks.div_ceil(BLOCKS_PER_TABLE)).unwrap_or(usize::MAX);
        let limit = limit.min(ENTRY_SCRATCH - ENTRY_FIRST_SLOT);
        Self { tables: vec![0; tables], slabs: Vec::new(), free: 0, touched: 0, used: 0, limit }
    }

    /// Slots in use.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.used
    }

    /// The most slots it may use.
    #[must_use]
    pub const fn limit(&self) -> u32 {
        self.limit
    }

    /// Slabs it has.
    #[must_use]
    pub fn slabs(&self) -> usize {
        self.slabs.len()
    }

    /// Adds memory.
    pub fn add_slab(&mut self, slab: S) {
        self.slabs.push(slab);
    }

    /// The memory it had.
    pub fn into_slabs(self) -> impl Iterator<Item = S> {
        self.slabs.into_iter()
    }

    fn range(slot: Slot) -> (usize, Range<usize>) {
        let (slab, slot) = (slot.0 / SLOTS_PER_SLAB, (slot.0 % SLOTS_PER_SLAB) as usize);
        (slab as usize, slot * BLOCK_BYTES..(slot + 1) * BLOCK_BYTES)
    }

    /// `slots` slots from `first` on, all in one slab.
    #[must_use]
    pub fn pages(&self, first: Slot, slots: usize) -> &[u8] {
        let (slab, range) = Self::range(first);
        let end = range.start.saturating_add(slots.saturating_mul(BLOCK_BYTES));
        self.slabs.get(slab).and_then(|slab| slab.as_ref().get(range.start..end)).unwrap_or_default()
    }

    /// As [`Self::pages`], to be written.
    pub fn pages_mut(&mut self, first: Slot, slots: usize) -> &mut [u8] {
        let (slab, range) = Self::range(first);
        let end = range.start.saturating_add(slots.saturating_mul(BLOCK_BYTES));
        self.slabs.get_mut(slab).and_then(|slab| slab.as_mut().get_mut(range.start..end)).unwrap_or_default()
    }

    fn word(&self, slot: Slot, index: usize) -> u32 {
        let at = index * ENTRY_BYTES;
        match self.pages(slot, 1).get(at..).and_then(|bytes| bytes.first_chunk()) {
            Some(bytes) => u32::from_le_bytes(*bytes),
            None => 0,
        }
    }

    fn set_word(&mut self, slot: Slot, index: usize, value: u32) {
        let at = index * ENTRY_BYTES;
        if let Some(bytes) = self.pages_mut(slot, 1).get_mut(at..).and_then(|bytes| bytes.first_chunk_mut()) {
            *bytes = value.to_le_bytes();
        }
    }

    /// A free slot; what it holds means nothing.
    ///
    /// # Errors
    /// [`Shortage`].
    pub fn allocate(&mut self) -> Result<Slot, Shortage> {
        if self.used >= self.limit {
            return Err(Shortage::Limit);
        }
        if let Some(slot) = self.free.checked_sub(1).map(Slot) {
            self.free = self.word(slot, 0);
            self.used += 1;
            return Ok(slot);
        }
        if (self.touched / SLOTS_PER_SLAB) as usize >= self.slabs.len() {
            return Err(Shortage::Slab);
        }
        let slot = Slot(self.touched);
        self.touched += 1;
        self.used += 1;
        Ok(slot)
    }

    /// Takes a slot back that no block is in.
    pub fn free(&mut self, slot: Slot) {
        self.set_word(slot, 0, self.free);
        self.free = slot.0 + 1;
        self.used = self.used.saturating_sub(1);
    }

    fn table(&self, block: u64) -> Option<Slot> {
        let table = usize::try_from(block / BLOCKS_PER_TABLE).ok()?;
        self.tables.get(table)?.checked_sub(1).map(Slot)
    }

    /// Whether any of the blocks that share `block`'s table may have been changed.
    #[must_use]
    pub fn has_table(&self, block: u64) -> bool {
        self.table(block).is_some()
    }

    /// Where a block's content is.
    #[must_use]
    pub fn place(&self, block: u64) -> Place {
        let Some(table) = self.table(block) else { return Place::Base };
        match self.word(table, (block % BLOCKS_PER_TABLE) as usize) {
            ENTRY_BASE => Place::Base,
            ENTRY_ZERO => Place::Zero,
            entry if entry & ENTRY_SCRATCH != 0 => Place::Scratch(entry & !ENTRY_SCRATCH),
            entry => Place::Memory(Slot(entry - ENTRY_FIRST_SLOT)),
        }
    }

    /// Makes room in the map for a change of `block`.
    ///
    /// # Errors
    /// [`Shortage`].
    pub fn prepare(&mut self, block: u64) -> Result<(), Shortage> {
        if self.has_table(block) {
            return Ok(());
        }
        let slot = self.allocate()?;
        self.pages_mut(slot, 1).fill(0);
        let table = usize::try_from(block / BLOCKS_PER_TABLE).ok();
        match table.and_then(|table| self.tables.get_mut(table)) {
            Some(place) => *place = slot.0 + 1,
            // There is no such block: nothing will be found there.
            None => self.free(slot),
        }
        Ok(())
    }

    /// Changes where a block's content is, and frees the slot it was in. There must be room for it: [`Self::prepare`].
    pub fn set(&mut self, block: u64, place: Place) {
        let Some(table) = self.table(block) else { return };
        let before = self.place(block);
        let entry = match place {
            Place::Base => ENTRY_BASE,
            Place::Zero => ENTRY_ZERO,
            Place::Memory(slot) => slot.0 + ENTRY_FIRST_SLOT,
            Place::Scratch(number) => number | ENTRY_SCRATCH,
        };
        self.set_word(table, (block % BLOCKS_PER_TABLE) as usize, entry);
        if let Place::Memory(slot) = before
            && before != place
        {
            self.free(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use proptest::prelude::*;

    fn overlay(blocks: u64, limit: u32, slabs: usize) -> Overlay<Vec<u8>> {
        let mut overlay = Overlay::new(blocks, limit);
        // Slabs hold rubbish, as slots that were used before do.
        (0..slabs).for_each(|_| overlay.add_slab(vec![0xA5; SLAB_BYTES]));
        overlay
    }

    #[test]
    fn an_overlay_needs_slabs_up_to_its_limit() {
        let mut overlay = overlay(1 << 20, SLOTS_PER_SLAB + 2, 0);
        assert_eq!(overlay.allocate(), Err(Shortage::Slab));
        overlay.add_slab(vec![0; SLAB_BYTES]);
        assert!((0..SLOTS_PER_SLAB).all(|_| overlay.allocate().is_ok()));
        assert_eq!(overlay.allocate(), Err(Shortage::Slab));
        overlay.add_slab(vec![0; SLAB_BYTES]);
        overlay.allocate().unwrap();
        let last = overlay.allocate().unwrap();
        assert_eq!(overlay.allocate(), Err(Shortage::Limit));
        overlay.free(last);
        assert_eq!(overlay.allocate(), Ok(last));
        assert_eq!((overlay.used(), overlay.into_slabs().count()), (SLOTS_PER_SLAB + 2, 2));
    }

    #[test]
    fn blocks_outside_the_disk_have_no_place() {
        let mut overlay = overlay(10, 100, 1);
        overlay.prepare(BLOCKS_PER_TABLE).unwrap();
        overlay.set(BLOCKS_PER_TABLE, Place::Zero);
        assert_eq!(overlay.place(BLOCKS_PER_TABLE), Place::Base);
        assert_eq!(overlay.place(u64::MAX), Place::Base);
        assert_eq!(overlay.used(), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Fill(u64, u8),
        Set(u64, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let block = prop_oneof![0..40_u64, 1020..1030_u64, Just(4095)];
        prop_oneof![
            (block.clone(), any::<u8>()).prop_map(|(block, value)| Step::Fill(block, value)),
            (block, 0..3_u8).prop_map(|(block, place)| Step::Set(block, place)),
        ]
    }

    proptest! {
        #[test]
        fn the_map_equals_a_model_and_no_slot_is_lost_or_shared(steps in prop::collection::vec(step(), 0..200)) {
            let mut overlay = overlay(4096, 30, 1);
            let mut model: BTreeMap<u64, (Place, u8)> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Fill(block, value) => {
                        if overlay.prepare(block).is_err() {
                            continue;
                        }
                        let Ok(slot) = overlay.allocate() else { continue };
                        overlay.pages_mut(slot, 1).fill(value);
                        overlay.set(block, Place::Memory(slot));
                        model.insert(block, (Place::Memory(slot), value));
                    }
                    Step::Set(block, place) => {
                        let place = [Place::Base, Place::Zero, Place::Scratch(7)][usize::from(place)];
                        if overlay.has_table(block) {
                            overlay.set(block, place);
                            model.insert(block, (place, 0));
                        }
                    }
                }
                prop_assert!(overlay.used() <= 30);
            }
            let mut tables: Vec<u64> = model.keys().map(|block| block / BLOCKS_PER_TABLE).collect();
            tables.dedup();
            let mut in_memory = 0;
            for (block, (place, value)) in &model {
                prop_assert_eq!(overlay.place(*block), *place);
                if let Place::Memory(slot) = place {
                    in_memory += 1;
                    prop_assert!(overlay.pages(*slot, 1).iter().all(|byte| byte == value));
                }
            }
            let tables = (0..4).filter(|table| overlay.has_table(table * BLOCKS_PER_TABLE)).count();
            prop_assert_eq!(overlay.used() as usize, in_memory + tables);
        }
    }
}
