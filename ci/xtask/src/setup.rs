//! What building and testing need, checked at every start and installed where it is missing.
//!
//! A fresh Debian 12 with rustup (and the C compiler that rustup itself asks for) is enough. Where rustup cannot deliver the kernel's
//! target, Debian's own Rust builds the kernel together with its `core` and `alloc`; `NESTLING_TOOLCHAIN=debian` asks for that.

use crate::build::workspace_root;
use crate::process::{find, output, run, shown, succeeds};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The kernel's target.
pub(crate) const TARGET: &str = "x86_64-unknown-none";

/// Debian's Rust, for where rustup has no `x86_64-unknown-none`: compiler, cargo, the sources of `core`, clippy, and a linker.
const DEBIAN_RUST: [&str; 5] = ["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy", "lld"];

/// Who compiles the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Toolchain {
    /// The toolchain of rust-toolchain.toml with its ready-made target.
    Rustup,
    /// Debian's rustc-web and cargo-web, which build `core` and `alloc` from rust-web-src.
    Debian,
}

/// What the last set-up found, kept in `target/setup.json` so that the next start does not look again.
#[derive(PartialEq, Serialize, Deserialize)]
struct Stamp {
    /// Raised when set-up learns to install something else.
    version: u32,
    /// What `NESTLING_TOOLCHAIN` asked for.
    asked: Option<Toolchain>,
    toolchain: Toolchain,
    /// `rustc --version` of the toolchain that builds everything but, perhaps, the kernel.
    rustc: String,
}

const STAMP_VERSION: u32 = 2;

/// Something that must be there, and the Debian packages that bring it.
struct Tool {
    /// A program's name, or the path of a file.
    what: &'static str,
    package: &'static str,
}

impl Tool {
    const fn new(what: &'static str, package: &'static str) -> Self {
        Self { what, package }
    }

    /// Where it stands.
    fn path(&self) -> Option<PathBuf> {
        if self.what.starts_with('/') {
            Some(PathBuf::from(self.what)).filter(|file| file.exists())
        } else {
            find(self.what)
        }
    }
}

/// What everything needs.
const TOOLS: [Tool; 7] = [
    Tool::new("qemu-system-x86_64", "qemu-system-x86"),
    Tool::new("dpkg-deb", "dpkg"),
    Tool::new("cc", "gcc libc6-dev"),
    // Disks for tests, and the index of images' modules.
    Tool::new("/sbin/mke2fs", "e2fsprogs"),
    Tool::new("/sbin/depmod", "kmod"),
    Tool::new("xz", "xz-utils"),
    Tool::new("zstd", "zstd"),
];

/// What the bed Bochs needs, and what makes the disk it boots from.
const BOCHS: [Tool; 7] = [
    Tool::new("bochs", "bochs"),
    Tool::new("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so", "bochs-term"),
    Tool::new("/usr/share/bochs/BIOS-bochs-latest", "bochsbios"),
    Tool::new("/usr/share/vgabios", "vgabios"),
    Tool::new("/usr/lib/grub/i386-pc/multiboot2.mod", "grub-pc-bin"),
    Tool::new("grub-mkimage", "grub-common"),
    Tool::new("xorriso", "xorriso"),
];

/// What the benchmark's loads need: their servers here, and what makes their root file system.
const LOADS: [Tool; 4] = [
    Tool::new("iperf3", "iperf3"),
    Tool::new("mmdebstrap", "mmdebstrap"),
    Tool::new("/usr/sbin/mke2fs", "e2fsprogs"),
    Tool::new("tar", "tar"),
];

/// Installs what is missing for the benchmark's loads. Says nothing when nothing is missing.
pub(crate) fn ensure_loads() -> Result<()> {
    install_missing(&LOADS)
}

/// Installs what is missing of the bed Bochs. Says nothing when nothing is missing.
pub(crate) fn ensure_bochs() -> Result<()> {
    install_missing(&BOCHS)
}

/// What a root file system is installed with: as root, or in a namespace of one's own.
const IMAGES: [Tool; 3] = [
    Tool::new("mmdebstrap", "mmdebstrap"),
    Tool::new("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    Tool::new("newuidmap", "uidmap"),
];

/// Installs what is missing for images with a root file system on a disk. Says nothing when nothing is missing.
pub(crate) fn ensure_images() -> Result<()> {
    install_missing(&IMAGES)
}

/// Installs what is missing of `tools` and shows where they are then.
fn install_missing(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| tool.path().is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing.iter().flat_map(|tool| tool.package.split(' ')).collect::<Vec<_>>())?;
    for tool in missing {
        let path = tool
            .path()
            .with_context(|| format!("{} is still missing after installing {}", tool.what, tool.package))?;
        eprintln!("setup: {:<20} {}", tool.package, path.display());
    }
    Ok(())
}

/// Installs what is missing and says who compiles the kernel. Says nothing when nothing is missing.
pub(crate) fn ensure() -> Result<Toolchain> {
    let asked = asked_toolchain()?;
    let rustc = output(Command::new("rustc").arg("--version"))?.trim().to_owned();
    let file = workspace_root().join("target/setup.json");
    let stamp = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Stamp>(&text).ok());
    if let Some(stamp) = stamp
        && stamp.version == STAMP_VERSION
        && stamp.rustc == rustc
        && stamp.asked == asked
        && TOOLS.iter().all(|tool| tool.path().is_some())
    {
        return Ok(stamp.toolchain);
    }

    eprintln!("setup: checking what building and testing need");
    install_missing(&TOOLS)?;
    for tool in &TOOLS {
        let path = tool.path().unwrap_or_default();
        eprintln!("setup: {:<20} {}", tool.what, path.display());
    }
    for component in ["clippy", "fmt"] {
        if !succeeds(Command::new("cargo").args([component, "--version"])) {
            let name = if component == "fmt" { "rustfmt" } else { component };
            run(Command::new("rustup").args(["component", "add", name]))
                .with_context(|| format!("`cargo {component}` is missing and rustup cannot add it"))?;
        }
    }
    let toolchain = match asked {
        Some(toolchain) => toolchain,
        None if rustup_target() => Toolchain::Rustup,
        None => Toolchain::Debian,
    };
    match toolchain {
        Toolchain::Rustup if !rustup_target() => bail!(
            "the toolchain has no {TARGET} and rustup cannot add it; unset NESTLING_TOOLCHAIN to use Debian's Rust for the kernel"
        ),
        Toolchain::Rustup => eprintln!("setup: {:<20} {TARGET} by rustup, {rustc}", "kernel toolchain"),
        Toolchain::Debian => {
            if !debian_rust_stands() {
                install(&DEBIAN_RUST)?;
            }
            let version = output(debian("rustc").arg("--version"))?;
            eprintln!(
                "setup: {:<20} Debian's {}, core and alloc from source",
                "kernel toolchain",
                version.trim()
            );
        }
    }
    fs::create_dir_all(workspace_root().join("target"))?;
    fs::write(&file, serde_json::to_vec_pretty(&Stamp { version: STAMP_VERSION, asked, toolchain, rustc })?)?;
    eprintln!("setup: done; recorded in {}", file.display());
    Ok(toolchain)
}

/// The toolchain that `NESTLING_TOOLCHAIN` asks for, if any.
fn asked_toolchain() -> Result<Option<Toolchain>> {
    match std::env::var("NESTLING_TOOLCHAIN").as_deref() {
        Ok("debian") => Ok(Some(Toolchain::Debian)),
        Ok("rustup") => Ok(Some(Toolchain::Rustup)),
        Ok("") | Err(_) => Ok(None),
        Ok(other) => {
            bail!("NESTLING_TOOLCHAIN is `{other}`; set it to `rustup` or `debian`, or leave it unset")
        }
    }
}

/// True once the toolchain of rust-toolchain.toml has the kernel's target; adds it by rustup if need be.
fn rustup_target() -> bool {
    let stands = || {
        let mut rustc = Command::new("rustc");
        rustc.args(["--print", "target-libdir", "--target", TARGET]);
        output(&mut rustc).is_ok_and(|folder| Path::new(folder.trim()).is_dir())
    };
    if stands() {
        return true;
    }
    let mut add = Command::new("rustup");
    add.args(["target", "add", TARGET]);
    eprintln!("setup: {}", shown(&add));
    run(&mut add).is_ok() && stands()
}

/// True if every part of Debian's Rust is installed.
fn debian_rust_stands() -> bool {
    ["/usr/bin/rustc", "/usr/bin/cargo", "/usr/bin/cargo-clippy", "/usr/bin/ld.lld"]
        .iter()
        .all(|file| Path::new(file).exists())
        && output(debian("rustc").args(["--print", "sysroot"]))
            .is_ok_and(|sysroot| Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").exists())
}

/// A program of Debian's Rust, which finds the others of it before those of rustup.
pub(crate) fn debian(program: &str) -> Command {
    let mut command = Command::new(Path::new("/usr/bin").join(program));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once("/usr/bin".into()).chain(std::env::split_paths(&path));
    if let Ok(path) = std::env::join_paths(path) {
        command.env("PATH", path);
    }
    command.env("RUSTC", "/usr/bin/rustc").env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    command
}

/// Installs Debian packages: as root or by a sudo that does not ask; otherwise says which one command to run.
fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if find("apt-get").is_none() {
        bail!(
            "this is no Debian, and set-up can install only there; install the counterparts of: {}",
            packages.join(" ")
        );
    }
    let root = output(Command::new("id").arg("-u"))?.trim() == "0";
    if !root && !succeeds(Command::new("sudo").args(["-n", "true"])) {
        bail!("packages are missing; run this once, then the same command again:\n\n    sudo {by_hand}\n");
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new(if root { "env" } else { "sudo" });
        if !root {
            command.args(["-n", "env"]);
        }
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]).args(arguments);
        command
    };
    eprintln!("setup: {by_hand}");
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend(packages);
    if run(&mut apt(&arguments)).is_ok() {
        return Ok(());
    }
    eprintln!("setup: that failed; fetching the package lists first");
    run(&mut apt(&["update"]))?;
    run(&mut apt(&arguments)).with_context(|| format!("cannot install {}", packages.join(", ")))
}
