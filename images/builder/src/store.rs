//! Stores of images: a bundle of several images in a file, on a whole disk, or in the GPT partition `nestling-images` of a disk (UEFI 2.10, 5.3).
//!
//! Whatever interrupts a change, what is left is a store: an image appears with the one block that begins it, written last, and a file from
//! which something is taken away is written anew beside the old one, which a running node may still read. Only on a disk, where there is
//! no room for a second store, an interrupted removal loses the images behind the removed one.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use anyhow::{Context, Error, Result, bail};
use nestling_storage::partitions;
use nestling_storage::source::Source;

use crate::bundle::{BLOCK, END, Found, Window, find, verify};

/// The partition's name.
pub const PARTITION: &str = "nestling-images";
/// How much is copied at once.
const CHUNK: usize = 4 << 20;

/// An open store.
struct Store {
    file: File,
    base: u64,
    /// Bytes there are for it; a file may grow.
    room: Option<u64>,
}

/// The images of a store or a bundle.
///
/// # Errors
/// When it is none, or is damaged.
pub fn list(path: &Path) -> Result<Vec<Found>> {
    let told = || path.display().to_string();
    let store = Store::open(path, false).with_context(told)?;
    Ok(store.find().with_context(told)?.0)
}

/// Adds the images of `bundles` to the store at `path`, a file that is made if it is not there. With `replace` an image takes the place of one
/// of the same name. Returns the names of those added.
///
/// # Errors
/// When a bundle is damaged or the store has an image of that name or no room. The store is as it was then, unless it could not be written.
pub fn add(path: &Path, bundles: &[impl AsRef<Path>], replace: bool) -> Result<Vec<String>> {
    let mut added: Vec<(File, Found)> = Vec::new();
    for bundle in bundles {
        let bundle = bundle.as_ref();
        let told = || bundle.display().to_string();
        let source = Store::open(bundle, false).with_context(told)?;
        // `cat` makes one bundle of several, with zeros between them.
        let (images, _) = find(source.window()?, source.room.is_none()).with_context(told)?;
        if images.is_empty() {
            bail!("{} holds no image", bundle.display());
        }
        for image in images {
            verify(&source.file, source.base, &image).with_context(told)?;
            if added.iter().any(|(_, other)| other.name == image.name) {
                bail!("the image {} is there twice", image.name);
            }
            let start = source.base + image.start;
            added.push((source.file.try_clone()?, Found { start, ..image }));
        }
    }
    let told = || path.display().to_string();
    let is_new = !path.exists();
    if is_new {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        folder.map_or(Ok(()), fs::create_dir_all).with_context(told)?;
        // In one step, so that another command that makes it at the same time is not disturbed.
        match File::create_new(path) {
            Ok(file) => file.write_all_at(&END, 0).with_context(told)?,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(told),
        }
    }
    let mut store = Store::open(path, true).with_context(told)?;
    let (images, end) = store.find().with_context(told)?;
    let is_added = |image: &Found| added.iter().any(|(_, other)| other.name == image.name);
    let (old, kept): (Vec<_>, Vec<_>) = images.into_iter().partition(is_added);
    if let Some(image) = old.first().filter(|_| !replace) {
        bail!(
            "{} has an image {} already; --replace puts the new one in its place",
            path.display(),
            image.name
        );
    }
    let freed = old.iter().map(Found::size).sum::<u64>();
    let needed = end - freed + added.iter().map(|(_, image)| image.size()).sum::<u64>() + END.len() as u64;
    if let Some(room) = store.room.filter(|&room| room < needed) {
        bail!(
            "{} has {} MiB, and the images need {} MiB",
            path.display(),
            room >> 20,
            needed.div_ceil(1 << 20)
        );
    }
    let write = |store: &Store, mut end: u64| -> Result<()> {
        for (source, image) in &added {
            end = store.append(end, source, image)?;
        }
        Ok(())
    };
    if old.is_empty() {
        write(&store, end).with_context(told)?;
    } else if store.room.is_none() {
        store.rewrite(path, &kept, write).with_context(told)?;
    } else {
        let end = store.take_away(&kept, end).with_context(told)?;
        write(&store, end).with_context(told)?;
    }
    Ok(added.into_iter().map(|(_, image)| image.name).collect())
}

/// Takes the image `name` out of the store at `path`.
///
/// # Errors
/// When it is not there, or the store cannot be written.
pub fn remove(path: &Path, name: &str) -> Result<()> {
    let told = || path.display().to_string();
    let mut store = Store::open(path, true).with_context(told)?;
    let (images, end) = store.find().with_context(told)?;
    let names: Vec<_> = images.iter().map(|image| image.name.clone()).collect();
    let (old, kept): (Vec<_>, Vec<_>) = images.into_iter().partition(|image| image.name == name);
    if old.is_empty() {
        let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        bail!("{} has no image {name}; it has: {names}", path.display());
    }
    if store.room.is_none() {
        store.rewrite(path, &kept, |_, _| Ok(())).with_context(told)
    } else {
        store.take_away(&kept, end).map(drop).with_context(told)
    }
}

impl Store {
    fn open(path: &Path, write: bool) -> Result<Self> {
        let mut file = File::options().read(true).write(write).open(path)?;
        let is_device = file.metadata()?.file_type().is_block_device();
        // Commands that change a store wait for one another.
        if write {
            file.lock()?;
        }
        let len = file.seek(SeekFrom::End(0))?;
        match partition(&file, len)? {
            Some((base, len)) => Ok(Self { file, base, room: Some(len) }),
            None => Ok(Self { file, base: 0, room: is_device.then_some(len) }),
        }
    }

    /// Its images, and where they end. Anything may be behind the blocks of zeros at its end: the rest of a disk, or of an addition that
    /// was interrupted.
    fn find(&self) -> Result<(Vec<Found>, u64)> {
        find(self.window()?, false)
    }

    fn window(&self) -> Result<Window<'_>> {
        let len = match self.room {
            Some(room) => room,
            None => self.file.metadata()?.len(),
        };
        Ok(Window::new(&self.file, self.base, len))
    }

    /// Adds an image at the end; the new end.
    fn append(&self, end: u64, source: &File, image: &Found) -> Result<u64> {
        let to = self.base + end;
        let next = end + image.len;
        // First, for an image that is moved down its old place may be overwritten by the rest.
        let mut first = [0; BLOCK as usize];
        source.read_exact_at(&mut first, image.start)?;
        copy(source, image.start + BLOCK, &self.file, to + BLOCK, image.len - BLOCK)?;
        self.file.write_all_at(&END, self.base + next)?;
        self.file.sync_data()?;
        self.file.write_all_at(&first, to)?;
        self.file.sync_data()?;
        Ok(next)
    }

    /// Writes a file with the images `kept` and what `more` adds, and puts it in the place of the old one.
    fn rewrite(
        &mut self,
        path: &Path,
        kept: &[Found],
        more: impl FnOnce(&Store, u64) -> Result<()>,
    ) -> Result<()> {
        let path = path.canonicalize()?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let new = tempfile::Builder::new().prefix(".nestling-images-").tempfile_in(folder)?;
        new.as_file().set_permissions(self.file.metadata()?.permissions())?;
        let store = Store { file: new.as_file().try_clone()?, base: 0, room: None };
        store.file.write_all_at(&END, 0)?;
        let mut end = 0;
        for image in kept {
            end = store.append(end, &self.file, image)?;
        }
        more(&store, end)?;
        new.persist(path)?;
        Ok(())
    }

    /// Moves the images `kept` to the front of a disk; the new end.
    fn take_away(&mut self, kept: &[Found], end: u64) -> Result<u64> {
        let mut at = 0;
        for image in kept {
            if image.start != at {
                // What follows is no longer where it was: end the store here until it is whole again.
                self.file.write_all_at(&END, self.base + at)?;
                self.file.sync_data()?;
                let moved = Found { start: self.base + image.start, ..image.clone() };
                self.append(at, &self.file, &moved)?;
            }
            at += image.len;
        }
        if at < end {
            self.file.write_all_at(&END, self.base + at)?;
            self.file.sync_data()?;
        }
        Ok(at)
    }
}

/// Copies bytes, from the front: what is moved down within a file is not overwritten before it is read.
fn copy(from: &File, mut at: u64, to: &File, mut place: u64, len: u64) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut left = len;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        from.read_exact_at(&mut buffer[..most], at)?;
        to.write_all_at(&buffer[..most], place)?;
        (at, place, left) = (at + most as u64, place + most as u64, left - most as u64);
    }
    Ok(())
}

/// Place and length of the partition of images, if this is a disk with partitions.
fn partition(file: &File, len: u64) -> Result<Option<(u64, u64)>> {
    let Some(partitions) = partitions::read(&mut Disk { file, len }).map_err(Error::msg)? else {
        return Ok(None);
    };
    let found = partitions.iter().find(|partition| partition.name == PARTITION);
    let found = found.with_context(|| format!("the disk has no partition named {PARTITION}"))?;
    Ok(Some((found.at, found.bytes)))
}

/// A file, as the node's own reader of partition tables wants it.
struct Disk<'a> {
    file: &'a File,
    len: u64,
}

impl Source for Disk<'_> {
    fn bytes(&self) -> u64 {
        self.len
    }

    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String> {
        self.file.read_exact_at(into, at).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;
    use crate::testing::bundle;

    fn names(path: &Path) -> Vec<String> {
        list(path).unwrap().into_iter().map(|image| image.name).collect()
    }

    /// What GNU tar lists of an archive at the beginning of a file, which it may refuse to end well when something follows.
    fn tar(path: &Path) -> Vec<String> {
        let output = Command::new("tar").arg("tf").arg(path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    fn members(names: &[&str]) -> Vec<String> {
        let files = ["image.json", "vmlinuz", "initramfs.cpio", "disk.img"];
        names.iter().flat_map(|name| files.map(|file| format!("{name}/{file}"))).collect()
    }

    /// A disk of this size with a GPT whose second partition is the store's.
    fn disk(path: &Path, mib: u64) {
        let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        file.set_len(mib << 20).unwrap();
        gpt::mbr::ProtectiveMBR::with_lb_size((mib << 11) as u32 - 1).overwrite_lba0(&mut file).unwrap();
        let mut disk = gpt::GptConfig::new().writable(true).create_from_device(file, None).unwrap();
        disk.add_partition("other", 1 << 20, gpt::partition_types::LINUX_FS, 0, None).unwrap();
        disk.add_partition(PARTITION, (mib - 3) << 20, gpt::partition_types::LINUX_FS, 0, None).unwrap();
        disk.write().unwrap();
    }

    /// Adds, replaces and removes images, in a file or in a partition.
    fn exercise(store: &Path, folder: &Path, listed: impl Fn() -> Vec<String>) {
        let bundles: Vec<PathBuf> = ["a", "b", "c"].map(|name| bundle(folder, name, true)).into();
        assert_eq!(add(store, &bundles, false).unwrap(), ["a", "b", "c"]);
        assert_eq!(
            (names(store), listed()),
            (vec!["a".into(), "b".into(), "c".into()], members(&["a", "b", "c"]))
        );
        let error = add(store, &bundles[1..2], false).unwrap_err().to_string();
        assert!(error.contains("--replace"), "{error}");
        add(store, &bundles[1..2], true).unwrap();
        assert_eq!(listed(), members(&["a", "c", "b"]));
        remove(store, "a").unwrap();
        assert_eq!(listed(), members(&["c", "b"]));
        let again = tempfile::tempdir().unwrap();
        // What was moved is whole: adding proves the sums.
        add(&again.path().join("copy.tar"), &[store], false).unwrap();
        let error = remove(store, "a").unwrap_err().to_string();
        assert!(error.contains("it has: c, b"), "{error}");
        remove(store, "b").unwrap();
        remove(store, "c").unwrap();
        assert_eq!(names(store), Vec::<String>::new());
        add(store, &bundles[..1], false).unwrap();
        assert_eq!(listed(), members(&["a"]));
    }

    #[test]
    fn images_come_and_go_in_a_file_that_tar_lists() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("new/images.tar");
        exercise(&store, folder.path(), || tar(&store));
        assert_eq!(
            fs::read_dir(folder.path().join("new")).unwrap().count(),
            1,
            "nothing is left beside the store"
        );
    }

    #[test]
    fn images_come_and_go_in_a_partition_that_tar_lists() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        disk(&path, 64);
        let part = folder.path().join("partition");
        exercise(&path, folder.path(), || {
            let (base, len) = partition(&File::open(&path).unwrap(), 64 << 20).unwrap().unwrap();
            let to = File::create(&part).unwrap();
            copy(&File::open(&path).unwrap(), base, &to, 0, len).unwrap();
            tar(&part)
        });
    }

    #[test]
    fn a_partition_too_small_is_told_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        disk(&path, 5);
        let before = fs::read(&path).unwrap();
        let error = format!("{:#}", add(&path, &[bundle(folder.path(), "a", true)], false).unwrap_err());
        assert!(error.contains("the images need"), "{error}");
        assert!(fs::read(&path).unwrap() == before);
    }

    #[test]
    fn a_damaged_bundle_is_not_added() {
        let folder = tempfile::tempdir().unwrap();
        let (store, path) = (folder.path().join("images.tar"), bundle(folder.path(), "a", true));
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        for (bytes, expected) in [
            (&damaged[..], "SHA-256"),
            (&whole[..whole.len() - 5000], "cut off"),
            (&whole[..3000], "cut off"),
            (b"hello", "not an archive"),
            (&[7; 2000], "not an archive"),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", add(&store, &[&path], false).unwrap_err());
            assert!(error.contains(expected), "{expected}: {error}");
            assert!(!store.exists());
        }
    }

    #[test]
    fn bundles_one_after_another_are_read_and_stored_as_one_archive() {
        let folder = tempfile::tempdir().unwrap();
        let both = folder.path().join("both.tar");
        let parts = ["a", "b"].map(|name| fs::read(bundle(folder.path(), name, true)).unwrap());
        fs::write(&both, parts.concat()).unwrap();
        let store = folder.path().join("images.tar");
        assert_eq!(add(&store, &[both], false).unwrap(), ["a", "b"]);
        assert_eq!(tar(&store), members(&["a", "b"]));
    }

    #[test]
    fn an_addition_that_was_interrupted_leaves_the_store_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("images.tar");
        add(&store, &[bundle(folder.path(), "a", true)], false).unwrap();
        let end = Store::open(&store, true).unwrap().find().unwrap().1;
        let file = File::options().write(true).open(&store).unwrap();
        // All of another image but its first block, as an interrupted `append` leaves it.
        let other = fs::read(bundle(folder.path(), "b", true)).unwrap();
        file.write_all_at(&other[512..], end + 512).unwrap();
        assert_eq!(names(&store), ["a"]);
        add(&store, &[bundle(folder.path(), "c", true)], false).unwrap();
        assert_eq!(tar(&store), members(&["a", "c"]));
    }
}
