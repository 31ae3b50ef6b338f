//! Starting and stopping a node on this computer that outlives the command which started it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::accelerator::Accelerator;
use crate::client::{Client, ClientError};
use crate::image;
use crate::kernel_image;
use crate::qemu::{self, BadCommandLine, Network, Qemu};
use crate::ready::{self, NotReady};
use crate::state::{LocalNode, NodeDir, StateError};

/// How long a node may take until it takes jobs. An emulated one on a busy computer needs a while.
const READY_TIMEOUT: Duration = Duration::from_secs(180);
/// How long QEMU may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often that is looked at.
const INTERVAL: Duration = Duration::from_millis(20);
/// Least and most bytes of a token.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=256;

/// A node to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// What executes it.
    pub accelerator: Accelerator,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// The port on 127.0.0.1, or 0 for any free one.
    pub port: u16,
    /// The bundle of images; none looks in the usual places.
    pub image: Option<PathBuf>,
    /// The token it asks for; none for a node anybody on this computer may use.
    pub token: Option<String>,
}

/// Starts the node `name` whose place is `dir`, which the caller has locked, and waits until it takes jobs. `phase` is told
/// what it is at; `interrupted` ends the wait, and the node with it.
///
/// # Errors
/// Whatever keeps it from taking jobs. Nothing runs then, and the log stays.
pub fn start(
    dir: &NodeDir,
    name: &str,
    options: &Options,
    interrupted: impl Fn() -> bool,
    mut phase: impl FnMut(&str),
) -> Result<LocalNode, LocalError> {
    if let Some(token) = &options.token {
        check_token(token)?;
    }
    let image = image::find(options.image.as_deref()).map_err(LocalError::Image)?;
    dir.forget().map_err(LocalError::State)?;
    let auth = options.token.as_ref().map_or("auth=off".to_owned(), |token| format!("token={token}"));
    let qemu = Qemu {
        accelerator: options.accelerator,
        cpu: options.accelerator.default_cpu().to_owned(),
        memory_mib: options.memory_mib,
        cores: 1,
        kernel: dir.kernel(),
        image: Some(image.clone()),
        command_line: format!("{auth} name={name}"),
        network: Network::User { port: options.port },
        serial_log: dir.serial_log(),
        qmp_socket: dir.qmp_socket(),
        extra: Vec::new(),
    };
    kernel_image::write(&dir.kernel()).map_err(LocalError::Files)?;
    let config = qemu.config_file().map_err(LocalError::CommandLine)?;
    dir.write_private("qemu.conf", &config).map_err(LocalError::Files)?;

    phase("starting QEMU");
    let mut node = LocalNode {
        name: name.to_owned(),
        url: String::new(),
        token: options.token.clone(),
        pid: 0,
        qmp_socket: dir.qmp_socket(),
        bed: options.accelerator.to_string(),
        image,
        memory_mib: options.memory_mib,
    };
    // Before there is anything to record: should this process end now, `stop` still finds what it started.
    dir.write(&node).map_err(LocalError::State)?;
    let result = launch(dir, &qemu).and_then(|pid| {
        node.pid = pid;
        await_ready(dir, &mut node, interrupted, phase)
    });
    if result.is_err() {
        // The first error is the one to tell.
        let _ = stop(dir, &node);
    }
    result.map(|()| node)
}

/// Refuses what the kernel's command line cannot carry as one word, and what is guessed too easily.
fn check_token(token: &str) -> Result<(), LocalError> {
    let word = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte));
    if word && TOKEN_LENGTH.contains(&token.len()) { Ok(()) } else { Err(LocalError::Token) }
}

/// Starts QEMU in a session of its own and returns its process. With `-daemonize` the command ends once QEMU has taken
/// hold of all it needs, or says what it could not.
fn launch(dir: &NodeDir, qemu: &Qemu) -> Result<u32, LocalError> {
    let output = Command::new(qemu::PROGRAM)
        .args(qemu.arguments(&dir.config()))
        .arg("-daemonize")
        .arg("-pidfile")
        .arg(dir.pid_file())
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(match qemu.network {
                Network::User { port } if words.contains("host forwarding rule") => {
                    LocalError::PortTaken(port)
                }
                _ => LocalError::Qemu(words),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(LocalError::NoQemu),
        Err(error) => return Err(LocalError::Qemu(error.to_string())),
    }
    dir.recorded_pid()
        .ok_or_else(|| LocalError::Qemu(format!("{} has no process number", dir.pid_file().display())))
}

/// Learns the node's port, records it and waits until it takes jobs.
fn await_ready(
    dir: &NodeDir,
    node: &mut LocalNode,
    interrupted: impl Fn() -> bool,
    phase: impl FnMut(&str),
) -> Result<(), LocalError> {
    let log = dir.serial_log();
    let Ok(port) = node.qmp().and_then(|mut qmp| qmp.forwarded_port()) else {
        let reason = "the node ended as soon as it started".to_owned();
        let serial = ready::tail(&log, ready::TAIL_LINES);
        return Err(LocalError::NotReady { error: NotReady { reason, serial }, log });
    };
    node.url = format!("http://127.0.0.1:{port}");
    dir.write(node).map_err(LocalError::State)?;
    let client = Client::new(&node.url, node.token.as_deref()).map_err(LocalError::Client)?;
    let ended = || {
        if interrupted() {
            Some("interrupted".to_owned())
        } else if node.is_running() {
            None
        } else {
            Some("it switched itself off".to_owned())
        }
    };
    ready::wait(&client, &log, READY_TIMEOUT, ended, phase)
        .map_err(|error| LocalError::NotReady { error, log })
}

/// Ends a node and forgets it; whether it ran. The caller has locked `dir`.
///
/// # Errors
/// When it can be neither asked nor killed.
pub fn stop(dir: &NodeDir, node: &LocalNode) -> Result<bool, LocalError> {
    let ran = node.is_running();
    if ran {
        let asked = node.qmp().and_then(|mut qmp| qmp.quit());
        // QEMU may end before it has answered: what counts is that it does. One that is stopped does not hear.
        let deaf = asked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        if deaf || !ends(node) {
            // Its number is not recorded when the command that started it was ended meanwhile.
            let pid = Some(node.pid).filter(|&pid| pid != 0).or_else(|| dir.recorded_pid());
            let pid = pid.ok_or(LocalError::Lost)?;
            kill(node, pid)?;
            if !ends(node) {
                return Err(LocalError::Stuck(pid));
            }
        }
    }
    dir.forget().map_err(LocalError::State)?;
    Ok(ran)
}

/// Waits until QEMU no longer listens.
fn ends(node: &LocalNode) -> bool {
    let start = Instant::now();
    while node.is_running() {
        if start.elapsed() >= STOP_TIMEOUT {
            return false;
        }
        thread::sleep(INTERVAL);
    }
    true
}

/// Kills QEMU, after making sure that its process number is still its own.
fn kill(node: &LocalNode, pid: u32) -> Result<(), LocalError> {
    let arguments = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    let socket = node.qmp_socket.as_os_str().as_encoded_bytes();
    if !arguments.windows(socket.len()).any(|window| window == socket) {
        return Err(LocalError::Stuck(pid));
    }
    let status =
        Command::new("kill").arg("-KILL").arg(pid.to_string()).status().map_err(LocalError::Files)?;
    if status.success() { Ok(()) } else { Err(LocalError::Stuck(pid)) }
}

/// Why a node on this computer could not be started or stopped.
#[derive(Debug)]
pub enum LocalError {
    /// No bundle of images.
    Image(image::NotFound),
    /// The record of the node.
    State(StateError),
    /// Another file.
    Files(io::Error),
    /// The kernel's command line cannot be handed over.
    CommandLine(BadCommandLine),
    /// Not a token.
    Token,
    /// QEMU is not installed.
    NoQemu,
    /// Another program has this port.
    PortTaken(u16),
    /// QEMU's own complaint.
    Qemu(String),
    /// The client could not be made.
    Client(ClientError),
    /// The node did not come up.
    NotReady {
        /// How, with the end of its log.
        error: NotReady,
        /// The whole log.
        log: PathBuf,
    },
    /// This process does not end.
    Stuck(u32),
    /// A process that does not end and is not known.
    Lost,
}

impl fmt::Display for LocalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LocalError::Image(error) => error.fmt(f),
            LocalError::State(error) => error.fmt(f),
            LocalError::Files(error) => write!(f, "cannot prepare the node's files: {error}"),
            LocalError::CommandLine(error) => error.fmt(f),
            LocalError::Token => write!(
                f,
                "the token must have {} to {} letters, digits or -._~+/=; leave it out to have one made",
                TOKEN_LENGTH.start(),
                TOKEN_LENGTH.end()
            ),
            LocalError::NoQemu => write!(f, "{} is not installed; {}", qemu::PROGRAM, qemu::INSTALL_HINT),
            LocalError::PortTaken(port) => {
                write!(f, "port {port} of 127.0.0.1 cannot be had; leave out --port to get any that is free")
            }
            LocalError::Qemu(words) => write!(f, "QEMU did not start: {words}"),
            LocalError::Client(error) => error.fmt(f),
            LocalError::NotReady { error, log } => {
                write!(f, "{error}\nthe whole log is in {}", log.display())
            }
            LocalError::Lost => {
                f.write_str("QEMU does not end; end it with `kill -KILL`, once you have found it in the output of `ps -ef`")
            }
            LocalError::Stuck(pid) => {
                write!(f, "QEMU (process {pid}) does not end; end it with `kill -KILL {pid}`")
            }
        }
    }
}

impl std::error::Error for LocalError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_word_of_some_length() {
        for token in
            ["", "short", "0123456789abcde ", "0123456789abcde\"", "0123456789abcdé", &"a".repeat(257)]
        {
            assert!(check_token(token).is_err(), "{token}");
        }
        assert!(check_token(&crate::random::hex(32)).is_ok());
    }
}
