//! A node in QEMU for the length of a test, a demo or a benchmark.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! let node = nestling::bed::Bed::builder().image("target/images/minimal.tar").start()?;
//! node.wait_ready(Duration::from_secs(60))?;
//! println!("{}", node.client().host()?.version);
//! # Ok(()) }
//! ```

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::accelerator::Accelerator;
use crate::client::Client;
use crate::image;
use crate::kernel_image;
use crate::qemu::{self, BadCommandLine, Network, Qemu};
use crate::qmp::Qmp;
use crate::random;
use crate::ready::{self, NotReady};

/// How long QEMU may take until it listens on its control socket.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often files and sockets are looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Runs QEMU, and ends it when the standard input closes: a test's process may be killed, and its statics are never
/// dropped. `$1` is the bed's directory, the rest QEMU's command. The directory is kept until then.
const KEEPER: &str = r#"
dir=$1; shift
exec 3<&0
"$@" </dev/null 3<&- >"$dir/qemu.log" 2>&1 &
qemu=$!
echo "$qemu" >"$dir/pid.new" && mv "$dir/pid.new" "$dir/pid"
{ cat <&3 >/dev/null; [ -e "$dir/exit" ] || kill "$qemu"; } 2>/dev/null &
keeper=$!
exec 3<&-
wait "$qemu"
echo "$?" >"$dir/exit.new" && mv "$dir/exit.new" "$dir/exit"
wait "$keeper"
rm -rf -- "$dir"
"#;

/// Where a bed begins: [`Bed::builder`].
#[derive(Clone, Copy, Debug)]
pub struct Bed;

impl Bed {
    /// A node as `nestling up` would start it, emulated, on any free port, with a random token.
    pub fn builder() -> BedBuilder {
        BedBuilder {
            accelerator: Accelerator::Tcg,
            cpu: None,
            memory_mib: 2048,
            cores: 1,
            kernel: None,
            image: BedImage::Find,
            network: Network::User { port: 0 },
            auth: BedAuth::Random,
            command_line: None,
            words: Vec::new(),
            extra: Vec::new(),
        }
    }
}

#[derive(Clone, Debug)]
enum BedImage {
    Find,
    File(PathBuf),
    None,
}

#[derive(Clone, Debug)]
enum BedAuth {
    Random,
    Token(String),
    Off,
}

/// A node about to be started.
#[derive(Clone, Debug)]
pub struct BedBuilder {
    accelerator: Accelerator,
    cpu: Option<String>,
    memory_mib: u32,
    cores: u32,
    kernel: Option<PathBuf>,
    image: BedImage,
    network: Network,
    auth: BedAuth,
    command_line: Option<String>,
    words: Vec<String>,
    extra: Vec<OsString>,
}

impl BedBuilder {
    /// What executes L1; default: the emulator.
    #[must_use]
    pub fn accelerator(mut self, accelerator: Accelerator) -> Self {
        self.accelerator = accelerator;
        self
    }

    /// QEMU's `-cpu`, such as `max,-la57,-svm`; default: the accelerator's.
    #[must_use]
    pub fn cpu(mut self, cpu: impl Into<String>) -> Self {
        self.cpu = Some(cpu.into());
        self
    }

    /// L1's memory in MiB; default: 2048.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// L1's cores; default: 1.
    #[must_use]
    pub fn cores(mut self, cores: u32) -> Self {
        self.cores = cores;
        self
    }

    /// A kernel ELF (or any other kernel QEMU loads) instead of the one this crate carries.
    #[must_use]
    pub fn kernel(mut self, kernel: impl Into<PathBuf>) -> Self {
        self.kernel = Some(kernel.into());
        self
    }

    /// The bundle of images; default: where [`image::find`] finds it.
    #[must_use]
    pub fn image(mut self, image: impl Into<PathBuf>) -> Self {
        self.image = BedImage::File(image.into());
        self
    }

    /// No bundle of images at all.
    #[must_use]
    pub fn no_image(mut self) -> Self {
        self.image = BedImage::None;
        self
    }

    /// What the network card is plugged into; default: the user network, on any free port.
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// The token the node asks for; default: a random one.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.auth = BedAuth::Token(token.into());
        self
    }

    /// A node that asks for no token.
    #[must_use]
    pub fn no_auth(mut self) -> Self {
        self.auth = BedAuth::Off;
        self
    }

    /// Words added to the kernel's command line, such as `log=debug`; may be called again.
    #[must_use]
    pub fn append(mut self, words: impl Into<String>) -> Self {
        self.words.push(words.into());
        self
    }

    /// The whole of the kernel's command line, instead of the token and the words added.
    #[must_use]
    pub fn command_line(mut self, command_line: impl Into<String>) -> Self {
        self.command_line = Some(command_line.into());
        self
    }

    /// Further arguments for QEMU, as they are; may be called again.
    #[must_use]
    pub fn qemu_args<I>(mut self, arguments: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        self.extra.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts QEMU and returns as soon as it runs; the node is booting then, see [`RunningBed::wait_ready`].
    ///
    /// # Errors
    /// When there is no image or no QEMU, or QEMU refuses.
    pub fn start(self) -> Result<RunningBed, BedError> {
        let image = match &self.image {
            BedImage::None => None,
            BedImage::File(path) => Some(image::find(Some(path)).map_err(BedError::Image)?),
            BedImage::Find => Some(image::find(None).map_err(BedError::Image)?),
        };
        let dir = tempfile::Builder::new().prefix("nestling-bed-").tempdir().map_err(BedError::Files)?;
        let kernel = match self.kernel {
            Some(kernel) => kernel,
            None => {
                let path = dir.path().join("kernel.elf");
                kernel_image::write(&path).map_err(BedError::Files)?;
                path
            }
        };
        let token = match self.auth {
            BedAuth::Random => Some(random::hex(32)),
            BedAuth::Token(token) => Some(token),
            BedAuth::Off => None,
        };
        let command_line = self.command_line.unwrap_or_else(|| {
            let first = token.as_ref().map_or("auth=off".to_owned(), |token| format!("token={token}"));
            [vec![first], self.words].concat().join(" ")
        });
        let qemu = Qemu {
            accelerator: self.accelerator,
            cpu: self.cpu.unwrap_or_else(|| self.accelerator.default_cpu().to_owned()),
            memory_mib: self.memory_mib,
            cores: self.cores,
            kernel,
            image,
            command_line,
            network: self.network,
            serial_log: dir.path().join("serial.log"),
            qmp_socket: dir.path().join("qmp"),
            extra: self.extra,
        };
        let config = dir.path().join("qemu.conf");
        write_private(&config, &qemu.config_file().map_err(BedError::CommandLine)?)
            .map_err(BedError::Files)?;
        let started = Instant::now();
        let keeper = Command::new("/bin/sh")
            .args(["-c", KEEPER, "nestling-bed"])
            .arg(dir.path())
            .arg(qemu::PROGRAM)
            .args(qemu.arguments(&config))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A signal to all of a terminal's or a timeout's processes must not end it before it has cleaned up.
            .process_group(0)
            .spawn()
            .map_err(BedError::Files)?;
        // From here on the keeper removes the directory.
        let mut bed = RunningBed {
            dir: dir.keep(),
            keeper: Mutex::new(keeper),
            started,
            url: String::new(),
            token,
            client: None,
        };
        bed.connect(self.network)?;
        Ok(bed)
    }
}

/// Writes a file only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

/// A node in QEMU. Dropping it ends QEMU, and so does the end of this process, however it ends.
#[derive(Debug)]
pub struct RunningBed {
    dir: PathBuf,
    keeper: Mutex<Child>,
    started: Instant,
    url: String,
    token: Option<String>,
    client: Option<Client>,
}

impl RunningBed {
    /// Waits for QEMU to take commands and learns the port it chose.
    fn connect(&mut self, network: Network) -> Result<(), BedError> {
        let mut qmp = loop {
            if let Ok(qmp) = self.qmp() {
                break qmp;
            }
            if let Some(code) = self.exit_code() {
                let words = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
                // A node that ends at once is for `wait_ready` to tell, with what it said.
                if code == 0 {
                    return Ok(());
                }
                return Err(if code == 127 {
                    BedError::NoQemu
                } else {
                    BedError::Qemu(words.trim().to_owned())
                });
            }
            if self.started.elapsed() > START_TIMEOUT {
                return Err(BedError::Qemu("QEMU does not answer on its control socket".to_owned()));
            }
            thread::sleep(INTERVAL);
        };
        if matches!(network, Network::User { .. }) {
            let port = qmp.forwarded_port().map_err(BedError::Files)?;
            self.url = format!("http://127.0.0.1:{port}");
            self.client = Client::new(&self.url, self.token.as_deref()).ok();
        }
        Ok(())
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

    /// When QEMU was started.
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
        self.dir.join("serial.log")
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
        let ended = || self.exit_code().map(|code| format!("QEMU's exit code {code}"));
        ready::wait(client, &self.serial_log_path(), timeout, ended, |_| {}).map_err(BedError::NotReady)
    }

    /// Waits until the serial log has `text`, and returns the log; none when `timeout` passes or QEMU ends without it.
    pub fn wait_serial(&self, text: &str, timeout: Duration) -> Option<String> {
        let start = Instant::now();
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

    /// QEMU's exit code, once it has ended: 0 when the node switched itself off.
    pub fn exit_code(&self) -> Option<i32> {
        fs::read_to_string(self.dir.join("exit")).ok()?.trim().parse().ok()
    }

    /// Waits until QEMU ends by itself; none when `timeout` passes first.
    pub fn wait_exit(&self, timeout: Duration) -> Option<i32> {
        let start = Instant::now();
        loop {
            let code = self.exit_code();
            if code.is_some() || start.elapsed() >= timeout {
                return code;
            }
            thread::sleep(INTERVAL);
        }
    }

    /// QEMU's process, once it has one.
    pub fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.dir.join("pid")).ok()?.trim().parse().ok()
    }

    /// A connection to QEMU's control socket.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn qmp(&self) -> io::Result<Qmp> {
        Qmp::connect(&self.dir.join("qmp"))
    }
}

impl Drop for RunningBed {
    fn drop(&mut self) {
        // Without a panic in a panic: a poisoned lock has the child all the same.
        let keeper = self.keeper.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Closing the keeper's input makes it end QEMU and remove the directory.
        drop(keeper.stdin.take());
        let _ = keeper.wait();
    }
}

/// Why a node could not be started in a bed.
#[derive(Debug)]
pub enum BedError {
    /// No bundle of images.
    Image(image::NotFound),
    /// The kernel's command line cannot be handed over.
    CommandLine(BadCommandLine),
    /// A file or a socket.
    Files(io::Error),
    /// QEMU is not installed.
    NoQemu,
    /// QEMU's own complaint.
    Qemu(String),
    /// The node did not come up.
    NotReady(NotReady),
}

impl fmt::Display for BedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BedError::Image(error) => error.fmt(f),
            BedError::CommandLine(error) => error.fmt(f),
            BedError::Files(error) => write!(f, "cannot prepare QEMU's files: {error}"),
            BedError::NoQemu => write!(f, "{} is not installed; {}", qemu::PROGRAM, qemu::INSTALL_HINT),
            BedError::Qemu(words) => write!(f, "QEMU did not start: {words}"),
            BedError::NotReady(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for BedError {}
