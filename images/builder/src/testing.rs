//! What several tests need.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use tar::{Builder, EntryType, Header};

/// An archive of these: a path that ends with `/` is a folder, `->` begins a link, `=` a hard link; anything else is a file. Paths go in
/// as they are, those that lead out of the root too.
pub(crate) fn archive(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, what) in entries {
        let mut header = Header::new_ustar();
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        let (kind, target, data) = if let Some(target) = what.strip_prefix("->") {
            (EntryType::Symlink, target, "")
        } else if let Some(target) = what.strip_prefix('=') {
            (EntryType::Link, target, "")
        } else if path.ends_with('/') {
            (EntryType::Directory, "", "")
        } else {
            (EntryType::Regular, "", *what)
        };
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        let bytes = header.as_mut_bytes();
        bytes[..path.len()].copy_from_slice(path.as_bytes());
        bytes[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// What a program makes of its standard input.
pub(crate) fn tool(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", command[0]));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let mut output = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    writer.join().unwrap();
    assert!(child.wait().unwrap().success(), "{command:?}");
    output
}

/// The head of a bzImage for x86-64 that says this release.
pub(crate) fn bz_image(release: &str) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20F_u16.to_le_bytes());
    image[0x20E..0x210].copy_from_slice(&0x400_u16.to_le_bytes());
    image[0x236] = 1;
    let text = format!("{release} (somebody@somewhere)");
    image[0x600..0x600 + text.len()].copy_from_slice(text.as_bytes());
    image
}

/// A small image.
pub(crate) fn image(name: &str, disk: bool) -> crate::bundle::Image {
    let mut root = crate::Tree::new();
    root.file("bin/sh", crate::Content::bytes("#!"), 0o755).unwrap();
    crate::bundle::Image {
        name: name.into(),
        version: "1".into(),
        command_line: "quiet".into(),
        kernel: bz_image("6.1"),
        initramfs: b"initramfs".to_vec(),
        disk: disk.then_some(crate::bundle::Disk { root, free_mib: 2048 }),
    }
}

/// The bundle of a small image in `folder`.
pub(crate) fn bundle(folder: &std::path::Path, name: &str, disk: bool) -> std::path::PathBuf {
    let path = folder.join(format!("{name}.tar"));
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    image(name, disk).write(&file, &mut |_, _| {}).unwrap();
    path
}
