//! A job's artifacts on this computer: a tar from a machine that nobody trusts, unpacked where the user wants it.
//!
//! Only files that the user's own globs match are written, each in place of what was there, and none through a link of the
//! tar: its links are made last, and only such as lead no way out.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};
use tar::{Archive, EntryType};
use tempfile::NamedTempFile;

const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// What was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Files and links that were written.
    pub files: u64,
    /// Bytes of the files.
    pub bytes: u64,
    /// Where they are below the directory, and the bytes of each; 0 for a link.
    pub names: Vec<(PathBuf, u64)>,
    /// What was not written, and why.
    pub refused: Vec<(String, &'static str)>,
}

/// Why artifacts are not (all) here.
#[derive(Debug)]
pub enum UnpackError {
    /// The tar breaks off or is none; another try may help.
    Tar(io::Error),
    /// A file or directory of ours cannot be written.
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl fmt::Display for UnpackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnpackError::Tar(error) => write!(f, "the artifacts cannot be read: {error}"),
            UnpackError::Write { path, source } => {
                write!(f, "{} cannot be written: {source}", path.display())
            }
        }
    }
}

impl std::error::Error for UnpackError {}

impl From<io::Error> for UnpackError {
    fn from(error: io::Error) -> UnpackError {
        UnpackError::Tar(error)
    }
}

/// Unpacks artifacts below `directory`, which is made if need be. `globs` are those that the job was created with.
///
/// # Errors
/// The tar breaks off or is none, or a file cannot be written; what was unpacked by then stays.
pub fn unpack(tar: impl Read, directory: &Path, globs: &[String]) -> Result<Unpacked, UnpackError> {
    let patterns = globs.iter().map(|glob| Pattern::new(glob.trim_start_matches("./").trim_end_matches('/')));
    let patterns = patterns.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    let mut unpacked = Unpacked::default();
    let mut links = Vec::new();
    fs::create_dir_all(directory).map_err(|error| named(directory, error))?;
    let mut archive = Archive::new(tar);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if let Err(why) = wanted(&path, &patterns) {
            unpacked.refused.push((path.display().to_string(), why));
            continue;
        }
        let place = directory.join(&path);
        match entry.header().entry_type() {
            EntryType::Regular => {
                let parent = place.parent().unwrap_or(directory);
                fs::create_dir_all(parent).map_err(|error| named(parent, error))?;
                let mut file = NamedTempFile::new_in(parent).map_err(|error| named(parent, error))?;
                let bytes = copy(&mut entry, &mut file, &place)?;
                if bytes < entry.size() {
                    let message = format!("the tar broke off in the middle of {}", path.display());
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message).into());
                }
                unpacked.bytes += bytes;
                let mode = entry.header().mode()? & 0o755 | 0o600;
                fs::set_permissions(file.path(), fs::Permissions::from_mode(mode))
                    .map_err(|error| named(&place, error))?;
                file.persist(&place).map_err(|error| named(&place, error.error))?;
                unpacked.files += 1;
                unpacked.names.push((path, bytes));
            }
            EntryType::Symlink => match entry.link_name()? {
                Some(target) => links.push((path, target.into_owned())),
                None => unpacked.refused.push((path.display().to_string(), "it is a link to nothing")),
            },
            _ => unpacked.refused.push((path.display().to_string(), "it is neither a file nor a link")),
        }
    }
    // An archive ends before what carries it does, and the node keeps the machine until somebody has read to that end.
    let _ = io::copy(&mut archive.into_inner(), &mut io::sink());
    for (path, target) in links {
        let inside = target.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !inside {
            unpacked.refused.push((path.display().to_string(), "it is a link that leads elsewhere"));
            continue;
        }
        let place = directory.join(&path);
        let parent = place.parent().unwrap_or(directory);
        fs::create_dir_all(parent).map_err(|error| named(parent, error))?;
        if fs::symlink_metadata(&place).is_ok_and(|there| there.is_dir()) {
            unpacked.refused.push((path.display().to_string(), "it is a link where a directory is"));
            continue;
        }
        match fs::remove_file(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(&place, error)),
            _ => symlink(&target, &place).map_err(|error| named(&place, error))?,
        }
        unpacked.files += 1;
        unpacked.names.push((path, 0));
    }
    Ok(unpacked)
}

/// Whether an artifact is one that was asked for.
fn wanted(path: &Path, patterns: &[Pattern]) -> Result<(), &'static str> {
    if path.components().any(|part| !matches!(part, Component::Normal(_))) || path.as_os_str().is_empty() {
        return Err("its name leads elsewhere");
    }
    let matches = |path: &Path| {
        let text = path.to_string_lossy();
        patterns.iter().any(|pattern| pattern.matches_with(&text, OPTIONS))
    };
    // A directory that matches stands for all below it.
    let asked = path.ancestors().filter(|path| !path.as_os_str().is_empty()).any(matches);
    if asked { Ok(()) } else { Err("no --artifact asks for it") }
}

/// Copies all there is, and tells whose fault it is when that does not work.
fn copy(from: &mut impl Read, to: &mut impl Write, place: &Path) -> Result<u64, UnpackError> {
    let (mut buffer, mut bytes) = ([0; 32 << 10], 0);
    loop {
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(bytes);
        }
        to.write_all(&buffer[..count]).map_err(|error| named(place, error))?;
        bytes += count as u64;
    }
}

fn named(path: &Path, source: io::Error) -> UnpackError {
    UnpackError::Write { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use tar::Header;

    use super::*;

    /// A tar of entries whose names nobody has checked: kind, name, link or data.
    fn tar(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, name, text) in entries {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            let data = if *kind == EntryType::Regular { *text } else { "" };
            if *kind != EntryType::Regular {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_size(data.len() as u64);
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(data.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    fn globs(globs: &[&str]) -> Vec<String> {
        globs.iter().map(|glob| (*glob).to_owned()).collect()
    }

    #[test]
    fn files_take_the_places_of_those_that_were_there() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new/out");
        let tar = tar(&[
            (EntryType::Regular, "dist/a", "one"),
            (EntryType::Regular, "dist/deep/b", ""),
            (EntryType::Symlink, "dist/latest", "a"),
        ]);
        for _ in 0..2 {
            let unpacked = unpack(tar.as_slice(), &out, &globs(&["./dist/"])).unwrap();
            assert_eq!((unpacked.files, unpacked.bytes, unpacked.refused.len()), (3, 3, 0));
            assert_eq!(fs::read(out.join("dist/latest")).unwrap(), b"one");
            assert_eq!(fs::metadata(out.join("dist/a")).unwrap().permissions().mode() & 0o7777, 0o755);
        }
    }

    #[test]
    fn what_carries_the_archive_is_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = tar(&[(EntryType::Regular, "a", "one")]);
        bytes.extend([0; 9000]);
        let mut rest = bytes.as_slice();
        assert_eq!(unpack(&mut rest, dir.path(), &globs(&["a"])).unwrap().files, 1);
        assert!(rest.is_empty(), "{} bytes left", rest.len());
    }

    #[test]
    fn what_leads_elsewhere_or_was_not_asked_for_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let tar = tar(&[
            (EntryType::Regular, "../evil", "x"),
            (EntryType::Regular, "/tmp/nestling-evil", "x"),
            (EntryType::Regular, "dist/../../evil", "x"),
            (EntryType::Regular, ".bashrc", "x"),
            (EntryType::Symlink, "dist/out", ".."),
            (EntryType::Symlink, "dist/abs", "/etc"),
            (EntryType::Symlink, "dist/in", "sub"),
            (EntryType::Regular, "dist/in/f", "x"),
            (EntryType::Fifo, "dist/fifo", ""),
            (EntryType::Link, "dist/hard", "../../kept"),
        ]);
        let unpacked = unpack(tar.as_slice(), &out, &globs(&["dist/**"])).unwrap();
        assert_eq!((unpacked.files, unpacked.refused.len()), (1, 9), "{:?}", unpacked.refused);
        assert_eq!(fs::read(out.join("dist/in/f")).unwrap(), b"x");
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["out"]);
        let left: Vec<_> =
            fs::read_dir(out.join("dist")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["in"]);
    }

    #[test]
    fn a_file_is_not_written_through_a_link_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("kept"), "kept").unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        symlink("../kept", out.join("a")).unwrap();
        unpack(tar(&[(EntryType::Regular, "a", "new")]).as_slice(), &out, &globs(&["a"])).unwrap();
        assert_eq!(
            (fs::read(dir.path().join("kept")).unwrap(), fs::read(out.join("a")).unwrap()),
            (b"kept".into(), b"new".into())
        );
    }

    #[test]
    fn a_tar_that_breaks_off_is_an_error_and_leaves_no_half_file() {
        let dir = tempfile::tempdir().unwrap();
        let whole = tar(&[(EntryType::Regular, "a", "one"), (EntryType::Regular, "b", &"x".repeat(5000))]);
        let error = unpack(&whole[..3000], dir.path(), &globs(&["*"])).unwrap_err();
        assert!(!error.to_string().is_empty());
        assert!(dir.path().join("a").exists() && !dir.path().join("b").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
