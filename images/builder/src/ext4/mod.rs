//! Writes a tree as an ext4 file system (Linux: Documentation/filesystems/ext4/, the on-disk format).
//!
//! Debian 12's mke2fs takes neither an archive nor owners that are not on this computer's disk, and writes files in the order in which a
//! folder happens to list them. This writer takes a [`Tree`] from anybody, and the same tree gives the same bytes.
//!
//! What it makes is meant to be grown at boot and thrown away after: no journal; all inode tables at the front (`flex_bg`); `meta_bg`,
//! so that descriptors of new groups need no room kept for them; descriptor checksums (`uninit_bg`), with which the kernel writes no
//! inode table of a new group before it is used; blocks of 4 KiB in the order of the folders, so that what belongs together is read
//! together.

mod folder;
mod inode;
mod space;
mod xattr;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail};
use crc::{CRC_16_MODBUS, Crc, Table};

use crate::content::Content;
use crate::tree::{Kind, NodeId, Tree};
use inode::{INODE_SIZE, Inode};
use space::{Geometry, Space};

/// Bytes of a block.
pub(crate) const BLOCK: u64 = 4096;
/// Blocks of a group: as many as a block has bits.
const GROUP: u64 = BLOCK * 8;
/// Bytes of a group's descriptor.
const DESCRIPTOR: u64 = 32;
/// The root folder's inode and the first that is not kept for something else.
const ROOT_INODE: u32 = 2;
const FIRST_INODE: u32 = 11;
/// Blocks left free, so that the file system can be used before it is grown, and for growing it.
const FREE_BLOCKS: u64 = 1024;
/// Most links a folder counts (`EXT4_LINK_MAX`); beyond, `dir_nlink` says 1.
const MAX_FOLDER_LINKS: u32 = 65_000;
/// Most names one file may have.
const MAX_LINKS: u32 = 65_000;
/// Every file system's own number and the seed of its folders' hashes: an image has no identity, its machines live in different worlds.
const UUID: [u8; 16] = *b"nestling\x40\x00\x80\x00root";
const HASH_SEED: [u8; 16] = *b"nestling-folders";

/// What a file system holds, once it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its size in bytes, a multiple of 4096.
    pub size: u64,
    /// Its inodes in use.
    pub inodes: u32,
}

/// One inode to be written.
struct Planned {
    node: NodeId,
    /// The folder it was found in first.
    parent: u32,
    links: u32,
}

/// Writes `tree` into `out` from byte `base`, which has to read as zeros from there on. `progress` is told bytes of files written, and how
/// many there are.
///
/// # Errors
/// When a file cannot be read or has changed its length, and when `out` cannot be written.
pub fn write(tree: &Tree, out: &File, base: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<Written> {
    let mut tree = tree.clone();
    tree.folder("lost+found", 0o700)?;
    let (planned, numbers) = plan(&tree)?;
    let last_inode = FIRST_INODE - 2 + planned.len() as u32;
    let needed = planned.iter().map(|one| blocks_needed(&tree, one)).sum::<u64>();
    let geometry = Geometry::new(needed + FREE_BLOCKS, last_inode)?;
    let mut space = Space::new(&geometry);
    let disk = Disk { file: out, base };
    out.set_len(base + geometry.blocks * BLOCK).context("cannot make room for the file system")?;

    let total = planned.iter().map(|one| file_len(&tree, one.node)).sum();
    let mut done = 0;
    let mut tables = Tables::new(&geometry, &space);
    for (one, number) in planned.iter().zip(inode_numbers()) {
        let node = tree.node(one.node);
        let mut inode = Inode::new(node, one.links);
        let attributes = xattr::encode(&node.xattrs)?;
        inode.inline_attributes = attributes.inline;
        match &node.kind {
            Kind::Folder(entries) => {
                let bytes = folder::encode(number, one.parent, entries, |id| {
                    (numbers[id.0], folder::kind(&tree.node(id).kind))
                });
                tables.count_folder(number);
                inode.map(&mut space, &disk, bytes.len() as u64)?;
                inode.write(&disk, &mut bytes.as_slice(), |_| {})?;
            }
            Kind::File(content) => {
                inode.map(&mut space, &disk, content.len())?;
                let told = || format!("cannot take over {}", path(&tree, one.node));
                let mut reader = content.reader().with_context(told)?;
                let mut counted = |len| {
                    done += len;
                    progress(done, total);
                };
                inode.write(&disk, &mut *reader, &mut counted).with_context(told)?;
                check_end(content, &mut *reader).with_context(told)?;
            }
            Kind::Link(target) if target.len() < inode::INLINE => inode.set_inline(target),
            Kind::Link(target) => {
                inode.map(&mut space, &disk, target.len() as u64)?;
                inode.write(&disk, &mut target.as_slice(), |_| {})?;
            }
            Kind::CharacterDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                inode.set_device(*major, *minor);
            }
            Kind::Fifo | Kind::Socket => {}
        }
        if let Some(block) = attributes.block {
            let place = space.take()?;
            disk.write(place, 0, &block)?;
            inode.attributes_block = Some(place);
        }
        tables.put(&disk, number, &inode.encode())?;
    }
    tables.finish(&disk)?;
    write_head(&disk, &geometry, &space, &tables, last_inode)?;
    Ok(Written { size: geometry.blocks * BLOCK, inodes: last_inode })
}

/// The root's number, then one after another.
fn inode_numbers() -> impl Iterator<Item = u32> {
    std::iter::once(ROOT_INODE).chain(FIRST_INODE..)
}

/// Every node that has a name, in the order of its first; and the numbers by node.
fn plan(tree: &Tree) -> Result<(Vec<Planned>, Vec<u32>)> {
    let mut numbers = vec![0_u32; tree.capacity()];
    let mut places = vec![usize::MAX; tree.capacity()];
    let mut planned = vec![Planned { node: Tree::ROOT, parent: ROOT_INODE, links: 2 }];
    (numbers[Tree::ROOT.0], places[Tree::ROOT.0]) = (ROOT_INODE, 0);
    let mut next = FIRST_INODE;
    for (folder, _, id) in tree.walk() {
        let is_folder = matches!(tree.node(id).kind, Kind::Folder(_));
        if is_folder {
            planned[places[folder.0]].links += 1;
        }
        if numbers[id.0] != 0 {
            let links = &mut planned[places[id.0]].links;
            *links += 1;
            if *links > MAX_LINKS {
                bail!("{} has more than {MAX_LINKS} hard links", path(tree, id));
            }
            continue;
        }
        (numbers[id.0], places[id.0]) = (next, planned.len());
        planned.push(Planned { node: id, parent: numbers[folder.0], links: if is_folder { 2 } else { 1 } });
        next = next.checked_add(1).context("there are more files than ext4 has numbers for")?;
    }
    for one in planned.iter_mut().filter(|one| matches!(tree.node(one.node).kind, Kind::Folder(_))) {
        if one.links >= MAX_FOLDER_LINKS {
            one.links = 1;
        }
    }
    Ok((planned, numbers))
}

/// Most blocks an inode can need, besides its own.
fn blocks_needed(tree: &Tree, one: &Planned) -> u64 {
    let node = tree.node(one.node);
    let data = match &node.kind {
        Kind::Folder(entries) => folder::blocks(entries),
        Kind::File(content) => content.len().div_ceil(BLOCK),
        Kind::Link(target) => u64::from(target.len() >= inode::INLINE),
        _ => 0,
    };
    data + inode::mapping_blocks(data) + u64::from(!node.xattrs.is_empty())
}

fn file_len(tree: &Tree, id: NodeId) -> u64 {
    match &tree.node(id).kind {
        Kind::File(content) => content.len(),
        _ => 0,
    }
}

/// A name of a node, for messages.
fn path(tree: &Tree, id: NodeId) -> String {
    let walk = tree.walk();
    let (mut names, mut at) = (Vec::new(), id);
    while let Some((folder, name, _)) = walk.iter().find(|(_, _, other)| *other == at) {
        names.push(name.escape_ascii().to_string());
        at = *folder;
    }
    names.reverse();
    format!("/{}", names.join("/"))
}

/// A file that has grown since it was found would be cut off in the image.
fn check_end(content: &Content, reader: &mut dyn Read) -> Result<()> {
    if let Content::Path { path, len } = content
        && (reader.read(&mut [0])? != 0 || std::fs::metadata(path)?.len() != *len)
    {
        bail!("its length has changed meanwhile");
    }
    Ok(())
}

/// The file system's place in a file.
pub(crate) struct Disk<'a> {
    file: &'a File,
    base: u64,
}

impl Disk<'_> {
    /// Writes at a byte of a block.
    fn write(&self, block: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        let at = self.base + block * BLOCK + offset;
        self.file.write_all_at(bytes, at).context("cannot write the file system")
    }
}

/// The inode tables being written, a group at a time.
struct Tables<'a> {
    geometry: &'a Geometry,
    places: Vec<u64>,
    current: usize,
    bytes: Vec<u8>,
    folders: Vec<u32>,
}

impl<'a> Tables<'a> {
    fn new(geometry: &'a Geometry, space: &Space) -> Self {
        let folders = vec![0; space.inode_tables.len()];
        Self { geometry, places: space.inode_tables.clone(), current: 0, bytes: Vec::new(), folders }
    }

    fn place(&self, number: u32) -> (usize, usize) {
        let index = (number - 1) as usize;
        let a_group = self.geometry.inodes_a_group as usize;
        (index / a_group, index % a_group * INODE_SIZE)
    }

    fn count_folder(&mut self, number: u32) {
        let (group, _) = self.place(number);
        self.folders[group] += 1;
    }

    /// Adds an inode; they come in the order of their numbers.
    fn put(&mut self, disk: &Disk<'_>, number: u32, inode: &[u8; INODE_SIZE]) -> Result<()> {
        let (group, offset) = self.place(number);
        if group != self.current {
            self.finish(disk)?;
            self.current = group;
        }
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(inode);
        Ok(())
    }

    fn finish(&mut self, disk: &Disk<'_>) -> Result<()> {
        disk.write(self.places[self.current], 0, &self.bytes)?;
        self.bytes.clear();
        Ok(())
    }
}

/// Writes bitmaps, descriptors and superblocks.
fn write_head(
    disk: &Disk<'_>,
    geometry: &Geometry,
    space: &Space,
    tables: &Tables<'_>,
    last_inode: u32,
) -> Result<()> {
    let mut descriptors = Vec::new();
    let (mut free_blocks, mut free_inodes) = (0, 0);
    for group in 0..geometry.groups {
        let index = group as usize;
        let blocks = space.bitmap(group);
        disk.write(space.block_bitmaps[index], 0, blocks)?;
        let used =
            last_inode.saturating_sub(group as u32 * geometry.inodes_a_group).min(geometry.inodes_a_group);
        disk.write(space.inode_bitmaps[index], 0, &inode_bitmap(used, geometry.inodes_a_group))?;
        let free = blocks.iter().map(|byte| u64::from(byte.count_zeros())).sum::<u64>();
        let unused = geometry.inodes_a_group - used;
        free_blocks += free;
        free_inodes += unused;
        let mut descriptor = [0; DESCRIPTOR as usize];
        let mut at = Fields(&mut descriptor);
        at.u32(0x00, space.block_bitmaps[index] as u32);
        at.u32(0x04, space.inode_bitmaps[index] as u32);
        at.u32(0x08, space.inode_tables[index] as u32);
        at.u16(0x0C, free as u16);
        at.u16(0x0E, unused as u16);
        at.u16(0x10, tables.folders[index] as u16);
        // INODE_ZEROED, and INODE_UNINIT where no inode is in use.
        at.u16(0x12, 4 | u16::from(used == 0));
        at.u16(0x1C, unused as u16);
        let checksum = checksum(group as u32, &descriptor[..0x1E]);
        Fields(&mut descriptor).u16(0x1E, checksum);
        descriptors.extend_from_slice(&descriptor);
    }
    for group in (0..geometry.groups).filter(|&group| space::has_superblock(group)) {
        let block = group * GROUP;
        let superblock = superblock(geometry, group as u16, free_blocks as u32, free_inodes);
        disk.write(block, if group == 0 { 1024 } else { 0 }, &superblock)?;
        disk.write(block + 1, 0, &descriptors)?;
    }
    Ok(())
}

/// A group's inodes in use; bits that stand for none count as used.
fn inode_bitmap(used: u32, a_group: u32) -> Vec<u8> {
    let bit = |bit: u32| bit < used || bit >= a_group;
    (0..BLOCK as u32).map(|byte| (0..8).map(|place| u8::from(bit(byte * 8 + place)) << place).sum()).collect()
}

fn checksum(group: u32, descriptor: &[u8]) -> u16 {
    const CRC: Crc<u16, Table<1>> = Crc::<u16, Table<1>>::new(&CRC_16_MODBUS);
    let mut digest = CRC.digest();
    digest.update(&UUID);
    digest.update(&group.to_le_bytes());
    digest.update(descriptor);
    digest.finalize()
}

fn superblock(geometry: &Geometry, group: u16, free_blocks: u32, free_inodes: u32) -> [u8; 1024] {
    /// ext_attr, dir_index.
    const COMPATIBLE: u32 = 0x8 | 0x20;
    /// filetype, meta_bg, extents, flex_bg.
    const INCOMPATIBLE: u32 = 0x2 | 0x10 | 0x40 | 0x200;
    /// sparse_super, large_file, huge_file, uninit_bg (gdt_csum), dir_nlink, extra_isize.
    const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40;
    let mut bytes = [0; 1024];
    let mut at = Fields(&mut bytes);
    at.u32(0x00, geometry.inodes_a_group * geometry.groups as u32);
    at.u32(0x04, geometry.blocks as u32);
    at.u32(0x0C, free_blocks);
    at.u32(0x10, free_inodes);
    // Blocks and clusters of 2^(10+2) bytes.
    at.u32(0x18, 2);
    at.u32(0x1C, 2);
    at.u32(0x20, GROUP as u32);
    at.u32(0x24, GROUP as u32);
    at.u32(0x28, geometry.inodes_a_group);
    // No check after any number of mounts.
    at.u16(0x36, 0xFFFF);
    at.u16(0x38, 0xEF53);
    // Clean; errors are counted and work goes on.
    at.u16(0x3A, 1);
    at.u16(0x3C, 1);
    // The revision with variable inodes.
    at.u32(0x4C, 1);
    at.u32(0x54, FIRST_INODE);
    at.u16(0x58, INODE_SIZE as u16);
    at.u16(0x5A, group);
    at.u32(0x5C, COMPATIBLE);
    at.u32(0x60, INCOMPATIBLE);
    at.u32(0x64, READ_ONLY_COMPATIBLE);
    at.bytes(0x68, &UUID);
    at.bytes(0xEC, &HASH_SEED);
    // Folders are hashed by half MD4, of signed characters.
    at.u8(0xFC, 1);
    at.u32(0x160, 1);
    // Mounted with user_xattr and acl.
    at.u32(0x100, 0x4 | 0x8);
    // The first group of descriptors that is not after the superblock: the first that this file system does not have.
    at.u32(0x104, geometry.descriptor_blocks as u32);
    at.u16(0x15C, inode::EXTRA);
    at.u16(0x15E, inode::EXTRA);
    // Sixteen groups' metadata stand together.
    at.u8(0x174, 4);
    bytes
}

/// Little-endian fields at byte offsets, as the format's documentation numbers them.
struct Fields<'a>(&'a mut [u8]);

impl Fields<'_> {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn u8(&mut self, at: usize, value: u8) {
        self.bytes(at, &[value]);
    }
    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }
    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests;
