//! The agent's binary: static, small, and the same from every folder it is built in.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};

use crate::build::workspace_root;
use crate::process::{output, run, succeeds};

/// musl makes a binary of half the size, and one that starts without asking for the processor's caches: every CPUID is an exit.
const MUSL: &str = "x86_64-unknown-linux-musl";
/// Where rustup cannot deliver [`MUSL`], glibc's static library does.
const GLIBC: &str = "x86_64-unknown-linux-gnu";

/// Builds the agent below `folder` and returns its bytes.
pub(super) fn build(folder: &Path) -> Result<Vec<u8>> {
    build_from(workspace_root(), folder)
}

/// Builds the agent of the workspace `root` below `folder`.
fn build_from(root: &Path, folder: &Path) -> Result<Vec<u8>> {
    let home = env::var_os("CARGO_HOME")
        .map(Into::into)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let target = target()?;
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        "-Crelocation-model=static".to_owned(),
        "-Clink-arg=-Wl,--build-id=none".to_owned(),
        format!("--remap-path-prefix={}=/nestling", root.display()),
        format!("--remap-path-prefix={}=/cargo", home.display()),
    ];
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--release",
        "--package",
        "nestling-agent",
        "--target",
        target,
    ]);
    cargo.arg("--target-dir").arg(folder).current_dir(root);
    // Unlike RUSTFLAGS, this may contain folders with spaces.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f")).env_remove("RUSTFLAGS");
    for (setting, value) in [
        ("OPT_LEVEL", "z"),
        ("LTO", "fat"),
        ("CODEGEN_UNITS", "1"),
        ("STRIP", "symbols"),
        ("DEBUG", "false"),
        ("PANIC", "abort"),
    ] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    run(&mut cargo).context("cannot build the agent (a static binary needs gcc and libc6-dev)")?;
    let binary = folder.join(target).join("release/nestling-agent");
    fs::read(&binary).with_context(|| format!("cannot read {}", binary.display()))
}

/// The target to build for; adds musl's if that is possible.
fn target() -> Result<&'static str> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace_root()))?;
    let installed = Path::new(sysroot.trim()).join("lib/rustlib").join(MUSL).join("lib").is_dir();
    let mut rustup = Command::new("rustup");
    rustup.args(["target", "add", MUSL]).current_dir(workspace_root());
    if installed || succeeds(&mut rustup) {
        return Ok(MUSL);
    }
    eprintln!("image: rustup cannot deliver {MUSL}; building the agent for {GLIBC}");
    Ok(GLIBC)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that is gone when the test ends.
    struct Folder(std::path::PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_agent_is_the_same_from_another_folder() {
        let folder = Folder(env::temp_dir().join(format!("nestling-agent-elsewhere-{}", std::process::id())));
        let elsewhere = folder.0.join("some where");
        fs::create_dir_all(&elsewhere).unwrap();
        let files =
            crate::process::output(Command::new("git").args(["ls-files"]).current_dir(workspace_root()))
                .unwrap();
        for file in files.lines() {
            let to = elsewhere.join(file);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(workspace_root().join(file), to).unwrap();
        }
        let here = build(&folder.0.join("one")).unwrap();
        assert!(here == build_from(&elsewhere, &folder.0.join("other")).unwrap());
    }
}
