//! Images whose machines have a disk: `minimal`'s kernel and initramfs with an ext4 file system, made by mke2fs.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use tar::{Archive, Builder, Header};

/// The image's name.
pub const NAME: &str = "disk";
/// Where the file system has the sums of its files, as sha256sum writes them.
pub const SUMS: &str = "sums";

/// A file system of `mib` MiB with `data_mib` MiB of data in files and their sums.
///
/// # Panics
/// When mke2fs is not there or refuses.
pub fn file_system(mib: u32, data_mib: u32) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("data")).expect("a folder can be made");
    // Numbers that look random and are the same everywhere (Marsaglia, "Xorshift RNGs").
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    for number in 0..data_mib {
        let words = (0..1 << 17).flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        let bytes: Vec<u8> = words.collect();
        fs::write(tree.join(format!("data/{number}")), bytes).expect("a file can be written");
    }
    let sums = Command::new("sh").arg("-c").arg("sha256sum data/*").current_dir(&tree).output();
    fs::write(tree.join(SUMS), sums.expect("sha256sum runs").stdout).expect("a file can be written");
    let file = folder.path().join("disk.img");
    let made = Command::new("/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-b", "4096", "-E", "root_owner=0:0,lazy_itable_init=0", "-d"])
        .args([&tree, &file])
        .arg(format!("{mib}M"))
        .status();
    assert!(made.expect("mke2fs runs").success());
    fs::read(&file).expect("mke2fs has made a file")
}

/// Writes a bundle of the images in the file `minimal` and of one with this disk to `path`, and returns `path`.
///
/// # Panics
/// When a file cannot be read or written.
pub fn bundle(path: &Path, minimal: &Path, disk: &[u8], free_mib: u32) -> PathBuf {
    let bytes = fs::read(minimal).expect("the minimal image can be read");
    let mut bundle = Builder::new(Vec::new());
    for member in Archive::new(bytes.as_slice()).entries().expect("the minimal image is a tar") {
        let mut member = member.expect("the minimal image is whole");
        let name = member.path().expect("a member has a path").display().to_string();
        let mut contents = Vec::new();
        member.read_to_end(&mut contents).expect("the minimal image is whole");
        append(&mut bundle, &name, &contents);
        let Some(file) = name.strip_prefix("minimal/") else { continue };
        if file == "image.json" {
            let mut image: serde_json::Value = serde_json::from_slice(&contents).expect("image.json is JSON");
            image["name"] = NAME.into();
            image["disk"] = "disk.img".into();
            image["disk_free_mib"] = free_mib.into();
            contents = image.to_string().into_bytes();
        }
        append(&mut bundle, &format!("{NAME}/{file}"), &contents);
    }
    append(&mut bundle, &format!("{NAME}/disk.img"), disk);
    fs::write(path, bundle.into_inner().expect("the bundle ends")).expect("the bundle can be written");
    path.to_owned()
}

/// Writes a disk with a GUID partition table (UEFI specification, 5.3) to `path`: the store in the file `store` and `scratch_mib` MiB of scratch
/// space. Returns `path`.
///
/// # Panics
/// When a file cannot be read or written.
pub fn partitioned(path: &Path, store: &Path, scratch_mib: u64) -> PathBuf {
    let bytes = fs::read(store).expect("the store can be read");
    let sectors = |bytes: u64| bytes.div_ceil(1 << 20) * 2048;
    let store_sectors = sectors(bytes.len() as u64);
    let scratch_at = 2048 + store_sectors;
    let end = scratch_at + scratch_mib * 2048;
    let partitions = [("nestling-images", 2048, scratch_at - 1), ("nestling-scratch", scratch_at, end - 1)];
    let mut entries = vec![0; 128 * 128];
    for (entry, (name, first, last)) in entries.chunks_mut(128).zip(partitions) {
        // Linux data (0FC63DAF-8483-4772-8E79-3D69D8477DE4), and a GUID of its own.
        entry[..16].copy_from_slice(&0xE47D_47D8_693D_798E_4772_8483_0FC6_3DAF_u128.to_le_bytes());
        entry[16..32].copy_from_slice(&u128::from(first).to_le_bytes());
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
        for (place, unit) in entry[56..].chunks_mut(2).zip(name.encode_utf16()) {
            place.copy_from_slice(&unit.to_le_bytes());
        }
    }
    let mut header = b"EFI PART\0\0\x01\0".to_vec();
    [92_u32, 0, 0].iter().for_each(|word| header.extend(word.to_le_bytes()));
    [1, end + 2047, 34, end].iter().for_each(|lba| header.extend(lba.to_le_bytes()));
    header.extend([0x77; 16]);
    header.extend(2_u64.to_le_bytes());
    [128, 128, crc32(&entries)].iter().for_each(|word: &u32| header.extend(word.to_le_bytes()));
    let checksum = crc32(&header);
    header[16..20].copy_from_slice(&checksum.to_le_bytes());

    let mut disk = vec![0; 1 << 20];
    disk[512..512 + header.len()].copy_from_slice(&header);
    disk[1024..1024 + entries.len()].copy_from_slice(&entries);
    disk.extend(bytes);
    fs::write(path, disk).expect("the disk can be written");
    let file = fs::OpenOptions::new().write(true).open(path).expect("the disk can be opened");
    file.set_len((end + 2048) * 512).expect("the disk can grow");
    path.to_owned()
}

/// CRC-32, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xEDB8_8320 } else { 0 })
    })
}

/// QEMU's arguments for a virtio disk of L1 at `path` that it may write to.
pub fn writable_drive(path: &Path) -> [String; 4] {
    let drive = format!("file={},if=none,id=store,format=raw,cache=unsafe", path.display());
    ["-drive".into(), drive, "-device".into(), "virtio-blk-pci,drive=store".into()]
}

/// QEMU's arguments for a virtio disk of L1 with the bundle at `path`. Nobody writes to it.
pub fn drive(path: &Path) -> [String; 4] {
    let drive = format!("file={},if=none,id=store,format=raw,readonly=on", path.display());
    ["-drive".into(), drive, "-device".into(), "virtio-blk-pci,drive=store".into()]
}

fn append(bundle: &mut Builder<Vec<u8>>, name: &str, contents: &[u8]) {
    let mut header = Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(contents.len() as u64);
    bundle.append_data(&mut header, name, contents).expect("a member is appended");
}
