//! Tar archives: where their files lie.
//!
//! POSIX.1-1988 and pax, "ustar Interchange Format"; GNU tar, "Basic Tar Format" for sizes in base 256. Every header's checksum is
//! proven and every file must lie within the archive, which finds what is damaged, cut off or no archive.

use crate::source::Source;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

const BLOCK: usize = 512;
/// The most files of an archive.
const MEMBERS_MAX: usize = 4096;

/// A regular file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its path.
    pub name: String,
    /// Where its content starts, a multiple of 512 bytes from the archive's start.
    pub at: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What two blocks of zeros mean, which end an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterEnd {
    /// Another archive may follow: a module made of several.
    Archives,
    /// What follows means nothing: a disk that held something else before.
    Nothing,
}

/// Whether an archive starts at the beginning.
#[must_use]
pub fn is_archive(first: &[u8; BLOCK]) -> bool {
    has_magic(first)
}

/// What an archive holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Its regular files, in order. Folders and the like are passed over.
    pub members: Vec<Member>,
    /// What is wrong behind the last of them, for people, with the position.
    pub problem: Option<String>,
}

/// Lists the archive at the source's beginning.
#[must_use]
pub fn list(source: &mut dyn Source, after: AfterEnd) -> Listing {
    let mut members = Vec::new();
    let problem = read_members(source, after, &mut members).err();
    let problem = problem.or_else(|| members.is_empty().then(|| "it holds no files".into()));
    Listing { members, problem }
}

fn read_members(source: &mut dyn Source, after: AfterEnd, members: &mut Vec<Member>) -> Result<(), String> {
    let (mut at, mut zeros) = (0_u64, 0);
    let length = source.bytes();
    while length.saturating_sub(at) >= BLOCK as u64 {
        let mut header = [0; BLOCK];
        source.read(at, &mut header)?;
        let data = at + BLOCK as u64;
        if header.iter().all(|byte| *byte == 0) {
            zeros += 1;
            if zeros == 2 && after == AfterEnd::Nothing {
                return Ok(());
            }
            at = data;
            continue;
        }
        zeros = 0;
        if !has_magic(&header) {
            return Err(format!("no ustar header at byte {at}"));
        }
        if octal(&header, 148..156) != Some(checksum(&header)) {
            return Err(format!("wrong checksum of the header at byte {at}"));
        }
        let name = member_name(&header);
        let bytes = size(&header).ok_or_else(|| format!("{name} has no valid size"))?;
        let left = length - data;
        if bytes > left {
            return Err(format!("{name} has {bytes} bytes, of which only {left} are there: it was cut off"));
        }
        // Type '0' and NUL are regular files.
        if matches!(header.get(156), Some(b'0' | 0)) {
            if members.len() == MEMBERS_MAX {
                return Err(format!("it holds more than {MEMBERS_MAX} files"));
            }
            members.push(Member { name, at: data, bytes });
        }
        let next = bytes.checked_next_multiple_of(BLOCK as u64).and_then(|padded| data.checked_add(padded));
        at = next.unwrap_or(length);
    }
    let mut rest = [0; BLOCK];
    let rest = rest.get_mut(..usize::try_from(length.saturating_sub(at)).unwrap_or(0)).unwrap_or_default();
    source.read(at.min(length), rest)?;
    if rest.iter().any(|byte| *byte != 0) {
        return Err(format!("the header at byte {at} was cut off"));
    }
    Ok(())
}

fn has_magic(header: &[u8; BLOCK]) -> bool {
    header.get(257..262) == Some(b"ustar".as_slice())
}

fn member_name(header: &[u8; BLOCK]) -> String {
    let text = |range| {
        let field: &[u8] = header.get::<core::ops::Range<usize>>(range).unwrap_or_default();
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
    };
    let (name, prefix) = (text(0..100), text(345..500));
    let name = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
    name.strip_prefix("./").map_or_else(|| name.clone(), ToString::to_string)
}

/// The size: octal digits, or in base 256 if the first bit is set.
fn size(header: &[u8; BLOCK]) -> Option<u64> {
    let field: &[u8; 12] = header.get(124..136)?.try_into().ok()?;
    let [0x80, 0, 0, 0, number @ ..] = field else { return octal(header, 124..136) };
    Some(u64::from_be_bytes(*number))
}

/// A number in octal digits, ended by a space or NUL.
fn octal(header: &[u8; BLOCK], range: core::ops::Range<usize>) -> Option<u64> {
    let text = header.get(range)?.trim_ascii();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
    u64::from_str_radix(core::str::from_utf8(text.get(..end)?).ok()?, 8).ok()
}

/// The sum of the header's bytes with the checksum field read as spaces.
fn checksum(header: &[u8; BLOCK]) -> u64 {
    let byte =
        |(index, byte): (usize, &u8)| if (148..156).contains(&index) { 0x20 } else { u64::from(*byte) };
    header.iter().enumerate().map(byte).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;
    use std::io::Write;

    fn header(name: &str, size: &[u8], kind: u8) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..124 + size.len()].copy_from_slice(size);
        header[156] = kind;
        header[257..263].copy_from_slice(b"ustar\0");
        let sum = checksum(&header);
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        header
    }

    fn file(name: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = header(name, format!("{:011o}", data.len()).as_bytes(), b'0').to_vec();
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn read(bytes: &[u8], after: AfterEnd) -> Result<Vec<Member>, String> {
        let Listing { members, problem } = list(&mut &*bytes, after);
        problem.map_or(Ok(members), Err)
    }

    #[test]
    fn files_are_found_where_they_lie_and_folders_passed_over() {
        let bytes = [
            header("a/", b"00000000000", b'5').to_vec(),
            file("./a/one", b"1"),
            file("a/empty", b""),
            file("a/two", &[2; 513]),
            vec![0; 1024],
        ];
        let found = read(&bytes.concat(), AfterEnd::Nothing).unwrap();
        let found: Vec<_> =
            found.iter().map(|member| (member.name.as_str(), member.at, member.bytes)).collect();
        assert_eq!(found, [("a/one", 1024, 1), ("a/empty", 2048, 0), ("a/two", 2560, 513)]);
    }

    #[test]
    fn what_follows_the_end_is_another_archive_or_means_nothing() {
        let two = [file("a", b"a"), vec![0; 1024], file("b", b"b"), vec![0; 1024]].concat();
        assert_eq!(read(&two, AfterEnd::Archives).unwrap().len(), 2);
        assert_eq!(read(&two, AfterEnd::Nothing).unwrap().len(), 1);
        let rubbish = [file("a", b"a"), vec![0; 1024], vec![7; 4096]].concat();
        assert_eq!(read(&rubbish, AfterEnd::Nothing).unwrap().len(), 1);
        assert!(read(&rubbish, AfterEnd::Archives).unwrap_err().contains("no ustar header at byte 2048"));
    }

    #[test]
    fn sizes_from_eight_gibibytes_on_are_in_base_256() {
        /// An archive of one file of zeros, only whose header exists.
        struct Huge(u64);
        impl Source for Huge {
            fn bytes(&self) -> u64 {
                self.0 + 2048
            }
            fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), String> {
                into.fill(0);
                if at == 0 {
                    let size = [&[0x80, 0, 0, 0], self.0.to_be_bytes().as_slice()].concat();
                    into.copy_from_slice(&header("disk.img", &size, b'0'));
                }
                Ok(())
            }
        }
        let found = list(&mut Huge(9 << 30), AfterEnd::Nothing);
        assert_eq!(found.members, [Member { name: "disk.img".into(), at: 512, bytes: 9 << 30 }]);
        let size = [0xFF; 12];
        assert!(read(&header("x", &size, b'0'), AfterEnd::Nothing).unwrap_err().contains("no valid size"));
        let size = [&[0x80, 0, 0, 0], u64::MAX.to_be_bytes().as_slice()].concat();
        assert!(read(&header("x", &size, b'0'), AfterEnd::Nothing).unwrap_err().contains("cut off"));
    }

    #[test]
    fn an_archive_made_by_tar_is_read() {
        let folder = std::env::temp_dir().join(format!("nestling-archive-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("image")).unwrap();
        std::fs::File::create(folder.join("image/vmlinuz")).unwrap().write_all(&[3; 700]).unwrap();
        let tar =
            std::process::Command::new("tar").args(["-C"]).arg(&folder).args(["-cf", "-", "image"]).output();
        std::fs::remove_dir_all(&folder).unwrap();
        let found = read(&tar.unwrap().stdout, AfterEnd::Nothing).unwrap();
        assert_eq!(found, [Member { name: "image/vmlinuz".into(), at: 1024, bytes: 700 }]);
    }

    #[test]
    fn damage_and_truncation_are_told_with_their_place() {
        let whole = [file("a", &[1; 600]), file("b", &[2; 10]), vec![0; 1024]].concat();
        let error = read(&whole[..900], AfterEnd::Nothing).unwrap_err();
        assert!(error.contains("a has 600 bytes, of which only 388"), "{error}");
        let cut = list(&mut &whole[..1600], AfterEnd::Nothing);
        assert_eq!((cut.members.len(), cut.problem.is_some()), (1, true), "what is whole is there");
        let mut damaged = whole.clone();
        damaged[1536 + 3] ^= 1;
        assert!(
            read(&damaged, AfterEnd::Nothing).unwrap_err().contains("checksum of the header at byte 1536")
        );
        for bytes in [vec![], vec![0; 4096], vec![0; 100]] {
            assert_eq!(read(&bytes, AfterEnd::Nothing).unwrap_err(), "it holds no files");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_no_file_lies_outside(mut bytes in prop::collection::vec(any::<u8>(), 0..3000), magic: bool) {
            if magic && bytes.len() >= BLOCK {
                bytes[257..262].copy_from_slice(b"ustar");
                let head: [u8; BLOCK] = bytes[..BLOCK].try_into().unwrap();
                bytes[148..155].copy_from_slice(format!("{:06o}\0", checksum(&head)).as_bytes());
            }
            for after in [AfterEnd::Archives, AfterEnd::Nothing] {
                for member in list(&mut &*bytes, after).members {
                    prop_assert!(member.at + member.bytes <= bytes.len() as u64);
                }
            }
        }
    }
}
