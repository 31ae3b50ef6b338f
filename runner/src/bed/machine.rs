//! One L1 about to be started: what all beds have in common.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{BedError, BedKind, bochs, qemu};

/// The port L1 listens on, inside its own network.
pub const NODE_PORT: u16 = 8080;

/// Most bytes of a kernel command line: QEMU reads configuration values into 1024 bytes.
pub const MAX_COMMAND_LINE: usize = 1000;

/// What L1's network card is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A user network, which answers DHCP and forwards a port of this computer's loopback address to the node. Port 0 is any
    /// free one.
    User {
        /// The port on 127.0.0.1.
        port: u16,
    },
    /// A card whose cable leads nowhere: nothing answers, DHCP neither.
    Silent,
    /// No card.
    None,
}

/// One L1 to start.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What executes it.
    pub bed: BedKind,
    /// QEMU's `-cpu`; none for the bed's own choice. Bochs has its model in [`BedKind`].
    pub cpu: Option<String>,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its cores.
    pub cores: u32,
    /// The kernel's ELF.
    pub kernel: PathBuf,
    /// The bundle of images, when there is one.
    pub image: Option<PathBuf>,
    /// The store of further images, on a disk that the node only reads; QEMU's alone.
    pub store: Option<PathBuf>,
    /// The kernel's command line, which has the node's token.
    pub command_line: String,
    /// What the network card is plugged into.
    pub network: Network,
    /// The directory of its files, which only the user can enter.
    pub dir: PathBuf,
    /// The name of the serial log's file in `dir`.
    pub serial_log: &'static str,
    /// QEMU's control socket; Bochs has none.
    pub qmp_socket: PathBuf,
    /// QEMU's further arguments, as they are.
    pub qemu_arguments: Vec<OsString>,
}

impl Machine {
    /// Writes the files the bed reads; the program that then runs it, and its arguments.
    ///
    /// # Errors
    /// When the bed cannot run such a machine, something is not installed or a file cannot be written.
    pub fn prepare(&self) -> Result<Program, BedError> {
        if self.bed.is_qemu() { qemu::prepare(self) } else { bochs::prepare(self) }
    }

    /// Where its serial log is.
    pub fn serial_log_path(&self) -> PathBuf {
        self.dir.join(self.serial_log)
    }
}

/// A program to run, by its name in `PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name.
    pub name: &'static str,
    /// What it is given.
    pub arguments: Vec<OsString>,
    /// Its environment, beyond what this process has.
    pub environment: Vec<(&'static str, &'static str)>,
    /// The signal that ends it.
    pub stop_signal: &'static str,
    /// The port on 127.0.0.1 it will forward to the node, where the program cannot be asked.
    pub forwarded_port: Option<u16>,
}

impl Program {
    /// It, run by a shell script, which gets `first` and then the program with its arguments as parameters.
    pub fn by_script(&self, script: &str, dir: &Path, first: &[&std::ffi::OsStr]) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script, "nestling-bed"])
            .args(first)
            .arg(self.name)
            .args(&self.arguments)
            .envs(self.environment.iter().copied())
            .current_dir(dir);
        command
    }
}

/// Arguments being collected.
#[derive(Default)]
pub(super) struct Arguments(pub(super) Vec<OsString>);

impl Arguments {
    pub(super) fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

/// Refuses a kernel command line that no bed's files can carry.
pub(super) fn check_command_line(text: &str) -> Result<(), BedError> {
    if text.len() > MAX_COMMAND_LINE {
        return Err(BedError::CommandLine(format!(
            "has {} bytes; at most {MAX_COMMAND_LINE} can be given",
            text.len()
        )));
    }
    // QEMU's file ends a value at the double quote; GRUB's script a word at the single one, and obeys the backslash.
    match text.chars().find(|&c| matches!(c, '"' | '\'' | '\\') || c.is_control()) {
        Some(character) => Err(BedError::CommandLine(format!("cannot have the character {character:?}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_the_files_cannot_carry_is_refused() {
        assert!(check_command_line("token=00ff ip=dhcp $x;{}").is_ok());
        for text in ["a\"b", "a'b", "a\\b", "a\nb", &"a".repeat(1001)] {
            let error = check_command_line(text).unwrap_err().to_string();
            assert!(error.contains("the kernel's command line"), "{error}");
        }
    }
}
