//! Building the kernel, the command and the guest images.

use crate::process::run;
use crate::setup::{TARGET, Toolchain, debian};
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the workspace's Cargo.toml.
pub(crate) fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("."))
}

/// Where cargo puts what it builds.
pub(crate) fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}

/// A cargo command for the kernel, at its target, by the toolchain that set-up chose.
pub(crate) fn kernel_cargo(toolchain: Toolchain, command: &str) -> Command {
    let mut cargo = match toolchain {
        Toolchain::Rustup => Command::new("cargo"),
        Toolchain::Debian => {
            // Stable compilers build `core` only when told that they bootstrap; Debian's has no rust-lld of its own.
            let mut cargo = debian("cargo");
            cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", "ld.lld");
            cargo
        }
    };
    cargo.arg(command).args(["-p", "nestling-kernel", "--target", TARGET]).current_dir(workspace_root());
    if toolchain == Toolchain::Debian {
        cargo
            .args(["-Zbuild-std=core,alloc,compiler_builtins", "-Zbuild-std-features=compiler-builtins-mem"]);
        // Apart from the other compiler's results, so that neither rebuilds after the other.
        cargo.arg("--target-dir").arg(target_folder().join("debian"));
    }
    cargo
}

/// Builds the kernel, release profile; the path of its ELF.
pub(crate) fn kernel(toolchain: &Toolchain) -> Result<PathBuf> {
    run(kernel_cargo(*toolchain, "build").arg("--release"))?;
    let target = match toolchain {
        Toolchain::Rustup => target_folder(),
        Toolchain::Debian => target_folder().join("debian"),
    };
    let elf = target.join(TARGET).join("release/nestling-kernel");
    if !elf.is_file() {
        bail!("cargo built the kernel but {} does not exist", elf.display());
    }
    Ok(elf)
}

/// Builds the `nestling` command around the kernel, release profile; its path.
pub(crate) fn runner(toolchain: &Toolchain) -> Result<PathBuf> {
    let elf = kernel(toolchain)?;
    run(Command::new("cargo").args(["build", "--release", "-p", "nestling"]).env("NESTLING_KERNEL", &elf))?;
    Ok(target_folder().join("release/nestling"))
}

/// Builds the guest image `name`, unless it stands; the path of its bundle.
pub(crate) fn image(name: &str) -> Result<PathBuf> {
    crate::image::build(name)
}
