//! A directory as a job's workspace: what of it goes in, and its tar, made while it is read.
//!
//! The directory is walked twice: once for the names and sizes, so that the tar's length is known before it is sent, and once
//! for the bytes. A file whose size changes in between ends the second walk.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ignore::WalkBuilder;
use tar::{Builder, EntryType, Header};

/// A tar is made of blocks of this many bytes, and ends in two of zeros.
const BLOCK: usize = 512;

/// Why a directory cannot be a workspace.
#[derive(Debug)]
pub enum WorkspaceError {
    /// It is not there, or is no directory.
    NotADirectory {
        /// What was named.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something in it cannot be read.
    Unreadable {
        /// What.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for WorkspaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkspaceError::NotADirectory { path, reason } => {
                write!(f, "the workspace {} {reason}; give a directory", path.display())
            }
            WorkspaceError::Unreadable { path, reason } => {
                write!(
                    f,
                    "{} cannot be read: {reason}; make it readable, or leave it out by a line in .gitignore",
                    path.display()
                )
            }
        }
    }
}

impl std::error::Error for WorkspaceError {}

/// What of a directory goes into a job's machine.
#[derive(Debug)]
pub struct Workspace {
    root: PathBuf,
    entries: Vec<Entry>,
    bytes: u64,
    skipped: Vec<PathBuf>,
}

/// A file, directory or link, relative to the root.
#[derive(Clone, Debug)]
struct Entry {
    path: PathBuf,
    kind: EntryType,
    mode: u32,
    mtime: u64,
    size: u64,
    /// Where a link points.
    target: Option<PathBuf>,
}

impl Workspace {
    /// Walks a directory. What git would ignore is left out, going by `.gitignore`, `.git/info/exclude` and the user's own list,
    /// whether or not it is a repository; so is `.git` itself. Links are taken as links.
    ///
    /// # Errors
    /// [`WorkspaceError`], with the path in question.
    pub fn scan(directory: &Path) -> Result<Workspace, WorkspaceError> {
        let not_a_directory =
            |reason: String| WorkspaceError::NotADirectory { path: directory.to_owned(), reason };
        let root = fs::canonicalize(directory)
            .map_err(|error| not_a_directory(format!("cannot be found: {error}")))?;
        if !root.is_dir() {
            return Err(not_a_directory("is no directory".to_owned()));
        }
        let mut workspace = Workspace {
            root: root.clone(),
            entries: Vec::new(),
            bytes: 2 * BLOCK as u64,
            skipped: Vec::new(),
        };
        let mut walk = WalkBuilder::new(&root);
        walk.hidden(false).ignore(false).require_git(false).sort_by_file_name(Ord::cmp);
        walk.filter_entry(|entry| entry.depth() != 1 || entry.file_name() != ".git");
        for found in walk.build() {
            let found = found.map_err(|error| unreadable(&root, &error))?;
            let Ok(path) = found.path().strip_prefix(&root) else { continue };
            if !path.as_os_str().is_empty() {
                workspace.add(path.to_owned())?;
            }
        }
        Ok(workspace)
    }

    /// Files, directories and links.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of its tar.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is no file, directory or link, and is left out.
    pub fn skipped(&self) -> &[PathBuf] {
        &self.skipped
    }

    /// Its tar, [`Workspace::bytes`] long, read from the directory as it is asked for.
    pub fn tar(&self) -> TarReader {
        TarReader {
            root: self.root.clone(),
            waiting: self.entries.iter().cloned().collect(),
            made: Vec::new(),
            taken: 0,
            open: None,
            ended: false,
        }
    }

    fn add(&mut self, path: PathBuf) -> Result<(), WorkspaceError> {
        let there = self.root.join(&path);
        let told =
            |error: io::Error| WorkspaceError::Unreadable { path: path.clone(), reason: error.to_string() };
        let data = fs::symlink_metadata(&there).map_err(told)?;
        let kind = data.file_type();
        let (kind, size, target) = if kind.is_dir() {
            (EntryType::Directory, 0, None)
        } else if kind.is_symlink() {
            (EntryType::Symlink, 0, Some(fs::read_link(&there).map_err(told)?))
        } else if kind.is_file() {
            (EntryType::Regular, data.len(), None)
        } else {
            self.skipped.push(path);
            return Ok(());
        };
        let mtime = u64::try_from(data.mtime()).unwrap_or(0);
        let entry = Entry { mode: data.mode() & 0o7777, path, kind, mtime, size, target };
        let header = entry.header().map_err(|error| WorkspaceError::Unreadable {
            path: entry.path.clone(),
            reason: error.to_string(),
        })?;
        self.bytes += header.len() as u64 + size + padding(size) as u64;
        self.entries.push(entry);
        Ok(())
    }
}

/// An error of the walk, which names the path by itself.
fn unreadable(root: &Path, error: &ignore::Error) -> WorkspaceError {
    let mut inner = error;
    let mut path = root.to_owned();
    loop {
        match inner {
            ignore::Error::WithPath { path: named, err } => (path, inner) = (named.clone(), err),
            ignore::Error::WithDepth { err, .. } | ignore::Error::WithLineNumber { err, .. } => inner = err,
            other => return WorkspaceError::Unreadable { path, reason: other.to_string() },
        }
    }
}

/// Bytes that fill a file's last block.
fn padding(size: u64) -> usize {
    usize::try_from(size.wrapping_neg() % BLOCK as u64).unwrap_or(0)
}

impl Entry {
    /// What comes before its bytes in a tar.
    fn header(&self) -> io::Result<Vec<u8>> {
        let mut header = Header::new_gnu();
        header.set_entry_type(self.kind);
        header.set_mode(self.mode);
        header.set_mtime(self.mtime);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(self.size);
        let mut tar = Builder::new(Vec::new());
        match &self.target {
            Some(target) => tar.append_link(&mut header, &self.path, target)?,
            None => tar.append_data(&mut header, &self.path, io::empty())?,
        }
        Ok(std::mem::take(tar.get_mut()))
    }
}

/// A workspace's tar. Reading fails, with the path, where the directory is no longer what it was.
#[derive(Debug)]
pub struct TarReader {
    root: PathBuf,
    waiting: VecDeque<Entry>,
    /// Headers, padding, the end mark; from `taken` on.
    made: Vec<u8>,
    taken: usize,
    /// The file that is being read, and how much of it is left.
    open: Option<(File, Entry, u64)>,
    ended: bool,
}

impl Read for TarReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.taken < self.made.len() {
                let rest = &self.made[self.taken..];
                let count = rest.len().min(into.len());
                into[..count].copy_from_slice(&rest[..count]);
                self.taken += count;
                return Ok(count);
            }
            if let Some((file, entry, left)) = &mut self.open {
                let count = read_part(file, entry, left, into)?;
                if *left == 0 {
                    (self.made, self.taken) = (vec![0; padding(entry.size)], 0);
                    self.open = None;
                }
                if count > 0 {
                    return Ok(count);
                }
            } else if let Some(entry) = self.waiting.pop_front() {
                (self.made, self.taken) = (entry.header()?, 0);
                if entry.kind == EntryType::Regular {
                    let file = File::open(self.root.join(&entry.path)).map_err(|error| {
                        io::Error::new(
                            error.kind(),
                            format!("{} cannot be read: {error}", entry.path.display()),
                        )
                    })?;
                    let left = entry.size;
                    self.open = Some((file, entry, left));
                }
            } else if !self.ended {
                self.ended = true;
                (self.made, self.taken) = (vec![0; 2 * BLOCK], 0);
            } else {
                return Ok(0);
            }
        }
    }
}

/// Reads more of a file, which must be as long as it was.
fn read_part(file: &mut File, entry: &Entry, left: &mut u64, into: &mut [u8]) -> io::Result<usize> {
    let changed = || {
        let path = entry.path.display();
        io::Error::other(format!(
            "{path} changed its size while it was read; run again when nobody writes to it"
        ))
    };
    let room = into.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
    let count = if room > 0 { file.read(&mut into[..room])? } else { 0 };
    if count == 0 && room > 0 {
        return Err(changed());
    }
    *left -= count as u64;
    if *left == 0 && file.read(&mut [0])? > 0 {
        return Err(changed());
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn write(root: &Path, name: &str, data: &str) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, data).unwrap();
    }

    /// The names in a workspace's tar, whose length is checked on the way.
    fn names(workspace: &Workspace) -> Vec<String> {
        let mut bytes = Vec::new();
        workspace.tar().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, workspace.bytes());
        let mut archive = tar::Archive::new(bytes.as_slice());
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn what_git_ignores_stays_out_and_so_does_git_itself() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            ".git/config",
            ".gitignore",
            ".github/ci.yml",
            "src/a.c",
            "src/a.o",
            "target/big",
            "sub/x",
            "sub/keep",
        ] {
            write(dir.path(), name, name);
        }
        write(dir.path(), ".gitignore", "*.o\n/target\n");
        write(dir.path(), "sub/.gitignore", "x\n");
        let workspace = Workspace::scan(dir.path()).unwrap();
        let expected = [
            ".github",
            ".github/ci.yml",
            ".gitignore",
            "src",
            "src/a.c",
            "sub",
            "sub/.gitignore",
            "sub/keep",
        ];
        assert_eq!(names(&workspace), expected);
        assert_eq!(workspace.len(), expected.len());
    }

    #[test]
    fn files_links_modes_and_long_names_go_into_the_tar_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/{}", "d".repeat(150), "f".repeat(150));
        write(dir.path(), "run.sh", "#!/bin/sh\n");
        write(dir.path(), &long, &"x".repeat(1000));
        write(dir.path(), "empty", "");
        write(dir.path(), "block", &"y".repeat(512));
        fs::set_permissions(dir.path().join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        symlink("..", dir.path().join("up")).unwrap();
        let workspace = Workspace::scan(dir.path()).unwrap();
        let mut bytes = Vec::new();
        workspace.tar().read_to_end(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(bytes.as_slice());
        let mut seen = 0;
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut data = String::new();
            entry.read_to_string(&mut data).unwrap();
            let path = entry.path().unwrap().display().to_string();
            match path.as_str() {
                "run.sh" => {
                    assert_eq!((entry.header().mode().unwrap(), data.as_str()), (0o755, "#!/bin/sh\n"))
                }
                "loop" => assert_eq!(entry.link_name().unwrap().unwrap(), Path::new("loop")),
                "up" => assert_eq!(entry.link_name().unwrap().unwrap(), Path::new("..")),
                path if path == long => assert_eq!(data.len(), 1000),
                _ => continue,
            }
            seen += 1;
        }
        assert_eq!(seen, 4);
        assert_eq!(bytes.len() as u64, workspace.bytes());
    }

    #[test]
    fn what_is_no_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "file", "x");
        symlink("loop", dir.path().join("loop")).unwrap();
        for (name, words) in [
            ("file", "is no directory"),
            ("nope", "No such file"),
            ("loop", "Too many levels of symbolic links"),
        ] {
            let error = Workspace::scan(&dir.path().join(name)).unwrap_err().to_string();
            assert!(
                error.contains(words) && error.contains(name) && error.contains("give a directory"),
                "{error}"
            );
        }
    }

    #[test]
    fn sockets_are_skipped_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = UnixListener::bind(dir.path().join("socket")).unwrap();
        write(dir.path(), "file", "x");
        let workspace = Workspace::scan(dir.path()).unwrap();
        assert_eq!(
            (names(&workspace), workspace.skipped()),
            (vec!["file".to_owned()], &["socket".into()] as &[PathBuf])
        );
    }

    #[test]
    fn a_file_that_changes_its_size_or_goes_ends_the_tar_with_its_name() {
        for change in ["grow", "shrink", "remove"] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), "log", &"x".repeat(100_000));
            let workspace = Workspace::scan(dir.path()).unwrap();
            let mut file = File::options().append(true).open(dir.path().join("log")).unwrap();
            match change {
                "grow" => file.write_all(b"more").unwrap(),
                "shrink" => file.set_len(10).unwrap(),
                _ => fs::remove_file(dir.path().join("log")).unwrap(),
            }
            let error = workspace.tar().read_to_end(&mut Vec::new()).unwrap_err().to_string();
            let words = if change == "remove" { "log cannot be read" } else { "log changed its size" };
            assert!(error.contains(words), "{change}: {error}");
        }
    }
}
