//! Tar archives, compressed or not, as entries of a tree (POSIX.1-2001, pax interchange format; GNU tar's long names and sparse files).
//!
//! An uncompressed archive is read where it is; a compressed one is unpacked into a nameless file first. Either way the contents of its
//! files stay there until the image is written.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ruzstd::decoding::StreamingDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use tar::{Archive, EntryType};

use crate::content::Content;
use crate::tree::{Kind, Node, Tree, shown};

/// One entry of an archive.
pub(crate) struct Entry {
    /// Its path as the archive has it.
    pub(crate) path: Vec<u8>,
    pub(crate) item: Item,
}

/// What an entry adds.
pub(crate) enum Item {
    Node(Node),
    /// Another name for what is at this path.
    HardLink(Vec<u8>),
}

/// Bytes of an archive's block.
const BLOCK: u64 = 512;
/// Most memory an xz stream may ask for, in KiB: xz's own highest preset needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 256 * 1024;

/// Adds everything in the archive at `path` to `tree`. `scratch` is a folder for what is unpacked.
///
/// # Errors
/// When it is no archive, is cut off, or holds what no image can have; the message names the entry.
pub(crate) fn add(tree: &mut Tree, path: &Path, scratch: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let entries = entries(file, scratch).with_context(|| path.display().to_string())?;
    apply(tree, entries).with_context(|| path.display().to_string())
}

/// Puts entries into a tree, one after another.
pub(crate) fn apply(tree: &mut Tree, entries: impl IntoIterator<Item = Entry>) -> Result<()> {
    for entry in entries {
        match entry.item {
            Item::Node(node) => tree.insert(&entry.path, node).map(drop)?,
            Item::HardLink(target) => tree.hard_link(&entry.path, &target)?,
        }
    }
    Ok(())
}

/// The entries of an archive.
pub(crate) fn entries(file: File, scratch: &Path) -> Result<Vec<Entry>> {
    let file = Arc::new(unpacked(file, scratch)?);
    let len = file.metadata()?.len();
    let mut spool = Spool::new(scratch);
    let (mut found, mut end) = (Vec::new(), 0);
    let mut archive = Archive::new(BufReader::new(&*file));
    for entry in archive.entries_with_seek().context("it is not a tar archive")? {
        let mut entry = entry.with_context(|| not_an_archive(found.is_empty()))?;
        let path = entry.path_bytes().into_owned();
        let kind = entry.header().entry_type();
        let (offset, size) = (entry.raw_file_position(), entry.header().entry_size()?.max(entry.size()));
        end = offset.saturating_add(if kind == EntryType::GNUSparse {
            entry.header().entry_size()?
        } else {
            size
        });
        if end > len {
            bail!("it is cut off in the middle of {}", shown(&path));
        }
        let told = || format!("the entry {}", shown(&path));
        let (xattrs, precise) = attributes(&mut entry).with_context(told)?;
        let header = entry.header();
        let kind = match kind {
            EntryType::Regular | EntryType::Continuous => {
                Kind::File(Content::Part { file: Arc::clone(&file), offset, len: size })
            }
            EntryType::GNUSparse => Kind::File(spool.take(&mut entry).with_context(told)?),
            EntryType::Directory => Kind::Folder(Default::default()),
            EntryType::Symlink => {
                Kind::Link(entry.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default())
            }
            EntryType::Char => device(header).map(|(major, minor)| Kind::CharacterDevice { major, minor })?,
            EntryType::Block => device(header).map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Link => {
                let target = entry.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default();
                found.push(Entry { path, item: Item::HardLink(target) });
                continue;
            }
            EntryType::XGlobalHeader => continue,
            other => bail!(
                "{} has the type {:?}, which no file system has",
                shown(&path),
                char::from(other.as_byte())
            ),
        };
        let header = entry.header();
        let number = |what: &str, value: io::Result<u64>| {
            let value = value.ok().and_then(|value| u32::try_from(value).ok());
            value.with_context(|| format!("{} has no valid {what}", shown(&path)))
        };
        let node = Node {
            kind,
            mode: (number("mode", header.mode().map(u64::from))? & 0o7777) as u16,
            uid: number("owner", header.uid())?,
            gid: number("group", header.gid())?,
            mtime: precise.unwrap_or((header.mtime().unwrap_or(0).cast_signed(), 0)),
            xattrs,
        };
        found.push(Entry { path, item: Item::Node(node) });
    }
    if found.is_empty() {
        bail!("{}", not_an_archive(true));
    }
    let mut last = [0; BLOCK as usize];
    if file.read_exact_at(&mut last, end.next_multiple_of(BLOCK)).is_err() || last != [0; BLOCK as usize] {
        bail!("it is cut off: the blocks of zeros that end an archive are missing");
    }
    Ok(found)
}

fn not_an_archive(first: bool) -> &'static str {
    if first { "it is not a tar archive, or empty" } else { "the archive is damaged or cut off" }
}

/// A device's numbers.
fn device(header: &tar::Header) -> Result<(u32, u32)> {
    let number = |number: io::Result<Option<u32>>| number.ok().flatten().context("a device without a number");
    Ok((number(header.device_major())?, number(header.device_minor())?))
}

/// Extended attributes and the precise time from an entry's pax header.
#[allow(clippy::type_complexity, reason = "two parts of a Node")]
fn attributes<R: Read>(
    entry: &mut tar::Entry<'_, R>,
) -> Result<(std::collections::BTreeMap<Vec<u8>, Vec<u8>>, Option<(i64, u32)>)> {
    let (mut xattrs, mut precise) = (std::collections::BTreeMap::new(), None);
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        let (key, value) = (extension.key_bytes(), extension.value_bytes());
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            xattrs.insert(name.to_vec(), value.to_vec());
        } else if key == b"mtime" {
            precise = std::str::from_utf8(value).ok().and_then(time);
        } else if key.starts_with(b"GNU.sparse.") {
            bail!("sparse files in pax format are not read; make the archive without --sparse");
        }
    }
    Ok((xattrs, precise))
}

/// `SECONDS[.FRACTION]`, perhaps negative.
fn time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    // Only times before 1970 would have to be rounded down, and nothing depends on their fraction.
    Some((whole, if text.starts_with('-') { 0 } else { nanos }))
}

/// A nameless file that takes what cannot be read in place.
struct Spool<'a> {
    scratch: &'a Path,
    file: Option<Arc<File>>,
    len: u64,
}

impl<'a> Spool<'a> {
    fn new(scratch: &'a Path) -> Self {
        Self { scratch, file: None, len: 0 }
    }

    fn take(&mut self, from: &mut impl Read) -> Result<Content> {
        let file = match &self.file {
            Some(file) => Arc::clone(file),
            None => Arc::clone(self.file.insert(Arc::new(nameless(self.scratch)?))),
        };
        let offset = self.len;
        let len = io::copy(from, &mut &*file)?;
        self.len += len;
        Ok(Content::Part { file, offset, len })
    }
}

fn nameless(scratch: &Path) -> Result<File> {
    tempfile::tempfile_in(scratch).with_context(|| format!("cannot create a file in {}", scratch.display()))
}

/// The file itself, or what it unpacks to.
fn unpacked(mut file: File, scratch: &Path) -> Result<File> {
    let mut magic = [0; 6];
    let len = file.read_at(&mut magic, 0)?;
    file.seek(SeekFrom::Start(0))?;
    let packed = BufReader::with_capacity(256 * 1024, &file);
    let unpack = |name: &str, from: &mut dyn Read| -> Result<File> {
        let mut out = nameless(scratch)?;
        io::copy(from, &mut out)
            .with_context(|| format!("the {name} stream is damaged or cut off, or the disk is full"))?;
        out.seek(SeekFrom::Start(0))?;
        Ok(out)
    };
    match &magic[..len] {
        [0x1f, 0x8b, ..] => unpack("gzip", &mut flate2::bufread::MultiGzDecoder::new(packed)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            unpack("xz", &mut lzma_rust2::XzReader::new_mem_limit(packed, true, XZ_MEMORY_KIB))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut out = nameless(scratch)?;
            unpack_zstd(packed, &mut out)?;
            out.seek(SeekFrom::Start(0))?;
            Ok(out)
        }
        [b'B', b'Z', b'h', ..] => bail!("bzip2 is not read; unpack it with `bunzip2` first"),
        _ => Ok(file),
    }
}

/// Bytes of a file that may be compressed as kernel modules are: `.xz`, `.zst`, `.gz`.
pub(crate) fn unpacked_bytes(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    match bytes {
        [0x1f, 0x8b, ..] => flate2::bufread::MultiGzDecoder::new(bytes).read_to_end(&mut out).map(drop)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => {
            lzma_rust2::XzReader::new_mem_limit(bytes, true, XZ_MEMORY_KIB).read_to_end(&mut out).map(drop)?
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => unpack_zstd(bytes, &mut out)?,
        _ => out.extend(bytes),
    }
    Ok(out)
}

/// Unpacks every frame of a zstd stream; frames that hold no data (zstd:chunked writes some) are passed over.
fn unpack_zstd(mut from: impl io::BufRead, out: &mut impl Write) -> Result<()> {
    while !from.fill_buf()?.is_empty() {
        match StreamingDecoder::new(&mut from) {
            Ok(mut decoder) => {
                io::copy(&mut decoder, out)
                    .context("the zstd stream is damaged or cut off, or the disk is full")?;
            }
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length, ..
            })) => {
                let skipped = io::copy(&mut (&mut from).take(u64::from(length)), &mut io::sink())?;
                if skipped != u64::from(length) {
                    bail!("the zstd stream is cut off");
                }
            }
            Err(error) => bail!("the zstd stream is damaged or cut off: {error}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{archive, tool};

    fn read(bytes: &[u8]) -> Result<Tree> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        let mut tree = Tree::new();
        add(&mut tree, &path, folder.path()).map(|()| tree)
    }

    fn text(tree: &Tree, path: &str) -> String {
        String::from_utf8(tree.file_at(path).unwrap().read(1 << 20).unwrap()).unwrap()
    }

    #[test]
    fn every_compression_gives_the_same_files() {
        let plain = archive(&[("etc/", ""), ("etc/a", "hello"), ("b", "->etc/a"), ("c", "=etc/a")]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let packed = [
            plain.clone(),
            gzip.finish().unwrap(),
            tool(&["xz", "-c"], &plain),
            tool(&["zstd", "-c"], &plain),
            // A skippable frame first, then two frames.
            [
                &b"\x50\x2a\x4d\x18\x03\0\0\0abc"[..],
                &tool(&["zstd", "-c"], &plain[..512]),
                &tool(&["zstd", "-c"], &plain[512..]),
            ]
            .concat(),
        ];
        for bytes in packed {
            let tree = read(&bytes).unwrap();
            assert_eq!((text(&tree, "b"), text(&tree, "c")), ("hello".into(), "hello".into()));
            assert_eq!(tree.find("c"), tree.find("etc/a"));
            for cut in [bytes.len() / 2, bytes.len() - 700.min(bytes.len() / 3)] {
                let error = format!("{:#}", read(&bytes[..cut]).unwrap_err());
                assert!(error.contains("cut off") || error.contains("not a tar archive"), "{cut}: {error}");
            }
        }
    }

    #[test]
    fn what_is_no_archive_is_told() {
        for bytes in [&b""[..], b"hello", &[7; 4096], b"BZh91AY"] {
            let error = format!("{:#}", read(bytes).unwrap_err());
            assert!(
                error.contains("not a tar archive") || error.contains("bunzip2") || error.contains("cut off"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_entry_that_leaves_the_root_is_named() {
        for path in ["../../etc/passwd", "a/../../b"] {
            let error = format!("{:#}", read(&archive(&[(path, "x")])).unwrap_err());
            assert!(error.contains(path) && error.contains("leaves the root"), "{error}");
        }
        let tree = read(&archive(&[("/etc/abs", "inside")])).unwrap();
        assert_eq!(text(&tree, "etc/abs"), "inside");
    }

    #[test]
    fn attributes_owners_and_devices_survive() {
        let mut builder = tar::Builder::new(Vec::new());
        builder
            .append_pax_extensions([
                ("SCHILY.xattr.security.capability", &b"\x01\0\0\x02"[..]),
                ("mtime", b"1700000000.25"),
            ])
            .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(EntryType::Char);
        header.set_mode(0o4620);
        header.set_uid(1000);
        header.set_gid(5);
        header.set_size(0);
        header.set_mtime(1_700_000_000);
        header.set_device_major(4).unwrap();
        header.set_device_minor(300).unwrap();
        builder.append_data(&mut header, "dev/tty", io::empty()).unwrap();
        let tree = read(&builder.into_inner().unwrap()).unwrap();
        let node = tree.node(tree.find("dev/tty").unwrap());
        assert!(matches!(node.kind, Kind::CharacterDevice { major: 4, minor: 300 }));
        assert_eq!(
            (node.mode, node.uid, node.gid, node.mtime),
            (0o4620, 1000, 5, (1_700_000_000, 250_000_000))
        );
        assert_eq!(node.xattrs[&b"security.capability"[..]], b"\x01\0\0\x02");
    }

    #[test]
    fn times_are_read_as_pax_writes_them() {
        assert_eq!(time("12"), Some((12, 0)));
        assert_eq!(time("12.5"), Some((12, 500_000_000)));
        assert_eq!(time("12.1234567891"), Some((12, 123_456_789)));
        assert_eq!(time("-1.5"), Some((-1, 0)));
        assert_eq!(time("x"), None);
    }
}
