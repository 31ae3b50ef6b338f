//! A set of interrupt vectors, as the request, service and trigger-mode registers hold them.

use crate::address::Vector;

/// 256 bits, one a vector.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct VectorSet([u64; 4]);

impl VectorSet {
    pub(super) fn insert(&mut self, vector: Vector) {
        if let Some(word) = self.0.get_mut(usize::from(vector.0 >> 6)) {
            *word |= 1 << (vector.0 & 63);
        }
    }

    pub(super) fn remove(&mut self, vector: Vector) {
        if let Some(word) = self.0.get_mut(usize::from(vector.0 >> 6)) {
            *word &= !(1 << (vector.0 & 63));
        }
    }

    pub(super) fn contains(&self, vector: Vector) -> bool {
        self.0.get(usize::from(vector.0 >> 6)).is_some_and(|word| word & 1 << (vector.0 & 63) != 0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// True when exactly one vector is in the set.
    pub(super) fn is_single(&self) -> bool {
        self.0.iter().map(|word| word.count_ones()).sum::<u32>() == 1
    }

    pub(super) fn highest(&self) -> Option<Vector> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some(Vector((index as u8) << 6 | (63 - word.leading_zeros()) as u8))
    }

    /// The 32 vectors from `32 * index` on, as one register shows them.
    pub(super) fn register(&self, index: u32) -> u32 {
        let word = self.0.get(index as usize >> 1).copied().unwrap_or(0);
        (word >> (32 * (index & 1))) as u32
    }
}
