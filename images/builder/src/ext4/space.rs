//! Which blocks there are, and which are taken.

use anyhow::{Context, Result, bail};

use super::inode::INODE_SIZE;
use super::{BLOCK, DESCRIPTOR, GROUP};

/// Least inodes of a group: one for every 16 KiB, as mke2fs has it. New groups get as many.
const INODES_A_GROUP: u64 = 8192;
/// Inodes in a block of a table; a group has a multiple.
const INODES_A_BLOCK: u64 = BLOCK / INODE_SIZE as u64;
/// Least blocks of the last group, beyond its copies of superblock and descriptors.
const LEAST_LAST: u64 = 64;
/// Inodes left free.
const FREE_INODES: u64 = 64;

/// Sizes and numbers.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_a_group: u32,
    /// Blocks of group descriptors after each superblock.
    pub(super) descriptor_blocks: u64,
}

impl Geometry {
    /// The smallest file system with room for `data` blocks and inodes up to `last_inode`.
    pub(super) fn new(data: u64, last_inode: u32) -> Result<Self> {
        let inodes = u64::from(last_inode) + FREE_INODES;
        // More groups never need fewer blocks, so this ends where they fit.
        for groups in 1.. {
            let a_group = inodes.div_ceil(groups).next_multiple_of(INODES_A_BLOCK).max(INODES_A_GROUP);
            if a_group > GROUP {
                continue;
            }
            let descriptor_blocks = (groups * DESCRIPTOR).div_ceil(BLOCK);
            let table = a_group / INODES_A_BLOCK;
            let copies = (0..groups).filter(|&group| has_superblock(group)).count() as u64;
            // A table that would meet a superblock begins behind it.
            let gaps = if groups * (table + 2) > GROUP / 2 { table * copies } else { 0 };
            let needed = data + copies * (1 + descriptor_blocks) + groups * (table + 2) + gaps;
            let least = (groups - 1) * GROUP + 1 + descriptor_blocks + LEAST_LAST;
            let blocks = needed.max(if groups > 1 { least } else { 0 });
            if blocks > u64::from(u32::MAX) {
                bail!("the files need {} TiB, more than this file system can have", blocks >> 28);
            }
            if blocks <= groups * GROUP {
                let inodes_a_group = u32::try_from(a_group)?;
                return Ok(Self { blocks, groups, inodes_a_group, descriptor_blocks });
            }
        }
        bail!("no number of groups is enough")
    }
}

/// Whether a group has a copy of the superblock: 0, 1 and the powers of 3, 5 and 7.
pub(super) fn has_superblock(group: u64) -> bool {
    let is_power = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power)
}

/// The blocks, taken one after another.
pub(super) struct Space {
    /// A bit a block, set where it is taken; whole groups, with bits set where there is no block.
    used: Vec<u8>,
    blocks: u64,
    next: u64,
    pub(super) block_bitmaps: Vec<u64>,
    pub(super) inode_bitmaps: Vec<u64>,
    pub(super) inode_tables: Vec<u64>,
}

impl Space {
    /// All of `geometry`, with the file system's own blocks taken.
    pub(super) fn new(geometry: &Geometry) -> Self {
        let mut space = Self {
            used: vec![0; (geometry.groups * BLOCK) as usize],
            blocks: geometry.blocks,
            next: 0,
            block_bitmaps: Vec::new(),
            inode_bitmaps: Vec::new(),
            inode_tables: Vec::new(),
        };
        for group in (0..geometry.groups).filter(|&group| has_superblock(group)) {
            (0..=geometry.descriptor_blocks).for_each(|block| space.set(group * GROUP + block));
        }
        (geometry.blocks..geometry.groups * GROUP).for_each(|block| space.set(block));
        let table = u64::from(geometry.inodes_a_group) / INODES_A_BLOCK;
        let mut take =
            |len| (0..geometry.groups).filter_map(|_| space.take_together(len)).collect::<Vec<_>>();
        let (block_bitmaps, inode_bitmaps, inode_tables) = (take(1), take(1), take(table));
        Self { block_bitmaps, inode_bitmaps, inode_tables, ..space }
    }

    /// Takes the next free block.
    pub(super) fn take(&mut self) -> Result<u64> {
        self.take_together(1).context("the size of the file system was reckoned too small")
    }

    /// Takes up to `most` blocks that follow one another: the first, and how many.
    pub(super) fn take_run(&mut self, most: u64) -> Result<(u64, u64)> {
        let start = self.take()?;
        let mut len = 1;
        while len < most && self.next < self.blocks && !self.is_set(self.next) {
            self.set(self.next);
            self.next += 1;
            len += 1;
        }
        Ok((start, len))
    }

    /// A group's bits.
    pub(super) fn bitmap(&self, group: u64) -> &[u8] {
        let start = (group * BLOCK) as usize;
        &self.used[start..start + BLOCK as usize]
    }

    /// Takes the next `len` blocks that follow one another.
    fn take_together(&mut self, len: u64) -> Option<u64> {
        loop {
            let start = self.next;
            if start + len > self.blocks {
                return None;
            }
            match (start..start + len).rev().find(|&block| self.is_set(block)) {
                Some(taken) => self.next = taken + 1,
                None => {
                    (start..start + len).for_each(|block| self.set(block));
                    self.next = start + len;
                    return Some(start);
                }
            }
        }
    }

    fn is_set(&self, block: u64) -> bool {
        self.used[(block / 8) as usize] & 1 << (block % 8) != 0
    }

    fn set(&mut self, block: u64) {
        self.used[(block / 8) as usize] |= 1 << (block % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_copied_where_sparse_super_has_them() {
        let groups: Vec<_> = (0..130).filter(|&group| has_superblock(group)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn everything_fits_whatever_the_size() {
        for data in [0, 1, 30_000, 32_768, 100_000, 1_000_000, 20_000_000] {
            for inodes in [12, 9000, 100_000, 2_000_000] {
                let geometry = Geometry::new(data, inodes).unwrap();
                let mut space = Space::new(&geometry);
                assert_eq!(space.inode_tables.len() as u64, geometry.groups, "{data} {inodes}");
                assert!(u64::from(geometry.inodes_a_group) * geometry.groups >= u64::from(inodes));
                let mut left = data;
                while left > 0 {
                    left -= space.take_run(left.min(32_768)).unwrap().1;
                }
            }
        }
    }

    #[test]
    fn what_is_too_large_is_refused() {
        assert!(Geometry::new(1 << 32, 12).unwrap_err().to_string().contains("TiB"));
    }
}
