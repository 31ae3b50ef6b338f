//! What is written is checked with e2fsprogs: `e2fsck -fn` finds no fault, `debugfs` finds what was put in.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::tree::Node;

fn write_to(tree: &Tree, path: &Path) -> Written {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    write(tree, &file, 0, &mut |_, _| {}).unwrap()
}

/// Runs a program of e2fsprogs, which is in /usr/sbin; its output.
fn e2fs(program: &str, arguments: &[&str], image: &Path) -> (bool, String) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).arg(image).env("PATH", path).output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    (output.status.success(), text)
}

fn check(image: &Path) {
    let (clean, text) = e2fs("e2fsck", &["-fn"], image);
    assert!(clean, "{text}");
}

fn debugfs(image: &Path, request: &str) -> String {
    e2fs("debugfs", &["-R", request], image).1
}

fn file(tree: &mut Tree, path: &str, bytes: impl Into<Vec<u8>>) {
    tree.file(path, Content::bytes(bytes), 0o644).unwrap();
}

/// One of everything.
fn zoo() -> Tree {
    let mut tree = Tree::new();
    file(&mut tree, "etc/passwd", "root:x:0:0::/root:/bin/sh\n");
    file(&mut tree, "empty", "");
    file(&mut tree, "exactly", vec![1; 8192]);
    tree.hard_link(b"etc/passwd.link", b"etc/passwd").unwrap();
    tree.insert(b"short", Node::new(Kind::Link(b"etc/passwd".to_vec()), 0o777)).unwrap();
    tree.insert(b"long", Node::new(Kind::Link(vec![b'l'; 300]), 0o777)).unwrap();
    tree.insert(b"edge", Node::new(Kind::Link(vec![b'e'; 60]), 0o777)).unwrap();
    tree.insert(b"dev/tty", Node::new(Kind::CharacterDevice { major: 4, minor: 64 }, 0o620)).unwrap();
    tree.insert(b"dev/big", Node::new(Kind::BlockDevice { major: 259, minor: 70_000 }, 0o660)).unwrap();
    tree.insert(b"run/fifo", Node::new(Kind::Fifo, 0o600)).unwrap();
    tree.insert(b"run/socket", Node::new(Kind::Socket, 0o600)).unwrap();
    tree.insert(b"odd\xff \"name\"", Node::new(Kind::File(Content::bytes("odd")), 0o4755)).unwrap();
    let owned = tree.file("home/file", Content::bytes("mine"), 0o2751).unwrap();
    let node = tree.node_mut(owned);
    (node.uid, node.gid, node.mtime) = (100_000, 200_000, (5_000_000_000, 123));
    node.xattrs.insert(
        b"security.capability".to_vec(),
        vec![1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    let large = tree.find("exactly").unwrap();
    for number in 0..20 {
        tree.node_mut(large).xattrs.insert(format!("user.attribute{number}").into_bytes(), vec![number; 50]);
    }
    tree
}

#[test]
fn one_of_everything_is_found_again_without_a_fault() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let written = write_to(&zoo(), &image);
    assert_eq!((written.size % 4096, std::fs::metadata(&image).unwrap().len()), (0, written.size));
    check(&image);
    assert!(debugfs(&image, "cat /etc/passwd.link").contains("root:x:0:0::/root:/bin/sh"));
    let stat = debugfs(&image, "stat /home/file");
    for part in ["User: 100000   Group: 200000", "Mode:  02751", "security.capability", "2128"] {
        assert!(stat.contains(part), "{part}: {stat}");
    }
    assert!(debugfs(&image, "stat /etc/passwd").contains("Links: 2"));
    assert!(debugfs(&image, "stat /short").contains("Fast link dest: \"etc/passwd\""));
    assert!(debugfs(&image, "stat /long").contains("Size: 300"));
    assert!(debugfs(&image, "stat /dev/tty").contains("Device major/minor number: 04:64"));
    assert!(debugfs(&image, "stat /dev/big").contains("259:70000"));
    assert!(debugfs(&image, "ea_list /exactly").contains("user.attribute19 (50)"));
    let folder = debugfs(&image, "ls -p /");
    assert!(folder.contains("/100755/") || folder.contains("/104755/"), "{folder}");
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    write_to(&zoo(), &one);
    write_to(&zoo(), &other);
    assert!(std::fs::read(one).unwrap() == std::fs::read(other).unwrap());
}

#[test]
fn a_hundred_thousand_files_in_one_folder_and_in_many() {
    let mut tree = Tree::new();
    for number in 0..50_000 {
        file(&mut tree, &format!("one/{number}-with-a-name-of-some-length"), "");
        file(
            &mut tree,
            &format!("many/{}/{}", number % 256, number),
            if number % 100 == 0 { "x" } else { "" },
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let written = write_to(&tree, &image);
    assert!(written.inodes > 100_000);
    check(&image);
}

#[test]
fn seventy_thousand_folders_in_one_are_more_than_links_are_counted() {
    let mut tree = Tree::new();
    for number in 0..70_000 {
        tree.folder(&format!("d/{number}"), 0o755).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    write_to(&tree, &image);
    check(&image);
    assert!(debugfs(&image, "stat /d").contains("Links: 1 "));
}

/// Files with holes cost nothing here: zeros are not written.
#[test]
fn files_that_meet_superblocks_and_need_blocks_of_extents_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    let sparse = folder.path().join("sparse");
    let file = File::create(&sparse).unwrap();
    let len = 1_300_000_000;
    file.set_len(len).unwrap();
    for at in [0, 134_217_728, 700_000_001, len - 5] {
        file.write_all_at(b"here!", at).unwrap();
    }
    let mut tree = Tree::new();
    tree.file("small", Content::bytes("s"), 0o644).unwrap();
    tree.file("sparse", Content::Path { path: sparse.clone(), len }, 0o644).unwrap();
    let image = folder.path().join("disk.img");
    write_to(&tree, &image);
    check(&image);
    let copy = folder.path().join("copy");
    debugfs(&image, &format!("dump /sparse {}", copy.display()));
    let same = Command::new("cmp").args([&sparse, &copy]).status().unwrap();
    assert!(same.success());
}

#[test]
fn a_file_that_changes_its_length_meanwhile_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let changing = folder.path().join("changing");
    for (found, is) in [("longer than", "short"), ("short", "longer than")] {
        std::fs::write(&changing, is).unwrap();
        let mut tree = Tree::new();
        let content = Content::Path { path: changing.clone(), len: found.len() as u64 };
        tree.file("var/changing", content, 0o644).unwrap();
        let out = tempfile::tempfile().unwrap();
        let error = format!("{:#}", write(&tree, &out, 0, &mut |_, _| {}).unwrap_err());
        assert!(error.contains("/var/changing"), "{error}");
    }
}

#[test]
fn bytes_of_a_file_are_counted_as_they_are_written() {
    let (mut tree, mut told) = (Tree::new(), Vec::new());
    file(&mut tree, "a", vec![1; 3_000_000]);
    let out = tempfile::tempfile().unwrap();
    write(&tree, &out, 4096 * 3, &mut |done, total| told.push((done, total))).unwrap();
    assert_eq!(told.last(), Some(&(3_000_000, 3_000_000)));
    assert!(told.len() > 2);
}
