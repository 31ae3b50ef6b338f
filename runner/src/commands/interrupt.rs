//! Ctrl-C and its like.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The signals by which users and systems ask a command to end.
const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// The first such signal of this process, or none yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Interrupt(Arc<AtomicI32>);

impl Interrupt {
    /// Runs `first` at the first such signal, on a thread of its own; the second ends the process.
    pub(super) fn watch(first: impl FnOnce() + Send + 'static) -> io::Result<Interrupt> {
        let interrupt = Interrupt::default();
        let shared = interrupt.clone();
        let mut signals = Signals::new(SIGNALS)?;
        thread::spawn(move || {
            let mut first = Some(first);
            for signal in signals.forever() {
                match first.take() {
                    Some(first) => {
                        shared.0.store(signal, Ordering::SeqCst);
                        // Not here, or a node that does not answer would hold up the second signal.
                        thread::spawn(first);
                    }
                    None => std::process::exit(i32::from(exit_code(signal))),
                }
            }
        });
        Ok(interrupt)
    }

    /// The exit code that tells of the signal, when there was one.
    pub(super) fn exit_code(&self) -> Option<u8> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(exit_code(signal)),
        }
    }
}

/// The shell's exit code of a process ended by a signal.
fn exit_code(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}
