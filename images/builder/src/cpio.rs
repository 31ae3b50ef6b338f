//! A writer of `newc` cpio archives, and a reader of what it writes, the format of a Linux initramfs
//! (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The archive depends on nothing but the entries: owner 0:0, time 0, inode numbers counted, entries sorted by path.

use std::collections::BTreeMap;

/// Bytes of a member's head.
const HEAD: usize = 110;

/// What an archive holds at one path.
#[derive(Clone)]
enum Entry {
    Folder,
    File { contents: Vec<u8>, executable: bool },
    Link { target: String },
    Device { kind: u32, major: u32, minor: u32 },
}

/// An archive under construction; paths are relative to the root, without a leading slash.
#[derive(Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a folder and those above it.
    pub fn folder(&mut self, path: &str) {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            self.entries.entry(path[..end].to_owned()).or_insert(Entry::Folder);
        }
    }

    /// Adds a file (mode 0755 or 0644) and the folders above it.
    pub fn file(&mut self, path: &str, contents: impl Into<Vec<u8>>, executable: bool) {
        self.parent(path);
        self.entries.insert(path.to_owned(), Entry::File { contents: contents.into(), executable });
    }

    /// Adds a symbolic link and the folders above it.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parent(path);
        self.entries.insert(path.to_owned(), Entry::Link { target: target.to_owned() });
    }

    /// Adds a character device (mode 0600) and the folders above it.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parent(path);
        self.entries.insert(path.to_owned(), Entry::Device { kind: 0o020_600, major, minor });
    }

    /// The archive's bytes, padded to 512 bytes.
    #[must_use]
    pub fn finish(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (path, entry)) in (1..).zip(&self.entries) {
            let (mode, data, device): (u32, &[u8], (u32, u32)) = match entry {
                Entry::Folder => (0o040_755, &[], (0, 0)),
                Entry::File { contents, executable } => {
                    (if *executable { 0o100_755 } else { 0o100_644 }, contents, (0, 0))
                }
                Entry::Link { target } => (0o120_777, target.as_bytes(), (0, 0)),
                Entry::Device { kind, major, minor } => (*kind, &[], (*major, *minor)),
            };
            member(&mut out, number, mode, device, path, data);
        }
        member(&mut out, 0, 0, (0, 0), "TRAILER!!!", &[]);
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    fn parent(&mut self, path: &str) {
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.folder(folder);
        }
    }
}

/// Appends one member: a head of 13 numbers of 8 hexadecimal digits, the name, the data; each padded to 4 bytes.
fn member(out: &mut Vec<u8>, inode: u32, mode: u32, device: (u32, u32), name: &str, data: &[u8]) {
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
    out.extend_from_slice(b"070701");
    for field in [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
        out.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The contents of the file at `path` in an archive.
#[must_use]
pub fn find<'a>(archive: &'a [u8], path: &str) -> Option<&'a [u8]> {
    let mut rest = archive;
    loop {
        let head = rest.get(..HEAD)?;
        let field = |number: usize| {
            let digits = head.get(6 + number * 8..14 + number * 8)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        if !head.starts_with(b"070701") {
            return None;
        }
        let (size, name_size) = (field(6)?, field(11)?);
        let start = HEAD.checked_add(name_size)?.checked_next_multiple_of(4)?;
        let name = rest.get(HEAD..HEAD.checked_add(name_size.checked_sub(1)?)?)?;
        let data = rest.get(start..start.checked_add(size)?)?;
        match name {
            name if name == path.as_bytes() => return Some(data),
            b"TRAILER!!!" => return None,
            _ => rest = rest.get(start.checked_add(size)?.checked_next_multiple_of(4)?..)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_entries_in_another_order_give_the_same_bytes() {
        let (mut one, mut other) = (Archive::default(), Archive::default());
        one.file("etc/a", "A", false);
        one.link("bin/sh", "busybox");
        other.link("bin/sh", "busybox");
        other.file("etc/a", "A", false);
        assert_eq!(one.finish(), other.finish());
    }

    #[test]
    fn folders_come_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("usr/lib/x", "X", true);
        let names: Vec<_> = archive.entries.keys().cloned().collect();
        assert_eq!(names, ["usr", "usr/lib", "usr/lib/x"]);
    }

    #[test]
    fn a_file_is_found_again_and_a_damaged_archive_is_none() {
        let mut archive = Archive::default();
        archive.file("init", "the agent", true);
        archive.file("usr/x", "X", false);
        let bytes = archive.finish();
        assert_eq!(find(&bytes, "init"), Some(&b"the agent"[..]));
        assert_eq!((find(&bytes, "usr/x"), find(&bytes, "y")), (Some(&b"X"[..]), None));
        for end in 0..130 {
            assert_eq!(find(&bytes[..end], "usr/x"), None);
        }
        assert_eq!(find(&[b'0'; 300], "init"), None);
    }

    #[test]
    fn a_member_has_a_head_of_110_bytes_and_padded_data() {
        let mut out = Vec::new();
        member(&mut out, 1, 0o100_644, (0, 0), "a", b"12345");
        assert_eq!(&out[..14], b"07070100000001");
        assert_eq!(out.len(), 112 + 8);
        assert_eq!(&out[112..117], b"12345");
    }
}
