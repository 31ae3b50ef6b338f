//! What the user sees on standard error: phases and remarks; and writing to standard output without dying of a closed pipe.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Writes a line to standard error. That nobody reads it is no failure.
pub(crate) fn say(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "nestling: {text}");
}

/// Writes to standard output.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Shows what is going on: a spinner on a terminal, else a line for each phase.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    /// Shows nothing yet; and never anything when `quiet`.
    pub(crate) fn new(quiet: bool) -> Progress {
        let terminal =
            io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = (terminal && !quiet).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(spinner());
            bar
        });
        Progress { bar, quiet }
    }

    /// Whether there is somebody to look at phases that change often.
    pub(crate) fn is_live(&self) -> bool {
        self.bar.as_ref().is_some_and(|bar| !bar.is_finished())
    }

    /// Shows what is going on now.
    pub(crate) fn phase(&self, text: &str) {
        match &self.bar {
            Some(bar) if !bar.is_finished() => {
                bar.set_message(text.to_owned());
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            Some(_) => {}
            None => self.say(text),
        }
    }

    /// Writes a line that stays.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    /// Removes the spinner for good.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn spinner() -> ProgressStyle {
    // `wide_msg` cuts what is longer than the line.
    ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}
