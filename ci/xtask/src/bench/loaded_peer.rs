//! The peer of the loads: as [`super::peer`], with L2's disk passed through from L1's (no cache, native AIO) and L2's network card on a tap device
//! with vhost, bridged with L1's card. There is no address translation, which favours the peer.

use super::loads::{Marks, from_serial};
use super::machine::Machine;
use super::peer::{busybox, single, vmm};
use crate::build::workspace_root;
use crate::image::recipe::Recipe;
use anyhow::Result;
use nestling_image_builder::modules::Modules;
use nestling_image_builder::packages::{resolve, unpack};
use std::fs;
use std::path::{Path, PathBuf};

const L1_INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t debugfs debug /sys/kernel/debug
mount -t tmpfs tmpfs /run
for module in MODULES; do insmod /modules/$module.ko; done
mkdir /run/vmm && cd /run/vmm && cpio -i < /dev/vda 2>/dev/null
cd /
brctl addbr br0
brctl addif br0 eth0
tunctl -t tap0 > /dev/null
brctl addif br0 tap0
for card in eth0 tap0 br0; do ip link set $card up; done
mount -o bind /dev /run/vmm/dev
loads=$(sed 's/.*\(loads=[^ ]*\).*/\1/' /proc/cmdline)
chroot /run/vmm /qemu -M microvm,rtc=on -L /share -accel kvm -cpu host -smp 1 -m 512 -nodefaults -no-user-config -display none \
    -no-reboot -serial stdio -kernel /vmlinuz -initrd /initramfs.cpio -append "COMMAND_LINE $loads" \
    -drive if=none,id=root,file=/dev/vdb,format=raw,cache=none,aio=native -device virtio-blk-device,drive=root \
    -netdev tap,id=net,ifname=tap0,script=no,downscript=no,vhost=on -device virtio-net-device,netdev=net,mac=52:54:00:12:34:57 </dev/null |
while read -r line; do
    echo "$line"
    case "$line" in MARK*) echo "EXITS $(cat /sys/kernel/debug/kvm/exits)" ;; esac
done
echo PEER ended
poweroff -f
"#;

const L2_INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in MODULES; do insmod /modules/$module.ko; done
loads=$(sed 's/.*loads=\([^ ]*\).*/\1/' /proc/cmdline | tr , ' ')
mount -t ext4 -o noatime /dev/vda /root
mount -t proc proc /root/proc
mount -t tmpfs tmpfs /root/tmp
mount -o bind /dev /root/dev
ip link set lo up
ip addr add 10.0.2.50/24 dev eth0
ip link set eth0 up
chroot /root $loads
poweroff -f
"#;

const L1_MODULES: [&str; 8] =
    ["virtio_pci", "virtio_blk", "virtio_net", "kvm_amd", "bridge", "tun", "tap", "vhost_net"];
const L2_MODULES: [&str; 3] = ["virtio_mmio", "virtio_blk", "virtio_net"];
const APPLETS: [&str; 6] = ["brctl", "tunctl", "ip", "sed", "tr", "cat"];

/// The peer's files.
pub(super) struct LoadedPeer {
    kernel: PathBuf,
    initramfs: PathBuf,
    disk: PathBuf,
}

impl LoadedPeer {
    /// Builds it from Debian packages.
    pub(super) fn build() -> Result<Self> {
        let folder = workspace_root().join("target/bench");
        fs::create_dir_all(&folder)?;
        let peer = Self {
            kernel: folder.join("loaded-vmlinuz"),
            initramfs: folder.join("loaded-l1.cpio"),
            disk: folder.join("loaded-l1-disk.cpio"),
        };
        let command_line = Recipe::read(&workspace_root().join("images/guest"), "minimal")?.command_line;
        let cache = workspace_root().join("target/images/cache");
        let kernel = unpack(&resolve("linux-image-cloud-amd64")?, &cache)?;
        let shell = unpack(&resolve("busybox-static")?, &cache)?;
        fs::copy(single(&kernel.join("boot"), "vmlinuz-")?, &peer.kernel)?;
        let archive = |script: &str, modules: &[&str]| -> Result<Vec<u8>> {
            let mut archive = busybox(&shell)?;
            for applet in APPLETS {
                archive.link(&format!("bin/{applet}"), "busybox");
            }
            archive.folder("root");
            let wanted: Vec<String> = modules.iter().map(|module| (*module).to_owned()).collect();
            let mut loaded = Vec::new();
            for module in Modules::of_package(&kernel)?.closure(&wanted)? {
                archive.file(&format!("modules/{}.ko", module.name), module.contents, false);
                loaded.push(module.name);
            }
            let script = script.replace("MODULES", &loaded.join(" ")).replace("COMMAND_LINE", &command_line);
            archive.file("init", script, true);
            Ok(archive.finish())
        };
        fs::write(&peer.initramfs, archive(L1_INIT, &L1_MODULES)?)?;
        fs::write(&peer.disk, vmm(&peer.kernel, &archive(L2_INIT, &L2_MODULES)?)?.finish())?;
        Ok(peer)
    }

    /// Runs `command` in an L2 whose root is `root`, which stays as it is.
    pub(super) fn run(&self, root: &Path, command: &str) -> Result<Marks> {
        let mut qemu = Machine::qemu(2048);
        qemu.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initramfs);
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 loads={}", command.replace(' ', ","))]);
        for (name, file, more) in [("d0", self.disk.as_path(), "readonly=on"), ("d1", root, "snapshot=on")] {
            qemu.arg("-drive").arg(format!("if=none,id={name},format=raw,{more},file={}", file.display()));
            qemu.args(["-device", &format!("virtio-blk-pci,drive={name}")]);
        }
        qemu.args(["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="]);
        from_serial(&mut Machine::start(qemu)?, "PEER ended")
    }
}
