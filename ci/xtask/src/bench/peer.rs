//! The peer: Debian's cloud kernel as L1 with kvm_amd and Debian's QEMU, booting the same Debian kernel as L2.
//!
//! Everything comes from Debian packages and lands in `target/bench`. L1's initramfs holds busybox and modules only, so that its start to
//! userland is as short as a Linux L1's can be; QEMU and its libraries come on a disk and are unpacked after that mark is taken.

use super::machine::Machine;
use super::rows::Samples;
use crate::build::workspace_root;
use crate::image::recipe::Recipe;
use crate::process::output;
use anyhow::{Context, Result, bail};
use nestling_image_builder::cpio::Archive;
use nestling_image_builder::modules::Modules;
use nestling_image_builder::packages::{resolve, unpack};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The peer's files.
pub(super) struct Peer {
    kernel: PathBuf,
    initramfs: PathBuf,
    disk: PathBuf,
}

/// L1's first program. The `MARK` lines are what the benchmark times.
const L1_INIT: &str = r#"#!/bin/sh
echo MARK userland
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
for module in MODULES; do insmod /modules/$module.ko; done
mkdir /run/vmm && cd /run/vmm && cpio -i < /dev/vda 2>/dev/null
cd /
if grep -q count_exits /proc/cmdline; then
    echo 'hist:keys=exit_reason:sort=hitcount.descending' > /sys/kernel/tracing/events/kvm/kvm_exit/trigger
fi
echo MARK vmm
chroot /run/vmm /qemu -M microvm,rtc=on -L /share -accel kvm -cpu host -smp 1 -m 256 -nodefaults -no-user-config -display none \
    -no-reboot -serial stdio -kernel /vmlinuz -initrd /initramfs.cpio -append 'COMMAND_LINE' </dev/null
echo MARK ended
if grep -q count_exits /proc/cmdline; then
    grep -E '^(\{|    Hits)' /sys/kernel/tracing/events/kvm/kvm_exit/hist
fi
echo MARK done
poweroff -f
"#;

/// L2's first program.
const L2_INIT: &str = "#!/bin/sh\necho READY\npoweroff -f\n";

/// What L1 loads, after what these depend on.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "kvm_amd"];

impl Peer {
    /// Builds the peer from Debian packages, unless it stands.
    pub(super) fn build() -> Result<Self> {
        let folder = workspace_root().join("target/bench");
        let peer = Self {
            kernel: folder.join("vmlinuz"),
            initramfs: folder.join("l1.cpio"),
            disk: folder.join("l1-disk.cpio"),
        };
        let (kernel, shell) = (resolve("linux-image-cloud-amd64")?, resolve("busybox-static")?);
        let qemu = output(Command::new("qemu-system-x86_64").arg("--version"))?;
        // Both sides' L2 boot with the same words.
        let command_line = Recipe::read(&workspace_root().join("images/guest"), "minimal")?.command_line;
        let recipe = format!(
            "{L1_INIT}{L2_INIT}{MODULES:?}\n{command_line}\n{} {}\n{qemu}",
            kernel.sha256, shell.sha256
        );
        let stamp = folder.join("recipe");
        if fs::read_to_string(&stamp).is_ok_and(|built| built == recipe) {
            return Ok(peer);
        }
        eprintln!("bench: building the peer (a Linux L1 with KVM and QEMU) from Debian packages");
        fs::create_dir_all(&folder)?;
        // The guest images' packages, downloaded once for both.
        let cache = workspace_root().join("target/images/cache");
        let (kernel, shell) = (unpack(&kernel, &cache)?, unpack(&shell, &cache)?);
        fs::copy(single(&kernel.join("boot"), "vmlinuz-")?, &peer.kernel)?;

        let mut l1 = busybox(&shell)?;
        let mut loaded = Vec::new();
        for module in Modules::of_package(&kernel)?.closure(&MODULES.map(str::to_owned))? {
            l1.file(&format!("modules/{}.ko", module.name), module.contents, false);
            loaded.push(module.name);
        }
        l1.file(
            "init",
            L1_INIT.replace("MODULES", &loaded.join(" ")).replace("COMMAND_LINE", &command_line),
            true,
        );
        fs::write(&peer.initramfs, l1.finish())?;

        let mut l2 = busybox(&shell)?;
        l2.file("init", L2_INIT, true);
        fs::write(&peer.disk, vmm(&peer.kernel, &l2.finish())?.finish())?;
        fs::write(&stamp, recipe)?;
        Ok(peer)
    }

    /// Boots L1, which boots one L2; counting the exits slows L2 a little, so timed runs leave it off.
    pub(super) fn run(&self, count_exits: bool) -> Result<Samples> {
        let mut command = Machine::qemu(2048);
        let append = if count_exits { " count_exits" } else { "" };
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        // The decompressor's first word on the early console is the kernel's start, seen from outside.
        command.args(["-append", &format!("earlyprintk=ttyS0,115200 console=ttyS0 quiet panic=-1{append}")]);
        command
            .arg("-drive")
            .arg(format!("if=none,id=d0,format=raw,readonly=on,file={}", self.disk.display()));
        command.args(["-device", "virtio-blk-pci,drive=d0"]);

        let mut machine = Machine::start(command)?;
        let (mut userland, mut vmm, mut ready) = (None, None, None);
        let mut exits: Option<u32> = None;
        loop {
            let (at, line) = machine.next_line(Duration::from_secs(120))?;
            match line.as_str() {
                "MARK userland" => userland = Some(at),
                "MARK vmm" => vmm = Some(at),
                "READY" => ready = Some(at),
                "MARK done" => break,
                line => {
                    exits = line.trim().strip_prefix("Hits: ").and_then(|hits| hits.parse().ok()).or(exits)
                }
            }
        }
        let marks = (machine.first_byte, userland, vmm, ready);
        let (Some(kernel), Some(userland), Some(vmm), Some(ready)) = marks else {
            bail!("the peer left out a mark; its last lines:\n{}", machine.tail());
        };
        if count_exits && exits.is_none() {
            bail!("the peer counted no exits; its last lines:\n{}", machine.tail());
        }
        let since = |from: Instant, to: Instant| Some(to.saturating_duration_since(from).as_secs_f64());
        Ok(Samples {
            cold: since(machine.started, userland),
            boot: since(kernel, userland),
            job: since(vmm, ready),
            first_output: since(vmm, ready),
            exits: exits.map(f64::from),
            ..Samples::default()
        })
    }
}

/// The one file of `folder` whose name starts with `start`.
pub(super) fn single(folder: &Path, start: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(start) {
            return Ok(entry.path());
        }
    }
    bail!("{} holds no {start}*", folder.display())
}

/// An archive with busybox under the names that the scripts use, and the folders they mount on.
pub(super) fn busybox(root: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "run"] {
        archive.folder(folder);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", fs::read(root.join("bin/busybox"))?, true);
    for applet in ["sh", "mount", "mkdir", "insmod", "cpio", "grep", "chroot", "poweroff"] {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(archive)
}

/// The VMM's root: this machine's qemu-system-x86_64 with its libraries and firmware, and what L2 boots.
pub(super) fn vmm(kernel: &Path, initramfs: &[u8]) -> Result<Archive> {
    let mut archive = Archive::default();
    let qemu = crate::process::find("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?;
    for line in output(Command::new("ldd").arg(&qemu))?.lines() {
        let library = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(library) = library {
            archive.file(library.trim_start_matches('/'), fs::read(library)?, true);
        }
    }
    archive.file("qemu", fs::read(&qemu)?, true);
    for firmware in ["bios-microvm.bin", "linuxboot_dma.bin"] {
        let found = ["/usr/share/qemu", "/usr/share/seabios"].map(|folder| Path::new(folder).join(firmware));
        let file = found
            .iter()
            .find(|file| file.exists())
            .with_context(|| format!("QEMU's {firmware} is not installed"))?;
        archive.file(&format!("share/{firmware}"), fs::read(file)?, false);
    }
    archive.file("vmlinuz", fs::read(kernel)?, false);
    archive.file("initramfs.cpio", initramfs, false);
    for folder in ["proc", "sys", "dev", "tmp"] {
        archive.folder(folder);
    }
    archive.character_device("dev/kvm", 10, 232);
    archive.character_device("dev/null", 1, 3);
    archive.character_device("dev/urandom", 1, 9);
    Ok(archive)
}
