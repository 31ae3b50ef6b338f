//! Starting and stopping a node on this computer that outlives the command which started it.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::bed::{BedError, BedKind, Machine, Network, OUTPUT, Program, bochs};
use crate::client::{Client, ClientError};
use crate::image;
use crate::kernel_image;
use crate::ready::{self, NotReady};
use crate::state::{LocalNode, NodeDir, SERIAL_LOG, StateError};

/// How long a node may take until it takes jobs. An emulated one on a busy computer needs a while, and a slower bed
/// [so many times](BedKind::slowness) as long.
const READY_TIMEOUT: Duration = Duration::from_secs(180);
/// How long Bochs may take until it has taken the port.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long an emulator may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How often that is looked at.
const INTERVAL: Duration = Duration::from_millis(20);
/// Least and most bytes of a token.
const TOKEN_LENGTH: std::ops::RangeInclusive<usize> = 16..=256;

/// A node to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// What executes it.
    pub bed: BedKind,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its cores.
    pub cores: u32,
    /// The port on 127.0.0.1, or 0 for any free one.
    pub port: u16,
    /// The bundle of images; none looks in the usual places.
    pub image: Option<PathBuf>,
    /// The store of further images; none takes the user's, where it is there and the bed has disks.
    pub store: Option<PathBuf>,
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
    let store = match &options.store {
        None if !options.bed.is_qemu() => None,
        given => image::find_store(given.as_deref()).map_err(LocalError::Image)?,
    };
    dir.forget().map_err(LocalError::State)?;
    let auth = options.token.as_ref().map_or("auth=off".to_owned(), |token| format!("token={token}"));
    let machine = Machine {
        bed: options.bed.clone(),
        cpu: None,
        memory_mib: options.memory_mib,
        cores: options.cores,
        kernel: dir.kernel(),
        image: Some(image.clone()),
        store,
        command_line: format!("{auth} name={name}"),
        network: Network::User { port: options.port },
        dir: dir.path().to_owned(),
        serial_log: SERIAL_LOG,
        qmp_socket: dir.qmp_socket(),
        qemu_arguments: Vec::new(),
    };
    let mut node = LocalNode {
        name: name.to_owned(),
        url: String::new(),
        token: options.token.clone(),
        pid: 0,
        control: if options.bed.is_qemu() { dir.qmp_socket() } else { dir.bochs_lock() },
        bed: options.bed.clone(),
        image,
        memory_mib: options.memory_mib,
    };
    // Before there is anything to record: should this process end now, `stop` still finds what it started.
    dir.write(&node).map_err(LocalError::State)?;
    let result = launch(dir, &machine, &mut node, &mut phase)
        .and_then(|()| await_ready(dir, &mut node, interrupted, phase));
    if result.is_err() {
        // The first error is the one to tell.
        let _ = stop(dir, &node);
    }
    result.map(|()| node)
}

/// Starts the node's emulator, and learns its process and, where it has not ended at once, its URL.
fn launch(
    dir: &NodeDir,
    machine: &Machine,
    node: &mut LocalNode,
    phase: &mut impl FnMut(&str),
) -> Result<(), LocalError> {
    kernel_image::write(&machine.kernel).map_err(LocalError::Files)?;
    if !machine.bed.is_qemu() {
        phase("making the boot disk");
    }
    let program = machine.prepare().map_err(LocalError::Bed)?;
    phase(&format!("starting {}", program.name));
    let port = if machine.bed.is_qemu() {
        node.pid = launch_qemu(dir, &program, machine.network)?;
        node.qmp().and_then(|mut qmp| qmp.forwarded_port()).ok()
    } else {
        let process = launch_bochs(dir, &program)?;
        node.pid = process.id();
        phase("GRUB loads the kernel and the images");
        await_port(dir, node, &program, process)?
    };
    if let Some(port) = port {
        node.url = format!("http://127.0.0.1:{port}");
        dir.write(node).map_err(LocalError::State)?;
    }
    Ok(())
}

/// Refuses what the kernel's command line cannot carry as one word, and what is guessed too easily.
fn check_token(token: &str) -> Result<(), LocalError> {
    let word = token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte));
    if word && TOKEN_LENGTH.contains(&token.len()) { Ok(()) } else { Err(LocalError::Token) }
}

/// Starts QEMU in a session of its own and returns its process. With `-daemonize` the command ends once QEMU has taken
/// hold of all it needs, or says what it could not.
fn launch_qemu(dir: &NodeDir, program: &Program, network: Network) -> Result<u32, LocalError> {
    let refused = |words: String| LocalError::Bed(BedError::Refused(program.name, words));
    let output = Command::new(program.name)
        .args(&program.arguments)
        .arg("-daemonize")
        .arg("-pidfile")
        .arg(dir.pid_file())
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(match network {
                Network::User { port } if words.contains("host forwarding rule") => {
                    LocalError::Bed(BedError::PortTaken(port))
                }
                _ => refused(words),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(LocalError::Bed(BedError::NoQemu));
        }
        Err(error) => return Err(refused(error.to_string())),
    }
    dir.recorded_pid().ok_or_else(|| refused(format!("{} has no process number", dir.pid_file().display())))
}

/// Starts Bochs in a process group of its own, with a locked file as its standard input: it is locked until Bochs ends.
fn launch_bochs(dir: &NodeDir, program: &Program) -> Result<Child, LocalError> {
    // The number is written first, so that what runs can always be found.
    const SCRIPT: &str = r#"pid=$1 output=$2; shift 2; echo $$ >"$pid"; exec "$@" >"$output" 2>&1"#;
    let start = || {
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(dir.bochs_lock())?;
        lock.lock()?;
        program
            .by_script(SCRIPT, dir.path(), &[dir.pid_file().as_os_str(), OUTPUT.as_ref()])
            .stdin(lock)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
    };
    start().map_err(LocalError::Files)
}

/// Waits until Bochs listens on the port it was given; none when its node has switched itself off before.
fn await_port(
    dir: &NodeDir,
    node: &LocalNode,
    program: &Program,
    mut process: Child,
) -> Result<Option<u16>, LocalError> {
    let start = Instant::now();
    let refused = |words: String| Err(LocalError::Bed(BedError::Refused(program.name, words)));
    loop {
        if let Some(port) = program.forwarded_port.filter(|&port| bochs::listens(node.pid, port)) {
            return Ok(Some(port));
        }
        if let Some(status) = process.try_wait().map_err(LocalError::Files)? {
            return match bochs::last_words(dir.path()) {
                words if bochs::switched_off(&words) => Ok(None),
                words if words.is_empty() => refused(format!("it ended without a word ({status})")),
                words => refused(words),
            };
        }
        if start.elapsed() >= START_TIMEOUT {
            return refused("it does not listen on the node's port".to_owned());
        }
        thread::sleep(INTERVAL);
    }
}

/// Waits until the node takes jobs.
fn await_ready(
    dir: &NodeDir,
    node: &mut LocalNode,
    interrupted: impl Fn() -> bool,
    phase: impl FnMut(&str),
) -> Result<(), LocalError> {
    let log = dir.serial_log();
    if node.url.is_empty() {
        let reason = "the node ended as soon as it started".to_owned();
        let serial = ready::tail(&log, ready::TAIL_LINES);
        return Err(LocalError::NotReady { error: NotReady { reason, serial }, log });
    }
    let client = Client::new(&node.url, node.token.as_deref()).map_err(LocalError::Client)?;
    let ended = || {
        if interrupted() {
            Some("interrupted".to_owned())
        } else if node.is_running() {
            None
        } else if node.bed.is_qemu() {
            Some("it switched itself off".to_owned())
        } else {
            let words = bochs::last_words(dir.path());
            Some(match words.as_str() {
                "" => "Bochs was ended".to_owned(),
                words if bochs::switched_off(words) => "it switched itself off".to_owned(),
                words => format!("Bochs says: {words}"),
            })
        }
    };
    let timeout = READY_TIMEOUT * node.bed.slowness();
    ready::wait(&client, &log, timeout, ended, phase).map_err(|error| LocalError::NotReady { error, log })
}

/// Ends a node and forgets it; whether it ran. The caller has locked `dir`.
///
/// # Errors
/// When it can be neither asked nor killed.
pub fn stop(dir: &NodeDir, node: &LocalNode) -> Result<bool, LocalError> {
    let ran = node.is_running();
    if ran {
        // Bochs cannot be asked. QEMU may end before it has answered: what counts is that it does. One that is stopped does
        // not hear.
        let deaf = !node.bed.is_qemu()
            || node
                .qmp()
                .and_then(|mut qmp| qmp.quit())
                .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        if deaf || !ends(node) {
            // Its number is not recorded when the command that started it was ended meanwhile.
            let pid = Some(node.pid).filter(|&pid| pid != 0).or_else(|| dir.recorded_pid());
            let pid = pid.ok_or(LocalError::Lost)?;
            kill(dir, node, pid)?;
            if !ends(node) {
                return Err(LocalError::Stuck(pid));
            }
        }
    }
    dir.forget().map_err(LocalError::State)?;
    Ok(ran)
}

/// Waits until the emulator no longer runs.
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

/// Kills the emulator, after making sure that its process number is still its own: its arguments name files of the node.
fn kill(dir: &NodeDir, node: &LocalNode, pid: u32) -> Result<(), LocalError> {
    let arguments = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
    let file = if node.bed.is_qemu() { node.control.clone() } else { dir.path().join(bochs::CONFIG) };
    let file = file.as_os_str().as_encoded_bytes();
    if !arguments.windows(file.len()).any(|window| window == file) {
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
    /// The emulator, or what was asked of it.
    Bed(BedError),
    /// Not a token.
    Token,
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
            LocalError::Bed(error) => error.fmt(f),
            LocalError::Token => write!(
                f,
                "the token must have {} to {} letters, digits or -._~+/=; leave it out to have one made",
                TOKEN_LENGTH.start(),
                TOKEN_LENGTH.end()
            ),
            LocalError::Client(error) => error.fmt(f),
            LocalError::NotReady { error, log } => {
                write!(f, "{error}\nthe whole log is in {}", log.display())
            }
            LocalError::Lost => {
                f.write_str("the emulator does not end; end it with `kill -KILL`, once you have found it in the output of `ps -ef`")
            }
            LocalError::Stuck(pid) => {
                write!(f, "the emulator (process {pid}) does not end; end it with `kill -KILL {pid}`")
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
