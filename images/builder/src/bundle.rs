//! Bundles: one uncompressed ustar archive (POSIX.1-1988) of `NAME/image.json`, `NAME/vmlinuz`, `NAME/initramfs.cpio` and, where the root is
//! on a disk, `NAME/disk.img`, in this order. `images/README.md` documents it for users.

use std::fs::{File, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tar::{Archive, EntryType, Header};

use crate::ext4;
use crate::tree::Tree;

/// Bytes of an archive's block.
pub(crate) const BLOCK: u64 = 512;
/// What ends an archive.
pub(crate) const END: [u8; 2 * BLOCK as usize] = [0; 2 * BLOCK as usize];
/// Most bytes of a manifest, as the node has it.
const MAX_MANIFEST: u64 = 64 * 1024;
/// Longest name of an image.
const MAX_NAME: usize = 64;

/// An image, to be written as a bundle.
pub struct Image {
    /// What a job's `image` names.
    pub name: String,
    /// What it says of its version.
    pub version: String,
    /// The kernel's command line.
    pub command_line: String,
    /// The kernel, a bzImage.
    pub kernel: Vec<u8>,
    /// The initramfs, uncompressed.
    pub initramfs: Vec<u8>,
    /// The root file system, if it is not the initramfs.
    pub disk: Option<Disk>,
}

/// A root file system on a disk.
pub struct Disk {
    /// The root.
    pub root: Tree,
    /// What a machine's disk has beyond it, in MiB.
    pub free_mib: u32,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the bundle.
    pub size: u64,
    /// Bytes of `disk.img`.
    pub disk: Option<u64>,
}

/// Refuses a name that no image can have.
///
/// # Errors
/// What a name is made of.
pub fn check_name(name: &str) -> Result<()> {
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !plain || name.len() > MAX_NAME || !name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        bail!(
            "`{name}` cannot be an image's name; use up to {MAX_NAME} letters, digits, `.`, `_` and `-`, a letter or digit first"
        );
    }
    Ok(())
}

impl Image {
    /// Writes the bundle into `out`, an empty file that can be read too. `progress` is told bytes of the disk's files written, and of all.
    ///
    /// # Errors
    /// When the name cannot be an image's, a file of the root cannot be read, or `out` cannot be written.
    pub fn write(&self, out: &File, progress: &mut dyn FnMut(u64, u64)) -> Result<Written> {
        check_name(&self.name)?;
        let mut sums = BTreeMap::from([
            ("vmlinuz", crate::sha256(&self.kernel)),
            ("initramfs.cpio", crate::sha256(&self.initramfs)),
        ]);
        if self.disk.is_some() {
            // The manifest comes first and is as long with the sum that is not known yet.
            sums.insert("disk.img", "0".repeat(64));
        }
        let padded = |len: usize| (len as u64).next_multiple_of(BLOCK);
        let manifest = self.manifest(&sums)?;
        let mut end =
            3 * BLOCK + padded(manifest.len()) + padded(self.kernel.len()) + padded(self.initramfs.len());
        let mut disk_size = None;
        if let Some(disk) = &self.disk {
            let start = end + BLOCK;
            let size = ext4::write(&disk.root, out, start, progress)?.size;
            out.write_all_at(self.header("disk.img", size)?.as_bytes(), end)?;
            sums.insert("disk.img", crate::hex(&sum(out, start, size)?));
            (end, disk_size) = (start + size, Some(size));
        }
        let mut at = 0;
        let manifest = self.manifest(&sums)?;
        for (name, bytes) in
            [("image.json", &manifest), ("vmlinuz", &self.kernel), ("initramfs.cpio", &self.initramfs)]
        {
            out.write_all_at(self.header(name, bytes.len() as u64)?.as_bytes(), at)?;
            out.write_all_at(bytes, at + BLOCK)?;
            at += BLOCK + padded(bytes.len());
        }
        out.write_all_at(&END, end)?;
        Ok(Written { size: end + END.len() as u64, disk: disk_size })
    }

    /// Writes the bundle to `path`, where nobody sees it before it is whole.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn write_to(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Written> {
        let told = || format!("cannot write {}", path.display());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Unlike other temporary files, it is for whoever may read what its user writes.
        let new = tempfile::Builder::new()
            .prefix(".nestling-image-")
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .with_context(told)?;
        let written = self.write(new.as_file(), progress).with_context(told)?;
        new.persist(path).with_context(told)?;
        Ok(written)
    }

    fn manifest(&self, sums: &BTreeMap<&str, String>) -> Result<Vec<u8>> {
        let mut manifest = json!({
            "name": self.name,
            "version": self.version,
            "kernel": "vmlinuz",
            "initramfs": "initramfs.cpio",
            "cmdline": self.command_line,
            "sha256": sums,
        });
        if let Some(disk) = &self.disk {
            manifest["disk"] = "disk.img".into();
            manifest["disk_free_mib"] = disk.free_mib.into();
        }
        Ok(serde_json::to_vec_pretty(&manifest)?)
    }

    fn header(&self, file: &str, size: u64) -> Result<Header> {
        let mut header = Header::new_ustar();
        header.set_path(format!("{}/{file}", self.name))?;
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        // Beyond 8 GiB it writes GNU tar's base-256.
        header.set_size(size);
        header.set_cksum();
        Ok(header)
    }
}

/// An image found in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// What it says of its version.
    pub version: String,
    /// Bytes of its root file system, if that is on a disk.
    pub disk: Option<u64>,
    /// Where its members begin in the archive, and their length with heads and padding.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Each file's place, length and SHA-256.
    pub(crate) files: Vec<(String, u64, u64, String)>,
}

impl Found {
    /// Bytes it takes in an archive.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len
    }
}

/// `image.json`.
#[derive(Deserialize)]
struct Manifest {
    name: String,
    version: String,
    kernel: String,
    initramfs: String,
    disk: Option<String>,
    #[serde(default)]
    sha256: BTreeMap<String, String>,
}

/// A part of a file, as a file of its own.
#[derive(Clone)]
pub(crate) struct Window<'a> {
    pub(crate) file: &'a File,
    pub(crate) base: u64,
    pub(crate) len: u64,
    at: u64,
}

impl<'a> Window<'a> {
    pub(crate) fn new(file: &'a File, base: u64, len: u64) -> Self {
        Self { file, base, len, at: 0 }
    }
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let most = left.min(buffer.len());
        let len = self.file.read_at(&mut buffer[..most], self.base + self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Window<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

/// The images of an archive and where it ends. `through_zeros`: whether blocks of zeros may be followed by another archive.
///
/// # Errors
/// When it is no archive of images, or is cut off.
pub(crate) fn find(archive: Window<'_>, through_zeros: bool) -> Result<(Vec<Found>, u64)> {
    let (file, base, len) = (archive.file, archive.base, archive.len);
    let mut images: Vec<Found> = Vec::new();
    let mut end = 0;
    let mut archive = Archive::new(archive);
    archive.set_ignore_zeros(through_zeros);
    for entry in archive.entries_with_seek()? {
        let entry = entry.context("it is not an archive of images, or is damaged")?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let (start, data, size) = (entry.raw_header_position(), entry.raw_file_position(), entry.size());
        if data.checked_add(size).is_none_or(|end| end > len) {
            bail!("it is cut off in the middle of {path}");
        }
        let Some((folder, member)) = path.split_once('/').filter(|_| entry.header().entry_type().is_file())
        else {
            bail!("{path} is no file of an image");
        };
        let next = (data + size).next_multiple_of(BLOCK);
        if member == "image.json" {
            let manifest = manifest(file, base + data, size).with_context(|| path.clone())?;
            if manifest.name != folder {
                bail!("{path} says that it is the image {}", manifest.name);
            }
            check_name(folder)?;
            let wanted = [Some(manifest.kernel), Some(manifest.initramfs), manifest.disk.clone()];
            let sum = |name: String| (manifest.sha256.get(&name).cloned().unwrap_or_default(), name);
            let files = wanted.into_iter().flatten().map(sum).map(|(sum, name)| (name, 0, 0, sum)).collect();
            let image = Found {
                name: folder.to_owned(),
                version: manifest.version,
                disk: manifest.disk.map(|_| 0),
                start,
                len: 0,
                files,
            };
            images.push(image);
        }
        let Some(image) = images.last_mut().filter(|image| image.name == folder) else {
            bail!("{path} comes before {folder}/image.json");
        };
        if image.len != 0 && image.start + image.len != start {
            bail!("the files of the image {folder} do not follow one another");
        }
        image.len = next - image.start;
        if let Some(place) = image.files.iter_mut().find(|place| place.0 == member) {
            (place.1, place.2) = (data, size);
            if member == "disk.img" {
                image.disk = Some(size);
            }
        }
        end = next;
    }
    if let Some((image, file)) =
        images.iter().find_map(|image| Some((image, image.files.iter().find(|file| file.1 == 0)?)))
    {
        bail!("the image {} has no {}: it is cut off or damaged", image.name, file.0);
    }
    Ok((images, end))
}

fn manifest(file: &File, at: u64, size: u64) -> Result<Manifest> {
    if size > MAX_MANIFEST {
        bail!("it has more than {MAX_MANIFEST} bytes");
    }
    let mut text = vec![0; size as usize];
    file.read_exact_at(&mut text, at)?;
    serde_json::from_slice(&text).context("it is not the description of an image")
}

/// Proves the SHA-256 sums that an image's manifest gives.
///
/// # Errors
/// When a file is not as its sum says; the message names it.
pub(crate) fn verify(file: &File, base: u64, image: &Found) -> Result<()> {
    for (name, place, size, expected) in &image.files {
        if crate::hex(&sum(file, base + place, *size)?) != *expected {
            bail!("{}/{name} is damaged: its SHA-256 is not what image.json says", image.name);
        }
    }
    Ok(())
}

/// SHA-256 of a part of a file.
fn sum(file: &File, start: u64, len: u64) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut part = Window::new(file, start, len);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match part.read(&mut buffer)? {
            0 if part.at == len => return Ok(hash.finalize().into()),
            0 => bail!("it is cut off"),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// The file `member` of the image `name` in the bundle `file`.
///
/// # Errors
/// When it is not there, or larger than `limit` bytes.
pub fn member(file: &File, name: &str, member: &str, limit: u64) -> Result<Vec<u8>> {
    let (images, _) = find(Window::new(file, 0, file.metadata()?.len()), true)?;
    let files =
        images.into_iter().find(|image| image.name == name).map(|image| image.files).unwrap_or_default();
    let place = files.into_iter().find(|place| place.0 == member);
    let (_, start, len, _) = place.with_context(|| format!("it has no {name}/{member}"))?;
    if len > limit {
        bail!("{name}/{member} has {len} bytes, more than {limit}");
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::testing::{bundle, image};

    #[test]
    fn a_bundle_is_listed_by_tar_describes_itself_first_and_says_nothing_of_its_builder() {
        let folder = tempfile::tempdir().unwrap();
        let path = bundle(folder.path(), "small", true);
        let listed = Command::new("tar").arg("tvf").arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&listed.stdout);
        assert!(listed.status.success() && listed.stderr.is_empty(), "{listed:?}");
        let names: Vec<_> = text.lines().filter_map(|line| line.split(' ').next_back()).collect();
        assert_eq!(names, ["small/image.json", "small/vmlinuz", "small/initramfs.cpio", "small/disk.img"]);
        assert!(text.lines().all(|line| line.contains(" 0/0 ") && line.contains("1970-01-01")), "{text}");
        let file = File::open(&path).unwrap();
        let manifest: serde_json::Value = {
            let (images, end) = find(Window::new(&file, 0, file.metadata().unwrap().len()), false).unwrap();
            verify(&file, 0, &images[0]).unwrap();
            assert_eq!((end + 1024, images[0].disk.unwrap() % 4096), (file.metadata().unwrap().len(), 0));
            let mut text = vec![0; 2000];
            file.read_at(&mut text, BLOCK).unwrap();
            let end = text.iter().position(|&byte| byte == 0).unwrap();
            serde_json::from_slice(&text[..end]).unwrap()
        };
        assert_eq!((&manifest["disk"], &manifest["disk_free_mib"]), (&"disk.img".into(), &2048.into()));
        assert_eq!(manifest["cmdline"], "quiet");
    }

    #[test]
    fn an_image_without_a_disk_has_three_files_and_says_nothing_of_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = bundle(folder.path(), "memory", false);
        let file = File::open(&path).unwrap();
        assert_eq!(member(&file, "memory", "initramfs.cpio", 100).unwrap(), b"initramfs");
        assert!(member(&file, "memory", "disk.img", 100).is_err());
        assert!(!String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("disk"));
    }

    #[test]
    fn the_same_image_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let one = std::fs::read(bundle(folder.path(), "same", true)).unwrap();
        let other = std::fs::read(bundle(folder.path(), "same", true)).unwrap();
        assert!(one == other);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", "../x", "a/b", ".hidden", "-x", "a b", &"n".repeat(65)] {
            let image = Image { name: name.into(), ..image("x", false) };
            assert!(image.write(&tempfile::tempfile().unwrap(), &mut |_, _| {}).is_err(), "{name}");
        }
    }
}
