//! Debian packages: which version apt would install, its download (verified by apt and by its digest), its contents.
//!
//! Needs apt and dpkg, but no privileges: nothing is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{find, output, run};
use crate::sha256;

/// One version of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of its file, hexadecimal, as the repository's signed index says.
    pub sha256: String,
    /// The first alternative of each thing it depends on, without version.
    depends: Vec<String>,
}

/// Finds the version of `name` that apt would install; for a kernel's metapackage, the kernel it stands for.
///
/// # Errors
/// When apt is not there or does not know the package.
pub fn resolve(name: &str) -> Result<Package> {
    for tool in ["apt-cache", "apt-get", "dpkg-deb"] {
        if find(tool).is_none() {
            bail!(
                "`{tool}` is missing; images are built from Debian packages, so build them on Debian 12 or in a container of it"
            );
        }
    }
    let package = with_fresh_lists(|| show(name))?;
    // linux-image-cloud-amd64 depends on linux-image-6.1.0-56-cloud-amd64.
    match package.depends.iter().find(|other| is_kernel(other)) {
        Some(kernel) if !is_kernel(name) => with_fresh_lists(|| show(kernel)),
        _ => Ok(package),
    }
}

/// Whether this is the name of a package with a kernel in it.
fn is_kernel(name: &str) -> bool {
    name.strip_prefix("linux-image-")
        .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

/// Downloads `package` into `cache` and unpacks it there, unless that has been done; the folder with its files.
///
/// # Errors
/// When it cannot be downloaded or unpacked, or is not what the repository's index promised.
pub fn unpack(package: &Package, cache: &Path) -> Result<PathBuf> {
    let root = cache.join(format!("{}_{}", package.name, package.version.replace(':', "%3a")));
    if root.is_dir() {
        return Ok(root);
    }
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let file = match downloaded(package, cache)? {
        Some(file) => file,
        None => {
            eprintln!("image: downloading {} {}", package.name, package.version);
            // By apt's rule `download` drops root's privileges, and then cannot write here; it needs none to begin with.
            let mut apt = Command::new("apt-get");
            apt.args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
                .arg(format!("{}={}", package.name, package.version));
            with_fresh_lists(|| run(apt.current_dir(cache)))?;
            downloaded(package, cache)?.with_context(|| {
                format!("what apt-get downloaded as {} is not what its index promised", package.name)
            })?
        }
    };
    let new = root.with_extension("new");
    let _ = fs::remove_dir_all(&new);
    run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&new))?;
    fs::rename(&new, &root).with_context(|| format!("cannot create {}", root.display()))?;
    Ok(root)
}

/// The package's file in `cache`, if it is there and whole.
fn downloaded(package: &Package, cache: &Path) -> Result<Option<PathBuf>> {
    let start = format!("{}_", package.name);
    for entry in fs::read_dir(cache).with_context(|| format!("cannot read {}", cache.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(&start) && name.ends_with(".deb") && sha256(&fs::read(&path)?) == package.sha256 {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Does something that needs apt's lists of packages. If it fails, the lists may be missing or old: root fetches them and tries once more.
fn with_fresh_lists<T>(mut action: impl FnMut() -> Result<T>) -> Result<T> {
    action().or_else(|error| {
        if fs::metadata("/proc/self").map(|own| std::os::unix::fs::MetadataExt::uid(&own)).unwrap_or(1) != 0 {
            return Err(error.context(
                "apt's lists of packages may be missing or old: run `sudo apt-get update`, then this again",
            ));
        }
        eprintln!("image: fetching apt's lists of packages");
        run(Command::new("apt-get").args(["-qq", "update"]))?;
        action()
    })
}

fn show(name: &str) -> Result<Package> {
    let shown = output(Command::new("apt-cache").args(["show", "--no-all-versions", name]))?;
    parse(&shown).with_context(|| format!("apt knows no package {name}"))
}

/// Reads the first paragraph of what `apt-cache show` prints (Debian policy, 5.1: control files).
fn parse(shown: &str) -> Option<Package> {
    let paragraph = shown.split("\n\n").next()?;
    let field = |name: &str| {
        paragraph
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(|value| value.trim().to_owned())
    };
    let depends = field("Depends").unwrap_or_default();
    let depends = depends
        .split(',')
        .filter_map(|one| one.split(['|', '(', ':']).next())
        .map(|one| one.trim().to_owned());
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        sha256: field("SHA256")?,
        depends: depends.filter(|one| !one.is_empty()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Package: linux-image-cloud-amd64\nSource: linux-signed-amd64 (6.1.192+2)\nVersion: 6.1.192-2\n\
        Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), foo:any | bar\nDescription: Linux\n more: text\n\
        SHA256: abc\n\nPackage: older\nVersion: 1\nSHA256: def\n";

    #[test]
    fn the_newest_version_is_read_from_what_apt_shows() {
        let package = parse(SHOWN).unwrap();
        assert_eq!(
            (package.name.as_str(), package.version.as_str()),
            ("linux-image-cloud-amd64", "6.1.192-2")
        );
        assert_eq!(package.sha256, "abc");
        assert_eq!(package.depends, ["linux-image-6.1.0-56-cloud-amd64", "foo"]);
    }

    #[test]
    fn a_metapackage_is_no_kernel() {
        assert!(!is_kernel("linux-image-cloud-amd64"));
        assert!(is_kernel("linux-image-6.1.0-56-cloud-amd64"));
    }

    #[test]
    fn an_empty_answer_is_no_package() {
        assert_eq!(parse(""), None);
        assert_eq!(parse("Package: x\nVersion: 1\n"), None);
    }

    #[test]
    fn a_file_with_another_digest_is_not_taken() {
        let cache = std::env::temp_dir().join(format!("nestling-packages-{}", std::process::id()));
        fs::create_dir_all(&cache).unwrap();
        let mut package = parse(SHOWN).unwrap();
        fs::write(cache.join("linux-image-cloud-amd64_1_amd64.deb"), "deb").unwrap();
        assert_eq!(downloaded(&package, &cache).unwrap(), None);
        package.sha256 = sha256(b"deb");
        assert!(downloaded(&package, &cache).unwrap().is_some());
        fs::remove_dir_all(&cache).unwrap();
    }
}
