//! From a root file system, a kernel and the agent to a bundle.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::bundle::{self, Disk, Image, Written};
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::tree::Tree;
use crate::{archive, directory, oci, root};

/// What an image's kernel has to have to boot from a disk, talk to the node, and reach the network: in itself or as modules.
pub const MODULES: [&str; 6] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "vmw_vsock_virtio_transport", "ext4"];
/// The kernel's command line of an image with a disk; images/README.md says what each word is for.
pub const COMMAND_LINE: &str =
    "console=ttyS0 loglevel=3 panic=-1 cryptomgr.notests nokaslr init_on_alloc=0 root=/dev/vda";
/// What a machine's disk has free, in MiB, unless somebody says otherwise.
pub const FREE_MIB: u32 = 2048;
/// Where the agent finds the modules to load, one path a line.
pub const MODULE_LIST: &str = "etc/nestling/modules";
/// Most bytes of an initramfs that is looked into.
const MAX_INITRAMFS: u64 = 256 << 20;

/// Where a root file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A tar archive or a folder.
    Path(PathBuf),
    /// An image in an OCI layout.
    Oci {
        /// The layout's folder.
        folder: PathBuf,
        /// The image's tag; none where there is only one.
        tag: Option<String>,
    },
}

impl FromStr for Source {
    type Err = String;

    /// `PATH`, `oci:DIR` or `oci:DIR:TAG`.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("oci:") else {
            return if text.is_empty() { Err("it is empty".into()) } else { Ok(Self::Path(text.into())) };
        };
        let (folder, tag) = match rest.rsplit_once(':') {
            // A folder may have a colon in its name.
            Some((folder, tag)) if !tag.contains('/') && !Path::new(rest).is_dir() => {
                (folder, Some(tag.to_owned()))
            }
            _ => (rest, None),
        };
        if folder.is_empty() || tag.as_deref() == Some("") {
            return Err("give oci:DIR or oci:DIR:TAG".into());
        }
        Ok(Self::Oci { folder: folder.into(), tag })
    }
}

/// Which kernel an image gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// A Debian package's, by apt.
    Package(String),
    /// A bzImage and its modules.
    Files {
        /// The bzImage.
        image: PathBuf,
        /// The folder of its modules, `/lib/modules/RELEASE`, or one that has it.
        modules: Option<PathBuf>,
    },
    /// The root's own.
    Own,
}

/// An image to build.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its root.
    pub from: &'a Source,
    /// What is done to the root before it is completed.
    pub prepare: &'a dyn Fn(&mut Tree) -> Result<()>,
    /// Its kernel.
    pub kernel: &'a KernelSource,
    /// The agent's program.
    pub agent: &'a [u8],
    /// What it says of nestling's version.
    pub version: &'a str,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Modules to load before the root is there.
    pub modules: &'a [String],
    /// Variables of every step, before those of the root's own configuration.
    pub environment: &'a [(String, String)],
    /// What a machine's disk has free, in MiB.
    pub free_mib: u32,
    /// Where packages are kept.
    pub cache: &'a Path,
}

/// What a build is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading the root.
    Reading,
    /// Finding the kernel, perhaps downloading it.
    Kernel,
    /// Writing the disk: bytes of files done, and of all.
    Writing(u64, u64),
}

/// Builds an image into the bundle `out`, which nobody sees before it is whole.
///
/// # Errors
/// What is wrong with the root, the kernel or this computer.
pub fn build(request: &Request<'_>, out: &Path, phase: &mut dyn FnMut(Phase)) -> Result<Written> {
    bundle::check_name(request.name)?;
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    phase(Phase::Reading);
    let mut tree = Tree::new();
    let mut environment = request.environment.to_vec();
    match request.from {
        Source::Path(path) if path.is_dir() && path.join("oci-layout").is_file() => {
            bail!("{0} is an OCI image layout; give --from oci:{0}", path.display())
        }
        Source::Path(path) if path.is_dir() => directory::add(&mut tree, "", path)?,
        Source::Path(path) => archive::add(&mut tree, path, folder)?,
        Source::Oci { folder: layout, tag } => {
            environment.extend(oci::add(&mut tree, layout, tag.as_deref(), folder)?.env);
        }
    }
    (request.prepare)(&mut tree)?;
    phase(Phase::Kernel);
    let kernel = match request.kernel {
        KernelSource::Package(name) => Kernel::of_package(name, request.cache)?,
        KernelSource::Files { image, modules } => Kernel::of_files(image, modules.as_deref())?,
        KernelSource::Own => Kernel::of_root(&tree)?,
    };
    root::complete(&mut tree, &kernel, &environment)?;
    let image = Image {
        name: request.name.to_owned(),
        version: format!("{}+linux-{}", request.version, kernel.version),
        command_line: request.command_line.to_owned(),
        initramfs: initramfs(request.agent, &kernel, request.modules)?.finish(),
        kernel: kernel.image,
        disk: Some(Disk { root: tree, free_mib: request.free_mib }),
    };
    image.write_to(out, &mut |done, all| phase(Phase::Writing(done, all)))
}

/// The initramfs that leads to a disk: the agent, modules, and the console that PID 1 is started with.
///
/// # Errors
/// When the kernel lacks a module.
pub fn initramfs(agent: &[u8], kernel: &Kernel, modules: &[String]) -> Result<Archive> {
    let mut archive = Archive::default();
    archive.file("init", agent, true);
    for folder in ["dev", "proc", "sys", "sysroot"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 5, 1);
    let mut list = String::new();
    for module in kernel.boot_modules(modules)? {
        let path = format!("usr/lib/modules/{}.ko", module.name);
        list.push_str(&format!("/{path}\n"));
        archive.file(&path, module.contents, false);
    }
    archive.file(MODULE_LIST, list, false);
    Ok(archive)
}

/// The agent in the image `name` of a bundle: every image has it as its initramfs's first program.
///
/// # Errors
/// When it is no such bundle.
pub fn agent_of_bundle(path: &Path, name: &str) -> Result<Vec<u8>> {
    let told = || format!("cannot take the agent from {}", path.display());
    let read = || -> Result<Vec<u8>> {
        let initramfs = bundle::member(&File::open(path)?, name, "initramfs.cpio", MAX_INITRAMFS)?;
        let agent = crate::cpio::find(&initramfs, "init").context("its initramfs has no /init")?;
        Ok(agent.to_vec())
    };
    read().with_context(told)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::testing::{archive, bz_image};

    fn files() -> (tempfile::TempDir, KernelSource) {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vmlinuz");
        fs::write(&image, bz_image("6.1")).unwrap();
        let modules = folder.path().join("lib/modules/6.1");
        fs::create_dir_all(&modules).unwrap();
        for name in MODULES {
            fs::write(modules.join(format!("{name}.ko")), format!("\0name={name}\0depends=\0")).unwrap();
        }
        fs::write(modules.join("modules.dep.bin"), "").unwrap();
        (folder, KernelSource::Files { image, modules: Some(modules) })
    }

    fn build_from(from: &Source, kernel: &KernelSource, out: &Path) -> Result<Written> {
        let request = Request {
            name: "mine",
            from,
            prepare: &|_| Ok(()),
            kernel,
            agent: b"the agent",
            version: "1",
            command_line: COMMAND_LINE,
            modules: &MODULES.map(String::from),
            environment: &[],
            free_mib: 1,
            cache: Path::new("/nonexistent"),
        };
        build(&request, out, &mut |_| {})
    }

    #[test]
    fn a_root_becomes_a_bundle_with_a_sound_disk_its_modules_and_the_agent() {
        let (folder, kernel) = files();
        let tar = folder.path().join("root.tar");
        fs::write(&tar, archive(&[("bin/sh", "#!"), ("etc/os-release", "ID=mine\n")])).unwrap();
        let out = folder.path().join("out/mine.tar");
        let written = build_from(&Source::Path(tar), &kernel, &out).unwrap();
        assert_eq!(fs::metadata(&out).unwrap().len(), written.size);
        assert_eq!(
            fs::read_dir(out.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside the bundle"
        );
        let initramfs =
            bundle::member(&File::open(&out).unwrap(), "mine", "initramfs.cpio", 1 << 20).unwrap();
        let list = crate::cpio::find(&initramfs, MODULE_LIST).unwrap();
        assert_eq!(String::from_utf8_lossy(list).lines().count(), MODULES.len());
        assert_eq!(agent_of_bundle(&out, "mine").unwrap(), b"the agent");
        let disk = folder.path().join("disk.img");
        fs::write(&disk, bundle::member(&File::open(&out).unwrap(), "mine", "disk.img", 1 << 30).unwrap())
            .unwrap();
        let check = Command::new("/usr/sbin/e2fsck").arg("-fn").arg(&disk).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        let modules = Command::new("/usr/sbin/debugfs")
            .args(["-R", "ls -p /lib/modules/6.1"])
            .arg(&disk)
            .output()
            .unwrap();
        assert!(String::from_utf8_lossy(&modules.stdout).contains("virtio_blk.ko"), "{modules:?}");
    }

    #[test]
    fn a_folder_and_an_archive_of_it_are_the_same_image() {
        let (folder, kernel) = files();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::write(root.join("bin/sh"), "#!").unwrap();
        std::os::unix::fs::symlink("sh", root.join("bin/dash")).unwrap();
        let tar = folder.path().join("root.tar.gz");
        let made = Command::new("tar")
            .arg("--format=posix")
            .args(["--owner=0", "--group=0", "-C"])
            .arg(&root)
            .arg("-czf")
            .arg(&tar)
            .arg(".")
            .status();
        assert!(made.unwrap().success());
        let (one, other) = (folder.path().join("one.tar"), folder.path().join("other.tar"));
        build_from(&Source::Path(root), &kernel, &one).unwrap();
        build_from(&Source::Path(tar), &kernel, &other).unwrap();
        assert!(fs::read(one).unwrap() == fs::read(other).unwrap());
    }

    #[test]
    fn a_build_that_fails_leaves_nothing() {
        let (folder, kernel) = files();
        let out = folder.path().join("out/mine.tar");
        let tar = folder.path().join("root.tar");
        fs::write(&tar, archive(&[("etc/passwd", "")])).unwrap();
        let error = build_from(&Source::Path(tar.clone()), &kernel, &out).unwrap_err().to_string();
        assert!(error.contains("/bin/sh"), "{error}");
        fs::write(&tar, archive(&[("bin/sh", "#!")])).unwrap();
        let error = build_from(&Source::Path(tar), &KernelSource::Own, &out).unwrap_err().to_string();
        assert!(error.contains("no kernel"), "{error}");
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_source_is_a_path_or_an_oci_layout() {
        let oci = |folder: &str, tag: Option<&str>| Source::Oci {
            folder: folder.into(),
            tag: tag.map(str::to_owned),
        };
        assert_eq!("root.tar".parse(), Ok(Source::Path("root.tar".into())));
        assert_eq!("oci:dir".parse(), Ok(oci("dir", None)));
        assert_eq!("oci:./a:b/dir:1.2".parse(), Ok(oci("./a:b/dir", Some("1.2"))));
        assert_eq!("oci:a:b/dir".parse(), Ok(oci("a:b/dir", None)));
        for bad in ["", "oci:", "oci::tag", "oci:dir:"] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }
}
