//! Where the nodes of this computer are recorded: one directory each in `$XDG_STATE_HOME/nestling` (by default
//! `~/.local/state/nestling`), with the node's kernel, its logs and `node.json`, which only the user can read: it has the token.

use std::env;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bed::qmp::{self, Qmp};
use crate::bed::{BedKind, bochs, qemu};

/// The node commands mean when nobody names one.
pub const DEFAULT_NODE: &str = "local";

/// The name of a node's serial log in its directory.
pub(crate) const SERIAL_LOG: &str = "node.log";

/// Longest name of a node.
const MAX_NAME: usize = 40;
/// Longest path of a Unix socket, less the zero byte at its end (`sun_path` in `unix(7)`).
const MAX_SOCKET_PATH: usize = 107;

/// A node that was started on this computer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalNode {
    /// Its name here.
    pub name: String,
    /// Its URL, without a slash at its end; empty as long as its port is not known.
    pub url: String,
    /// The token it asks for; none when it asks for none.
    pub token: Option<String>,
    /// The emulator's process; 0 as long as it is not known.
    pub pid: u32,
    /// What shows that the emulator runs: QEMU's control socket, or the file that Bochs keeps locked.
    #[serde(alias = "qmp_socket")]
    pub control: PathBuf,
    /// What executes it.
    pub bed: BedKind,
    /// The bundle of images it was started with.
    pub image: PathBuf,
    /// Its memory in MiB.
    pub memory_mib: u32,
}

impl LocalNode {
    /// Whether its emulator still runs: QEMU listens on its control socket until it ends, Bochs keeps its lock.
    pub fn is_running(&self) -> bool {
        if self.bed.is_qemu() { qmp::is_listened_on(&self.control) } else { is_locked(&self.control) }
    }

    /// A connection to its QEMU.
    ///
    /// # Errors
    /// When QEMU has ended or does not answer, or it is no QEMU.
    pub fn qmp(&self) -> io::Result<Qmp> {
        Qmp::connect(&self.control)
    }
}

/// The directory of all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State(PathBuf);

impl State {
    /// The user's.
    ///
    /// # Errors
    /// When neither `XDG_STATE_HOME` nor `HOME` says where.
    pub fn of_user() -> Result<State, StateError> {
        let home = env::var_os("XDG_STATE_HOME")
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
            .or_else(|| Some(env::home_dir()?.join(".local/state")))
            .ok_or(StateError::NoHome)?;
        Ok(State(home.join("nestling")))
    }

    /// The one at a path.
    pub fn at(path: impl Into<PathBuf>) -> State {
        State(path.into())
    }

    /// The place of one node.
    ///
    /// # Errors
    /// When the name is not one: lower-case letters, digits and dashes, the first no dash.
    pub fn node(&self, name: &str) -> Result<NodeDir, StateError> {
        let valid = (1..=MAX_NAME).contains(&name.len())
            && !name.starts_with('-')
            && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if valid { Ok(NodeDir { path: self.0.join(name) }) } else { Err(StateError::Name(name.to_owned())) }
    }

    /// All nodes that run, by name.
    pub fn running(&self) -> Vec<LocalNode> {
        let mut nodes: Vec<LocalNode> = fs::read_dir(&self.0)
            .into_iter()
            .flatten()
            .filter_map(|entry| self.node(entry.ok()?.file_name().to_str()?).ok()?.read().ok()?)
            .filter(LocalNode::is_running)
            .collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }
}

/// One node's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeDir {
    path: PathBuf,
}

impl NodeDir {
    /// Keeps others from starting or stopping this node until the file is dropped. Creates the directory.
    ///
    /// # Errors
    /// When the directory cannot be created or written.
    pub fn lock(&self) -> Result<File, StateError> {
        let lock = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
            let file = OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(false)
                .mode(0o600)
                .open(self.path.join("lock"))?;
            file.lock()?;
            Ok(file)
        };
        lock().map_err(|error| self.failed(error))
    }

    /// What is recorded; none when nothing is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self) -> Result<Option<LocalNode>, StateError> {
        match fs::read(self.record()) {
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(node) => Ok(Some(node)),
                Err(error) => Err(self.failed(io::Error::new(io::ErrorKind::InvalidData, error))),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Records a node, at once or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, node: &LocalNode) -> Result<(), StateError> {
        let write = || {
            let new = self.path.join("node.json.new");
            let text = serde_json::to_string_pretty(node)? + "\n";
            self.write_private("node.json.new", &text)?;
            fs::rename(new, self.record())
        };
        write().map_err(|error| self.failed(error))
    }

    /// Forgets the node; its logs stay until it is started again.
    ///
    /// # Errors
    /// When its emulator still runs, or the files cannot be removed.
    pub fn forget(&self) -> Result<(), StateError> {
        if qmp::is_listened_on(&self.qmp_socket()) || is_locked(&self.bochs_lock()) {
            return Err(StateError::Running { path: self.path.clone(), pid: self.recorded_pid() });
        }
        bochs::remove(&self.path).map_err(|error| self.failed(error))?;
        let config = self.path.join(qemu::CONFIG);
        for path in
            [self.record(), config, self.kernel(), self.qmp_socket(), self.bochs_lock(), self.pid_file()]
        {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.failed(error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Writes a file here that only the user can read.
    ///
    /// # Errors
    /// Those of writing a file.
    pub fn write_private(&self, name: &str, text: &str) -> io::Result<()> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        crate::bed::write_private(&path, text)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The record of the node.
    pub fn record(&self) -> PathBuf {
        self.path.join("node.json")
    }

    /// The node's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.path.join("kernel.elf")
    }

    /// The file that has the emulator's process number.
    pub fn pid_file(&self) -> PathBuf {
        self.path.join("pid")
    }

    /// The process number in that file.
    pub fn recorded_pid(&self) -> Option<u32> {
        fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok()
    }

    /// The node's serial log.
    pub fn serial_log(&self) -> PathBuf {
        self.path.join(SERIAL_LOG)
    }

    /// The file that a Bochs keeps locked as long as it runs.
    pub fn bochs_lock(&self) -> PathBuf {
        self.path.join("bochs.lock")
    }

    /// QEMU's control socket: here, or in the directory for temporary files when the path would be longer than a socket's
    /// may be.
    pub fn qmp_socket(&self) -> PathBuf {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let path = self.path.join("qmp");
        if path.as_os_str().len() <= MAX_SOCKET_PATH {
            return path;
        }
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        env::temp_dir().join(format!("nestling-{:016x}.qmp", hasher.finish()))
    }

    fn failed(&self, error: io::Error) -> StateError {
        StateError::Files { path: self.path.clone(), error }
    }
}

/// Whether a process has the file locked. Nothing is locked that is not there.
fn is_locked(file: &Path) -> bool {
    File::open(file).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// What can go wrong with the records of nodes.
#[derive(Debug)]
pub enum StateError {
    /// No directory to keep them in.
    NoHome,
    /// Not a node's name.
    Name(String),
    /// A file.
    Files {
        /// The node's directory.
        path: PathBuf,
        /// What went wrong in it.
        error: io::Error,
    },
    /// An emulator without a record.
    Running {
        /// The node's directory.
        path: PathBuf,
        /// Its process, if that is known.
        pid: Option<u32>,
    },
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::NoHome => {
                f.write_str("neither XDG_STATE_HOME nor HOME is set; set one, for the node's files")
            }
            StateError::Name(name) => write!(
                f,
                "{name:?} cannot be a node's name; give lower-case letters, digits and dashes, at most {MAX_NAME}, the \
                 first no dash"
            ),
            StateError::Running { path, pid } => {
                write!(f, "an emulator started from {} still runs; end it with ", path.display())?;
                match pid {
                    Some(pid) => write!(f, "`kill -KILL {pid}`"),
                    None => write!(f, "`kill -KILL`, once you have found it in the output of `ps -ef`"),
                }
            }
            StateError::Files { path, error } => write!(f, "the node's files in {}: {error}", path.display()),
        }
    }
}

impl std::error::Error for StateError {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn node(dir: &NodeDir) -> LocalNode {
        LocalNode {
            name: "local".into(),
            url: "http://127.0.0.1:1".into(),
            token: Some("00ff".into()),
            pid: 1,
            control: dir.qmp_socket(),
            bed: BedKind::QemuTcg,
            image: "/minimal.tar".into(),
            memory_mib: 2048,
        }
    }

    #[test]
    fn a_record_is_read_back_and_is_for_the_user_alone() {
        let home = tempfile::tempdir().unwrap();
        let dir = State::at(home.path().join("nestling")).node("local").unwrap();
        let _lock = dir.lock().unwrap();
        assert_eq!(dir.read().unwrap(), None);
        dir.write(&node(&dir)).unwrap();
        dir.write(&node(&dir)).unwrap();
        assert_eq!(dir.read().unwrap(), Some(node(&dir)));
        assert_eq!(fs::metadata(dir.record()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        dir.forget().unwrap();
        assert_eq!(dir.read().unwrap(), None);
        dir.forget().unwrap();
    }

    #[test]
    fn a_node_runs_as_long_as_its_socket_is_listened_on() {
        let home = tempfile::tempdir().unwrap();
        let state = State::at(home.path());
        let dir = state.node("local").unwrap();
        let _lock = dir.lock().unwrap();
        dir.write(&node(&dir)).unwrap();
        assert!(state.running().is_empty());
        let listener = UnixListener::bind(dir.qmp_socket()).unwrap();
        assert_eq!(state.running(), [node(&dir)]);
        drop(listener);
        assert!(state.running().is_empty());
    }

    #[test]
    fn a_node_in_bochs_runs_as_long_as_its_file_is_locked() {
        let home = tempfile::tempdir().unwrap();
        let state = State::at(home.path());
        let dir = state.node("local").unwrap();
        let _lock = dir.lock().unwrap();
        let node = LocalNode { bed: BedKind::bochs(), control: dir.bochs_lock(), ..node(&dir) };
        dir.write(&node).unwrap();
        assert!(state.running().is_empty());
        let file = File::create(dir.bochs_lock()).unwrap();
        assert!(state.running().is_empty());
        file.lock().unwrap();
        assert_eq!(state.running(), [node]);
        assert!(matches!(dir.forget(), Err(StateError::Running { .. })));
        drop(file);
        assert!(state.running().is_empty());
        dir.forget().unwrap();
        assert!(!dir.bochs_lock().exists());
    }

    #[test]
    fn a_record_of_the_release_before_is_understood() {
        let json = r#"{"name": "local", "url": "http://127.0.0.1:1", "token": null, "pid": 1, "qmp_socket": "/s/qmp",
            "bed": "qemu-kvm", "image": "/minimal.tar", "memory_mib": 2048}"#;
        let node: LocalNode = serde_json::from_str(json).unwrap();
        assert_eq!((node.bed, node.control), (BedKind::QemuKvm, PathBuf::from("/s/qmp")));
    }

    #[test]
    fn a_node_that_runs_is_not_forgotten() {
        let home = tempfile::tempdir().unwrap();
        let dir = State::at(home.path()).node("local").unwrap();
        let _lock = dir.lock().unwrap();
        let listener = UnixListener::bind(dir.qmp_socket()).unwrap();
        fs::write(dir.pid_file(), "4711\n").unwrap();
        let error = dir.forget().unwrap_err().to_string();
        assert!(error.contains("still runs") && error.contains("`kill -KILL 4711`"), "{error}");
        drop(listener);
        dir.forget().unwrap();
        assert!(!dir.pid_file().exists() && !dir.qmp_socket().exists());
    }

    #[test]
    fn a_name_that_could_leave_the_directory_is_refused() {
        let state = State::at("/s");
        for name in ["", "..", "a/b", "-x", "A", "a b", "é", &"a".repeat(41)] {
            let error = state.node(name).unwrap_err();
            assert!(error.to_string().contains("lower-case letters"), "{name}: {error}");
        }
        assert_eq!(state.node("ci-1").unwrap().path(), Path::new("/s/ci-1"));
    }

    #[test]
    fn a_socket_path_too_long_for_the_system_moves_to_the_temporary_directory() {
        let short = State::at("/s").node("a").unwrap().qmp_socket();
        assert_eq!(short, Path::new("/s/a/qmp"));
        let long = State::at(format!("/{}", "s".repeat(120)));
        let (one, two) = (long.node("a").unwrap().qmp_socket(), long.node("b").unwrap().qmp_socket());
        assert!(one.as_os_str().len() <= MAX_SOCKET_PATH && one.starts_with(env::temp_dir()));
        assert_ne!(one, two);
    }
}
