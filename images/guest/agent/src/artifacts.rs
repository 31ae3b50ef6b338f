//! Artifacts: files of the workspace that match globs, listed and sent when the node asks.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use nestling_api::agent::{ArtifactList, MAX_PAYLOAD};
use nestling_api::types::Artifact;
use nix::libc;
use tar::{Builder, EntryType, Header};

/// Most files that are artifacts of one job.
const MAX_FILES: usize = 200_000;
/// Bytes of a list's frame that names may take.
const LIST_ROOM: usize = MAX_PAYLOAD - 4096;
/// A tar is made of blocks of this many bytes, and ends in two of zeros.
const BLOCK: usize = 512;

const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// A file that is an artifact.
struct Found {
    /// Relative to the workspace.
    path: PathBuf,
    /// As the list has it.
    name: String,
    size: u64,
}

/// The artifacts of a job.
pub(crate) struct Artifacts {
    folder: PathBuf,
    files: Vec<Found>,
    message: Option<String>,
}

impl Artifacts {
    /// Looks for files below `folder` that match. Links are not followed; a folder that matches stands for all files below.
    pub(crate) fn find(folder: &Path, patterns: &[String]) -> Self {
        let mut found = Self { folder: folder.to_owned(), files: Vec::new(), message: None };
        let mut search = match Search::new(folder, patterns) {
            Ok(search) => search,
            Err(message) => {
                found.message = Some(message);
                return found;
            }
        };
        if let Err(message) = search.folder(Path::new(""), false) {
            found.message = Some(message);
            return found;
        }
        found.message = search.unmatched();
        found.files = search.files;
        found.files.sort_by(|one, other| one.path.cmp(&other.path));
        found
    }

    /// What the node is told: the first of them by name, as many as a frame holds.
    pub(crate) fn list(&self) -> ArtifactList {
        let mut room = LIST_ROOM;
        let mut artifacts = Vec::new();
        for file in &self.files {
            let Some(left) = room.checked_sub(json_len(&file.name).saturating_add(40)) else { break };
            room = left;
            artifacts.push(Artifact { name: file.name.clone(), size: file.size });
        }
        ArtifactList {
            total_count: self.files.len() as u64,
            total_bytes: self.files.iter().fold(0, |sum, file| sum.saturating_add(file.size)),
            artifacts,
            message: self.message.clone(),
        }
    }

    /// Begins to send one of them, or all as a tar.
    ///
    /// # Errors
    /// Why the one cannot be sent.
    pub(crate) fn send(&self, name: Option<&str>) -> Result<Sending, String> {
        let mut sending = Sending {
            folder: self.folder.clone(),
            waiting: VecDeque::new(),
            made: Vec::new(),
            open: None,
            is_tar: name.is_none(),
            ended: false,
        };
        match name {
            None => sending.waiting.extend(self.files.iter().map(|file| file.path.clone())),
            Some(name) => {
                let file = self.files.iter().find(|file| file.name == name);
                let file = file.ok_or_else(|| format!("there is no artifact '{name}'"))?;
                sending.waiting.push_back(file.path.clone());
            }
        }
        Ok(sending)
    }
}

/// Bytes of a string once it is JSON.
fn json_len(text: &str) -> usize {
    text.bytes().map(|byte| if byte < b' ' { 6 } else { 1 + usize::from(matches!(byte, b'"' | b'\\')) }).sum()
}

/// The walk through a workspace.
struct Search<'a> {
    root: &'a Path,
    /// Each with whether something has matched it.
    patterns: Vec<(Pattern, bool)>,
    files: Vec<Found>,
}

impl<'a> Search<'a> {
    fn new(root: &'a Path, patterns: &[String]) -> Result<Self, String> {
        let parse = |text: &String| {
            let text = text.trim_start_matches("./").trim_end_matches('/');
            let pattern =
                Pattern::new(text).map_err(|error| format!("'{text}' is no glob: {}", error.msg))?;
            Ok((pattern, false))
        };
        let patterns = patterns.iter().map(parse).collect::<Result<_, String>>()?;
        Ok(Self { root, patterns, files: Vec::new() })
    }

    /// Looks through a folder, given whether all below it is wanted.
    fn folder(&mut self, folder: &Path, wanted: bool) -> Result<(), String> {
        let here = self.root.join(folder);
        let entries = match fs::read_dir(&here) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("{} cannot be read: {error}", here.display())),
        };
        for entry in entries {
            let entry = entry.map_err(|error| format!("{} cannot be read: {error}", here.display()))?;
            let path = folder.join(entry.file_name());
            // What is gone meanwhile is no artifact.
            let Ok(kind) = entry.file_type() else { continue };
            let wanted = self.matches(&path) || wanted;
            if kind.is_dir() {
                self.folder(&path, wanted)?;
            } else if wanted && (kind.is_file() || kind.is_symlink()) {
                if self.files.len() >= MAX_FILES {
                    return Err(format!("more than {MAX_FILES} files match; pack them into one"));
                }
                let size = entry.metadata().map_or(0, |data| if kind.is_file() { data.len() } else { 0 });
                let name = path.to_string_lossy().into_owned();
                self.files.push(Found { path, name, size });
            }
        }
        Ok(())
    }

    /// Whether a pattern matches; those that do are ticked off.
    fn matches(&mut self, path: &Path) -> bool {
        let text = path.to_string_lossy();
        let mut any = false;
        for (pattern, matched) in &mut self.patterns {
            if pattern.matches_with(&text, OPTIONS) {
                (any, *matched) = (true, true);
            }
        }
        any
    }

    /// The patterns that nothing has matched, for a person to read.
    fn unmatched(&self) -> Option<String> {
        let unmatched: Vec<_> = self
            .patterns
            .iter()
            .filter(|(_, matched)| !matched)
            .map(|(pattern, _)| pattern.as_str())
            .collect();
        (!unmatched.is_empty()).then(|| format!("nothing in the workspace matches {}", unmatched.join(", ")))
    }
}

/// Artifacts that are being sent.
pub(crate) struct Sending {
    folder: PathBuf,
    waiting: VecDeque<PathBuf>,
    /// Bytes that come before those of the file: headers, padding, the end mark.
    made: Vec<u8>,
    open: Option<Open>,
    is_tar: bool,
    ended: bool,
}

/// The file that is being sent.
struct Open {
    file: File,
    path: PathBuf,
    left: u64,
    /// Zeros that fill its last block.
    padding: usize,
}

impl Sending {
    /// The next bytes, at most `room`; none once everything was given.
    ///
    /// # Errors
    /// Which file cannot be sent and why.
    pub(crate) fn next(&mut self, room: usize) -> Result<Option<Vec<u8>>, String> {
        loop {
            if !self.made.is_empty() {
                let rest = self.made.split_off(room.min(self.made.len()));
                return Ok(Some(std::mem::replace(&mut self.made, rest)));
            }
            if let Some(open) = &mut self.open {
                let bytes = open.read(room)?;
                if open.left == 0 {
                    self.made = vec![0; open.padding];
                    self.open = None;
                }
                if !bytes.is_empty() {
                    return Ok(Some(bytes));
                }
            } else if let Some(path) = self.waiting.pop_front() {
                self.begin(path)?;
            } else if self.is_tar && !self.ended {
                self.ended = true;
                self.made = vec![0; 2 * BLOCK];
            } else {
                return Ok(None);
            }
        }
    }

    /// Begins a file: opens it and makes its header.
    fn begin(&mut self, path: PathBuf) -> Result<(), String> {
        let there = self.folder.join(&path);
        let told = |error: io::Error| format!("{} cannot be read: {error}", path.display());
        let data = fs::symlink_metadata(&there).map_err(told)?;
        if data.is_symlink() {
            if !self.is_tar {
                return Err(format!("{} is a link; a tar of all artifacts has it", path.display()));
            }
            let target = fs::read_link(&there).map_err(told)?;
            let mut header = header(&data, 0);
            header.set_entry_type(EntryType::Symlink);
            return self.make(|tar| tar.append_link(&mut header, &path, target)).map_err(told);
        }
        // Should a FIFO or a link be in its place by now, opening it must neither block nor lead elsewhere.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&there).map_err(told)?;
        let data = file.metadata().map_err(told)?;
        if !data.is_file() {
            return Err(format!("{} is no file any more", path.display()));
        }
        let mut padding = 0;
        if self.is_tar {
            // Without the bytes, which follow: this makes the header, and one before it for a long name.
            let mut header = header(&data, data.len());
            self.make(|tar| tar.append_data(&mut header, &path, io::empty())).map_err(told)?;
            padding = usize::try_from(data.len().wrapping_neg() % BLOCK as u64).unwrap_or(0);
        }
        self.open = Some(Open { file, path, left: data.len(), padding });
        Ok(())
    }

    /// Adds headers to what comes next.
    fn make(&mut self, append: impl FnOnce(&mut Builder<Vec<u8>>) -> io::Result<()>) -> io::Result<()> {
        let mut tar = Builder::new(std::mem::take(&mut self.made));
        append(&mut tar)?;
        self.made = std::mem::take(tar.get_mut());
        Ok(())
    }
}

impl Open {
    /// The next of its bytes, at most `room`.
    fn read(&mut self, room: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; room.min(usize::try_from(self.left).unwrap_or(room))];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        let count = self.file.read(&mut bytes);
        let count = count.map_err(|error| format!("{} cannot be read: {error}", self.path.display()))?;
        if count == 0 {
            return Err(format!("{} became shorter while it was read", self.path.display()));
        }
        bytes.truncate(count);
        self.left = self.left.saturating_sub(count as u64);
        Ok(bytes)
    }
}

fn header(data: &fs::Metadata, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(data.mode() & 0o7777);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(u64::try_from(data.mtime()).unwrap_or(0));
    header.set_size(size);
    header.set_entry_type(EntryType::Regular);
    header
}
