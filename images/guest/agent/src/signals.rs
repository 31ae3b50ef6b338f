//! Signals as a file descriptor, and the reaping of every child.
//!
//! The agent is the parent of every orphan in its machine (as PID 1 or as a child subreaper), so it waits for any child; the
//! running step is told its own end.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

/// What the signals that came ask of the agent, besides reaping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Turn the machine off (`poweroff` and `halt` of busybox send SIGUSR2 and SIGUSR1 to PID 1).
    PowerOff,
    /// Restart the machine (`reboot` of busybox sends SIGTERM to PID 1).
    Restart,
}

/// The signals the agent listens to; blocked for this process from now on.
pub(crate) struct Signals {
    descriptor: SignalFd,
}

impl Signals {
    /// Listens for the end of children and, if `init`, for the requests PID 1 gets.
    pub(crate) fn new(init: bool) -> Result<Self, Errno> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        if init {
            for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR]
            {
                set.add(signal);
            }
        }
        set.thread_block()?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { descriptor })
    }

    /// Takes the signals that came.
    pub(crate) fn take(&self) -> Option<Request> {
        let mut request = None;
        while let Ok(Some(signal)) = self.descriptor.read_signal() {
            request = match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGUSR1 | Signal::SIGUSR2 | Signal::SIGPWR)) => Some(Request::PowerOff),
                Ok(Ok(Signal::SIGTERM | Signal::SIGINT)) => Some(Request::Restart),
                _ => request,
            };
        }
        request
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Waits for one child that has ended: its process id and how it ended; `None` when none has.
pub(crate) fn reap() -> Option<(i32, Ending)> {
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int to the pointer, which is valid for the call. nix's wrapper is not used because
        // it loses the status of a child killed by a real-time signal.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid > 0 && libc::WIFEXITED(status) {
            return Some((pid, Ending::Exited(libc::WEXITSTATUS(status))));
        }
        if pid > 0 && libc::WIFSIGNALED(status) {
            return Some((pid, Ending::Killed(libc::WTERMSIG(status))));
        }
        if pid == 0 || (pid < 0 && Errno::last() != Errno::EINTR) {
            return None;
        }
    }
}
