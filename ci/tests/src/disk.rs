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
