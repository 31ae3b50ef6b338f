//! The root file system on a disk: from the initramfs, which only has the agent and modules, to the image's own root.
//!
//! Linux: Documentation/filesystems/ramfs-rootfs-initramfs.rst (what an initramfs's init does instead of pivot_root) and
//! fs/ext4/ioctl.c (growing a mounted file system). PID 1 itself has to change the root: kernel threads share its root folder, and
//! so the kernel finds `/sbin/modprobe` in the image.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, fstatfs, statfs};
use nix::unistd::{chdir, chroot};

use crate::settings::RootDisk;
use crate::system::optional;

/// Where the disk is mounted until it becomes the root.
const PLACE: &str = "/sysroot";
/// What is mounted already and goes along.
const MOVED: [&str; 3] = ["/proc", "/sys", "/dev"];
/// How long the disk may take to appear, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// Mount options. The disk lives no longer than its machine, so nothing is gained by flushes (`nobarrier`); what lies behind its end
/// so far reads as zeros, so nothing is gained by writing zeros into new inode tables (`noinit_itable`).
const OPTIONS: &str = "nobarrier,noinit_itable";
/// Linux: include/uapi/linux/magic.h; an initramfs is one of these.
const IN_MEMORY: [i64; 2] = [0x8584_58f6, 0x0102_1994];

mod ioctl {
    nix::ioctl_write_ptr!(resize, b'f', 16, u64);
}

/// Mounts the disk, grows its file system to the disk's size, and makes it this process's and the kernel's root.
///
/// # Errors
/// What is wrong with the disk.
pub(crate) fn enter(disk: &RootDisk) -> Result<(), String> {
    let device = disk.device.display();
    let size = wait_for(disk)?;
    let _ = fs::create_dir_all(PLACE);
    mount(Some(&disk.device), PLACE, Some(disk.kind.as_str()), MsFlags::MS_NOATIME, options(&disk.kind))
        .map_err(|error| format!("cannot mount {device} as {}: {}", disk.kind, error.desc()))?;
    if disk.kind == "ext4" {
        // A file system that stays small is one that fills up early, not one that cannot be used.
        optional(&format!("grow the file system on {device}"), grow(size));
    }
    let told = |what: &str, error: nix::errno::Errno| format!("cannot {what}: {}", error.desc());
    forget_initramfs();
    for place in MOVED {
        let target = format!("{PLACE}{place}");
        let _ = fs::create_dir_all(&target);
        mount(Some(place), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|error| told(&format!("move {place} to the disk"), error))?;
    }
    chdir(PLACE).map_err(|error| told("enter the disk", error))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|error| told("move the disk to /", error))?;
    chroot(".").and_then(|()| chdir("/")).map_err(|error| told("make the disk the root", error))?;
    if !Path::new("/bin/sh").exists() {
        return Err(format!("{device} has no /bin/sh, which runs the steps"));
    }
    Ok(())
}

/// Waits for the disk; its size in bytes.
fn wait_for(disk: &RootDisk) -> Result<u64, String> {
    let name = disk.device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let start = Instant::now();
    loop {
        let sectors = fs::read_to_string(format!("/sys/class/block/{name}/size"));
        match sectors.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
            Some(sectors) if disk.device.exists() => return Ok(sectors.saturating_mul(512)),
            _ if start.elapsed() < PATIENCE => std::thread::sleep(LOOK_EVERY),
            _ => return Err(format!("the disk {} did not appear", disk.device.display())),
        }
    }
}

fn options(kind: &str) -> Option<&'static str> {
    (kind == "ext4").then_some(OPTIONS)
}

/// Grows the mounted file system to `size` bytes, if it is smaller by a block or more.
fn grow(size: u64) -> io::Result<()> {
    let folder = File::open(PLACE)?;
    let stat = fstatfs(&folder)?;
    let Some(blocks) = u64::try_from(stat.block_size()).ok().and_then(|block| size.checked_div(block)) else {
        return Err(io::Error::other("it has no block size"));
    };
    // What statfs calls the number of blocks leaves out the file system's own, so it cannot tell whether it is grown already; asked
    // for the size it has, ext4 does nothing.
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64 from the pointer, which is valid for the call; the descriptor is open.
    unsafe { ioctl::resize(folder.as_raw_fd(), &raw const blocks) }?;
    Ok(())
}

/// Gives the memory of the initramfs back: nobody sees it any more once there is another root.
fn forget_initramfs() {
    let in_memory = statfs("/")
        .is_ok_and(|stat| IN_MEMORY.map(|magic| FsType(magic as _)).contains(&stat.filesystem_type()));
    if !in_memory {
        return;
    }
    for folder in ["/etc/nestling", "/usr/lib/modules"] {
        let _ = fs::remove_dir_all(folder);
    }
    let _ = fs::remove_file("/init");
}
