//! The folder that a workspace is unpacked in: every name is looked up below it, part by part, and no link is followed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat, mkdirat};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};

/// Flags to open a folder itself with, and never what a link in its place points to.
const FOLDER: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// A folder and what is below it.
pub(crate) struct Tree {
    root: OwnedFd,
    /// The folder that was looked up last, by its path: files of one folder follow one another.
    last: Option<(Vec<u8>, OwnedFd)>,
}

/// A name's folder and its last part; the name without needless parts.
struct Place<'a> {
    folder: Vec<u8>,
    last: &'a [u8],
}

impl Tree {
    /// Everything below `root`, which is there.
    pub(crate) fn new(root: &Path) -> Result<Self, Errno> {
        Ok(Self { root: open(root, FOLDER, Mode::empty())?, last: None })
    }

    /// Makes a folder, or gives the one that is there the mode.
    pub(crate) fn make_folder(&mut self, name: &[u8], mode: Mode) -> Result<(), String> {
        let Some(Place { mut folder, last }) = place(name)? else {
            // The root itself keeps its mode.
            return Ok(());
        };
        if !folder.is_empty() {
            folder.push(b'/');
        }
        folder.extend_from_slice(last);
        fchmod(self.folder(&folder)?, mode).map_err(told)
    }

    /// Makes a file anew, for writing.
    pub(crate) fn make_file(&mut self, name: &[u8]) -> Result<File, String> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = self.make(name, |folder, last| openat(folder, last, flags, Mode::from_bits_retain(0o600)));
        made.map(File::from)
    }

    /// Makes a symbolic link, which may point anywhere.
    pub(crate) fn make_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), String> {
        self.make(name, |folder, last| symlinkat(target, folder, last))
    }

    /// Gives a file of the tree another name.
    pub(crate) fn make_hard_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), String> {
        let Some(Place { folder, last }) = place(target)? else {
            return Err("is a hard link to the workspace itself".to_owned());
        };
        let there = self.folder(&folder)?.try_clone_to_owned().map_err(|error| error.to_string())?;
        self.make(name, |folder, new| linkat(&there, last, folder, new, AtFlags::empty()))
    }

    /// Bytes of the file system below the tree: all of them, and those that are free.
    pub(crate) fn space(&self) -> Option<(u64, u64)> {
        let numbers = fstatvfs(&self.root).ok()?;
        let unit = numbers.fragment_size();
        Some((numbers.blocks().saturating_mul(unit), numbers.blocks_available().saturating_mul(unit)))
    }

    /// Makes something in the place of whatever file is there.
    fn make<T>(
        &mut self,
        name: &[u8],
        make: impl Fn(BorrowedFd<'_>, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, String> {
        let Some(Place { folder, last }) = place(name)? else {
            return Err("names the workspace itself, which is a directory".to_owned());
        };
        let folder = self.folder(&folder)?;
        match make(folder, last) {
            Err(Errno::EEXIST) => {}
            made => return made.map_err(told),
        }
        let there = fstatat(folder, last, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(told)?;
        if SFlag::from_bits_truncate(there.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR {
            return Err("would replace a directory".to_owned());
        }
        unlinkat(folder, last, UnlinkatFlags::NoRemoveDir).map_err(told)?;
        make(folder, last).map_err(told)
    }

    /// A folder of the tree, made as far as it is not there.
    fn folder(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>, String> {
        if path.is_empty() {
            return Ok(self.root.as_fd());
        }
        if self.last.as_ref().is_none_or(|(last, _)| last != path) {
            let mut here: Option<OwnedFd> = None;
            for part in path.split(|&byte| byte == b'/') {
                let parent = here.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
                let next = match openat(parent, part, FOLDER, Mode::empty()) {
                    Err(Errno::ENOENT) => mkdirat(parent, part, Mode::from_bits_retain(0o755))
                        .and_then(|()| openat(parent, part, FOLDER, Mode::empty())),
                    opened => opened,
                };
                let next = next.map_err(|error| match error {
                    Errno::ELOOP | Errno::ENOTDIR => {
                        let part = part.escape_ascii();
                        format!("goes through '{part}', which is a link or a file and no directory")
                    }
                    error => told(error),
                });
                here = Some(next?);
            }
            self.last = here.map(|folder| (path.to_vec(), folder));
        }
        Ok(self.last.as_ref().map_or(self.root.as_fd(), |(_, folder)| folder.as_fd()))
    }
}

fn told(error: Errno) -> String {
    error.desc().to_owned()
}

/// Where in the tree a name is; none for the root.
fn place(name: &[u8]) -> Result<Option<Place<'_>>, String> {
    if name.starts_with(b"/") {
        return Err("is an absolute name; names are relative to the workspace".to_owned());
    }
    if name.contains(&0) {
        return Err("has a zero byte in its name".to_owned());
    }
    let (mut folder, mut last): (Vec<u8>, &[u8]) = (Vec::new(), &[]);
    for part in name.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("has a part '..', which could lead out of the workspace".to_owned()),
            part => {
                if !last.is_empty() {
                    if !folder.is_empty() {
                        folder.push(b'/');
                    }
                    folder.extend_from_slice(last);
                }
                last = part;
            }
        }
    }
    Ok((!last.is_empty()).then_some(Place { folder, last }))
}
