//! The kernel of an image: a bzImage for x86-64 and its modules.
//!
//! Linux: Documentation/arch/x86/boot.rst (the real-mode header).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::directory;
use crate::modules::Modules;
use crate::packages;
use crate::process::{find, run};
use crate::tree::Tree;

/// Debian's kernel for virtual machines, where nobody asks for another.
pub const DEBIAN: &str = "linux-image-cloud-amd64";
/// Most bytes of a kernel.
const MAX_KERNEL: u64 = 256 << 20;
/// The file that says that `depmod` has been there; without it, `modprobe` finds nothing.
const INDEX: &str = "modules.dep.bin";

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The bzImage.
    pub image: Vec<u8>,
    /// What `uname -r` prints.
    pub release: String,
    /// What an image says of it: its package's version, or its release.
    pub version: String,
    /// What is in its folder in `/lib/modules`, if it has one.
    pub modules: Option<Tree>,
}

impl Kernel {
    /// The kernel of a Debian package, downloaded into `cache`; for a metapackage, the one it stands for.
    ///
    /// # Errors
    /// Where there is no apt, and when the package cannot be had or has no kernel.
    pub fn of_package(name: &str, cache: &Path) -> Result<Self> {
        let package = packages::resolve(name).context(
            "for a kernel that is not Debian's give --kernel VMLINUZ --modules DIR, or --kernel own for the root's",
        )?;
        let root = packages::unpack(&package, cache)?;
        let mut kernel = Self::of_files(&only_kernel(&root.join("boot"))?, Some(&root.join("lib/modules")))?;
        kernel.version = package.version;
        Ok(kernel)
    }

    /// The kernel `image` with the modules in `modules`: its own folder, or one that has it.
    ///
    /// # Errors
    /// When it is no kernel for these machines, or the modules are not its.
    pub fn of_files(image: &Path, modules: Option<&Path>) -> Result<Self> {
        let told = || format!("cannot read {}", image.display());
        if fs::metadata(image).with_context(told)?.len() > MAX_KERNEL {
            bail!("{} is larger than any kernel", image.display());
        }
        let image_bytes = fs::read(image).with_context(told)?;
        let release = release(&image_bytes).with_context(|| image.display().to_string())?;
        let modules = match modules {
            Some(folder) => {
                let own =
                    [folder.join(&release), folder.join("lib/modules").join(&release), folder.to_owned()];
                let own = own.iter().find(|folder| folder.ends_with(&release) && folder.is_dir());
                let own = own.with_context(|| {
                    format!(
                        "{} has no modules of the kernel {release}: no folder {release}",
                        folder.display()
                    )
                })?;
                Some(read_modules(own)?)
            }
            None => None,
        };
        Ok(Self { image: image_bytes, version: release.clone(), release, modules })
    }

    /// The newest kernel in `/boot` of `root` that has its modules there.
    ///
    /// # Errors
    /// When there is none, or none for these machines.
    pub fn of_root(root: &Tree) -> Result<Self> {
        let mut names = root.names("boot").unwrap_or_default();
        names.retain(|name| name.starts_with("vmlinuz"));
        names.sort_by_key(|name| numbers(name));
        let name = names
            .pop()
            .context("the root has no kernel (/boot/vmlinuz-*); leave out --kernel own to use Debian's")?;
        let path = format!("boot/{name}");
        let content = root.file_at(&path).with_context(|| format!("/{path} is no file"))?;
        let image = content.read(MAX_KERNEL).with_context(|| format!("/{path}"))?;
        let release = release(&image).with_context(|| format!("/{path}"))?;
        let modules = subtree(root, &format!("lib/modules/{release}")).with_context(|| {
            format!("the root has the kernel /{path}, but not its modules: /lib/modules/{release}")
        })?;
        Ok(Self { image, version: release.clone(), release, modules: Some(modules) })
    }

    /// The modules to load at boot, from `wanted`; what a kernel without modules does not have, it has to have in itself.
    ///
    /// # Errors
    /// When the kernel has one neither in itself nor as a module.
    pub fn boot_modules(&self, wanted: &[String]) -> Result<Vec<crate::modules::Module>> {
        match &self.modules {
            Some(tree) => {
                Modules::find(tree)?.closure(wanted).with_context(|| format!("the kernel {}", self.release))
            }
            None => Ok(Vec::new()),
        }
    }
}

/// The kernel's release, from a bzImage for x86-64.
///
/// # Errors
/// What it is instead.
pub fn release(image: &[u8]) -> Result<String> {
    let at = |at: usize, len: usize| image.get(at..at + len).unwrap_or_default();
    if at(0x202, 4) != b"HdrS" {
        let what = match image {
            [0x7F, b'E', b'L', b'F', ..] => {
                "an ELF (vmlinux); give the bzImage that the kernel's build makes of it"
            }
            [0x1F, 0x8B, ..] => "gzip-compressed, as kernels for ARM are; machines are x86-64",
            _ if at(0x38, 4) == b"ARM\x64" => "a kernel for 64-bit ARM; machines are x86-64",
            [] => "empty",
            _ => "no Linux kernel for x86 (a bzImage)",
        };
        bail!("it is {what}");
    }
    let number = |place| u16::from_le_bytes(at(place, 2).try_into().unwrap_or_default());
    // xloadflags came with version 2.12; its first bit says that there is a 64-bit entry.
    if number(0x206) < 0x20C || number(0x236) & 1 == 0 {
        bail!("it is a 32-bit kernel; machines need one for x86-64");
    }
    let text = image.get(usize::from(number(0x20E)) + 0x200..).unwrap_or_default();
    let end = text.iter().take(256).position(|&byte| byte == b' ' || byte == 0);
    let release = end.and_then(|end| std::str::from_utf8(&text[..end]).ok()).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._+~".contains(c);
    if release.is_empty() || release.starts_with('.') || !release.chars().all(plain) {
        bail!("it does not say its version: it is cut off or damaged");
    }
    Ok(release.to_owned())
}

/// The only `vmlinuz-*` in a folder.
fn only_kernel(boot: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(boot).with_context(|| format!("cannot read {}", boot.display()))? {
        let path = entry?.path();
        if path.file_name().unwrap_or_default().to_string_lossy().starts_with("vmlinuz-") {
            return Ok(path);
        }
    }
    bail!("there is no kernel (vmlinuz-*) in {}", boot.display())
}

/// Reads a folder of modules, indexed by depmod; one without an index, as in a package, gets it.
fn read_modules(folder: &Path) -> Result<Tree> {
    if !folder.join(INDEX).is_file() {
        let depmod =
            ["/usr/sbin/depmod", "/sbin/depmod"].map(PathBuf::from).into_iter().find(|path| path.is_file());
        let depmod = depmod.or_else(|| find("depmod"));
        let depmod = depmod
            .context("`depmod` is missing, which lets modprobe find modules; install the package kmod")?;
        // depmod wants the folder in lib/modules of some root.
        let (Some(release), Some(root)) = (folder.file_name(), folder.ancestors().nth(3)) else {
            bail!("{} is not in a folder lib/modules", folder.display());
        };
        if root.join("lib/modules").join(release) != folder {
            bail!("{} has no {INDEX}; run depmod, or keep it in a folder lib/modules", folder.display());
        }
        run(Command::new(depmod).arg("-b").arg(root).arg(release))?;
    }
    let mut tree = Tree::new();
    directory::add(&mut tree, "", folder)?;
    // Links to where the kernel was built.
    for link in ["build", "source"] {
        tree.remove(link.as_bytes())?;
    }
    // The index is as new as this computer's last build; the image is not to show that.
    let nodes: Vec<_> = tree.walk().into_iter().map(|(_, _, id)| id).collect();
    nodes.into_iter().for_each(|id| tree.node_mut(id).mtime = (0, 0));
    Ok(tree)
}

/// A copy of a folder as a tree of its own.
fn subtree(tree: &Tree, path: &str) -> Option<Tree> {
    let top = tree.find(path)?;
    let mut copy = Tree::new();
    let mut places = std::collections::HashMap::from([(top, Vec::new())]);
    for (folder, name, id) in tree.walk() {
        let Some(prefix) = places.get(&folder) else { continue };
        let place = [prefix.as_slice(), b"/", name].concat();
        let mut node = tree.node(id).clone();
        if let crate::tree::Kind::Folder(entries) = &mut node.kind {
            entries.clear();
            places.insert(id, place.clone());
        }
        copy.insert(&place, node).ok()?;
    }
    matches!(tree.node(top).kind, crate::tree::Kind::Folder(_)).then_some(copy)
}

/// A name's numbers, by which `vmlinuz-6.1.0-9` is older than `vmlinuz-6.1.0-10`.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::Content;
    use crate::testing::bz_image;

    #[test]
    fn a_kernel_says_its_release_and_anything_else_what_it_is() {
        assert_eq!(release(&bz_image("6.1.0-9-cloud-amd64")).unwrap(), "6.1.0-9-cloud-amd64");
        let mut old = bz_image("6.1");
        old[0x236] = 0;
        let mut arm = vec![0; 0x1000];
        arm[0x38..0x3C].copy_from_slice(b"ARM\x64");
        let whole = bz_image("6.1");
        for (bytes, expected) in [
            (&old[..], "32-bit"),
            (&arm, "64-bit ARM"),
            (b"\x7fELF", "vmlinux"),
            (b"\x1f\x8b", "gzip"),
            (b"", "empty"),
            (b"#!/bin/sh", "no Linux kernel"),
            (&whole[..0x300], "cut off"),
        ] {
            let error = release(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        for bad in ["../../etc", "a/b", ""] {
            assert!(release(&bz_image(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_roots_own_kernel_is_its_newest_and_comes_with_its_modules() {
        let mut root = Tree::new();
        assert!(Kernel::of_root(&root).unwrap_err().to_string().contains("no kernel"));
        for release in ["6.1.0-9", "6.1.0-10"] {
            root.file(&format!("boot/vmlinuz-{release}"), Content::bytes(bz_image(release)), 0o644).unwrap();
        }
        assert!(Kernel::of_root(&root).unwrap_err().to_string().contains("/lib/modules/6.1.0-10"));
        root.folder("usr/lib", 0o755).unwrap();
        root.insert(b"lib", crate::Node::new(crate::Kind::Link(b"usr/lib".to_vec()), 0o777)).unwrap();
        root.file("lib/modules/6.1.0-10/kernel/virtio_blk.ko", Content::bytes("\0depends=\0"), 0o644)
            .unwrap();
        let kernel = Kernel::of_root(&root).unwrap();
        assert_eq!(kernel.release, "6.1.0-10");
        assert!(kernel.modules.as_ref().unwrap().file_at("kernel/virtio_blk.ko").is_some());
        assert_eq!(kernel.boot_modules(&["virtio_blk".into()]).unwrap().len(), 1);
        let error = format!("{:#}", kernel.boot_modules(&["virtio_pci".into()]).unwrap_err());
        assert!(error.contains("no module virtio_pci"), "{error}");
    }

    #[test]
    fn modules_of_another_kernel_are_refused_and_a_kernels_own_tell_no_time() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vmlinuz");
        fs::write(&image, bz_image("6.1")).unwrap();
        fs::create_dir_all(folder.path().join("lib/modules/6.2")).unwrap();
        let error = Kernel::of_files(&image, Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("no folder 6.1"), "{error}");
        assert!(Kernel::of_files(&image, None).unwrap().modules.is_none());
        fs::write(folder.path().join("lib/modules/6.2").join(INDEX), "").unwrap();
        fs::rename(folder.path().join("lib/modules/6.2"), folder.path().join("lib/modules/6.1")).unwrap();
        let modules = Kernel::of_files(&image, Some(folder.path())).unwrap().modules.unwrap();
        assert_eq!(modules.node(modules.find(INDEX).unwrap()).mtime, (0, 0));
    }
}
