//! A job's output to its end, over as many connections as it takes.

use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nestling::client::types::{Job, Status};
use nestling::client::{ClientError, LogFrame, Stream, Streams};
use nestling::ready;
use nestling::state::State;

use super::target::Target;

/// How long a node may be out of reach.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first pause between two tries; each is twice the one before, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Lines of its serial log shown when a node of this computer ended.
const TAIL_LINES: usize = 20;

#[cfg(test)]
#[path = "../../tests/fake/mod.rs"]
#[allow(dead_code, reason = "the command's own tests use more of it")]
mod fake;

/// What the log is handed to.
pub(super) trait Sink {
    /// Output of the job.
    fn output(&mut self, stream: Stream, data: &[u8]) -> io::Result<()>;
    /// So many bytes of output are no longer there.
    fn dropped(&mut self, bytes: u64) -> io::Result<()>;
    /// A remark for the user.
    fn remark(&mut self, text: &str);
}

/// Hands over the output of the job from its beginning until the job is over, and returns the job then. A connection that
/// breaks is made again and goes on where it broke.
pub(super) fn follow(target: &Target, id: &str, sink: &mut dyn Sink) -> Result<Job> {
    let mut follower = Follower { target, id, offset: 0, trouble: None, ended_early: false };
    loop {
        match follower.attempt(sink) {
            Ok(Some(job)) => return Ok(job),
            Ok(None) => thread::sleep(FIRST_PAUSE),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(error)) => follower.pause(error, sink)?,
        }
    }
}

/// What was read so far and how it goes.
struct Follower<'a> {
    target: &'a Target,
    id: &'a str,
    offset: u64,
    /// Since when the node is out of reach, and the next pause.
    trouble: Option<(Instant, Duration)>,
    /// Whether the last log of the completed job ended before the job's last byte.
    ended_early: bool,
}

enum Failure {
    /// Worth another try.
    Passing(anyhow::Error),
    Final(anyhow::Error),
}

impl Follower<'_> {
    /// Reads one connection's worth. The job, once all of it was read.
    fn attempt(&mut self, sink: &mut dyn Sink) -> Result<Option<Job>, Failure> {
        let client = &self.target.client;
        let mut log = client.log_stream(self.id, Streams::Both, self.offset, true).map_err(classify)?;
        let before = self.offset;
        loop {
            let frame = match log.next_frame() {
                Ok(frame) => frame,
                // The job may just be quiet, which a new connection tells from a node that is gone.
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
                Err(error) => return Err(Failure::Passing(anyhow!("the log broke off: {error}"))),
            };
            let written = match &frame {
                Some(LogFrame::Output(stream, data)) => sink.output(*stream, data),
                Some(LogFrame::Dropped(bytes)) => sink.dropped(*bytes),
                None => break,
            };
            written.map_err(|error| Failure::Final(error.into()))?;
            self.offset = log.offset();
            self.trouble = None;
        }
        let job = client.job(self.id).map_err(classify)?;
        self.trouble = None;
        if job.status != Status::Completed {
            return Ok(None);
        }
        // A log that twice ends early will not become longer.
        let complete = self.offset >= job.log.bytes || (self.ended_early && self.offset == before);
        self.ended_early = true;
        Ok(complete.then_some(job))
    }

    /// Waits before another try, unless there is no point in one.
    fn pause(&mut self, error: anyhow::Error, sink: &mut dyn Sink) -> Result<()> {
        if let Some(local) = self.target.local.as_ref().filter(|local| !local.is_running()) {
            let mut text = format!("the node {} ended while the job ran", local.name);
            if let Ok(dir) = State::of_user().and_then(|state| state.node(&local.name)) {
                let tail = ready::tail(&dir.serial_log(), TAIL_LINES);
                tail.iter().for_each(|line| {
                    text.push_str("\n  | ");
                    text.push_str(line);
                });
            }
            return Err(anyhow!(text));
        }
        let (since, pause) = *self.trouble.get_or_insert_with(|| {
            sink.remark(&format!("{error:#}; trying again"));
            (Instant::now(), FIRST_PAUSE)
        });
        if since.elapsed() >= PATIENCE {
            return Err(error.context(format!("the node was out of reach for {} s", PATIENCE.as_secs())));
        }
        thread::sleep(pause);
        self.trouble = Some((since, (pause * 2).min(LONGEST_PAUSE)));
        Ok(())
    }
}

/// Whether another try may help.
fn classify(error: ClientError) -> Failure {
    let passing = matches!(error, ClientError::Unreachable { .. }) || error.status() == Some(503);
    if passing { Failure::Passing(error.into()) } else { Failure::Final(error.into()) }
}

/// Passes a job's two outputs on to ours.
#[derive(Debug)]
pub(super) struct Outputs {
    /// Whether to pass on the standard output.
    pub(super) stdout: bool,
    /// Whether to pass on the standard error.
    pub(super) stderr: bool,
}

impl Outputs {
    /// Writes what came from one of the job's outputs.
    pub(super) fn write(&self, stream: Stream, data: &[u8]) -> io::Result<()> {
        match stream {
            Stream::Stdout if self.stdout => write_all(&mut io::stdout().lock(), data),
            Stream::Stderr if self.stderr => write_all(&mut io::stderr().lock(), data),
            _ => Ok(()),
        }
    }
}

impl Sink for Outputs {
    fn output(&mut self, stream: Stream, data: &[u8]) -> io::Result<()> {
        self.write(stream, data)
    }

    fn dropped(&mut self, bytes: u64) -> io::Result<()> {
        self.remark(&dropped(bytes));
        Ok(())
    }

    fn remark(&mut self, text: &str) {
        crate::terminal::say(text);
    }
}

/// The remark for output that is gone.
pub(super) fn dropped(bytes: u64) -> String {
    format!("{bytes} bytes of earlier output are no longer on the node")
}

fn write_all(to: &mut dyn Write, data: &[u8]) -> io::Result<()> {
    to.write_all(data)?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use nestling::client::Client;
    use nestling::client::types::{JobRequest, StepRequest};

    use super::fake::{FakeNode, TOKEN};
    use super::*;

    /// Keeps what it is handed.
    #[derive(Default)]
    struct Kept {
        output: Vec<u8>,
        remarks: Vec<String>,
    }

    impl Sink for Kept {
        fn output(&mut self, _: Stream, data: &[u8]) -> io::Result<()> {
            self.output.extend_from_slice(data);
            Ok(())
        }

        fn dropped(&mut self, bytes: u64) -> io::Result<()> {
            self.remark(&dropped(bytes));
            Ok(())
        }

        fn remark(&mut self, text: &str) {
            self.remarks.push(text.to_owned());
        }
    }

    #[test]
    fn a_job_that_is_quiet_for_longer_than_a_connection_lasts_is_followed_to_its_end() {
        let node = FakeNode::start();
        let client =
            Client::new(node.url(), Some(TOKEN)).unwrap().with_silence_limit(Duration::from_millis(700));
        let step = StepRequest { run: "echo one; sleep 2; echo two".to_owned(), ..StepRequest::default() };
        let id = client.create_job(&JobRequest { steps: vec![step], ..JobRequest::default() }).unwrap().id;
        let mut kept = Kept::default();
        let job = follow(&Target { client, local: None }, &id, &mut kept).unwrap();
        assert_eq!((kept.output.as_slice(), job.status), (b"one\ntwo\n".as_slice(), Status::Completed));
        assert_eq!(kept.remarks, [] as [&str; 0]);
    }
}
