//! Images that machines boot: from the modules the boot loader left in memory and from the store on the node's disk.
//!
//! Both are tar archives with members `NAME/image.json`, `NAME/vmlinuz`, `NAME/initramfs.cpio` and, for machines with a disk,
//! `NAME/disk.img`. A store stands at the beginning of the disk or of a partition named `nestling-images`. Headers are proven, which finds
//! truncated and damaged archives. The manifest's SHA-256 sums are reported and not proven here: the images came the same way as this
//! kernel, and hashing them would take longer than booting.

#![forbid(unsafe_code)]

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use nestling_api::types;
use nestling_storage::archive::{self, AfterEnd, Listing, Member};
use nestling_storage::partitions;
use nestling_storage::source::{Part, Source};
use nestling_storage::volume::Base;
use serde::Deserialize;

/// A manifest is a small file.
const MAX_MANIFEST_BYTES: u64 = 64 * 1024;
/// The most images a node keeps.
const MAX_IMAGES: usize = 256;
/// Free space that a machine gets on its disk unless the image says otherwise.
const DEFAULT_FREE_MIB: u32 = 2048;
/// The largest disk of an image.
const MAX_DISK_BYTES: u64 = 1 << 40;
/// The name of the partition that holds the store.
const STORE_PARTITION: &str = "nestling-images";

/// One image.
#[derive(Debug, Clone)]
pub struct Image {
    /// What a job's `image` names.
    pub name: String,
    /// The image's version.
    pub version: String,
    /// The kernel, a bzImage.
    pub kernel: &'static [u8],
    /// The initramfs, a cpio archive.
    pub initramfs: &'static [u8],
    /// The kernel's command line.
    pub command_line: String,
    /// SHA-256 of each file in hexadecimal, as the manifest has it.
    pub sha256: BTreeMap<String, String>,
    /// The disk its machines get, if they get one.
    pub disk: Option<ImageDisk>,
}

/// An image's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageDisk {
    /// What it holds.
    pub base: Base,
    /// Free space behind that, in MiB.
    pub free_mib: u32,
}

/// `image.json`.
#[derive(Deserialize)]
struct Manifest {
    name: String,
    version: String,
    kernel: String,
    initramfs: String,
    cmdline: String,
    #[serde(default)]
    sha256: BTreeMap<String, String>,
    #[serde(default)]
    disk: Option<String>,
    #[serde(default)]
    disk_free_mib: Option<u32>,
}

impl Image {
    /// Bytes of kernel, initramfs and disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let disk = self.disk.map_or(0, |disk| disk.base.bytes());
        (self.kernel.len() as u64).saturating_add(self.initramfs.len() as u64).saturating_add(disk)
    }

    /// What `GET /v1/images` tells of it.
    #[must_use]
    pub fn describe(&self) -> types::Image {
        types::Image {
            name: self.name.clone(),
            version: self.version.clone(),
            cmdline: self.command_line.clone(),
            size_bytes: self.bytes(),
            sha256: self.sha256.clone(),
        }
    }
}

/// A place that holds an archive of images.
trait Store {
    /// Its bytes, from the archive's beginning on.
    fn source(&mut self) -> &mut dyn Source;

    /// A file's content, in memory for as long as the node runs.
    fn keep(&mut self, member: &Member) -> Result<&'static [u8], String>;

    /// A file as the base of disks.
    fn base(&mut self, member: &Member) -> Result<Base, String>;
}

/// A module in memory.
struct Module(&'static [u8]);

impl Store for Module {
    fn source(&mut self) -> &mut dyn Source {
        &mut self.0
    }

    fn keep(&mut self, member: &Member) -> Result<&'static [u8], String> {
        let start = usize::try_from(member.at).ok();
        let end = usize::try_from(member.at.saturating_add(member.bytes)).ok();
        let content = start.zip(end).and_then(|(start, end)| self.0.get(start..end));
        content.ok_or_else(|| format!("{} does not lie within its module", member.name))
    }

    fn base(&mut self, member: &Member) -> Result<Base, String> {
        self.keep(member).map(Base::Memory)
    }
}

/// A range of the node's disk.
struct OnDisk<'a, 'b, S> {
    part: Part<'a, S>,
    memory: &'b mut dyn FnMut(u64) -> Option<&'static mut [u8]>,
}

impl<S: Source> Store for OnDisk<'_, '_, S> {
    fn source(&mut self) -> &mut dyn Source {
        &mut self.part
    }

    fn keep(&mut self, member: &Member) -> Result<&'static [u8], String> {
        let MemberSize { name, mib } = size_of(member);
        let memory = (self.memory)(member.bytes);
        let place = memory.and_then(|memory| memory.get_mut(..usize::try_from(member.bytes).ok()?));
        let place =
            place.ok_or_else(|| format!("{name}: the node has no {mib} MiB of memory to keep it in"))?;
        self.part.read(member.at, place)?;
        Ok(place)
    }

    fn base(&mut self, member: &Member) -> Result<Base, String> {
        let at = self.part.at.checked_add(member.at);
        let at = at.ok_or_else(|| format!("{} does not lie within the disk", member.name))?;
        Ok(Base::Disk { at, bytes: member.bytes })
    }
}

/// A file's name and size for people.
struct MemberSize<'a> {
    name: &'a str,
    mib: u64,
}

fn size_of(member: &Member) -> MemberSize<'_> {
    MemberSize { name: &member.name, mib: member.bytes.div_ceil(1 << 20) }
}

/// All images of a node, and a message for each place or image that cannot be used.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The images, by name.
    pub images: Vec<Image>,
    /// What is wrong, for people.
    pub problems: Vec<String>,
}

impl Catalog {
    /// Adds the images of boot module number `index`.
    pub fn add_module(&mut self, index: usize, module: &'static [u8]) {
        let place = format!("boot module {index}");
        let listing = archive::list(&mut &*module, AfterEnd::Archives);
        if listing.members.is_empty() {
            let reason = listing.problem.unwrap_or_default();
            self.problems.push(format!(
                "{place} is not an image bundle: {reason}; build one with `cargo xtask image minimal`"
            ));
        } else {
            self.add(&place, &mut Module(module), listing);
        }
    }

    /// Adds the images of the store on the node's disk. Kernels and initramfses are kept in `memory`, which gives at least as many bytes as
    /// it is asked for, or none.
    pub fn add_disk<S: Source>(
        &mut self,
        disk: &mut S,
        memory: &mut dyn FnMut(u64) -> Option<&'static mut [u8]>,
    ) {
        match find_store(disk) {
            Ok((place, at, bytes)) => {
                let mut store = OnDisk { part: Part { whole: disk, at, bytes }, memory };
                let listing = archive::list(&mut store.part, AfterEnd::Nothing);
                self.add(&place, &mut store, listing);
            }
            Err(reason) => self.problems.push(format!(
                "no image store on the disk: {reason}; write one with `nestling image add`, or a bundle as it is"
            )),
        }
    }

    fn add(&mut self, place: &str, store: &mut dyn Store, listing: Listing) {
        for manifest in listing.members.iter().filter(|member| member.name.ends_with("/image.json")) {
            match read_image(manifest, &listing.members, store) {
                Ok(image)
                    if self.images.len() < MAX_IMAGES
                        && !self.images.iter().any(|other| other.name == image.name) =>
                {
                    self.images.push(image);
                }
                Ok(image) => self.problems.push(format!(
                    "image {}: there is another of this name, or too many; the one of {place} is left out",
                    image.name
                )),
                Err(reason) => self.problems.push(format!("{} of {place}: {reason}", manifest.name)),
            }
        }
        self.problems.extend(listing.problem.map(|reason| format!("{place}: {reason}")));
        self.images.sort_by(|a, b| a.name.cmp(&b.name));
    }
}

/// Where the store is: its name for people, its position and its length.
fn find_store<S: Source>(disk: &mut S) -> Result<(String, u64, u64), String> {
    let mut first = [0; 512];
    disk.read(0, &mut first)?;
    if archive::is_archive(&first) {
        return Ok(("the disk".into(), 0, disk.bytes()));
    }
    let Some(partitions) = partitions::read(disk)? else {
        return Err("it holds neither a tar archive nor a partition table".into());
    };
    match partitions.iter().find(|partition| partition.name == STORE_PARTITION) {
        Some(partition) => Ok((format!("partition {STORE_PARTITION}"), partition.at, partition.bytes)),
        None => Err(format!("none of its {} partitions is named {STORE_PARTITION}", partitions.len())),
    }
}

fn read_image(manifest: &Member, members: &[Member], store: &mut dyn Store) -> Result<Image, String> {
    if manifest.bytes > MAX_MANIFEST_BYTES {
        return Err(format!("the manifest is larger than {MAX_MANIFEST_BYTES} bytes"));
    }
    let mut text = vec![0; manifest.bytes as usize];
    store.source().read(manifest.at, &mut text)?;
    let parsed: Manifest = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let folder = manifest.name.strip_suffix("image.json").unwrap_or_default();
    let file = |name: &str| {
        let path = format!("{folder}{name}");
        let member = members.iter().find(|member| member.name == path);
        match member {
            None => Err(format!("{path} is missing")),
            Some(member) if member.bytes == 0 => Err(format!("{path} is empty")),
            Some(member) => Ok(member),
        }
    };
    // Before anything large is read.
    let (kernel, initramfs) = (file(&parsed.kernel)?, file(&parsed.initramfs)?);
    let disk = match &parsed.disk {
        Some(name) => Some(ImageDisk {
            base: read_disk(file(name)?, store)?,
            free_mib: parsed.disk_free_mib.unwrap_or(DEFAULT_FREE_MIB),
        }),
        None => None,
    };
    Ok(Image {
        kernel: store.keep(kernel)?,
        initramfs: store.keep(initramfs)?,
        name: parsed.name,
        version: parsed.version,
        command_line: parsed.cmdline,
        sha256: parsed.sha256,
        disk,
    })
}

/// A file as the base of disks, if it looks like one.
fn read_disk(member: &Member, store: &mut dyn Store) -> Result<Base, String> {
    let name = &member.name;
    if !member.bytes.is_multiple_of(512) || member.bytes > MAX_DISK_BYTES {
        let bytes = member.bytes;
        return Err(format!(
            "{name} has {bytes} bytes; a disk is made of whole sectors of 512 bytes, up to 1 TiB"
        ));
    }
    let is = |at: u64, magic: &[u8], store: &mut dyn Store| {
        let mut found = [0; 8];
        let found = found.get_mut(..magic.len()).unwrap_or_default();
        if at + magic.len() as u64 > member.bytes {
            return Ok(false);
        }
        store.source().read(member.at + at, found).map(|()| found == magic)
    };
    for (at, magic) in DISK_MAGICS {
        if is(*at, magic, store)? {
            return store.base(member);
        }
    }
    Err(format!(
        "{name} is not a disk: it begins with no file system (ext4, XFS, Btrfs, SquashFS) and no partition table"
    ))
}

/// What a disk has at some place: the magic numbers of file systems, and of a boot sector.
const DISK_MAGICS: &[(u64, &[u8])] =
    &[(1080, &[0x53, 0xEF]), (0, b"XFSB"), (0x1_0040, b"_BHRfS_M"), (0, b"hsqs"), (510, &[0x55, 0xAA])];

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str =
        r#"{"name":"NAME","version":"1","kernel":"vmlinuz","initramfs":"initramfs.cpio","cmdline":"quiet"}"#;

    const BLOCK: usize = 512;

    fn checksum(header: &[u8; BLOCK]) -> u64 {
        let byte =
            |(index, byte): (usize, &u8)| if (148..156).contains(&index) { 0x20 } else { u64::from(*byte) };
        header.iter().enumerate().map(byte).sum()
    }

    fn member(name: &str, data: &[u8]) -> Vec<u8> {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
        header[156] = b'0';
        header[257..263].copy_from_slice(b"ustar\0");
        let sum = checksum(&header);
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        let mut bytes = header.to_vec();
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn bundle(name: &str) -> Vec<u8> {
        let manifest = MANIFEST.replace("NAME", name);
        let mut bytes = member(&format!("{name}/image.json"), manifest.as_bytes());
        bytes.extend(member(&format!("{name}/vmlinuz"), b"the kernel"));
        bytes.extend(member(&format!("{name}/initramfs.cpio"), &[7; 1000]));
        bytes.extend([0; 2 * BLOCK]);
        bytes
    }

    fn load_one(bytes: Vec<u8>) -> (Vec<Image>, Vec<String>) {
        let mut catalog = Catalog::default();
        catalog.add_module(0, bytes.leak());
        (catalog.images, catalog.problems)
    }

    /// What a disk with these bytes gives, where the node keeps files of `room` bytes and less.
    fn load_disk(bytes: &[u8], room: u64) -> (Vec<Image>, Vec<String>) {
        let mut catalog = Catalog::default();
        catalog.add_disk(&mut &*bytes, &mut |bytes| {
            (bytes <= room).then(|| &mut *vec![0; bytes as usize + 9].leak())
        });
        (catalog.images, catalog.problems)
    }

    /// A file system's first 8 KiB, as far as they are looked at.
    fn disk() -> Vec<u8> {
        let mut disk = vec![0x77; 8192];
        disk[1080..1082].copy_from_slice(&[0x53, 0xEF]);
        disk
    }

    fn bundle_with_disk(name: &str, disk: &[u8]) -> Vec<u8> {
        let manifest =
            MANIFEST.replace("NAME", name).replace('}', r#","disk":"disk.img","disk_free_mib":7}"#);
        let files = [
            member(&format!("{name}/image.json"), manifest.as_bytes()),
            member(&format!("{name}/vmlinuz"), b"the kernel"),
            member(&format!("{name}/initramfs.cpio"), &[7; 1000]),
            member(&format!("{name}/disk.img"), disk),
        ];
        files.concat()
    }

    #[test]
    fn a_bundle_gives_its_image() {
        let (images, problems) = load_one(bundle("minimal"));
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(images.len(), 1);
        assert_eq!((images[0].name.as_str(), images[0].kernel), ("minimal", b"the kernel".as_slice()));
        assert_eq!((images[0].initramfs.len(), images[0].bytes()), (1000, 1010));
    }

    #[test]
    fn bundles_one_after_another_give_all_images_by_name() {
        let (images, problems) = load_one([bundle("b"), bundle("a"), vec![0; 4 * BLOCK]].concat());
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(images.iter().map(|image| image.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_bundle_cut_off_anywhere_before_its_end_gives_no_image_and_a_reason() {
        let whole = bundle("minimal");
        for length in (1..whole.len() - 2 * BLOCK - 24).step_by(97) {
            let (images, problems) = load_one(whole[..length].to_vec());
            assert!(images.is_empty() && (!problems.is_empty() || length < BLOCK), "{length}: {problems:?}");
        }
    }

    #[test]
    fn a_damaged_header_is_found() {
        let mut bytes = bundle("minimal");
        bytes[3] ^= 1;
        let (images, problems) = load_one(bytes);
        assert!(images.is_empty());
        assert!(problems[0].contains("wrong checksum of the header at byte 0"), "{problems:?}");
    }

    #[test]
    fn what_is_no_archive_is_named_so() {
        for bytes in [vec![1; 5000], vec![], b"070701".repeat(200)] {
            let (images, problems) = load_one(bytes);
            assert!(images.is_empty());
            assert!(problems[0].contains("is not an image bundle"), "{problems:?}");
        }
    }

    #[test]
    fn a_missing_file_and_a_second_image_of_a_name_are_named() {
        let manifest = MANIFEST.replace("NAME", "x");
        let (_, problems) = load_one(member("x/image.json", manifest.as_bytes()));
        assert!(problems[0].contains("x/vmlinuz is missing"), "{problems:?}");
        let (images, problems) = load_one([bundle("a"), bundle("a")].concat());
        assert_eq!(images.len(), 1);
        assert!(problems[0].contains("another of this name"), "{problems:?}");
    }

    #[test]
    fn a_store_on_a_disk_gives_its_images_with_kernel_and_initramfs_in_memory() {
        let store = [bundle_with_disk("debian", &disk()), bundle("minimal"), vec![0x99; 4096]].concat();
        let (images, problems) = load_disk(&store, 1 << 20);
        assert!(problems.is_empty(), "{problems:?}");
        let [debian, minimal] = images.as_slice() else { panic!("{images:?}") };
        assert_eq!((debian.kernel, debian.initramfs), (b"the kernel".as_slice(), [7; 1000].as_slice()));
        let Some(ImageDisk { base: Base::Disk { at, bytes }, free_mib: 7 }) = debian.disk else {
            panic!("{debian:?}")
        };
        assert_eq!(&store[at as usize..(at + bytes) as usize], disk());
        assert_eq!((minimal.name.as_str(), minimal.disk), ("minimal", None));
    }

    #[test]
    fn a_module_may_have_a_disk_which_is_read_where_it_is() {
        let (images, problems) = load_one(bundle_with_disk("a", &disk()));
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(images[0].disk, Some(ImageDisk { base: Base::Memory(disk().leak()), free_mib: 7 }));
        let manifest = MANIFEST.replace("NAME", "a").replace('}', r#","disk":"disk.img"}"#);
        let rest = bundle_with_disk("a", &disk())[2 * BLOCK..].to_vec();
        let (images, _) = load_one([member("a/image.json", manifest.as_bytes()), rest].concat());
        assert_eq!(images[0].disk.unwrap().free_mib, DEFAULT_FREE_MIB);
    }

    #[test]
    fn an_image_whose_disk_is_none_or_damaged_is_left_out_with_the_reason_and_the_others_are_there() {
        for (content, reason) in [
            (vec![0x77; 8192], "a/disk.img is not a disk"),
            (vec![0; 512], "a/disk.img is not a disk"),
            (disk()[..8191].to_vec(), "whole sectors"),
            (vec![], "a/disk.img is empty"),
        ] {
            let (images, problems) =
                load_disk(&[bundle_with_disk("a", &content), bundle("b")].concat(), 1 << 20);
            assert_eq!(images.len(), 1);
            assert!(problems[0].contains(reason), "{problems:?}");
        }
        let store = [bundle_with_disk("b", &disk()), bundle_with_disk("a", &disk())].concat();
        let (images, problems) = load_disk(&store[..store.len() - 512], 1 << 20);
        assert_eq!((images.len(), problems.len()), (1, 2), "{problems:?}");
        assert!(
            problems[0].contains("a/disk.img is missing") && problems[1].contains("it was cut off"),
            "{problems:?}"
        );
    }

    #[test]
    fn what_the_node_cannot_keep_is_left_out_with_its_size() {
        let (images, problems) = load_disk(&bundle("big"), 999);
        assert!(images.is_empty());
        assert!(problems[0].contains("big/initramfs.cpio: the node has no 1 MiB of memory"), "{problems:?}");
    }

    #[test]
    fn a_disk_without_a_store_is_named_so() {
        for bytes in [vec![0; 4096], vec![0x55; 4096], vec![]] {
            let (images, problems) = load_disk(&bytes, 1 << 20);
            assert!(images.is_empty());
            assert!(problems[0].starts_with("no image store on the disk: "), "{problems:?}");
        }
    }
}
