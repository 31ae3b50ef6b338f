//! An image with its root on a disk, small enough for tests: busybox and Debian's kernel with all its modules.

use anyhow::{Context, Result};
use nestling_image_builder::build::{self, COMMAND_LINE, KernelSource, MODULES, Request, Source};
use nestling_image_builder::{kernel, packages, store};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What jobs call it.
pub const NAME: &str = "disk";
/// What a machine's disk has free, in MiB.
pub const FREE_MIB: u32 = 512;

/// A store with the image [`NAME`], built by the first test that asks for it.
///
/// # Panics
/// When it cannot be built.
pub fn store() -> &'static Path {
    static STORE: OnceLock<PathBuf> = OnceLock::new();
    STORE.get_or_init(|| {
        build_store().unwrap_or_else(|error| panic!("cannot build the image `{NAME}`: {error:#}"))
    })
}

/// A store with the image `debian`, as `cargo xtask image debian` has built it.
///
/// # Panics
/// When it has not been built.
pub fn debian_store() -> PathBuf {
    let store = images().join("tests/debian-images.tar");
    let add = || {
        fs::create_dir_all(images().join("tests"))?;
        store::add(&store, &[images().join("debian.tar")], true)
    };
    add().unwrap_or_else(|error| panic!("run `cargo xtask image debian` first: {error:#}"));
    store
}

/// Folders of the workspace's target folder, where the packages of the other images are, too.
fn images() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/images")
}

fn build_store() -> Result<PathBuf> {
    let (cache, folder) = (images().join("cache"), images().join("tests"));
    fs::create_dir_all(&folder)?;
    // Test binaries may run side by side.
    let lock = fs::File::create(folder.join(".lock"))?;
    lock.lock()?;
    let root = root(&folder.join("root"), &cache)?;
    let bundle = folder.join(format!("{NAME}.tar"));
    let agent = build::agent_of_bundle(&images().join("minimal.tar"), "minimal")
        .context("build it with `cargo xtask image minimal`")?;
    let request = Request {
        name: NAME,
        from: &Source::Path(root),
        prepare: &|_| Ok(()),
        kernel: &KernelSource::Package(kernel::DEBIAN.to_owned()),
        agent: &agent,
        version: "test",
        command_line: COMMAND_LINE,
        modules: &MODULES.map(str::to_owned),
        environment: &[("LANG".to_owned(), "C.UTF-8".to_owned())],
        free_mib: FREE_MIB,
        cache: &cache,
    };
    build::build(&request, &bundle, &mut |_| {})?;
    let store = folder.join("images.tar");
    store::add(&store, &[bundle], true)?;
    Ok(store)
}

/// A root of busybox and its applets.
fn root(folder: &Path, cache: &Path) -> Result<PathBuf> {
    let _ = fs::remove_dir_all(folder);
    let package = packages::unpack(&packages::resolve("busybox-static")?, cache)?;
    let busybox = [package.join("bin/busybox"), package.join("usr/bin/busybox")];
    let busybox = busybox.iter().find(|path| path.is_file()).context("the package has no busybox")?;
    fs::create_dir_all(folder.join("bin"))?;
    fs::copy(busybox, folder.join("bin/busybox"))?;
    for place in ["sbin", "usr"] {
        symlink(if place == "usr" { "." } else { "bin" }, folder.join(place))?;
    }
    let applets = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8(applets.stdout)?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", folder.join("bin").join(applet))?;
    }
    fs::create_dir(folder.join("etc"))?;
    fs::write(folder.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    Ok(folder.to_owned())
}
