//! What an image is made from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// `recipe.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    kernel: String,
    packages: Vec<String>,
    modules: Vec<String>,
    command_line: Vec<String>,
    root: Option<Distribution>,
}

/// A root file system that is installed from a Debian suite.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Distribution {
    /// The suite, such as `bookworm`.
    pub(super) suite: String,
    /// What is installed besides the essential packages and apt.
    pub(super) packages: Vec<String>,
    /// Variables of every step.
    pub(super) environment: BTreeMap<String, String>,
}

/// An image's description.
#[derive(Debug)]
pub(crate) struct Recipe {
    /// The image's name: the folder's.
    pub(super) name: String,
    /// The Debian package of the kernel; may be one that only depends on the real one.
    pub(super) kernel: String,
    /// Debian packages whose programs the image has.
    pub(super) packages: Vec<String>,
    /// Kernel modules to load at boot; those they depend on come by themselves.
    pub(super) modules: Vec<String>,
    /// The kernel's command line.
    pub(crate) command_line: String,
    /// The image's own files: path in the image, contents, whether executable.
    pub(super) files: BTreeMap<String, (Vec<u8>, bool)>,
    /// What is on the image's disk, if the initramfs is not its root.
    pub(super) root: Option<Distribution>,
}

impl Recipe {
    /// Reads the recipe `name` below `folder`.
    pub(crate) fn read(folder: &Path, name: &str) -> Result<Self> {
        let known = || {
            let mut names: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
            names.retain(|entry| entry.path().join("recipe.json").is_file());
            names
                .iter()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let path = folder.join(name).join("recipe.json");
        if name.is_empty() || name.contains(['/', '.']) || !path.is_file() {
            bail!("there is no image `{name}`; there is: {}", known());
        }
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text: Text =
            serde_json::from_slice(&text).with_context(|| format!("{} is not a recipe", path.display()))?;
        let mut files = BTreeMap::new();
        collect(&folder.join(name).join("root"), "", &mut files)?;
        Ok(Self {
            name: name.to_owned(),
            kernel: text.kernel,
            packages: text.packages,
            modules: text.modules,
            command_line: text.command_line.join(" "),
            files,
            root: text.root,
        })
    }

    /// Adds everything that decides how the image comes out.
    pub(super) fn digest_into(&self, digest: &mut Sha256) -> Result<()> {
        let head = (&self.name, &self.kernel, &self.packages, &self.modules, &self.command_line, &self.root);
        digest.update(serde_json::to_vec(&head)?);
        for (path, (contents, executable)) in &self.files {
            digest.update(serde_json::to_vec(&(path, executable))?);
            digest.update(Sha256::digest(contents));
        }
        Ok(())
    }
}

/// Takes every file below `folder`.
fn collect(folder: &Path, prefix: &str, files: &mut BTreeMap<String, (Vec<u8>, bool)>) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut paths: Vec<PathBuf> = match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", folder.display())),
    };
    paths.sort();
    for path in paths {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_str()
            .with_context(|| format!("{} is not UTF-8", path.display()))?;
        let place = format!("{prefix}{name}");
        let kind = fs::symlink_metadata(&path)?;
        if kind.is_dir() {
            collect(&path, &format!("{place}/"), files)?;
        } else if kind.is_file() {
            let contents = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            files.insert(place, (contents, kind.permissions().mode() & 0o100 != 0));
        } else {
            bail!("{} is neither a file nor a folder; a recipe has only these", path.display());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::workspace_root;

    #[test]
    fn the_minimal_recipe_reads() {
        let recipe = Recipe::read(&workspace_root().join("images/guest"), "minimal").unwrap();
        assert_eq!(recipe.name, "minimal");
        assert!(recipe.files.contains_key("etc/passwd"));
        assert!(recipe.command_line.contains("panic=-1"), "a panic has to end the machine at once");
    }

    #[test]
    fn the_debian_recipe_boots_from_its_disk_and_has_what_builds_need() {
        let recipe = Recipe::read(&workspace_root().join("images/guest"), "debian").unwrap();
        assert!(recipe.command_line.contains("root=/dev/vda") && recipe.command_line.contains("panic=-1"));
        let root = recipe.root.unwrap();
        for package in ["git", "curl", "ca-certificates", "build-essential", "python3", "sudo", "kmod"] {
            assert!(root.packages.iter().any(|one| one == package), "{package}");
        }
        assert!(recipe.modules.iter().any(|module| module == "virtio_blk"));
    }

    #[test]
    fn an_unknown_image_is_refused_with_the_ones_there_are() {
        for name in ["minimall", "", "../guest/minimal", "agent"] {
            let error = Recipe::read(&workspace_root().join("images/guest"), name).unwrap_err().to_string();
            assert!(error.contains("there is: ") && error.contains("minimal"), "{error}");
        }
    }

    #[test]
    fn a_change_of_any_file_changes_the_digest() {
        let read = || Recipe::read(&workspace_root().join("images/guest"), "minimal").unwrap();
        let digest = |recipe: &Recipe| {
            let mut digest = Sha256::new();
            recipe.digest_into(&mut digest).unwrap();
            digest.finalize()
        };
        let mut changed = read();
        assert_eq!(digest(&read()), digest(&changed));
        changed.files.get_mut("etc/passwd").unwrap().0.push(b'#');
        assert_ne!(digest(&read()), digest(&changed));
    }
}
