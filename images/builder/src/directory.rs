//! A folder of this computer as a tree.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{lgetxattr, llistxattr};

use crate::content::Content;
use crate::tree::{Kind, Node, Tree};

/// Most bytes of a file's attributes, names or one value (Linux: `XATTR_SIZE_MAX`).
const MAX_ATTRIBUTE: usize = 65_536;

/// Adds what is in the folder `path` to the folder `place` of `tree`, as it is there: owners, modes, times, hard links, devices, attributes.
/// What belongs to the user who calls this is root's in the image, unless that is root, who knows better. What is mounted in it stays out.
///
/// # Errors
/// When something cannot be read; the message names it.
pub fn add(tree: &mut Tree, place: &str, path: &Path) -> Result<()> {
    let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let root = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !root.is_dir() {
        bail!("{} is not a folder", path.display());
    }
    let place = place.trim_matches('/').as_bytes();
    tree.insert(place, node(path, &root, Kind::Folder(BTreeMap::new()), me)?)?;
    let mut seen: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut open = vec![(path.to_owned(), place.to_vec())];
    while let Some((folder, prefix)) = open.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
            let name = path.file_name().unwrap_or_default().as_bytes();
            let at = [prefix.as_slice(), b"/", name].concat();
            let metadata =
                fs::symlink_metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let kind = kind(&path, &metadata)?;
            if metadata.nlink() > 1 && !metadata.is_dir() {
                let key = (metadata.dev(), metadata.ino());
                if let Some(first) = seen.get(&key) {
                    tree.hard_link(&at, first)?;
                    continue;
                }
                seen.insert(key, at.clone());
            }
            tree.insert(&at, node(&path, &metadata, kind, me)?)?;
            // What is mounted there is no part of it: /proc, for one, would have no end.
            if metadata.is_dir() && metadata.dev() == root.dev() {
                open.push((path, at));
            }
        }
    }
    Ok(())
}

fn kind(path: &Path, metadata: &fs::Metadata) -> Result<Kind> {
    let kind = metadata.file_type();
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Ok(if kind.is_dir() {
        Kind::Folder(BTreeMap::new())
    } else if kind.is_file() {
        Kind::File(Content::Path { path: path.to_owned(), len: metadata.len() })
    } else if kind.is_symlink() {
        let target = fs::read_link(path).with_context(|| format!("cannot read {}", path.display()))?;
        Kind::Link(target.as_os_str().as_bytes().to_vec())
    } else if kind.is_char_device() {
        Kind::CharacterDevice { major, minor }
    } else if kind.is_block_device() {
        Kind::BlockDevice { major, minor }
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    })
}

fn node(path: &Path, metadata: &fs::Metadata, kind: Kind, me: (u32, u32)) -> Result<Node> {
    let unless_mine = |id: u32, mine: u32| if id == mine { 0 } else { id };
    Ok(Node {
        kind,
        mode: (metadata.mode() & 0o7777) as u16,
        uid: unless_mine(metadata.uid(), me.0),
        gid: unless_mine(metadata.gid(), me.1),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
        xattrs: attributes(path)
            .with_context(|| format!("cannot read the attributes of {}", path.display()))?,
    })
}

/// The attributes that an image keeps: `user.*` and a file's capabilities. Labels of this computer's SELinux mean nothing elsewhere.
fn attributes(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let len = match llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::PERM) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut found = BTreeMap::new();
    for name in names[..len].split(|&byte| byte == 0) {
        if !(name.starts_with(b"user.") || name == b"security.capability") {
            continue;
        }
        let mut value = vec![0; MAX_ATTRIBUTE];
        let len = lgetxattr(path, name, &mut value[..])?;
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_folder_comes_over_with_links_modes_and_odd_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("d")).unwrap();
        fs::write(at("d/f"), "hello").unwrap();
        fs::set_permissions(at("d/f"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(at("d/f"), at("hard")).unwrap();
        symlink("/etc/passwd", at("absolute")).unwrap();
        fs::write(folder.path().join(std::ffi::OsStr::from_bytes(b"odd\xff\n")), "odd").unwrap();
        let mut tree = Tree::new();
        add(&mut tree, "usr/share", folder.path()).unwrap();
        assert_eq!(tree.find("usr/share/hard"), tree.find("usr/share/d/f"));
        let node = tree.node(tree.find("usr/share/d/f").unwrap());
        assert_eq!((node.mode, node.uid), (0o4751, 0));
        assert!(tree.find("usr/share/absolute").is_none(), "links are not followed out of the image");
        assert_eq!(tree.walk().iter().filter(|(_, name, _)| *name == b"odd\xff\n").count(), 1);
        let error = add(&mut tree, "", &at("d/f")).unwrap_err().to_string();
        assert!(error.contains("not a folder"), "{error}");
    }
}
