//! The loads that an L2 with a disk and a network runs, on both sides the same: `ci/bench/run.sh` on one root file system.

use super::machine::Machine;
use super::rows::Goal;
use crate::build::workspace_root;
use crate::process::{find, output, run};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// One load.
pub(super) struct Load {
    /// As run.sh knows it; the row's name.
    pub(super) name: &'static str,
    /// What is measured.
    pub(super) what: &'static str,
    /// What its time becomes.
    pub(super) figure: Figure,
    /// What has to hold.
    pub(super) goal: Goal,
}

/// What a load's time, or its exits, become.
#[derive(Clone, Copy)]
pub(super) enum Figure {
    /// MiB a second, of so many MiB.
    Throughput(f64),
    /// Operations a second, of so many.
    Rate(f64),
    /// The time itself.
    Seconds,
    /// Exits a second.
    ExitsASecond,
}

/// A load that ran.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// How long it took, by the clock outside.
    pub(super) seconds: f64,
    /// Exits of its L2 meanwhile.
    pub(super) exits: f64,
}

impl Figure {
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Throughput(_) => "MiB/s",
            Self::Rate(_) => "/s",
            Self::Seconds => "s",
            Self::ExitsASecond => "exits/s",
        }
    }

    pub(super) fn of(self, measured: &Measured) -> f64 {
        match self {
            Self::Throughput(amount) | Self::Rate(amount) => amount / measured.seconds,
            Self::Seconds => measured.seconds,
            Self::ExitsASecond => measured.exits / measured.seconds,
        }
    }
}

const fn load(name: &'static str, what: &'static str, figure: Figure, goal: Goal) -> Load {
    Load { name, what, figure, goal }
}

/// What users of a peer would call faster.
const FASTER: Goal = Goal::AtLeastRatio(1.5);

/// Every load, in an order in which they can run: `disk-write` leaves the file that the two after it write to.
pub(super) const LOADS: [Load; 10] = [
    load("net-send", "one TCP stream out of L2", Figure::Throughput(96.0), FASTER),
    load("net-receive", "one TCP stream into L2", Figure::Throughput(96.0), FASTER),
    load("net-round-trips", "64 bytes to an outside host and back", Figure::Rate(2000.0), FASTER),
    load("disk-read", "sequential reads of 1 MiB, 4 in flight", Figure::Throughput(128.0), FASTER),
    load("disk-random-read", "random reads of 4 KiB, one in flight", Figure::Rate(2048.0), FASTER),
    load("disk-write", "sequential writes of 1 MiB, 4 in flight", Figure::Throughput(96.0), FASTER),
    load("disk-random-write", "random writes of 4 KiB, one in flight", Figure::Rate(2048.0), FASTER),
    load("disk-fsync", "4 KiB written and synced, one after another", Figure::Rate(256.0), FASTER),
    load("compile", "gcc over the sources of Lua", Figure::Seconds, Goal::Ratio(1.0)),
    load("idle", "exits of an L2 that sleeps", Figure::ExitsASecond, Goal::AtMost(20.0)),
];

/// Longest wait for a line of a running load.
const LIMIT: Duration = Duration::from_secs(600);

/// What the lines of a run of run.sh say, each with the time at which it arrived. A line `EXITS N` belongs to the mark before it.
#[derive(Default)]
pub(super) struct Marks {
    began: Option<(usize, Instant, Option<f64>)>,
    ended: Option<Instant>,
    pub(super) loads: [Option<Measured>; LOADS.len()],
}

impl Marks {
    /// Takes a line; true if it is a mark, after which `EXITS` should follow.
    pub(super) fn line(&mut self, at: Instant, line: &str) -> Result<bool> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["MARK", "begin", name] => {
                let index = LOADS.iter().position(|load| load.name == *name);
                let index = index.with_context(|| format!("run.sh began {name}, which is no load"))?;
                (self.began, self.ended) = (Some((index, at, None)), None);
                Ok(true)
            }
            ["MARK", "end", _] => {
                self.ended = Some(at);
                Ok(true)
            }
            ["MARK", "failed", name] => bail!("the load {name} failed"),
            ["EXITS", count] => {
                self.exits(count.parse()?);
                Ok(false)
            }
            _ => Ok(false),
        }
    }

    /// The exits at the last mark.
    pub(super) fn exits(&mut self, count: f64) {
        match (&mut self.began, self.ended) {
            (Some((index, began, Some(before))), Some(ended)) => {
                let seconds = ended.saturating_duration_since(*began).as_secs_f64();
                self.loads[*index] = Some(Measured { seconds, exits: count - *before });
                (self.began, self.ended) = (None, None);
            }
            (Some((_, _, before)), None) => *before = Some(count),
            _ => {}
        }
    }
}

/// What the loads talk to: on this computer's loopback, which QEMU shows its machines at 10.0.2.2.
pub(super) struct Servers {
    iperf: Child,
    stream_port: u16,
    echo_port: u16,
}

impl Servers {
    pub(super) fn start() -> Result<Self> {
        let stream_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let iperf = Command::new("iperf3")
            .args(["-s", "-B", "127.0.0.1", "-p", &stream_port.to_string()])
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start iperf3")?;
        let echo = TcpListener::bind("127.0.0.1:0")?;
        let echo_port = echo.local_addr()?.port();
        // Ends with this process.
        std::thread::spawn(move || {
            for mut stream in echo.incoming().flatten() {
                let _ = stream.set_nodelay(true);
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
            }
        });
        Ok(Self { iperf, stream_port, echo_port })
    }

    /// The command that runs these loads.
    pub(super) fn command(&self, loads: &[usize]) -> String {
        let names: Vec<&str> =
            loads.iter().filter_map(|index| LOADS.get(*index)).map(|load| load.name).collect();
        format!("/bench/run.sh 10.0.2.2 {} {} {}", self.stream_port, self.echo_port, names.join(" "))
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.iperf.kill();
        let _ = self.iperf.wait();
    }
}

/// Reads marks from a machine's serial port until `end`.
pub(super) fn from_serial(machine: &mut Machine, end: &str) -> Result<Marks> {
    let mut marks = Marks::default();
    loop {
        let (at, line) = machine.next_line(LIMIT)?;
        if line == end {
            return Ok(marks);
        }
        marks.line(at, &line).with_context(|| format!("the peer's last lines:\n{}", machine.tail()))?;
    }
}

/// The loads' root file system: Debian with fio, iperf3, stress-ng and gcc, the sources of Lua, and a file to read.
pub(super) fn root() -> Result<PathBuf> {
    const PACKAGES: &str = "--include=iperf3,fio,stress-ng,gcc,libc6-dev,make,ca-certificates";
    // The sources come the way users of Debian get them.
    const SOURCES: &str = r#"set -e
sed -n 's/^deb /deb-src /p' "$1/etc/apt/sources.list" > "$1/etc/apt/sources.list.d/sources.list"
chroot "$1" apt-get update
mkdir "$1/bench" && chroot "$1" sh -c 'cd /bench && apt-get source --download-only lua5.4 && mv lua*.orig.tar.gz source.tar.gz'
head -c 134217728 /dev/urandom > "$1/bench/data"
"#;
    let folder = workspace_root().join("target/bench");
    let (archive, script) = (folder.join("root.tar"), workspace_root().join("ci/bench/run.sh"));
    let stamp = folder.join("root-recipe");
    let recipe = format!("{PACKAGES}\n{SOURCES}\n{}", fs::read_to_string(&script)?);
    if fs::read_to_string(&stamp).is_ok_and(|built| built == recipe) && archive.is_file() {
        return Ok(archive);
    }
    eprintln!("bench: building the loads' root file system from Debian packages");
    fs::create_dir_all(&folder)?;
    let hook = folder.join("sources.sh");
    fs::write(&hook, SOURCES)?;
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", PACKAGES])
        .arg(format!("--customize-hook=sh {} \"$1\"", hook.display()))
        .arg(format!("--customize-hook=cp {} \"$1/bench/run.sh\"", script.display()))
        .arg("bookworm")
        .arg(&archive))?;
    fs::write(&stamp, recipe)?;
    Ok(archive)
}

/// What each side's file system has free, in MiB.
const FREE_MIB: u64 = 512;

/// Whether `made` is younger than what it is made from.
fn is_current(made: &Path, from: &Path) -> bool {
    let time = |file: &Path| fs::metadata(file).and_then(|meta| meta.modified()).ok();
    time(made) > time(from)
}

/// `archive` as an image of the name `loads`, for a node.
pub(super) fn store(archive: &Path, nestling: &Path) -> Result<PathBuf> {
    let store = archive.with_file_name("loads.tar");
    if !is_current(&store, archive) || !is_current(&store, nestling) {
        run(Command::new(nestling)
            .args(["image", "build", "loads", "--free", &FREE_MIB.to_string(), "--output"])
            .arg(&store)
            .arg("--from")
            .arg(archive))?;
    }
    Ok(store)
}

/// `archive` as an ext4 file system, for the peer.
pub(super) fn ext4(archive: &Path) -> Result<PathBuf> {
    let image = archive.with_extension("ext4");
    if is_current(&image, archive) {
        return Ok(image);
    }
    let tree = archive.with_extension("tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(&tree)?;
    run(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(&tree))?;
    let size = output(Command::new("du").arg("-sm").arg(&tree))?;
    let used: u64 =
        size.split_whitespace().next().and_then(|mib| mib.parse().ok()).context("du says no size")?;
    let _ = fs::remove_file(&image);
    let mke2fs = find("mke2fs").unwrap_or_else(|| "/usr/sbin/mke2fs".into());
    run(Command::new(mke2fs)
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
        .arg(&tree)
        .arg(&image)
        .arg(format!("{}M", used + used / 8 + FREE_MIB)))?;
    fs::remove_dir_all(&tree)?;
    Ok(image)
}
