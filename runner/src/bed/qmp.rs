//! QEMU's machine protocol: JSON lines over a Unix socket. Read "QEMU Machine Protocol Specification" first.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

/// Longest line taken from QEMU.
const MAX_LINE: u64 = 1 << 20;

/// How long QEMU may take to accept a connection, and for each answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a connection is tried meanwhile.
const INTERVAL: Duration = Duration::from_millis(20);

/// Whether a process listens on the socket. It may be stopped, or too busy to accept: this never waits for it.
pub fn is_listened_on(socket: &Path) -> bool {
    matches!(try_connect(socket), Ok(_) | Err(Errno::AGAIN))
}

/// A connection in blocking mode, without waiting for it: [`Errno::AGAIN`] while as many wait as the listener lets.
fn try_connect(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(stream)
}

/// A connection to a QEMU, ready for commands. QEMU serves one at a time.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and gets past the greeting.
    ///
    /// # Errors
    /// When nothing listens there, or what does is not QEMU, or neither accepts nor says anything for 10 s: then the kind is
    /// [`io::ErrorKind::WouldBlock`].
    pub fn connect(socket: &Path) -> io::Result<Qmp> {
        Qmp::connect_within(socket, PATIENCE)
    }

    fn connect_within(socket: &Path, patience: Duration) -> io::Result<Qmp> {
        let start = Instant::now();
        let stream = loop {
            match try_connect(socket) {
                Ok(stream) => break stream,
                Err(Errno::AGAIN) if start.elapsed() < patience => thread::sleep(INTERVAL),
                Err(error) => return Err(error.into()),
            }
        };
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let mut qmp = Qmp { reader: BufReader::new(stream.try_clone()?), stream };
        if qmp.line()?.get("QMP").is_none() {
            return Err(invalid("no QMP greeting"));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Executes one command and returns its answer. Events that arrive meanwhile are dropped.
    ///
    /// # Errors
    /// When QEMU refuses the command (with its own words) or the connection breaks.
    pub fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(io::Error::other(format!("QEMU refused {command}: {reason}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Executes one command of QEMU's human monitor and returns what it prints.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn human(&mut self, command: &str) -> io::Result<String> {
        let answer = self.execute("human-monitor-command", json!({"command-line": command}))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// The port of this computer that leads to the node, as QEMU chose or was told.
    ///
    /// # Errors
    /// When QEMU forwards no port, or the connection breaks.
    pub fn forwarded_port(&mut self) -> io::Result<u16> {
        forwarded_port(&self.human("info usernet")?)
            .ok_or_else(|| invalid("QEMU forwards no port to the node"))
    }

    /// Ends QEMU, and L1 with it.
    ///
    /// # Errors
    /// When the connection breaks before QEMU has taken the command.
    pub fn quit(&mut self) -> io::Result<()> {
        self.execute("quit", json!({})).map(drop)
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        (&mut self.reader).take(MAX_LINE).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU closed its control socket"));
        }
        serde_json::from_slice(&line).map_err(|_| invalid("a line that is not JSON"))
    }
}

/// Finds the local port in the table of `info usernet`:
/// ```text
///   Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
///   TCP[HOST_FORWARD]   3       127.0.0.1 42381       10.0.2.15  8080     0     0
/// ```
fn forwarded_port(table: &str) -> Option<u16> {
    let row = table.lines().find_map(|line| line.trim_start().strip_prefix("TCP[HOST_FORWARD]"))?;
    row.split_whitespace().nth(2)?.parse().ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Plays QEMU: says `lines`, each after a line was received (the greeting at once).
    fn play(lines: &'static [&'static str]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for (index, line) in lines.iter().enumerate() {
                if index > 0 {
                    reader.read_line(&mut String::new()).unwrap();
                }
                stream.write_all(line.as_bytes()).unwrap();
            }
        });
        (dir, path)
    }

    #[test]
    fn an_answer_is_found_behind_events() {
        let (_dir, path) = play(&[
            "{\"QMP\":{}}\n",
            "{\"return\":{}}\n",
            "{\"event\":\"RESUME\"}\n{\"return\":{\"status\":\"running\"}}\n",
        ]);
        let answer = Qmp::connect(&path).unwrap().execute("query-status", json!({})).unwrap();
        assert_eq!(answer, json!({"status": "running"}));
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let (_dir, path) =
            play(&["{\"QMP\":{}}\n", "{\"return\":{}}\n", "{\"error\":{\"desc\":\"no such thing\"}}\n"]);
        let error = Qmp::connect(&path).unwrap().execute("fly", json!({})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused fly: no such thing");
    }

    #[test]
    fn what_is_not_qemu_is_refused() {
        for words in [&["hello\n"] as &[&str], &["{}\n"], &["{\"QMP\":{}}"], &[]] {
            let (_dir, path) = play(Box::leak(words.to_vec().into_boxed_slice()));
            assert!(Qmp::connect(&path).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_qemu_that_is_stopped_listens_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        assert!(!is_listened_on(&path));
        let listener = UnixListener::bind(&path).unwrap();
        // As QEMU does: a stopped one soon has as many waiting as it lets.
        rustix::net::listen(&listener, 1).unwrap();
        let patience = Duration::from_millis(50);
        let silent = Qmp::connect_within(&path, patience).unwrap_err();
        assert_eq!(silent.kind(), io::ErrorKind::WouldBlock, "{silent}");
        let mut waiting = Vec::new();
        let full = loop {
            match try_connect(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(full, Errno::AGAIN);
        assert!(is_listened_on(&path));
        let full = Qmp::connect_within(&path, patience).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
        drop(listener);
        assert!(!is_listened_on(&path));
    }

    #[test]
    fn the_port_is_read_from_the_table_of_forwards() {
        let table = "Hub -1 (n0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                     TCP[HOST_FORWARD]   3       127.0.0.1 42381       10.0.2.15  8080     0     0\r\n";
        assert_eq!(forwarded_port(table), Some(42381));
        assert_eq!(forwarded_port("Hub -1 (n0):\r\n"), None);
        assert_eq!(forwarded_port("TCP[HOST_FORWARD] x"), None);
    }
}
