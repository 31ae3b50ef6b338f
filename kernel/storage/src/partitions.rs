//! Partition tables: where the image store and the scratch space lie on the node's disk.
//!
//! UEFI specification 2.10, 5.3 (GUID partition table). Sectors of 512 and of 4096 bytes are tried. A table whose checksums are wrong is not
//! believed; then its copy at the disk's end is asked.

use crate::source::Source;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use bytemuck::bytes_of_mut;
use gpt_disk_types::{BlockSize, Crc32, GptHeader, GptPartitionEntry, GptPartitionEntryArray};

/// The most bytes of a table's entries; the usual 128 entries have 16 KiB.
const ENTRIES_BYTES_MAX: usize = 64 << 10;
const ENTRY_BYTES: usize = 128;

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name in the table.
    pub name: String,
    /// Where it starts on the disk, in bytes.
    pub at: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The partitions of a disk; `None` when it has no GUID partition table.
///
/// # Errors
/// What is wrong with the table, for people, or why the disk cannot be read.
pub fn read(disk: &mut dyn Source) -> Result<Option<Vec<Partition>>, String> {
    let mut problem = None;
    for block in [BlockSize::BS_512, BlockSize::BS_4096] {
        let size = block.to_u64();
        let copies = [size, (disk.bytes() / size).saturating_sub(1) * size];
        for at in copies {
            match read_table(disk, block, at)? {
                Ok(Some(partitions)) => return Ok(Some(partitions)),
                Ok(None) => {}
                Err(reason) => problem = problem.or(Some(reason)),
            }
        }
    }
    problem.map_or(Ok(None), Err)
}

/// The table at byte `at`: `None` when there is none, an error inside when it is damaged.
fn read_table(
    disk: &mut dyn Source,
    block: BlockSize,
    at: u64,
) -> Result<Result<Option<Vec<Partition>>, String>, String> {
    let mut header: GptHeader = GptHeader::default();
    let size = size_of::<GptHeader>() as u64;
    if disk.bytes().saturating_sub(at) < size {
        return Ok(Ok(None));
    }
    disk.read(at, bytes_of_mut(&mut header))?;
    if !header.is_signature_valid() {
        return Ok(Ok(None));
    }
    let damaged = |what: &str| Ok(Err(format!("the partition table at byte {at} is damaged: {what}")));
    if header.calculate_header_crc32() != header.header_crc32 {
        return damaged("wrong checksum of its header");
    }
    let Ok(layout) = header.get_partition_entry_array_layout() else {
        return damaged("impossible size of its entries");
    };
    let Some(entries_bytes) = layout.num_bytes_exact_as_usize().filter(|bytes| *bytes <= ENTRIES_BYTES_MAX)
    else {
        return damaged("too many entries");
    };
    let stored = layout.num_bytes_rounded_to_block_as_usize(block).unwrap_or(entries_bytes);
    let mut storage = vec![0; stored.max(ENTRY_BYTES)];
    let start = layout.start_lba.to_u64().checked_mul(block.to_u64());
    let inside =
        start.and_then(|start| start.checked_add(stored as u64)).is_some_and(|end| end <= disk.bytes());
    let Some(start) = start.filter(|_| inside) else { return damaged("its entries lie outside the disk") };
    disk.read(start, storage.get_mut(..stored).unwrap_or_default())?;
    let Ok(entries) = GptPartitionEntryArray::new(layout, block, &mut storage) else {
        return damaged("impossible size of its entries");
    };
    let checksum: Crc32 = entries.calculate_crc32();
    if checksum != header.partition_entry_array_crc32 {
        return damaged("wrong checksum of its entries");
    }
    let entry = |index| {
        let entry: &GptPartitionEntry = entries.get_partition_entry(index)?;
        entry.is_used().then(|| partition(entry, block, disk.bytes())).flatten()
    };
    Ok(Ok(Some((0..layout.num_entries).filter_map(entry).collect())))
}

/// The partition of an entry; `None` when it does not lie within the disk.
fn partition(entry: &GptPartitionEntry, block: BlockSize, disk_bytes: u64) -> Option<Partition> {
    let range = entry.lba_range()?;
    let at = range.start().to_u64().checked_mul(block.to_u64())?;
    let bytes = range.num_bytes(block)?;
    let name = entry.name;
    (at.checked_add(bytes)? <= disk_bytes).then(|| Partition { name: name.chars().collect(), at, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK_BLOCKS: usize = 128;

    /// CRC-32 as in the specification, bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 }
            })
        })
    }

    /// A disk with a table of four entries and its copy, written out field by field.
    fn disk(block: usize, partitions: &[(&str, u64, u64)]) -> Vec<u8> {
        let mut entries = vec![0; 4 * ENTRY_BYTES];
        for (entry, (name, first, last)) in entries.chunks_mut(ENTRY_BYTES).zip(partitions) {
            entry[..32].fill(0x42);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
            for (place, unit) in entry[56..].chunks_mut(2).zip(name.encode_utf16()) {
                place.copy_from_slice(&unit.to_le_bytes());
            }
        }
        let header = |own: u64, other: u64, table: u64| {
            let mut header = b"EFI PART\0\0\x01\0".to_vec();
            for word in [92, 0, 0] {
                header.extend(u32::to_le_bytes(word));
            }
            for lba in [own, other, 34, 100] {
                header.extend(lba.to_le_bytes());
            }
            header.extend([7; 16]);
            header.extend(table.to_le_bytes());
            for word in [4, ENTRY_BYTES as u32, crc32(&entries)] {
                header.extend(word.to_le_bytes());
            }
            let checksum = crc32(&header);
            header[16..20].copy_from_slice(&checksum.to_le_bytes());
            header
        };
        let last = DISK_BLOCKS as u64 - 1;
        let mut disk = vec![0; DISK_BLOCKS * block];
        let mut put =
            |lba: u64, bytes: &[u8]| disk[lba as usize * block..][..bytes.len()].copy_from_slice(bytes);
        put(1, &header(1, last, 2));
        put(2, &entries);
        put(last - 1, &entries);
        put(last, &header(last, 1, last - 1));
        disk
    }

    fn found(disk: &[u8]) -> Result<Option<Vec<Partition>>, String> {
        read(&mut &*disk)
    }

    #[test]
    fn partitions_are_found_by_name_whatever_the_sectors_size() {
        for block in [512, 4096] {
            let disk = disk(block, &[("EFI", 40, 49), ("nestling-images", 50, 99)]);
            let partitions = found(&disk).unwrap().unwrap();
            let block = block as u64;
            let images = Partition { name: "nestling-images".into(), at: 50 * block, bytes: 50 * block };
            assert_eq!((partitions.len(), &partitions[1]), (2, &images));
        }
    }

    #[test]
    fn a_damaged_table_is_replaced_by_its_copy_and_not_believed_without_one() {
        let whole = disk(512, &[("one", 40, 49)]);
        for place in [512 + 60, 512 + 17, 1024 + 33] {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            assert_eq!(found(&damaged).unwrap().unwrap().len(), 1, "{place}");
            let copy = (DISK_BLOCKS - 1) * 512;
            damaged[copy + 60] ^= 1;
            let error = found(&damaged).unwrap_err();
            assert!(
                error.starts_with("the partition table at byte 512 is damaged: wrong checksum"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_disk_without_a_table_has_none_and_partitions_outside_the_disk_are_left_out() {
        for bytes in [0, 1, 512, 600, 65536] {
            assert_eq!(found(&vec![0; bytes]), Ok(None));
        }
        let disk = disk(512, &[("outside", 100, 4000), ("backwards", 60, 50), ("good", 40, 41)]);
        let names: Vec<String> = found(&disk).unwrap().unwrap().into_iter().map(|found| found.name).collect();
        assert_eq!(names, ["good"]);
    }

    proptest! {
        #[test]
        fn whatever_the_table_says_every_partition_lies_within_the_disk(
            fields in prop::collection::vec((0..92_usize, any::<u8>()), 0..8),
            entry in prop::collection::vec(any::<u8>(), ENTRY_BYTES),
        ) {
            let mut disk = disk(512, &[("one", 40, 49)]);
            disk[1024..1024 + ENTRY_BYTES].copy_from_slice(&entry);
            for (at, value) in fields {
                disk[512 + at] = value;
            }
            let entries = crc32(&disk[1024..1024 + 4 * ENTRY_BYTES]);
            disk[512 + 88..512 + 92].copy_from_slice(&entries.to_le_bytes());
            disk[512 + 16..512 + 20].fill(0);
            let header = crc32(&disk[512..512 + 92]);
            disk[512 + 16..512 + 20].copy_from_slice(&header.to_le_bytes());
            for partition in found(&disk).unwrap_or_default().unwrap_or_default() {
                prop_assert!(partition.at + partition.bytes <= disk.len() as u64);
            }
        }
    }
}
