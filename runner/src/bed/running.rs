//! A bed that runs: its process, its serial log, the way to its node.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::qmp::Qmp;
use super::{BedError, BedKind, Machine, Network, OUTPUT, Program, SERIAL_LOG, bochs};
use crate::client::Client;
use crate::ready::{self, NotReady};

/// How long an emulator may take until it can be talked to.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often files and sockets are looked at.
const INTERVAL: Duration = Duration::from_millis(10);
/// How long the node may be silent on a connection.
const SILENCE: Duration = Duration::from_secs(60);
/// The shell's exit code when there is no such program.
const NOT_FOUND: i32 = 127;

/// Runs the emulator, and ends it when the standard input closes: a test's process may be killed, and its statics are never
/// dropped. `$1` is the bed's directory, which is kept until then, `$2` the signal that ends the emulator, the rest its command.
const KEEPER: &str = r#"
dir=$1; signal=$2; shift 2
exec 3<&0
"$@" </dev/null 3<&- >"$dir/emulator.log" 2>&1 &
emulator=$!
echo "$emulator" >"$dir/pid.new" && mv "$dir/pid.new" "$dir/pid"
{ cat <&3 >/dev/null; [ -e "$dir/exit" ] || kill -s "$signal" "$emulator"; } 2>/dev/null &
keeper=$!
exec 3<&-
wait "$emulator"
echo "$?" >"$dir/exit.new" && mv "$dir/exit.new" "$dir/exit"
wait "$keeper"
rm -rf -- "$dir"
"#;

/// A node in an emulator. Dropping it ends the emulator, and so does the end of this process, however it ends.
///
/// Limits on waiting are for QEMU's emulator; a slower bed is given [so many times](BedKind::slowness) as long.
#[derive(Debug)]
pub struct RunningBed {
    kind: BedKind,
    dir: PathBuf,
    keeper: Mutex<Child>,
    started: Instant,
    url: String,
    token: Option<String>,
    client: Option<Client>,
}

impl RunningBed {
    /// Starts the program prepared for this machine, whose directory is `dir`.
    pub(super) fn start(
        dir: TempDir,
        machine: &Machine,
        program: &Program,
        token: Option<String>,
    ) -> Result<RunningBed, BedError> {
        let started = Instant::now();
        let keeper = program
            .by_script(KEEPER, dir.path(), &[dir.path().as_os_str(), program.stop_signal.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A signal to all of a terminal's or a timeout's processes must not end it before it has cleaned up.
            .process_group(0)
            .spawn()
            .map_err(BedError::Files)?;
        // From here on the keeper removes the directory.
        let mut bed = RunningBed {
            kind: machine.bed.clone(),
            dir: dir.keep(),
            keeper: Mutex::new(keeper),
            started,
            url: String::new(),
            token,
            client: None,
        };
        let port = bed.connect(machine.network, program)?;
        if let Some(port) = port {
            bed.url = format!("http://127.0.0.1:{port}");
            let client = Client::new(&bed.url, bed.token.as_deref()).ok();
            bed.client = client.map(|client| client.with_silence_limit(bed.patience(SILENCE)));
        }
        Ok(bed)
    }

    /// Waits until the emulator is up, and learns the port that leads to the node; none when none does, or it ended at once as
    /// its node wished: that is for `wait_ready` to tell, with what it said.
    fn connect(&self, network: Network, program: &Program) -> Result<Option<u16>, BedError> {
        let user = matches!(network, Network::User { .. });
        loop {
            let up = match program.forwarded_port {
                _ if self.kind.is_qemu() => self
                    .qmp()
                    .ok()
                    .map(|mut qmp| if user { qmp.forwarded_port().map(Some) } else { Ok(None) }),
                Some(port) => self.pid().filter(|&pid| bochs::listens(pid, port)).map(|_| Ok(Some(port))),
                None => self.pid().map(|_| Ok(None)),
            };
            if let Some(port) = up {
                return port.map_err(BedError::Files);
            }
            match self.exit_code() {
                Some(0) => return Ok(None),
                Some(NOT_FOUND) if self.kind.is_qemu() => return Err(BedError::NoQemu),
                Some(_) => return Err(BedError::Refused(program.name, self.complaint())),
                None if self.started.elapsed() > self.patience(START_TIMEOUT) => {
                    return Err(BedError::Refused(program.name, "it runs but cannot be reached".to_owned()));
                }
                None => thread::sleep(INTERVAL),
            }
        }
    }

    /// What the emulator says of its own end.
    fn complaint(&self) -> String {
        if self.kind.is_qemu() {
            fs::read_to_string(self.dir.join(OUTPUT)).unwrap_or_default().trim().to_owned()
        } else {
            bochs::last_words(&self.dir)
        }
    }

    /// What executes the node.
    pub fn kind(&self) -> &BedKind {
        &self.kind
    }

    /// How long to wait for what takes `limit` at most in QEMU's emulator.
    pub fn patience(&self, limit: Duration) -> Duration {
        limit * self.kind.slowness()
    }

    /// The node's URL, without a slash at its end.
    ///
    /// # Panics
    /// When the bed has no user network: then nothing leads to the node.
    pub fn url(&self) -> &str {
        assert!(!self.url.is_empty(), "nothing leads to a node without a user network, or it ended at once");
        &self.url
    }

    /// The port on 127.0.0.1 that leads to the node.
    ///
    /// # Panics
    /// As [`url`](Self::url).
    pub fn port(&self) -> u16 {
        let port = self.url().rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        port.expect("the URL ends with the port")
    }

    /// The token the node asks for; none when it asks for none.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// A client of the node, with its token.
    ///
    /// # Panics
    /// As [`url`](Self::url).
    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("nothing leads to a node without a user network, or it ended at once")
    }

    /// When the emulator was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// All the node has written to its serial port so far.
    pub fn serial_log(&self) -> String {
        let bytes = fs::read(self.serial_log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The file that takes the serial log. It goes with the bed.
    pub fn serial_log_path(&self) -> PathBuf {
        self.dir.join(SERIAL_LOG)
    }

    /// Waits until the node takes jobs.
    ///
    /// # Errors
    /// With the end of the serial log, when it ended or `timeout` passed first.
    ///
    /// # Panics
    /// When the bed has no user network.
    pub fn wait_ready(&self, timeout: Duration) -> Result<(), BedError> {
        let Some(client) = &self.client else {
            assert!(self.exit_code().is_some(), "nothing leads to a node without a user network");
            let serial = ready::tail(&self.serial_log_path(), ready::TAIL_LINES);
            return Err(BedError::NotReady(NotReady { reason: "the node ended at once".to_owned(), serial }));
        };
        let ended = || {
            let words = if self.kind.is_qemu() { String::new() } else { bochs::last_words(&self.dir) };
            self.exit_code().map(|code| match words.as_str() {
                "" => format!("exit code {code}"),
                words => format!("exit code {code}, {words}"),
            })
        };
        let timeout = self.patience(timeout);
        ready::wait(client, &self.serial_log_path(), timeout, ended, |_| {}).map_err(BedError::NotReady)
    }

    /// Waits until the serial log has `text`, and returns the log; none when `timeout` passes or the emulator ends without it.
    pub fn wait_serial(&self, text: &str, timeout: Duration) -> Option<String> {
        let (start, timeout) = (Instant::now(), self.patience(timeout));
        loop {
            // Asked first, so that what was written last is still seen.
            let over = self.exit_code().is_some() || start.elapsed() >= timeout;
            let log = self.serial_log();
            if log.contains(text) {
                return Some(log);
            }
            if over {
                return None;
            }
            thread::sleep(INTERVAL);
        }
    }

    /// The emulator's exit code, once it has ended: 0 when the node switched itself off.
    pub fn exit_code(&self) -> Option<i32> {
        let code = fs::read_to_string(self.dir.join("exit")).ok()?.trim().parse().ok()?;
        // Bochs ends as after a crash.
        let off = code != 0 && !self.kind.is_qemu() && bochs::switched_off(&bochs::last_words(&self.dir));
        Some(if off { 0 } else { code })
    }

    /// Waits until the emulator ends by itself; none when `timeout` passes first.
    pub fn wait_exit(&self, timeout: Duration) -> Option<i32> {
        let (start, timeout) = (Instant::now(), self.patience(timeout));
        loop {
            let code = self.exit_code();
            if code.is_some() || start.elapsed() >= timeout {
                return code;
            }
            thread::sleep(INTERVAL);
        }
    }

    /// The emulator's process, once it has one.
    pub fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.dir.join("pid")).ok()?.trim().parse().ok()
    }

    /// A connection to QEMU's control socket.
    ///
    /// # Errors
    /// When QEMU has ended, or the bed is none.
    pub fn qmp(&self) -> io::Result<Qmp> {
        Qmp::connect(&self.dir.join("qmp"))
    }
}

impl Drop for RunningBed {
    fn drop(&mut self) {
        // Without a panic in a panic: a poisoned lock has the child all the same.
        let keeper = self.keeper.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Closing the keeper's input makes it end the emulator and remove the directory.
        drop(keeper.stdin.take());
        let _ = keeper.wait();
    }
}
