//! Builds the kernel for its own target and hands its ELF to the crate, so that one binary carries everything.
//!
//! `NESTLING_KERNEL=FILE` embeds a ready ELF instead of building one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What the kernel is built for.
const TARGET: &str = "x86_64-unknown-none";

fn main() {
    println!("cargo::rerun-if-env-changed=NESTLING_KERNEL");
    let elf = match env::var_os("NESTLING_KERNEL") {
        Some(path) if !path.is_empty() => given(Path::new(&path)),
        _ => build(),
    };
    println!("cargo::rustc-env=NESTLING_KERNEL_ELF={}", elf.display());
}

/// Checks the ELF the environment names.
fn given(path: &Path) -> PathBuf {
    println!("cargo::rerun-if-changed={}", path.display());
    match path.canonicalize() {
        Ok(path) if path.is_file() => path,
        Ok(path) => fail(&format!("NESTLING_KERNEL={} is not a file", path.display())),
        Err(error) => fail(&format!(
            "NESTLING_KERNEL={}: {error}; give the path of a kernel ELF, or unset it to have the kernel built",
            path.display()
        )),
    }
}

/// Builds the kernel with the cargo that runs this script, in a target directory of its own: the outer cargo holds
/// the lock of the usual one.
fn build() -> PathBuf {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let Some(workspace) = manifest.parent() else {
        fail("the crate must be inside the workspace");
    };
    for input in ["kernel", "Cargo.toml", "Cargo.lock", ".cargo/config.toml", "rust-toolchain.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    let target_dir = target_dir(Path::new(&variable("OUT_DIR")));
    let status = Command::new(variable("CARGO"))
        // The linker script's path in .cargo/config.toml is relative to the workspace.
        .current_dir(workspace)
        .args(["build", "--release", "--package", "nestling-kernel", "--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        // What cargo sets for the host's crates would replace the flags .cargo/config.toml sets for the kernel.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        // Under `cargo clippy` this is clippy, which checks and builds nothing.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => fail(&format!(
            "the kernel did not build (its messages are above). When the target {TARGET} is missing: run `rustup \
             target add {TARGET}`, or `cargo xtask setup`, which also knows what to do without rustup"
        )),
        Err(error) => fail(&format!("cannot run cargo for the kernel: {error}")),
    }
    let elf = target_dir.join(TARGET).join("release").join("nestling-kernel");
    if !elf.is_file() {
        fail(&format!("cargo built no {}", elf.display()));
    }
    elf
}

/// `kernel/` in the outer target directory (where cargo puts a CACHEDIR.TAG), so that all profiles share one build.
fn target_dir(out_dir: &Path) -> PathBuf {
    out_dir.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file()).unwrap_or(out_dir).join("kernel")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| fail(&format!("cargo sets {name} for build scripts; it is missing")))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
