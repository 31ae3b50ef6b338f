//! A node in an emulator, for the length of a test, a demo or a benchmark: QEMU ([`qmp`] steers it) or Bochs.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! let node = nestling::bed::Bed::builder().image("target/images/minimal.tar").start()?;
//! node.wait_ready(Duration::from_secs(60))?;
//! println!("{}", node.client().host()?.version);
//! # Ok(()) }
//! ```

pub mod bochs;
mod boot_disk;
mod error;
mod host;
mod kind;
mod machine;
pub(crate) mod qemu;
pub mod qmp;
mod running;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::image;
use crate::kernel_image;
use crate::random;

pub use error::BedError;
pub use host::HostFacts;
pub use kind::{BedKind, UnknownBed};
pub use machine::{MAX_COMMAND_LINE, Machine, NODE_PORT, Network, Program};
pub use running::RunningBed;

/// What the emulator itself prints, in a node's directory.
pub(crate) const OUTPUT: &str = "emulator.log";
/// The serial log of a bed, in its directory.
const SERIAL_LOG: &str = "serial.log";

/// Where a bed begins: [`Bed::builder`].
#[derive(Clone, Copy, Debug)]
pub struct Bed;

impl Bed {
    /// A node as `nestling up` would start it, in QEMU's emulator, on any free port, with a random token.
    pub fn builder() -> BedBuilder {
        BedBuilder {
            kind: BedKind::QemuTcg,
            cpu: None,
            memory_mib: 2048,
            cores: 1,
            kernel: None,
            image: BedImage::Find,
            store: None,
            network: Network::User { port: 0 },
            auth: BedAuth::Random,
            command_line: None,
            words: Vec::new(),
            qemu_arguments: Vec::new(),
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
    kind: BedKind,
    cpu: Option<String>,
    memory_mib: u32,
    cores: u32,
    kernel: Option<PathBuf>,
    image: BedImage,
    store: Option<PathBuf>,
    network: Network,
    auth: BedAuth,
    command_line: Option<String>,
    words: Vec<String>,
    qemu_arguments: Vec<OsString>,
}

impl BedBuilder {
    /// What executes L1; default: QEMU's emulator.
    #[must_use]
    pub fn kind(mut self, kind: BedKind) -> Self {
        self.kind = kind;
        self
    }

    /// QEMU's `-cpu`, such as `max,-la57,-svm`; default: the accelerator's. Bochs has its model in [`BedKind::Bochs`].
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

    /// A kernel ELF (or any other kernel the bed loads) instead of the one this crate carries.
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

    /// A store of further images, on a disk of its own; default: none, whatever the user has.
    #[must_use]
    pub fn store(mut self, store: impl Into<PathBuf>) -> Self {
        self.store = Some(store.into());
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
        self.qemu_arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts the emulator and returns as soon as it runs; the node is booting then, see [`RunningBed::wait_ready`].
    ///
    /// # Errors
    /// When there is no image or no emulator, or the emulator refuses.
    pub fn start(self) -> Result<RunningBed, BedError> {
        let image = match &self.image {
            BedImage::None => None,
            BedImage::File(path) => Some(image::find(Some(path)).map_err(BedError::Image)?),
            BedImage::Find => Some(image::find(None).map_err(BedError::Image)?),
        };
        let dir = private_directory().map_err(BedError::Files)?;
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
        let machine = Machine {
            bed: self.kind,
            cpu: self.cpu,
            memory_mib: self.memory_mib,
            cores: self.cores,
            kernel,
            image,
            store: self.store,
            command_line,
            network: self.network,
            dir: dir.path().to_owned(),
            serial_log: SERIAL_LOG,
            qmp_socket: dir.path().join("qmp"),
            qemu_arguments: self.qemu_arguments,
        };
        let program = machine.prepare()?;
        RunningBed::start(dir, &machine, &program, token)
    }
}

/// A new directory only its owner can enter.
fn private_directory() -> io::Result<tempfile::TempDir> {
    let private = fs::Permissions::from_mode(0o700);
    tempfile::Builder::new().prefix("nestling-bed-").permissions(private).tempdir()
}

/// Writes a file only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}
