//! An image whose root file system is its initramfs, in memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nestling_image_builder::build::MODULE_LIST;
use nestling_image_builder::bundle::Image;
use nestling_image_builder::cpio::Archive;
use nestling_image_builder::modules::Modules;
use nestling_image_builder::packages::Package;

use super::recipe::Recipe;
use crate::process::output;

/// Puts an image together from the agent and unpacked packages.
pub(super) fn gather(
    recipe: &Recipe,
    agent: Vec<u8>,
    kernel: &Package,
    kernel_root: &Path,
    roots: &[PathBuf],
) -> Result<Image> {
    let mut archive = skeleton();
    archive.file("init", agent, true);
    for root in roots {
        add_programs(&mut archive, root)?;
    }
    let mut list = String::new();
    for module in Modules::of_package(kernel_root)?.closure(&recipe.modules)? {
        let path = format!("usr/lib/modules/{}.ko", module.name);
        list.push_str(&format!("/{path}\n"));
        archive.file(&path, module.contents, false);
    }
    archive.file(MODULE_LIST, list, false);
    for (path, (contents, executable)) in &recipe.files {
        archive.file(path, contents.clone(), *executable);
    }
    Ok(Image {
        name: recipe.name.clone(),
        version: format!("{}+linux-{}", env!("CARGO_PKG_VERSION"), kernel.version),
        command_line: recipe.command_line.clone(),
        kernel: kernel_image(kernel_root)?,
        initramfs: archive.finish(),
        disk: None,
    })
}

/// The folders every image has, laid out as Debian does (`/bin` is `/usr/bin`), and the console its first process writes to.
fn skeleton() -> Archive {
    let mut archive = Archive::default();
    for folder in [
        "dev",
        "etc",
        "home",
        "mnt",
        "opt",
        "proc",
        "root",
        "run",
        "srv",
        "sys",
        "tmp",
        "usr/local/bin",
        "var/tmp",
        "var/log",
        "workspace",
    ] {
        archive.folder(folder);
    }
    for folder in ["bin", "sbin", "lib"] {
        archive.folder(&format!("usr/{folder}"));
        archive.link(folder, &format!("usr/{folder}"));
    }
    archive.link("var/run", "/run");
    archive.character_device("dev/console", 5, 1);
    archive
}

/// Adds the programs of an unpacked package, and for busybox a link for each of its applets.
fn add_programs(archive: &mut Archive, root: &Path) -> Result<()> {
    let mut found = false;
    for folder in ["bin", "sbin", "usr/bin", "usr/sbin"] {
        let Ok(entries) = fs::read_dir(root.join(folder)) else { continue };
        let place = if folder.ends_with("sbin") { "usr/sbin" } else { "usr/bin" };
        for entry in entries {
            let (path, name) =
                entry.map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned()))?;
            if !path.is_file() || path.is_symlink() {
                continue;
            }
            found = true;
            let contents = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(&format!("{place}/{name}"), contents, true);
            if name == "busybox" {
                for applet in applets(&path)? {
                    archive.link(&applet, &format!("/{place}/busybox"));
                }
            }
        }
    }
    if !found {
        bail!("{} has no programs", root.display());
    }
    Ok(())
}

/// Where busybox's applets are to be.
fn applets(busybox: &Path) -> Result<Vec<String>> {
    Ok(applet_paths(&output(Command::new(busybox).arg("--list-full"))?))
}

/// Paths in the image from what `busybox --list-full` prints. `init` is the agent's part, `busybox` is the file itself, and a
/// `modprobe` without the list of dependencies it reads could only fail, which costs a process each time the kernel calls it.
fn applet_paths(list: &str) -> Vec<String> {
    let wanted = |path: &&str| !matches!(path.rsplit('/').next(), Some("" | "init" | "busybox" | "modprobe"));
    let place = |path: &str| if path.starts_with("usr/") { path.to_owned() } else { format!("usr/{path}") };
    list.lines().map(str::trim).filter(wanted).map(place).collect()
}

/// The kernel below `root`, its unpacked package.
fn kernel_image(root: &Path) -> Result<Vec<u8>> {
    let boot = root.join("boot");
    for entry in fs::read_dir(&boot).with_context(|| format!("cannot read {}", boot.display()))? {
        let path = entry?.path();
        if path.file_name().unwrap_or_default().to_string_lossy().starts_with("vmlinuz-") {
            return fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
        }
    }
    bail!("there is no kernel (vmlinuz-*) in {}", boot.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applets_are_below_usr_and_replace_neither_the_agent_nor_busybox_itself() {
        let paths =
            applet_paths("bin/busybox\nbin/sh\nsbin/init\nsbin/modprobe\nsbin/reboot\nusr/bin/env\n\n");
        assert_eq!(paths, ["usr/bin/sh", "usr/sbin/reboot", "usr/bin/env"]);
    }
}
