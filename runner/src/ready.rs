//! Waiting for a node that was just started.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::duration::format_ms;

/// How often the node is asked.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long it is given to answer, at first and at last.
const SHORTEST_ANSWER: Duration = Duration::from_millis(50);
const LONGEST_ANSWER: Duration = Duration::from_secs(5);
/// How much of a serial log is read for its last lines.
const TAIL: u64 = 16 << 10;
/// How many of them a message shows.
pub(crate) const TAIL_LINES: usize = 20;
/// What the kernel writes before its reason when it cannot go on. It switches itself off then, where it can.
const REFUSAL: &str = "this node cannot run: ";

/// Waits until the node says it takes jobs. `ended` says how the emulator ended, once it has; `phase` is told what the node is
/// at, each time that changes.
///
/// # Errors
/// [`NotReady`] when it has not after `timeout`, or it ended before.
pub fn wait(
    client: &Client,
    serial_log: &Path,
    timeout: Duration,
    mut ended: impl FnMut() -> Option<String>,
    mut phase: impl FnMut(&str),
) -> Result<(), NotReady> {
    let start = Instant::now();
    let mut shown = String::new();
    let reason = loop {
        // An emulator takes connections before there is a node behind them, and offers them to it again only after seconds:
        // a new one gets through sooner. A busy computer needs longer to answer, and gets longer with every try.
        let patience = (start.elapsed() / 4).clamp(SHORTEST_ANSWER, LONGEST_ANSWER);
        if matches!(client.ready_within(patience), Ok(true)) {
            return Ok(());
        }
        // Asked before the log is read, so that what was written last is still seen.
        let ended = ended();
        if let Some(line) = tail(serial_log, 1).pop().filter(|line| *line != shown) {
            if let Some((_, reason)) = line.split_once(REFUSAL) {
                break format!("the node cannot run here: {reason}");
            }
            phase(without_time(&line));
            shown = line;
        }
        if let Some(how) = ended {
            break format!("the node ended before it was ready ({how})");
        }
        if start.elapsed() >= timeout {
            let waited = format_ms(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
            break format!("the node was not ready after {waited}");
        }
        thread::sleep(INTERVAL);
    };
    Err(NotReady { reason, serial: tail(serial_log, TAIL_LINES) })
}

/// The last `count` lines of a serial log that are not blank, without what a terminal would obey. Empty when there is no
/// log.
pub fn tail(serial_log: &Path, count: usize) -> Vec<String> {
    let text = read_end(serial_log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<String> =
        text.lines().rev().map(printable).filter(|line| !line.trim().is_empty()).take(count).collect();
    lines.reverse();
    lines
}

/// A line of the kernel's log without the time at its start, `[    0.017194] `.
fn without_time(line: &str) -> &str {
    line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, text)| text)
}

fn read_end(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A line of foreign text without control characters: it must not steer the terminal it is shown on.
pub fn printable(line: &str) -> String {
    line.chars().map(|c| if c == '\t' { ' ' } else { c }).filter(|c| !c.is_control()).collect()
}

/// The node did not come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReady {
    /// How it did not.
    pub reason: String,
    /// The last lines of its serial log.
    pub serial: Vec<String>,
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)?;
        if self.serial.iter().any(|line| line.contains(REFUSAL)) {
            // The reason is all there is to tell.
            return Ok(());
        }
        if self.serial.is_empty() {
            return f.write_str("; it wrote nothing to its serial log");
        }
        f.write_str("; the end of its serial log:")?;
        self.serial.iter().try_for_each(|line| write!(f, "\n  | {line}"))
    }
}

impl std::error::Error for NotReady {}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn nowhere() -> Client {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Client::new(&format!("http://127.0.0.1:{port}"), None).unwrap()
    }

    #[test]
    fn a_node_that_ends_is_told_with_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("node.log");
        fs::write(&log, "booting\r\n[    0.012345] no SVM: \x1b[31menable it\x1b[0m\n\n").unwrap();
        let mut phases = Vec::new();
        let mut polls = 0;
        let ended = || {
            polls += 1;
            (polls > 1).then(|| "exit status 0".to_owned())
        };
        let error =
            wait(&nowhere(), &log, Duration::from_secs(60), ended, |phase| phases.push(phase.to_owned()))
                .unwrap_err();
        assert_eq!(error.serial, ["booting", "[    0.012345] no SVM: [31menable it[0m"]);
        assert!(
            error.to_string().starts_with("the node ended before it was ready (exit status 0)"),
            "{error}"
        );
        assert_eq!(phases, ["no SVM: [31menable it[0m"]);
    }

    #[test]
    fn a_node_that_refuses_to_run_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("node.log");
        fs::write(&log, "ERROR this node cannot run: no SVM; enable it in the firmware\n").unwrap();
        let error = wait(&nowhere(), &log, Duration::from_secs(60), || None, |_| {}).unwrap_err();
        assert_eq!(error.to_string(), "the node cannot run here: no SVM; enable it in the firmware");
    }

    #[test]
    fn a_node_that_stays_silent_is_given_up() {
        let error = wait(&nowhere(), Path::new("/nonexistent"), Duration::ZERO, || None, |_| {}).unwrap_err();
        assert!(error.to_string().contains("wrote nothing to its serial log"), "{error}");
    }

    #[test]
    fn the_tail_of_a_long_log_is_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("node.log");
        let text: String = (0..10_000).map(|number| format!("line {number}\n")).collect();
        fs::write(&log, text).unwrap();
        assert_eq!(tail(&log, 2), ["line 9998", "line 9999"]);
    }
}
