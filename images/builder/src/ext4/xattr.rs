//! Extended attributes: in the inode where they fit, else in a block of their own (Linux: Documentation/filesystems/ext4/attributes.rst).

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::inode::ATTRIBUTES_LEN;
use super::{BLOCK, Fields};

const MAGIC: u32 = 0xEA02_0000;
/// Bytes before the entries: in an inode, in a block.
const INODE_HEAD: usize = 4;
const BLOCK_HEAD: usize = 32;
/// Bytes of an entry before its name.
const ENTRY: usize = 16;

/// Attributes, as they are written.
#[derive(Default)]
pub(super) struct Encoded {
    pub(super) inline: Option<[u8; ATTRIBUTES_LEN]>,
    pub(super) block: Option<Vec<u8>>,
}

/// Encodes attributes. ACLs and attributes of unknown kinds are left out: archives keep ACLs as text, and images of builds have none.
pub(super) fn encode(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Encoded> {
    let mut entries: Vec<(u8, &[u8], &[u8])> = attributes
        .iter()
        .filter_map(|(name, value)| split(name).map(|(index, name)| (index, name, value.as_slice())))
        .collect();
    // The order in which the kernel expects them.
    entries.sort_by(|a, b| (a.0, a.1.len(), a.1).cmp(&(b.0, b.1.len(), b.1)));
    let mut encoded = Encoded::default();
    if entries.is_empty() {
        return Ok(encoded);
    }
    let mut inline = [0; ATTRIBUTES_LEN];
    if fill(&mut inline, INODE_HEAD, INODE_HEAD, &entries, false) {
        Fields(&mut inline).u32(0, MAGIC);
        encoded.inline = Some(inline);
        return Ok(encoded);
    }
    let mut block = vec![0; BLOCK as usize];
    if !fill(&mut block, BLOCK_HEAD, 0, &entries, true) {
        bail!("its extended attributes do not fit into {BLOCK} bytes");
    }
    let hash =
        entries.iter().fold(0_u32, |hash, (_, name, value)| hash.rotate_left(16) ^ entry_hash(name, value));
    let mut at = Fields(&mut block);
    at.u32(0, MAGIC);
    at.u32(4, 1);
    at.u32(8, 1);
    at.u32(12, hash);
    encoded.block = Some(block);
    Ok(encoded)
}

/// The number of a name's prefix, and the rest.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")]
        .into_iter()
        .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))
        .filter(|(_, rest)| !rest.is_empty() && rest.len() < 256)
}

/// Writes entries from `start` on and values from the end backwards; offsets of values count from `origin`. False if they do not fit.
fn fill(area: &mut [u8], start: usize, origin: usize, entries: &[(u8, &[u8], &[u8])], hashed: bool) -> bool {
    let (mut at, mut end) = (start, area.len());
    for (index, name, value) in entries {
        let entry_len = ENTRY + name.len().next_multiple_of(4);
        let Some(place) = end.checked_sub(value.len().next_multiple_of(4)) else { return false };
        // Four zero bytes end the entries.
        if at + entry_len + 4 > place {
            return false;
        }
        let mut fields = Fields(&mut area[at..]);
        fields.u8(0, name.len() as u8);
        fields.u8(1, *index);
        fields.u16(2, if value.is_empty() { 0 } else { (place - origin) as u16 });
        fields.u32(8, value.len() as u32);
        fields.u32(12, if hashed { entry_hash(name, value) } else { 0 });
        fields.bytes(ENTRY, name);
        area[place..place + value.len()].copy_from_slice(value);
        (at, end) = (at + entry_len, place);
    }
    true
}

/// Linux: fs/ext4/xattr.c, `ext4_xattr_hash_entry`.
fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    let hash = name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    value.chunks(4).fold(hash, |hash, chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}
