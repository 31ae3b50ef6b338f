//! What a machine has changed on its disk: a map from blocks to pages of memory, or to places on the scratch partition.
//!
//! Memory comes in slabs of 2 MiB, each of 512 slots of 4 KiB. A slot holds a block's content or a table of the map, so that the map
//! costs nothing but what is counted, however the guest scatters its writes. Slots that become free are used again by this machine; slabs
//! go back when it ends.
//!
//! The overlay of a template is read by all its clones and changed by none: a clone copies the map's top, four bytes for 4 MiB of disk, shares the
//! slabs, and copies a table or a block into a slab of its own when it changes it. A clone of a clone does the same: whatever the number of
//! generations, one look into one table finds a block.

use crate::BLOCK_BYTES;
use alloc::sync::Arc;
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
    /// In a slot of the template's.
    Shared(Slot),
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
    /// The template's slabs, whose slots come first.
    shared: Arc<Vec<Arc<S>>>,
    slabs: Vec<S>,
    /// The first free slot that was used before and one; each holds the next one's number and one. Zero ends the list.
    free: u32,
    /// Slots that were ever used.
    touched: u32,
    used: u32,
    limit: u32,
}

/// The changes of a machine that was frozen.
#[derive(Debug)]
pub struct FrozenOverlay<S> {
    tables: Vec<u32>,
    slabs: Arc<Vec<Arc<S>>>,
    own: usize,
    limit: u32,
}

impl<S> FrozenOverlay<S> {
    /// The overlay of a clone.
    #[must_use]
    pub fn share(&self) -> Overlay<S> {
        let touched = u32::try_from(self.slabs.len()).unwrap_or(u32::MAX).saturating_mul(SLOTS_PER_SLAB);
        Overlay {
            tables: self.tables.clone(),
            shared: Arc::clone(&self.slabs),
            slabs: Vec::new(),
            free: 0,
            touched,
            used: 0,
            limit: self.limit.min((ENTRY_SCRATCH - ENTRY_FIRST_SLOT).saturating_sub(touched)),
        }
    }

    /// Slabs that it does not share with a template of its own.
    #[must_use]
    pub const fn own_slabs(&self) -> usize {
        self.own
    }

    /// The slabs that nobody shares any more.
    pub fn into_slabs(self) -> impl Iterator<Item = S> {
        Arc::into_inner(self.slabs).into_iter().flatten().filter_map(Arc::into_inner)
    }
}

impl<S: AsRef<[u8]> + AsMut<[u8]>> Overlay<S> {
    /// No changes to a disk of `blocks`; at most `limit` slots, tables included.
    #[must_use]
    pub fn new(blocks: u64, limit: u32) -> Self {
        let tables = usize::try_from(blocks.div_ceil(BLOCKS_PER_TABLE)).unwrap_or(usize::MAX);
        let limit = limit.min(ENTRY_SCRATCH - ENTRY_FIRST_SLOT);
        Self {
            tables: vec![0; tables],
            shared: Arc::new(Vec::new()),
            slabs: Vec::new(),
            free: 0,
            touched: 0,
            used: 0,
            limit,
        }
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

    /// Ends all changes: what there are is for clones to read. None is on the scratch partition.
    #[must_use]
    pub fn freeze(self) -> FrozenOverlay<S> {
        let own = self.slabs.len();
        let slabs = self.shared.iter().cloned().chain(self.slabs.into_iter().map(Arc::new));
        FrozenOverlay { tables: self.tables, slabs: Arc::new(slabs.collect()), own, limit: self.limit }
    }

    fn is_shared(&self, slot: Slot) -> bool {
        ((slot.0 / SLOTS_PER_SLAB) as usize) < self.shared.len()
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
        let bytes = match slab.checked_sub(self.shared.len()) {
            Some(own) => self.slabs.get(own).map(AsRef::as_ref),
            None => self.shared.get(slab).map(|slab| (**slab).as_ref()),
        };
        bytes.and_then(|bytes| bytes.get(range.start..end)).unwrap_or_default()
    }

    /// As [`Self::pages`], to be written: none that are shared.
    pub fn pages_mut(&mut self, first: Slot, slots: usize) -> &mut [u8] {
        let (slab, range) = Self::range(first);
        let end = range.start.saturating_add(slots.saturating_mul(BLOCK_BYTES));
        let own = slab.checked_sub(self.shared.len()).and_then(|own| self.slabs.get_mut(own));
        own.and_then(|slab| slab.as_mut().get_mut(range.start..end)).unwrap_or_default()
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
        if (self.touched / SLOTS_PER_SLAB) as usize >= self.shared.len() + self.slabs.len() {
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

    /// Whether the place of `block` can be changed: there is a table for it that is the machine's own.
    #[must_use]
    pub fn is_prepared(&self, block: u64) -> bool {
        self.table(block).is_some_and(|table| !self.is_shared(table))
    }

    /// Where a block's content is.
    #[must_use]
    pub fn place(&self, block: u64) -> Place {
        let Some(table) = self.table(block) else { return Place::Base };
        match self.word(table, (block % BLOCKS_PER_TABLE) as usize) {
            ENTRY_BASE => Place::Base,
            ENTRY_ZERO => Place::Zero,
            entry if entry & ENTRY_SCRATCH != 0 => Place::Scratch(entry & !ENTRY_SCRATCH),
            entry => match Slot(entry - ENTRY_FIRST_SLOT) {
                slot if self.is_shared(slot) => Place::Shared(slot),
                slot => Place::Memory(slot),
            },
        }
    }

    /// Makes room in the map for a change of `block`.
    ///
    /// # Errors
    /// [`Shortage`].
    pub fn prepare(&mut self, block: u64) -> Result<(), Shortage> {
        if self.is_prepared(block) {
            return Ok(());
        }
        let slot = self.allocate()?;
        match self.table(block) {
            Some(shared) => {
                let mut table = [0; BLOCK_BYTES];
                table.copy_from_slice(self.pages(shared, 1));
                self.pages_mut(slot, 1).copy_from_slice(&table);
            }
            None => self.pages_mut(slot, 1).fill(0),
        }
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
        let Some(table) = self.table(block).filter(|table| !self.is_shared(*table)) else { return };
        let before = self.place(block);
        let entry = match place {
            Place::Base => ENTRY_BASE,
            Place::Zero => ENTRY_ZERO,
            Place::Memory(slot) | Place::Shared(slot) => slot.0 + ENTRY_FIRST_SLOT,
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

    fn fill(overlay: &mut Overlay<Vec<u8>>, block: u64, value: u8) {
        overlay.prepare(block).unwrap();
        let slot = overlay.allocate().unwrap();
        overlay.pages_mut(slot, 1).fill(value);
        overlay.set(block, Place::Memory(slot));
    }

    fn value(overlay: &Overlay<Vec<u8>>, block: u64) -> Option<u8> {
        match overlay.place(block) {
            Place::Memory(slot) | Place::Shared(slot) => overlay.pages(slot, 1).first().copied(),
            _ => None,
        }
    }

    #[test]
    fn clones_of_clones_read_what_was_frozen_and_change_only_their_own() {
        let mut first = overlay(4096, 100, 1);
        (0..8).for_each(|block| fill(&mut first, block, 1));
        let mut generations = vec![first.freeze()];
        for depth in 1..6_u8 {
            let mut clone = generations.last().unwrap().share();
            assert_eq!((clone.used(), clone.slabs()), (0, 0));
            assert_eq!(clone.prepare(0), Err(Shortage::Slab));
            clone.add_slab(vec![0xA5; SLAB_BYTES]);
            fill(&mut clone, u64::from(depth), depth + 1);
            assert_eq!(clone.used(), 2, "a table and a block at depth {depth}");
            generations.push(clone.freeze());
        }
        for (depth, frozen) in (0..6_u8).zip(&generations) {
            let clone = frozen.share();
            for block in 0..8_u8 {
                let expected = if (1..=depth).contains(&block) { block + 1 } else { 1 };
                assert_eq!(value(&clone, block.into()), Some(expected), "block {block} at depth {depth}");
            }
        }
        // In any order, every slab comes back once.
        generations.swap(0, 4);
        let slabs: usize = generations.into_iter().map(|frozen| frozen.into_slabs().count()).sum();
        assert_eq!(slabs, 6);
    }

    #[test]
    fn two_clones_do_not_see_each_other_and_a_shared_slot_is_never_freed() {
        let mut template = overlay(4096, 100, 1);
        fill(&mut template, 3, 7);
        let template = template.freeze();
        let [mut one, mut other] = [template.share(), template.share()];
        one.set(3, Place::Zero);
        assert_eq!(value(&one, 3), Some(7), "not prepared");
        for (clone, new) in [(&mut one, 1), (&mut other, 2)] {
            clone.add_slab(vec![0; SLAB_BYTES]);
            fill(clone, 3, new);
            clone.set(3, Place::Base);
            assert_eq!((clone.used(), clone.place(3)), (1, Place::Base));
            fill(clone, 3, new);
        }
        assert_eq!(
            (value(&one, 3), value(&other, 3), value(&template.share(), 3)),
            (Some(1), Some(2), Some(7))
        );
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
