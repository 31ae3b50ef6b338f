//! The conversation with the node: one loop over the connection, the running step's pipes, signals and clocks.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nestling_api::agent::{AgentMessage, Hello, HostMessage, PROTOCOL, RunStep, StepCompleted, StepStarted};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::connection::Connection;
use crate::files::Files;
use crate::settings::Settings;
use crate::signals::{Request, Signals, reap};
use crate::step::Step;
use crate::system;

/// The exit code of a step whose shell could not be started (the shell's own code for "found but cannot be run").
const CANNOT_START: i32 = 126;
/// Most pipes of earlier steps that are kept open for processes in the background.
const MAX_HELD: usize = 256;

/// Serves the node until it closes the connection.
///
/// # Errors
/// Why the agent cannot go on.
pub(crate) fn serve(
    connection: &mut Connection,
    signals: &Signals,
    settings: &Settings,
) -> Result<(), String> {
    connection.say(&AgentMessage::Hello(hello()))?;
    let files = Files::new(settings.work.clone());
    let mut agent = Agent { connection, settings, step: None, held: VecDeque::new(), files };
    let ended = agent.converse(signals);
    if let Some(step) = &mut agent.step {
        step.kill();
    }
    ended
}

/// What [`Agent::wait`] found.
#[derive(Default)]
struct Ready {
    signals: bool,
    node: bool,
    output: bool,
}

struct Agent<'a> {
    connection: &'a mut Connection,
    settings: &'a Settings,
    step: Option<Step>,
    /// Pipes of earlier steps, read into nothing so that what runs in the background does not block on them.
    held: VecDeque<OwnedFd>,
    files: Files,
}

impl Agent<'_> {
    /// Does what the node asks until it hangs up.
    fn converse(&mut self, signals: &Signals) -> Result<(), String> {
        loop {
            if self.connection.send().is_err() {
                return Ok(());
            }
            let ready = self.wait(signals)?;
            if ready.signals {
                self.take_signals(signals);
            }
            if ready.node && !self.connection.receive() {
                return Ok(());
            }
            while let Some(message) = self.connection.next_message()? {
                self.obey(message)?;
            }
            self.advance(ready.output)?;
        }
    }

    /// Waits until something can be done.
    fn wait(&mut self, signals: &Signals) -> Result<Ready, String> {
        let drained = self.connection.is_drained();
        let node = if drained { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        let mut polled =
            vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(self.connection.as_fd(), node)];
        let pipes = self.step.iter().filter(|_| drained).flat_map(Step::pipes);
        polled.extend(pipes.map(|pipe| PollFd::new(pipe, PollFlags::POLLIN)));
        let first_held = polled.len();
        polled.extend(self.held.iter().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));

        let deadline = self.step.as_ref().and_then(Step::next_deadline);
        let timeout = match deadline {
            // Files are always ready to be read.
            _ if drained && self.files.is_sending() => PollTimeout::ZERO,
            deadline => deadline.map_or(PollTimeout::NONE, timeout_until),
        };
        match poll(&mut polled, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(error) => return Err(format!("cannot wait for events: {error}")),
        }
        let came = |place: usize| polled.get(place).and_then(PollFd::any).unwrap_or(true);
        let ready = Ready {
            signals: came(0),
            node: polled
                .get(1)
                .and_then(PollFd::revents)
                .is_none_or(|events| events.intersects(!PollFlags::POLLOUT)),
            output: (2..first_held).any(came),
        };
        let mut held = (first_held..polled.len()).map(came).collect::<VecDeque<_>>();
        self.held.retain(|pipe| !held.pop_front().unwrap_or(false) || discard(pipe));
        Ok(ready)
    }

    fn take_signals(&mut self, signals: &Signals) {
        match signals.take() {
            Some(Request::PowerOff) => system::power_off(),
            Some(Request::Restart) => system::restart(),
            None => {}
        }
        let now = Instant::now();
        while let Some((pid, ending)) = reap() {
            if let Some(step) = &mut self.step {
                step.process_ended(pid, ending, now);
            }
        }
    }

    fn obey(&mut self, message: HostMessage) -> Result<(), String> {
        let Some(message) = self.files.obey(message, self.connection)? else { return Ok(()) };
        match message {
            HostMessage::Identity(identity) => system::take_on(&identity),
            HostMessage::RunStep(request) if self.step.is_some() => {
                Err(format!("the node asked for step {} while another one runs", request.index))
            }
            HostMessage::RunStep(request) => self.start(&request),
            // The step may have ended while the node's word was on its way.
            HostMessage::CancelStep => {
                if let Some(step) = &mut self.step {
                    step.stop(Instant::now());
                }
                Ok(())
            }
            // What is about files has been done.
            _ => Ok(()),
        }
    }

    fn start(&mut self, request: &RunStep) -> Result<(), String> {
        let index = request.index;
        self.connection.say(&AgentMessage::StepStarted(StepStarted { index }))?;
        match Step::start(request, self.settings, Instant::now()) {
            Ok(step) => self.step = Some(step),
            Err(message) => {
                self.connection.say(&AgentMessage::Stderr(format!("nestling-agent: {message}\n").into()))?;
                let (exit_code, signal, timed_out) = (Some(CANNOT_START), None, false);
                let completed = StepCompleted { index, exit_code, signal, timed_out };
                self.connection.say(&AgentMessage::StepCompleted(completed))?;
            }
        }
        Ok(())
    }

    /// Moves the running step on: its output, its clocks, its end.
    fn advance(&mut self, output: bool) -> Result<(), String> {
        if self.connection.is_drained() {
            self.files.advance(self.connection)?;
        }
        let Some(step) = &mut self.step else { return Ok(()) };
        if output && self.connection.is_drained() {
            step.forward(self.connection);
        }
        let now = Instant::now();
        step.tick(now);
        let Some(completed) = step.completed(now) else { return Ok(()) };
        self.held.extend(self.step.take().into_iter().flat_map(Step::into_held_pipes));
        while self.held.len() > MAX_HELD {
            self.held.pop_front();
        }
        self.connection.say(&AgentMessage::StepCompleted(completed))
    }
}

fn hello() -> Hello {
    let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    Hello {
        protocol: PROTOCOL,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel.unwrap_or_default(),
    }
}

/// Reads from a pipe nobody listens to any more; false at its end.
fn discard(pipe: &OwnedFd) -> bool {
    let mut bytes = [0; 4096];
    !matches!(nix::unistd::read(pipe, &mut bytes), Ok(0))
}

/// Milliseconds until `deadline`, rounded up so that it has passed when the wait ends.
fn timeout_until(deadline: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(Instant::now()).as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}
