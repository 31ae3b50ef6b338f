//! The QEMU command line of a node.
//!
//! The kernel's command line carries the node's token, so it goes by a configuration file only the user can read
//! (`-readconfig`), not by `-append`: every user of the computer can read a process's arguments.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::accelerator::Accelerator;

/// The program, as Debian names it.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How to get the program, for messages.
pub const INSTALL_HINT: &str = "install it with `apt-get install --no-install-recommends qemu-system-x86 seabios` (Debian, \
                                Ubuntu), `dnf install qemu-system-x86-core` (Fedora) or `pacman -S qemu-system-x86` (Arch)";

/// The port L1 listens on, inside its own network.
pub const NODE_PORT: u16 = 8080;

/// Most bytes of a kernel command line: QEMU reads configuration values into 1024 bytes.
pub const MAX_COMMAND_LINE: usize = 1000;

/// What L1's network card is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// QEMU's user network, which answers DHCP and forwards a port of this computer's loopback address to the node. Port
    /// 0 is any free one.
    User {
        /// The port on 127.0.0.1.
        port: u16,
    },
    /// A card whose cable leads nowhere: nothing answers, DHCP neither.
    Silent,
    /// No card.
    None,
}

/// One node to start.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// What executes L1.
    pub accelerator: Accelerator,
    /// QEMU's `-cpu`; [`Accelerator::default_cpu`] unless a test wants less.
    pub cpu: String,
    /// L1's memory in MiB.
    pub memory_mib: u32,
    /// L1's cores.
    pub cores: u32,
    /// The kernel's ELF.
    pub kernel: PathBuf,
    /// The bundle of images, when there is one.
    pub image: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// What the network card is plugged into.
    pub network: Network,
    /// The file that takes the serial log.
    pub serial_log: PathBuf,
    /// The socket QEMU is steered by.
    pub qmp_socket: PathBuf,
    /// Arguments appended as they are.
    pub extra: Vec<OsString>,
}

impl Qemu {
    /// The contents of the configuration file [`arguments`](Self::arguments) refers to. Write it readable for its owner alone.
    ///
    /// # Errors
    /// [`BadCommandLine`] when the format cannot carry the kernel's command line.
    pub fn config_file(&self) -> Result<String, BadCommandLine> {
        let text = &self.command_line;
        if text.len() > MAX_COMMAND_LINE {
            return Err(BadCommandLine::TooLong(text.len()));
        }
        if let Some(character) = text.chars().find(|&c| c == '"' || c.is_control()) {
            return Err(BadCommandLine::Character(character));
        }
        Ok(if text.is_empty() { String::new() } else { format!("[machine]\n  append = \"{text}\"\n") })
    }

    /// The arguments, with `config` the path of the configuration file.
    pub fn arguments(&self, config: &Path) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        arguments.pair("-M", "pc");
        arguments.pair("-accel", self.accelerator.qemu_name());
        arguments.pair("-cpu", &self.cpu);
        arguments.pair("-smp", self.cores.to_string());
        arguments.pair("-m", self.memory_mib.to_string());
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            arguments.0.push(flag.into());
        }
        arguments.pair("-display", "none");
        arguments.pair("-readconfig", config);
        arguments.pair("-kernel", &self.kernel);
        if let Some(image) = &self.image {
            arguments.pair("-initrd", image);
        }
        arguments.pair("-chardev", option("file,id=serial,path=", &self.serial_log, ""));
        arguments.pair("-serial", "chardev:serial");
        arguments.pair("-chardev", option("socket,id=qmp,path=", &self.qmp_socket, ",server=on,wait=off"));
        arguments.pair("-mon", "chardev=qmp,mode=control");
        match self.network {
            Network::User { port } => {
                arguments.pair("-netdev", format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:{NODE_PORT}"));
            }
            Network::Silent => arguments.pair("-netdev", "hubport,id=n0,hubid=0"),
            Network::None => {}
        }
        if self.network != Network::None {
            // The card's boot ROM is of no use here, and a separate package in some distributions.
            arguments.pair("-device", "virtio-net-pci,netdev=n0,romfile=");
        }
        arguments.0.extend(self.extra.iter().cloned());
        arguments.0
    }
}

/// Arguments being collected.
#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

/// A path inside a list of QEMU options, where a comma is written twice.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(b',');
        }
    }
    bytes.extend_from_slice(after.as_bytes());
    OsString::from_vec(bytes)
}

/// A kernel command line that cannot be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadCommandLine {
    /// It has this many bytes.
    TooLong(usize),
    /// It has this character.
    Character(char),
}

impl fmt::Display for BadCommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadCommandLine::TooLong(length) => {
                write!(
                    f,
                    "the kernel's command line has {length} bytes; at most {MAX_COMMAND_LINE} can be given"
                )
            }
            BadCommandLine::Character(character) => {
                write!(f, "the kernel's command line cannot have the character {character:?}")
            }
        }
    }
}

impl std::error::Error for BadCommandLine {}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> Qemu {
        Qemu {
            accelerator: Accelerator::Tcg,
            cpu: "max,-la57".into(),
            memory_mib: 2048,
            cores: 1,
            kernel: "/s/kernel".into(),
            image: Some("/s/minimal.tar".into()),
            command_line: "token=00ff ip=dhcp".into(),
            network: Network::User { port: 0 },
            serial_log: "/s/a,b/node.log".into(),
            qmp_socket: "/s/qmp".into(),
            extra: vec!["-snapshot".into()],
        }
    }

    fn line(qemu: &Qemu) -> String {
        let arguments = qemu.arguments(Path::new("/s/conf"));
        arguments.iter().map(|argument| argument.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_token_is_in_the_configuration_file_and_not_in_the_arguments() {
        let qemu = qemu();
        assert_eq!(qemu.config_file().unwrap(), "[machine]\n  append = \"token=00ff ip=dhcp\"\n");
        assert!(!line(&qemu).contains("00ff"));
        assert!(line(&qemu).contains("-readconfig /s/conf"));
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert!(line(&qemu()).contains("path=/s/a,,b/node.log"));
    }

    #[test]
    fn the_network_is_what_was_asked_for() {
        let mut qemu = qemu();
        assert!(line(&qemu).contains("hostfwd=tcp:127.0.0.1:0-:8080"));
        qemu.network = Network::Silent;
        assert!(line(&qemu).contains("hubport") && line(&qemu).contains("virtio-net-pci"));
        qemu.network = Network::None;
        assert!(!line(&qemu).contains("netdev") && !line(&qemu).contains("virtio-net"));
    }

    #[test]
    fn a_command_line_the_file_cannot_carry_is_refused() {
        let mut qemu = qemu();
        qemu.command_line = "a\"b".into();
        assert_eq!(qemu.config_file(), Err(BadCommandLine::Character('"')));
        qemu.command_line = "a\nb".into();
        assert_eq!(qemu.config_file(), Err(BadCommandLine::Character('\n')));
        qemu.command_line = "a".repeat(1001);
        assert_eq!(qemu.config_file(), Err(BadCommandLine::TooLong(1001)));
        qemu.command_line = String::new();
        assert_eq!(qemu.config_file().unwrap(), "");
    }
}
