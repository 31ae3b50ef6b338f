//! Inodes and the extents that map a file's blocks (Linux: Documentation/filesystems/ext4/inodes.rst, ifork.rst).

use std::io::Read;

use anyhow::{Context, Result, bail};

use super::space::Space;
use super::{BLOCK, Disk, Fields};
use crate::tree::{Kind, Node};

/// Bytes of an inode.
pub(super) const INODE_SIZE: usize = 256;
/// Bytes of the fields beyond the first 128 that are in use.
pub(super) const EXTRA: u16 = 32;
/// Bytes of an inode's map; a link shorter than this is in it.
pub(super) const INLINE: usize = 60;
/// Where attributes begin.
const ATTRIBUTES: usize = 128 + EXTRA as usize;
/// Bytes for attributes in an inode.
pub(super) const ATTRIBUTES_LEN: usize = INODE_SIZE - ATTRIBUTES;

/// Most blocks of an extent.
const MAX_EXTENT: u64 = 32_768;
/// Extents, or blocks of extents, that fit into an inode; extents that fit into a block.
const IN_INODE: usize = 4;
const IN_BLOCK: usize = (BLOCK as usize - 12) / 12;
/// This inode's map is of extents.
const EXTENTS_FLAG: u32 = 0x8_0000;

/// One run of a file's blocks.
#[derive(Clone, Copy)]
struct Extent {
    first: u32,
    len: u16,
    place: u64,
}

/// One inode to be written.
pub(super) struct Inode<'a> {
    node: &'a Node,
    links: u32,
    size: u64,
    flags: u32,
    extents: Vec<Extent>,
    map: [u8; INLINE],
    /// Blocks it takes, those of its extents and attributes among them.
    blocks: u64,
    /// Attributes kept in the inode.
    pub(super) inline_attributes: Option<[u8; ATTRIBUTES_LEN]>,
    /// The block with its other attributes.
    pub(super) attributes_block: Option<u64>,
}

/// Most blocks that the extents of a file of `data` blocks can take.
pub(super) fn mapping_blocks(data: u64) -> u64 {
    // An extent ends after 32,768 blocks, or before a superblock, of which there is at most one in as many.
    let extents = data.div_ceil(MAX_EXTENT) * 2 + 1;
    if extents <= IN_INODE as u64 { 0 } else { extents.div_ceil(IN_BLOCK as u64) }
}

impl<'a> Inode<'a> {
    pub(super) fn new(node: &'a Node, links: u32) -> Self {
        Self {
            node,
            links,
            size: 0,
            flags: 0,
            extents: Vec::new(),
            map: [0; INLINE],
            blocks: 0,
            inline_attributes: None,
            attributes_block: None,
        }
    }

    /// Takes blocks for `size` bytes and writes the extents.
    pub(super) fn map(&mut self, space: &mut Space, disk: &Disk<'_>, size: u64) -> Result<()> {
        let blocks = size.div_ceil(BLOCK);
        if blocks > u64::from(u32::MAX) {
            bail!("a file of {size} bytes is larger than ext4's blocks of 4 KiB can hold");
        }
        let mut first = 0;
        while first < blocks {
            let (place, len) = space.take_run((blocks - first).min(MAX_EXTENT))?;
            self.extents.push(Extent { first: first as u32, len: len as u16, place });
            first += len;
        }
        (self.size, self.flags, self.blocks) = (size, EXTENTS_FLAG, blocks);
        if self.extents.len() <= IN_INODE {
            let leaf = node(&self.extents.iter().map(leaf_entry).collect::<Vec<_>>(), IN_INODE, 0);
            self.map[..leaf.len()].copy_from_slice(&leaf);
            return Ok(());
        }
        let mut index = Vec::new();
        for extents in self.extents.chunks(IN_BLOCK) {
            let place = space.take()?;
            let leaf = node(&extents.iter().map(leaf_entry).collect::<Vec<_>>(), IN_BLOCK, 0);
            disk.write(place, 0, &leaf)?;
            index.push(index_entry(extents[0].first, place));
            self.blocks += 1;
        }
        if index.len() > IN_INODE {
            bail!(
                "a file of {size} bytes has more extents than are written here; the largest is some 80 GiB"
            );
        }
        let root = node(&index, IN_INODE, 1);
        self.map[..root.len()].copy_from_slice(&root);
        Ok(())
    }

    /// Writes what `from` gives to the blocks that [`Inode::map`] took. Blocks of zeros are left as they are: zeros.
    pub(super) fn write(
        &self,
        disk: &Disk<'_>,
        from: &mut dyn Read,
        mut count: impl FnMut(u64),
    ) -> Result<()> {
        let mut buffer = vec![0; 256 * BLOCK as usize];
        let mut left = self.size;
        for extent in &self.extents {
            let mut at = 0;
            let end = (u64::from(extent.len) * BLOCK).min(left);
            left -= end;
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
                let bytes = &mut buffer[..len];
                from.read_exact(bytes).context("it is shorter than it was")?;
                write_unless_zero(disk, extent.place, at, bytes)?;
                at += len as u64;
                count(len as u64);
            }
        }
        Ok(())
    }

    /// Keeps a short link's target in the inode.
    pub(super) fn set_inline(&mut self, target: &[u8]) {
        self.size = target.len() as u64;
        self.map[..target.len()].copy_from_slice(target);
    }

    /// A device's numbers: the old encoding where they fit, else the new one in the second place.
    pub(super) fn set_device(&mut self, major: u32, minor: u32) {
        if major < 256 && minor < 256 {
            Fields(&mut self.map).u32(0, major << 8 | minor);
        } else {
            Fields(&mut self.map).u32(4, minor & 0xFF | (major & 0xFFF) << 8 | (minor & !0xFF) << 12);
        }
    }

    /// The inode's bytes.
    pub(super) fn encode(&self) -> [u8; INODE_SIZE] {
        let node = self.node;
        let kind: u16 = match node.kind {
            Kind::Fifo => 0o010_000,
            Kind::CharacterDevice { .. } => 0o020_000,
            Kind::Folder(_) => 0o040_000,
            Kind::BlockDevice { .. } => 0o060_000,
            Kind::File(_) => 0o100_000,
            Kind::Link(_) => 0o120_000,
            Kind::Socket => 0o140_000,
        };
        let blocks = self.blocks + u64::from(self.attributes_block.is_some());
        let sectors = blocks * (BLOCK / 512);
        let (seconds, extra) = time(node.mtime);
        let mut bytes = [0; INODE_SIZE];
        let mut at = Fields(&mut bytes);
        at.u16(0x00, kind | node.mode);
        at.u16(0x02, node.uid as u16);
        at.u32(0x04, self.size as u32);
        at.u16(0x18, node.gid as u16);
        at.u16(0x1A, self.links as u16);
        at.u32(0x1C, sectors as u32);
        at.u32(0x20, self.flags);
        at.bytes(0x28, &self.map);
        at.u32(0x68, self.attributes_block.unwrap_or(0) as u32);
        at.u32(0x6C, (self.size >> 32) as u32);
        at.u16(0x74, (sectors >> 32) as u16);
        at.u16(0x78, (node.uid >> 16) as u16);
        at.u16(0x7A, (node.gid >> 16) as u16);
        at.u16(0x80, EXTRA);
        // Times of access, change and modification, and of creation: all the only one there is.
        for (low, high) in [(0x08, 0x8C), (0x0C, 0x84), (0x10, 0x88), (0x90, 0x94)] {
            at.u32(low, seconds);
            at.u32(high, extra);
        }
        if let Some(attributes) = &self.inline_attributes {
            at.bytes(ATTRIBUTES, attributes);
        }
        bytes
    }
}

fn write_unless_zero(disk: &Disk<'_>, place: u64, at: u64, bytes: &[u8]) -> Result<()> {
    let is_zero = |chunk: &[u8]| chunk.iter().all(|&byte| byte == 0);
    if !is_zero(bytes) {
        disk.write(place, at, bytes)?;
    }
    Ok(())
}

/// Seconds since 1970 as 32 bits, and two more bits of them below the nanoseconds.
fn time((seconds, nanos): (i64, u32)) -> (u32, u32) {
    let seconds = seconds.clamp(i64::from(i32::MIN), (1 << 34) - (1 << 31) - 1);
    let low = seconds as u32;
    let epoch = (seconds - i64::from(low.cast_signed())) >> 32;
    (low, (epoch as u32) & 3 | nanos << 2)
}

/// An extent node: a head and entries.
fn node(entries: &[[u8; 12]], most: usize, depth: u16) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    let mut at = Fields(&mut bytes);
    at.u16(0, 0xF30A);
    at.u16(2, entries.len() as u16);
    at.u16(4, most as u16);
    at.u16(6, depth);
    bytes.extend(entries.iter().flatten());
    bytes
}

fn leaf_entry(extent: &Extent) -> [u8; 12] {
    let mut bytes = [0; 12];
    let mut at = Fields(&mut bytes);
    at.u32(0, extent.first);
    at.u16(4, extent.len);
    at.u16(6, (extent.place >> 32) as u16);
    at.u32(8, extent.place as u32);
    bytes
}

fn index_entry(first: u32, place: u64) -> [u8; 12] {
    let mut bytes = [0; 12];
    let mut at = Fields(&mut bytes);
    at.u32(0, first);
    at.u32(4, place as u32);
    at.u16(8, (place >> 32) as u16);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_the_bits_beyond_2038() {
        assert_eq!(time((0, 0)), (0, 0));
        assert_eq!(time((-1, 0)), (u32::MAX, 0));
        assert_eq!(time((1 << 31, 1)), (1 << 31, 1 | 1 << 2));
        assert_eq!(time((1 << 32, 0)), (0, 1));
        assert_eq!(time((i64::MAX, 0)), (i32::MAX as u32, 3));
        assert_eq!(time((i64::MIN, 0)), (1 << 31, 0));
    }

    #[test]
    fn a_devices_numbers_are_encoded_as_linux_reads_them() {
        let node = Node::new(Kind::Fifo, 0);
        let map = |major, minor| {
            let mut inode = Inode::new(&node, 1);
            inode.set_device(major, minor);
            (inode.map[..4].to_vec(), inode.map[4..8].to_vec())
        };
        assert_eq!(map(4, 64), (vec![64, 4, 0, 0], vec![0; 4]));
        assert_eq!(map(259, 0x12345), (vec![0; 4], 0x1231_0345_u32.to_le_bytes().to_vec()));
    }
}
