//! What PID 1 owes a Linux system: its file systems, modules, name and loopback interface; and the end of the machine.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use nestling_api::agent::Identity;

use crate::network;
use crate::root;
use crate::settings::Settings;

/// The modules to load, one file name a line, in order; written by the image's recipe.
const MODULES: &str = "/etc/nestling/modules";
/// Where programs look for the machine's id.
const MACHINE_ID: &str = "/etc/machine-id";
/// Where an image keeps variables of its own for steps.
const ENVIRONMENT: &str = "/etc/nestling/environment";
/// Open files of a step: what most programs expect at first, and what they may ask for (systemd's defaults).
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// File systems to mount before anything else can be done, and those that belong on the root: kind, place, options.
const FIRST_FILE_SYSTEMS: [(&str, &str, Option<&str>); 3] =
    [("proc", "/proc", None), ("sysfs", "/sys", None), ("devtmpfs", "/dev", Some("mode=0755"))];
const FILE_SYSTEMS: [(&str, &str, Option<&str>); 4] = [
    ("devpts", "/dev/pts", Some("gid=5,mode=0620,ptmxmode=0666")),
    ("tmpfs", "/dev/shm", Some("mode=1777")),
    ("tmpfs", "/run", Some("mode=0755")),
    ("cgroup2", CGROUPS, None),
];
/// `/tmp` of a root file system that is in memory itself; on a disk it is a folder as any other, with the disk's room.
const TMP: (&str, &str, Option<&str>) = ("tmpfs", "/tmp", Some("mode=1777"));
/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// What a kernel does by itself, again and again, that a machine of a few minutes gains nothing from: gathering free memory into large pages
/// twice a second, and counting its pages of each kind every second.
const HOUSEKEEPING: [(&str, &str); 2] =
    [("/proc/sys/vm/compaction_proactiveness", "0"), ("/proc/sys/vm/stat_interval", "30")];
/// The name of every machine.
const HOST_NAME: &str = "nestling";

/// Brings a freshly booted machine to where steps can run.
///
/// # Errors
/// What could not be done, when nothing would work without it.
pub(crate) fn start(settings: &mut Settings) -> Result<(), String> {
    for (kind, place, options) in FIRST_FILE_SYSTEMS {
        mount_at(kind, Path::new(place), options)?;
    }
    settings.read_kernel_command_line(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    load_modules()?;
    if let Some(disk) = &settings.root {
        root::enter(disk)?;
    }
    let tmp = settings.root.is_none().then_some(TMP);
    for (kind, place, options) in FILE_SYSTEMS.into_iter().chain(tmp) {
        mount_at(kind, Path::new(place), options)?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        optional(&format!("link /dev/{link}"), symlink(target, Path::new("/dev").join(link)));
    }
    // A root file system unpacked from an initramfs starts out writable for everybody, and a user's own may be incomplete.
    for (folder, mode) in
        [("/", 0o755), ("/tmp", 0o1777), ("/var/tmp", 0o1777), (settings.home.as_str(), 0o700)]
    {
        let _ = fs::create_dir_all(folder);
        optional(
            &format!("set the mode of {folder}"),
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)),
        );
    }
    optional("set the host name", nix::unistd::sethostname(HOST_NAME).map_err(io::Error::from));
    for (setting, value) in HOUSEKEEPING {
        // Kernels without them have nothing to turn down.
        let _ = fs::write(setting, value);
    }
    if settings.root.is_some() {
        optional("hand control groups on", delegate_control_groups());
        optional("give the machine its id", give_machine_id(Path::new(MACHINE_ID)));
    }
    // 0x1 is IFF_UP (Linux: include/uapi/linux/if.h).
    optional("bring lo up", fs::write("/sys/class/net/lo/flags", "0x1"));
    if let Some(network) = &settings.network {
        network::start(network);
    }
    let (soft, hard) = OPEN_FILES;
    optional(
        "set the limit of open files",
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).map_err(io::Error::from),
    );
    settings.read_environment(&fs::read_to_string(ENVIRONMENT).unwrap_or_default());
    fs::create_dir_all(&settings.work)
        .map_err(|error| format!("cannot create {}: {error}", settings.work.display()))
}

/// Becomes what a clone of a template is to be: with randomness, a time and a machine's id of its own. Nothing of the job has run yet.
///
/// # Errors
/// When the kernel's random numbers would be those of other clones: no job may run with them.
pub(crate) fn take_on(identity: &Identity) -> Result<(), String> {
    if std::process::id() != 1 {
        return Ok(());
    }
    reseed(&identity.entropy)
        .map_err(|error| format!("cannot make this clone's random numbers its own: {error}"))?;
    let (seconds, nanoseconds) = (identity.unix_ns / 1_000_000_000, identity.unix_ns % 1_000_000_000);
    let time = TimeSpec::new(seconds as _, nanoseconds as _);
    optional("set the clock", clock_settime(ClockId::CLOCK_REALTIME, time).map_err(io::Error::from));
    if HAS_OWN_ID.load(Ordering::Relaxed) {
        optional("give the machine another id", write_machine_id(Path::new(MACHINE_ID)));
    }
    Ok(())
}

/// Mixes `entropy` into the kernel's generator and has it start over at once (Linux: drivers/char/random.c).
fn reseed(entropy: &[u8; 32]) -> io::Result<()> {
    let device = fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    let pool = PoolInfo { bits: 256, bytes: 32, entropy: *entropy };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info from the pointer, which is valid for the call and as long as it says; RNDRESEEDCRNG
    // takes no argument; the descriptor is open.
    unsafe {
        ioctl::add_entropy(device.as_raw_fd(), (&raw const pool).cast())?;
        ioctl::reseed(device.as_raw_fd())?;
    }
    Ok(())
}

/// `struct rand_pool_info`.
#[repr(C)]
struct PoolInfo {
    bits: i32,
    bytes: i32,
    entropy: [u8; 32],
}

mod ioctl {
    nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [i32; 2]);
    nix::ioctl_none!(reseed, b'R', 0x07);
}

/// Makes this process the parent of its descendants' orphans, as PID 1 is by nature.
pub(crate) fn adopt_orphans() {
    optional("adopt orphans", nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from));
}

/// A machine out of memory loses a step, not its agent. Only root may ask for this.
pub(crate) fn protect_from_the_oom_killer() {
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Turns the machine off.
pub(crate) fn power_off() -> ! {
    end(RebootMode::RB_POWER_OFF)
}

/// Restarts the machine, which for the node is another way to end it.
pub(crate) fn restart() -> ! {
    end(RebootMode::RB_AUTOBOOT)
}

fn end(mode: RebootMode) -> ! {
    // Only a process without the right to do so comes back from here; as PID 1 its exit is a kernel panic, seen by the node.
    let _ = reboot(mode);
    std::process::exit(1)
}

fn mount_at(kind: &str, place: &Path, options: Option<&str>) -> Result<(), String> {
    let _ = fs::create_dir_all(place);
    let flags = if kind == "devtmpfs" || kind == "devpts" {
        MsFlags::MS_NOSUID
    } else {
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV
    };
    match mount(Some(kind), place, Some(kind), flags, options) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(format!("cannot mount {kind} at {}: {}", place.display(), error.desc())),
    }
}

/// Lets whoever makes control groups in a job, such as a container runtime, use every controller.
fn delegate_control_groups() -> io::Result<()> {
    let folder = Path::new(CGROUPS);
    for controller in fs::read_to_string(folder.join("cgroup.controllers"))?.split_whitespace() {
        fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"))?;
    }
    Ok(())
}

/// Whether the machine's id is its own, rather than the image's.
static HAS_OWN_ID: AtomicBool = AtomicBool::new(false);

/// Gives the machine an id of its own where the image has none (machine-id(5)): images are copied, ids are not.
fn give_machine_id(path: &Path) -> io::Result<()> {
    let is_id = |text: &str| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if fs::read_to_string(path).is_ok_and(|text| is_id(text.trim())) {
        return Ok(());
    }
    write_machine_id(path)?;
    HAS_OWN_ID.store(true, Ordering::Relaxed);
    Ok(())
}

fn write_machine_id(path: &Path) -> io::Result<()> {
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
    fs::write(path, format!("{id}\n"))
}

fn load_modules() -> Result<(), String> {
    let list = match fs::read_to_string(MODULES) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("cannot read {MODULES}: {error}")),
    };
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        let file = fs::File::open(path).map_err(|error| format!("cannot open the module {path}: {error}"))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(format!("cannot load the module {path}: {}", error.desc())),
        }
    }
    Ok(())
}

/// Reports what failed without being essential.
pub(crate) fn optional(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        eprintln!("nestling-agent: cannot {what}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_gets_an_id_only_where_there_is_none() {
        let path = std::env::temp_dir().join(format!("nestling-machine-id-{}", std::process::id()));
        for before in ["", "uninitialized\n", "short"] {
            fs::write(&path, before).unwrap();
            give_machine_id(&path).unwrap();
            let id = fs::read_to_string(&path).unwrap();
            assert!(id.len() == 33 && id.trim().bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
            give_machine_id(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), id);
        }
        fs::remove_file(&path).unwrap();
    }
}
