//! The workspace: a tar that comes in pieces and is unpacked as it comes.
//!
//! POSIX.1-2017, pax (ustar and pax extended headers), and GNU tar's long names (types `L` and `K`). Names and links lead only to
//! places below the tree's root (`tree.rs`); whatever cannot be unpacked ends it with the entry's name.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use tar::{EntryType, Header, PaxExtensions};

use crate::tree::Tree;

/// A tar is made of these.
const BLOCK: usize = 512;
/// Most bytes of an extended header or a long name. Linux takes names of 4 KiB.
const MAX_EXTENSION: u64 = 1024 * 1024;

/// A tar on its way into a folder.
pub(crate) struct Unpacker {
    tree: Tree,
    state: State,
    /// The part of a header that has come.
    block: Vec<u8>,
    /// What an extension has said of the next entry.
    next: Extension,
    entries: u64,
    bytes: u64,
}

/// What is being read.
enum State {
    /// A header.
    Header,
    /// An extension of the next entry's header.
    Extension { kind: EntryType, data: Vec<u8>, left: u64, padding: u64 },
    /// A file's bytes.
    File { file: File, name: Vec<u8>, mode: Mode, mtime: Duration, left: u64, padding: u64 },
    /// Bytes that mean nothing here.
    Skip { left: u64 },
    /// Whatever comes after the end mark.
    End,
}

/// What extensions say of the entry after them.
#[derive(Default)]
struct Extension {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Unpacker {
    /// A tar that will be unpacked in `folder`.
    pub(crate) fn new(folder: &Path) -> Result<Self, String> {
        let tree = Tree::new(folder).map_err(|error| {
            format!("the directory {} cannot be opened: {}", folder.display(), error.desc())
        })?;
        let (block, next) = (Vec::with_capacity(BLOCK), Extension::default());
        Ok(Self { tree, state: State::Header, block, next, entries: 0, bytes: 0 })
    }

    /// Takes the next bytes of the tar.
    ///
    /// # Errors
    /// Which entry cannot be unpacked and why. Nothing more can be taken then.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        while !bytes.is_empty() {
            let used = self.take(bytes)?;
            bytes = bytes.get(used..).unwrap_or_default();
        }
        Ok(())
    }

    /// That was all: how many entries it had.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn finish(self) -> Result<u64, String> {
        match self.state {
            State::End => Ok(self.entries),
            // An empty body is an empty workspace.
            State::Header if self.bytes == 0 => Ok(0),
            State::File { name, .. } => {
                Err(format!("the tar ends in the middle of '{}'", name.escape_ascii()))
            }
            _ => Err(format!("the tar ends after {} bytes without its end mark", self.bytes)),
        }
    }

    /// Takes some of `bytes`, at least one: how many.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, String> {
        match &mut self.state {
            State::Header => {
                let missing = BLOCK.saturating_sub(self.block.len());
                let part = bytes.get(..missing).unwrap_or(bytes);
                self.block.extend_from_slice(part);
                if self.block.len() == BLOCK {
                    let block = std::mem::take(&mut self.block);
                    self.state = self.header(&block)?;
                    self.settle()?;
                }
                Ok(part.len())
            }
            State::Extension { data, left, padding, .. } => {
                let used = if *left > 0 {
                    let part = part(bytes, *left);
                    data.extend_from_slice(part);
                    *left = left.saturating_sub(part.len() as u64);
                    part.len()
                } else {
                    let part = part(bytes, *padding);
                    *padding = padding.saturating_sub(part.len() as u64);
                    part.len()
                };
                self.settle()?;
                Ok(used)
            }
            State::File { file, name, left, padding, .. } => {
                let used = if *left > 0 {
                    let part = part(bytes, *left);
                    if let Err(error) = file.write_all(part) {
                        let name = name.clone();
                        return Err(self.describe(&name, &error));
                    }
                    *left = left.saturating_sub(part.len() as u64);
                    part.len()
                } else {
                    let part = part(bytes, *padding);
                    *padding = padding.saturating_sub(part.len() as u64);
                    part.len()
                };
                self.settle()?;
                Ok(used)
            }
            State::Skip { left } => {
                let part = part(bytes, *left);
                *left = left.saturating_sub(part.len() as u64);
                self.settle()?;
                Ok(part.len())
            }
            State::End => Ok(bytes.len()),
        }
    }

    /// Goes on to the next header once there is nothing left to read.
    fn settle(&mut self) -> Result<(), String> {
        let over = match &self.state {
            State::Extension { left, padding, .. } | State::File { left, padding, .. } => {
                *left == 0 && *padding == 0
            }
            State::Skip { left } => *left == 0,
            State::Header | State::End => false,
        };
        if !over {
            return Ok(());
        }
        match std::mem::replace(&mut self.state, State::Header) {
            State::Extension { kind, data, .. } => self.extend(kind, &data),
            State::File { file, name, mode, mtime, .. } => {
                let time = TimeSpec::from_duration(mtime);
                // After the last write, which takes the bits for other users away.
                let set = fchmod(&file, mode).and_then(|()| futimens(&file, &time, &time));
                set.map_err(|error| self.describe(&name, &error.into()))
            }
            _ => Ok(()),
        }
    }

    /// Begins the entry with this header.
    fn header(&mut self, block: &[u8]) -> Result<State, String> {
        if block.iter().all(|&byte| byte == 0) {
            return Ok(State::End);
        }
        let header = Header::from_byte_slice(block);
        let place = || format!("the tar is damaged after {} entries", self.entries);
        if header.cksum().ok() != Some(checksum(block)) {
            return Err(format!(
                "{}: a header's checksum is wrong; is it a tar that is not compressed?",
                place()
            ));
        }
        let kind = header.entry_type();
        let size = header.entry_size().map_err(|error| format!("{}: {error}", place()))?;
        let padded = |size: u64| size.wrapping_neg() % BLOCK as u64;
        if kind.is_pax_local_extensions() || kind.is_gnu_longname() || kind.is_gnu_longlink() {
            if size > MAX_EXTENSION {
                return Err(format!("{}: an extended header has {size} bytes", place()));
            }
            return Ok(State::Extension { kind, data: Vec::new(), left: size, padding: padded(size) });
        }
        if kind.is_pax_global_extensions() {
            return Ok(State::Skip { left: size.saturating_add(padded(size)) });
        }
        let extension = std::mem::take(&mut self.next);
        let size = extension.size.unwrap_or(size);
        let name = extension.name.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extension.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        self.entries = self.entries.saturating_add(1);
        self.begin(header, kind, &name, link.as_deref(), size)
            .map_err(|what| self.with_space(format!("the entry '{}' {what}", name.escape_ascii())))
    }

    /// Makes what an entry says; the error goes behind its name.
    fn begin(
        &mut self,
        header: &Header,
        kind: EntryType,
        name: &[u8],
        link: Option<&[u8]>,
        size: u64,
    ) -> Result<State, String> {
        let mode = header.mode().map_err(|error| format!("has a damaged header: {error}"))?;
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        let padding = size.wrapping_neg() % BLOCK as u64;
        let skip = State::Skip { left: size.saturating_add(padding) };
        let link = || link.filter(|link| !link.is_empty()).ok_or("is a link to nothing");
        match kind {
            // Before POSIX, a directory was a file with a slash at its end.
            EntryType::Regular | EntryType::Continuous if !name.ends_with(b"/") => {
                let file = self.tree.make_file(name)?;
                let mtime = Duration::from_secs(header.mtime().unwrap_or(0));
                Ok(State::File { file, name: name.to_vec(), mode, mtime, left: size, padding })
            }
            EntryType::Directory | EntryType::Regular => self.tree.make_folder(name, mode).map(|()| skip),
            EntryType::Symlink => self.tree.make_link(name, link()?).map(|()| skip),
            EntryType::Link => self.tree.make_hard_link(name, link()?).map(|()| skip),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                Err("is a device or a FIFO; a workspace has files, directories and links".to_owned())
            }
            EntryType::GNUSparse => {
                Err("is sparse in GNU's format; make the tar without --sparse".to_owned())
            }
            other => Err(format!("is of an unknown type, {:#04x}", other.as_byte())),
        }
    }

    /// Takes note of what an extension says.
    fn extend(&mut self, kind: EntryType, data: &[u8]) -> Result<(), String> {
        let text = || data.strip_suffix(b"\0").unwrap_or(data).to_vec();
        if kind.is_gnu_longname() {
            self.next.name = Some(text());
            return Ok(());
        }
        if kind.is_gnu_longlink() {
            self.next.link = Some(text());
            return Ok(());
        }
        let damaged = || {
            format!("the tar is damaged after {} entries: an extended header cannot be read", self.entries)
        };
        for extension in PaxExtensions::new(data) {
            let extension = extension.map_err(|_| damaged())?;
            let value = extension.value_bytes();
            match extension.key_bytes() {
                b"path" => self.next.name = Some(value.to_vec()),
                b"linkpath" => self.next.link = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
                    self.next.size = Some(size.ok_or_else(damaged)?);
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(
                        "the tar has sparse files in GNU's format; make it without --sparse".to_owned()
                    );
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn describe(&self, name: &[u8], error: &io::Error) -> String {
        self.with_space(format!("the entry '{}' cannot be written: {error}", name.escape_ascii()))
    }

    /// Says how much space there is when there is none left.
    fn with_space(&self, message: String) -> String {
        const MIB: u64 = 1 << 20;
        match self.tree.space() {
            Some((all, free)) if free < MIB => {
                let (all, sent) = (all / MIB, self.bytes / MIB);
                format!(
                    "{message} (the machine's disk has {all} MiB and is full after {sent} MiB of the workspace; ask for more \
                     in machine_config)"
                )
            }
            _ => message,
        }
    }
}

/// As much of `bytes` as there is still to read.
fn part(bytes: &[u8], left: u64) -> &[u8] {
    bytes.get(..usize::try_from(left).unwrap_or(usize::MAX)).unwrap_or(bytes)
}

/// The sum of a header's bytes, those of the checksum itself taken as spaces.
fn checksum(block: &[u8]) -> u32 {
    const FIELD: std::ops::Range<usize> = 148..156;
    let byte = |(place, &byte): (usize, &u8)| u32::from(if FIELD.contains(&place) { b' ' } else { byte });
    block.iter().enumerate().map(byte).sum()
}
