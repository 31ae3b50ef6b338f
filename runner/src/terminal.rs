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

    /// Shows how far something of so many bytes is, until [`Progress::end_transfer`].
    pub(crate) fn begin_transfer(&self, text: &str, bytes: u64) -> Transfer {
        match &self.bar {
            Some(bar) if !bar.is_finished() => {
                bar.set_style(transfer());
                bar.set_length(bytes);
                bar.set_position(0);
                bar.set_message(text.to_owned());
            }
            Some(_) => {}
            None => self.say(text),
        }
        Transfer(self.bar.clone())
    }

    /// The transfer is over; phases are shown again.
    pub(crate) fn end_transfer(&self) {
        if let Some(bar) = &self.bar {
            bar.set_style(spinner());
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

/// Something that is on its way.
#[derive(Debug)]
pub(crate) struct Transfer(Option<ProgressBar>);

impl Transfer {
    /// So many bytes more have gone.
    pub(crate) fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn transfer() -> ProgressStyle {
    let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {bytes}/{total_bytes} {elapsed}");
    style.unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn spinner() -> ProgressStyle {
    // `wide_msg` cuts what is longer than the line.
    ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}
