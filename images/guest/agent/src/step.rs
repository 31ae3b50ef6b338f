//! One step: a shell running a script in a session of its own, its two pipes, and its clocks.
//!
//! A step is over when its shell has ended and both pipes are at their end. Processes it left in the background may hold the
//! pipes open: they get [`GRACE`], and everything written before the shell ended is passed on in any case. They live on, so that
//! a step can start a server for the next one; only a step that ran out of time or was cancelled takes its group along.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nestling_api::agent::{Kind, RunStep, StepCompleted};
use nix::libc;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, setsid};

use crate::connection::{Connection, Forwarded, never_block};
use crate::settings::Settings;
use crate::signals::Ending;

/// How long background processes may hold a step's output open after its shell has ended.
const GRACE: Duration = Duration::from_secs(2);
/// From SIGTERM to SIGKILL.
const TERMINATION: Duration = Duration::from_millis(2500);

mod ioctl {
    nix::ioctl_read_bad!(bytes_readable, nix::libc::FIONREAD, nix::libc::c_int);
}

/// One of a step's output pipes.
struct Output {
    kind: Kind,
    /// None at its end.
    pipe: Option<OwnedFd>,
    /// Bytes that were in the pipe when the shell ended and are still to be passed on.
    owed: usize,
}

/// A running step.
pub(crate) struct Step {
    index: u32,
    shell: Pid,
    outputs: [Output; 2],
    timeout_at: Option<Instant>,
    kill_at: Option<Instant>,
    grace_until: Option<Instant>,
    ending: Option<Ending>,
    timed_out: bool,
    stopped: bool,
}

impl Step {
    /// Starts a step. The error says what went wrong, for the step's log.
    pub(crate) fn start(request: &RunStep, settings: &Settings, now: Instant) -> Result<Self, String> {
        fs::create_dir_all(&settings.scripts)
            .map_err(|error| format!("cannot create {}: {error}", settings.scripts.display()))?;
        let script = settings.scripts.join(format!("step-{}.sh", request.index));
        write_anew(&script, request.run.as_bytes())
            .map_err(|error| format!("cannot write the script to {}: {error}", script.display()))?;
        let folder =
            request.working_directory.as_ref().map_or(settings.work.as_path(), |folder| folder.as_ref());
        if !folder.is_dir() {
            return Err(format!("the working directory {} does not exist", folder.display()));
        }

        let mut command = Command::new("/bin/sh");
        command.arg("-e").arg(&script).current_dir(folder);
        let of_image = settings.environment.iter().map(|(name, value)| (name, value));
        command.env_clear().envs(base_environment(settings)).envs(of_image).envs(&request.env);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: the closure runs in the child between fork and exec; the agent has one thread, so no lock is held there.
        unsafe { command.pre_exec(become_a_step) };
        let mut child = command.spawn().map_err(|error| format!("cannot run /bin/sh: {error}"))?;
        let (stdout, stderr) =
            (child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from));
        for pipe in [&stdout, &stderr].into_iter().flatten() {
            never_block(pipe).map_err(|error| format!("cannot read the output: {error}"))?;
        }
        let timeout = request.timeout_seconds.map(|seconds| Duration::from_secs(seconds.into()));
        Ok(Self {
            index: request.index,
            shell: Pid::from_raw(child.id().cast_signed()),
            outputs: [
                Output { kind: Kind::Stdout, pipe: stdout, owed: 0 },
                Output { kind: Kind::Stderr, pipe: stderr, owed: 0 },
            ],
            timeout_at: timeout.and_then(|timeout| now.checked_add(timeout)),
            kill_at: None,
            grace_until: None,
            ending: None,
            timed_out: false,
            stopped: false,
        })
    }

    /// The pipes that are still open: stdout, stderr.
    pub(crate) fn pipes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.outputs.iter().filter_map(|output| output.pipe.as_ref()).map(AsFd::as_fd)
    }

    /// Passes on what is in the pipes, as long as the connection has room.
    pub(crate) fn forward(&mut self, connection: &mut Connection) {
        for output in &mut self.outputs {
            let Some(pipe) = &output.pipe else { continue };
            match connection.forward(output.kind, pipe.as_fd()) {
                Forwarded::Bytes(len) => output.owed = output.owed.saturating_sub(len),
                Forwarded::Nothing => {}
                Forwarded::End => (output.pipe, output.owed) = (None, 0),
            }
        }
    }

    /// Takes note of the end of a process, if it is this step's shell.
    pub(crate) fn process_ended(&mut self, pid: i32, ending: Ending, now: Instant) {
        if pid != self.shell.as_raw() || self.ending.is_some() {
            return;
        }
        self.ending = Some(ending);
        self.timeout_at = None;
        self.grace_until = now.checked_add(GRACE);
        for output in &mut self.outputs {
            output.owed = output.pipe.as_ref().map_or(0, readable);
        }
    }

    /// Ends the step: SIGTERM to its group now, SIGKILL after [`TERMINATION`].
    pub(crate) fn stop(&mut self, now: Instant) {
        if !self.stopped {
            self.stopped = true;
            self.kill_at = now.checked_add(TERMINATION);
            self.signal(Signal::SIGTERM);
        }
    }

    /// Kills what is left of the step's group.
    pub(crate) fn kill(&mut self) {
        self.kill_at = None;
        self.signal(Signal::SIGKILL);
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.timeout_at.is_some_and(|at| now >= at) {
            self.timeout_at = None;
            // A cancelled step was not ended by its timeout.
            self.timed_out = !self.stopped;
            self.stop(now);
        }
        if self.kill_at.is_some_and(|at| now >= at) {
            self.kill();
        }
    }

    /// When [`Step::tick`] or [`Step::completed`] has something to do next, if no pipe or signal comes first.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let grace = self.grace_until.filter(|_| self.kill_at.is_none() && self.owes_nothing());
        [self.timeout_at, self.kill_at, grace].into_iter().flatten().min()
    }

    /// The step's result, once it is over; then also takes along what is left of a stopped step.
    pub(crate) fn completed(&mut self, now: Instant) -> Option<StepCompleted> {
        let ending = self.ending?;
        let at_end = self.outputs.iter().all(|output| output.pipe.is_none());
        let waited = self.kill_at.is_none() && self.grace_until.is_none_or(|until| now >= until);
        if !(at_end || waited && self.owes_nothing()) {
            return None;
        }
        if self.stopped {
            self.kill();
        }
        let (exit_code, signal) = match ending {
            Ending::Exited(code) => (Some(code), None),
            Ending::Killed(signal) => (None, Some(signal)),
        };
        Some(StepCompleted { index: self.index, exit_code, signal, timed_out: self.timed_out })
    }

    /// The pipes that background processes still hold.
    pub(crate) fn into_held_pipes(self) -> impl Iterator<Item = OwnedFd> {
        self.outputs.into_iter().filter_map(|output| output.pipe)
    }

    fn owes_nothing(&self) -> bool {
        self.outputs.iter().all(|output| output.owed == 0)
    }

    fn signal(&self, signal: Signal) {
        // The group may be gone already, which is what was wanted.
        let _ = killpg(self.shell, signal);
    }
}

/// Writes a file that is the agent's own, whatever an earlier step has put in its place: opening a FIFO would block PID 1, and
/// a link would lead it elsewhere.
fn write_anew(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?
        .write_all(bytes)
}

/// Bytes that can be read from `pipe` now.
fn readable(pipe: &OwnedFd) -> usize {
    use std::os::fd::AsRawFd;
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the pointer, which is valid for the call; the descriptor is open.
    let asked = unsafe { ioctl::bytes_readable(pipe.as_raw_fd(), &raw mut bytes) };
    asked.ok().and_then(|_| usize::try_from(bytes).ok()).unwrap_or(0)
}

/// Makes the forked child a step: a session of its own, no blocked signals, ordinary to the OOM killer.
fn become_a_step() -> io::Result<()> {
    setsid()?;
    SigSet::empty().thread_set_mask()?;
    // Without /proc, or with a stricter parent, the step runs all the same.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    Ok(())
}

/// The environment every step starts from.
fn base_environment(settings: &Settings) -> [(&'static str, &str); 6] {
    [
        ("CI", "true"),
        ("HOME", &settings.home),
        ("LOGNAME", "root"),
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("SHELL", "/bin/sh"),
        ("USER", "root"),
    ]
}
