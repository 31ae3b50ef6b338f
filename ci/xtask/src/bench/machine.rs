//! A QEMU process under measurement: its serial output with the time at which each line arrived, seen from outside.
//!
//! Clocks inside an emulated machine drift, so every figure of the benchmark is taken by this process's clock.

use crate::process::shown;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// What arrived on the serial port.
enum Event {
    /// The first byte of all.
    FirstByte,
    /// A line, without its end.
    Line(String),
}

/// A running QEMU; killed when dropped.
pub(super) struct Machine {
    child: Child,
    events: Receiver<(Instant, Event)>,
    /// When QEMU was started.
    pub(super) started: Instant,
    /// When the first byte arrived on the serial port.
    pub(super) first_byte: Option<Instant>,
    log: String,
}

impl Machine {
    /// QEMU as both sides use it: one emulated core with SVM, the serial port on standard output.
    pub(super) fn qemu(memory_mib: u32) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max,-la57", "-smp", "1"]);
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ]);
        command.args(["-m", &memory_mib.to_string()]);
        command
    }

    /// Starts `command` and watches its output.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start `{}`", shown(&command)))?;
        let mut output = child.stdout.take().context("QEMU has no standard output")?;
        let (sender, events) = channel();
        std::thread::spawn(move || {
            let (mut buffer, mut line, mut first) = ([0; 4096], Vec::new(), true);
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                let now = Instant::now();
                if std::mem::take(&mut first) {
                    let _ = sender.send((now, Event::FirstByte));
                }
                for &byte in &buffer[..count] {
                    match byte {
                        b'\n' => {
                            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                            line.clear();
                            if sender.send((now, Event::Line(text))).is_err() {
                                return;
                            }
                        }
                        byte => line.push(byte),
                    }
                }
            }
        });
        Ok(Self { child, events, started, first_byte: None, log: String::new() })
    }

    /// The next line and when it arrived; an error with the log's tail when QEMU ends or `limit` passes without one.
    pub(super) fn next_line(&mut self, limit: Duration) -> Result<(Instant, String)> {
        let until = Instant::now() + limit;
        loop {
            match self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((at, Event::FirstByte)) => self.first_byte = Some(at),
                Ok((at, Event::Line(line))) => {
                    self.log.push_str(&line);
                    self.log.push('\n');
                    return Ok((at, line));
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "nothing arrived on the serial port for {} s; its last lines:\n{}",
                        limit.as_secs(),
                        self.tail()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU ended early; its last lines:\n{}", self.tail())
                }
            }
        }
    }

    /// Takes in what has arrived without waiting.
    pub(super) fn drain(&mut self) {
        while let Ok((at, event)) = self.events.try_recv() {
            match event {
                Event::FirstByte => self.first_byte = Some(at),
                Event::Line(line) => {
                    self.log.push_str(&line);
                    self.log.push('\n');
                }
            }
        }
    }

    /// True while QEMU runs.
    pub(super) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The last lines of the serial log.
    pub(super) fn tail(&self) -> String {
        let lines: Vec<&str> = self.log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
