//! Folders: blocks of entries, one after another (Linux: Documentation/filesystems/ext4/directory.rst).
//!
//! They are linear, not hashed: the kernel hashes those that it makes itself and reads both.

use std::collections::BTreeMap;

use super::{BLOCK, Fields};
use crate::tree::{Kind, NodeId};

/// Bytes of an entry before its name.
const HEAD: usize = 8;

/// What a folder says an entry is.
pub(super) fn kind(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Folder(_) => 2,
        Kind::CharacterDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Link(_) => 7,
    }
}

/// Blocks a folder takes.
pub(super) fn blocks(entries: &BTreeMap<Vec<u8>, NodeId>) -> u64 {
    encode(0, 0, entries, |_| (0, 0)).len() as u64 / BLOCK
}

/// A folder's bytes: whole blocks. `look_up` gives an entry's inode and what it is.
pub(super) fn encode(
    own: u32,
    parent: u32,
    entries: &BTreeMap<Vec<u8>, NodeId>,
    look_up: impl Fn(NodeId) -> (u32, u8),
) -> Vec<u8> {
    let dots = [(&b"."[..], own, 2), (&b".."[..], parent, 2)];
    let named = entries.iter().map(|(name, &id)| {
        let (inode, kind) = look_up(id);
        (name.as_slice(), inode, kind)
    });
    let mut bytes = Vec::new();
    // Where the last entry begins: it reaches to the end of its block.
    let mut last = 0;
    for (name, inode, kind) in dots.into_iter().chain(named) {
        let len = (HEAD + name.len()).next_multiple_of(4);
        let room = BLOCK as usize - bytes.len() % BLOCK as usize;
        if room < len {
            stretch(&mut bytes, last);
        }
        last = bytes.len();
        bytes.resize(last + len, 0);
        let mut at = Fields(&mut bytes[last..]);
        at.u32(0, inode);
        at.u16(4, len as u16);
        at.u8(6, name.len() as u8);
        at.u8(7, kind);
        at.bytes(8, name);
    }
    stretch(&mut bytes, last);
    bytes
}

/// Lets the entry at `last` reach to the end of its block.
fn stretch(bytes: &mut Vec<u8>, last: usize) {
    bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
    let len = bytes.len() - last;
    Fields(&mut bytes[last..]).u16(4, len as u16);
}
