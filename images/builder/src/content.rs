//! Where the bytes of a file come from. They are read when the image is written, not before.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

/// A file's bytes.
#[derive(Clone, Debug)]
pub enum Content {
    /// These.
    Bytes(Arc<[u8]>),
    /// A part of an open file: of an archive.
    Part {
        /// The file.
        file: Arc<File>,
        /// Where the part begins, in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A file on this computer.
    Path {
        /// Its path.
        path: PathBuf,
        /// Its length in bytes when it was found.
        len: u64,
    },
}

impl Content {
    /// Bytes in memory.
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Bytes(bytes.into().into())
    }

    /// Its length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Part { len, .. } | Self::Path { len, .. } => *len,
        }
    }

    /// Reads it from its beginning to [`Content::len`].
    ///
    /// # Errors
    /// When a file on this computer cannot be opened.
    pub fn reader(&self) -> Result<Box<dyn Read + '_>> {
        Ok(match self {
            Self::Bytes(bytes) => Box::new(&bytes[..]),
            Self::Part { file, offset, len } => Box::new(Part { file, offset: *offset, left: *len }),
            Self::Path { path, len } => {
                let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
                Box::new(file.take(*len))
            }
        })
    }

    /// All of it.
    ///
    /// # Errors
    /// When it cannot be read, or is larger than `limit` bytes.
    pub fn read(&self, limit: u64) -> Result<Vec<u8>> {
        if self.len() > limit {
            bail!("it has {} bytes; at most {limit} are read", self.len());
        }
        let mut bytes = Vec::new();
        self.reader()?.read_to_end(&mut bytes)?;
        if bytes.len() as u64 != self.len() {
            bail!("it has become shorter while it was read");
        }
        Ok(bytes)
    }
}

/// A reader of a part of a file that does not move the file's position.
struct Part<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let len = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += len as u64;
        self.left -= len as u64;
        Ok(len)
    }
}
