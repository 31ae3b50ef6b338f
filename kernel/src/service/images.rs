//! Images that machines boot, from the modules the boot loader left in memory.
//!
//! A module is an uncompressed ustar archive (POSIX.1-1988, pax "ustar Interchange Format") or several of
//! them one after another, with members `NAME/image.json`, `NAME/vmlinuz` and `NAME/initramfs.cpio`. Each
//! header's checksum is proven and each member must lie within the module, which finds truncated and damaged
//! archives. The manifest's SHA-256 sums are reported and not proven here: the module came the same way as
//! this kernel, and hashing it would take longer than booting.

#![forbid(unsafe_code)]

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use nestling_api::types;
use serde::Deserialize;

const BLOCK: usize = 512;
/// A manifest is a small file.
const MAX_MANIFEST_BYTES: usize = 64 * 1024;
/// The most images a node keeps.
const MAX_IMAGES: usize = 256;

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
}

/// A file of an archive.
struct Member<'a> {
    name: String,
    data: &'a [u8],
}

impl Image {
    /// Bytes of kernel and initramfs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        (self.kernel.len() as u64).saturating_add(self.initramfs.len() as u64)
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

/// The images of all modules by name, and a message for each module or image that cannot be used.
#[must_use]
pub fn load(modules: &[&'static [u8]]) -> (Vec<Image>, Vec<String>) {
    let (mut images, mut problems) = (Vec::<Image>::new(), Vec::new());
    for (index, module) in modules.iter().enumerate() {
        let members = match read_archive(module) {
            Ok(members) => members,
            Err(reason) => {
                problems.push(alloc::format!(
                    "boot module {index} is not an image bundle: {reason}; build one with `cargo xtask image minimal`"
                ));
                continue;
            }
        };
        for manifest in members.iter().filter(|member| member.name.ends_with("/image.json")) {
            match read_image(manifest, &members) {
                Ok(image)
                    if images.len() < MAX_IMAGES && !images.iter().any(|other| other.name == image.name) =>
                {
                    images.push(image)
                }
                Ok(image) => problems.push(alloc::format!(
                    "image {}: there is another of this name, or too many; it is left out",
                    image.name
                )),
                Err(reason) => {
                    problems.push(alloc::format!("{} of boot module {index}: {reason}", manifest.name))
                }
            }
        }
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    (images, problems)
}

fn read_image(manifest: &Member<'static>, members: &[Member<'static>]) -> Result<Image, String> {
    if manifest.data.len() > MAX_MANIFEST_BYTES {
        return Err(alloc::format!("the manifest is larger than {MAX_MANIFEST_BYTES} bytes"));
    }
    let parsed: Manifest = serde_json::from_slice(manifest.data).map_err(|error| error.to_string())?;
    let folder = manifest.name.strip_suffix("image.json").unwrap_or_default();
    let file = |name: &str| {
        let path = alloc::format!("{folder}{name}");
        let member = members
            .iter()
            .find(|member| member.name == path)
            .ok_or_else(|| alloc::format!("{path} is missing"))?;
        if member.data.is_empty() { Err(alloc::format!("{path} is empty")) } else { Ok(member.data) }
    };
    Ok(Image {
        kernel: file(&parsed.kernel)?,
        initramfs: file(&parsed.initramfs)?,
        name: parsed.name,
        version: parsed.version,
        command_line: parsed.cmdline,
        sha256: parsed.sha256,
    })
}

/// The regular files of an archive. Blocks of zeros, which end an archive, may be followed by another one.
fn read_archive(module: &[u8]) -> Result<Vec<Member<'_>>, String> {
    let mut members = Vec::new();
    let mut rest = module;
    while let Some((header, after)) = rest.split_first_chunk::<BLOCK>() {
        rest = after;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        let at = module.len().saturating_sub(after.len()).saturating_sub(BLOCK);
        if header.get(257..262) != Some(b"ustar".as_slice()) {
            return Err(alloc::format!("no ustar header at byte {at}"));
        }
        if octal(header, 148..156) != Some(checksum(header)) {
            return Err(alloc::format!("wrong checksum of the header at byte {at}"));
        }
        let name = member_name(header);
        let size = octal(header, 124..136).and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or_else(|| alloc::format!("{name} has no valid size"))?;
        let padded = size.checked_next_multiple_of(BLOCK).unwrap_or(usize::MAX);
        let (Some(data), Some(next)) = (rest.get(..size), rest.get(padded..).or_else(|| rest.get(size..)))
        else {
            return Err(alloc::format!(
                "{name} has {size} bytes, of which only {} are there: the bundle was cut off",
                rest.len()
            ));
        };
        // Type '0' and NUL are regular files; folders and the like are passed over.
        if matches!(header.get(156), Some(b'0' | 0)) {
            members.push(Member { name, data });
        }
        rest = next;
    }
    if members.is_empty() { Err("it holds no files".into()) } else { Ok(members) }
}

fn member_name(header: &[u8; BLOCK]) -> String {
    let text = |range| {
        let field: &[u8] = header.get::<core::ops::Range<usize>>(range).unwrap_or_default();
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
    };
    let (name, prefix) = (text(0..100), text(345..500));
    let name = if prefix.is_empty() { name } else { alloc::format!("{prefix}/{name}") };
    name.strip_prefix("./").map_or_else(|| name.clone(), ToString::to_string)
}

/// A number in octal digits, ended by a space or NUL.
fn octal(header: &[u8; BLOCK], range: core::ops::Range<usize>) -> Option<u64> {
    let text = header.get(range)?.trim_ascii();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
    u64::from_str_radix(core::str::from_utf8(text.get(..end)?).ok()?, 8).ok()
}

/// The sum of the header's bytes with the checksum field read as spaces.
fn checksum(header: &[u8; BLOCK]) -> u64 {
    header
        .iter()
        .enumerate()
        .map(|(index, byte)| if (148..156).contains(&index) { 0x20 } else { u64::from(*byte) })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str =
        r#"{"name":"NAME","version":"1","kernel":"vmlinuz","initramfs":"initramfs.cpio","cmdline":"quiet"}"#;

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
        load(&[&*bytes.leak()])
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
}
