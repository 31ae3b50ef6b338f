//! What the agent can be told, on its command line or the kernel's.

use std::path::PathBuf;

use crate::network::Network;
use crate::system::optional;

/// How the agent reaches the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// The machine's vsock, to the address in [`nestling_api::agent`].
    Vsock,
    /// A character device (a serial or virtio-console port), for hypervisors without vsock.
    Device(PathBuf),
    /// The socket that is this process's standard input.
    Stdin,
}

/// A disk with the image's root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RootDisk {
    /// Its device.
    pub(crate) device: PathBuf,
    /// The file system's name.
    pub(crate) kind: String,
}

/// Where things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// How the agent reaches the node.
    pub(crate) transport: Transport,
    /// Where a step starts if it names no working directory.
    pub(crate) work: PathBuf,
    /// Where the agent writes the steps' scripts.
    pub(crate) scripts: PathBuf,
    /// `HOME` of the steps.
    pub(crate) home: String,
    /// The image's own variables for steps.
    pub(crate) environment: Vec<(String, String)>,
    /// The disk to change to, if the initramfs is not the root itself.
    pub(crate) root: Option<RootDisk>,
    /// What to set the network card up by.
    pub(crate) network: Option<Network>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            transport: Transport::Vsock,
            work: "/workspace".into(),
            scripts: "/run/nestling".into(),
            home: "/root".into(),
            environment: Vec::new(),
            root: None,
            network: None,
        }
    }
}

impl Settings {
    /// Settings from `nestling-agent [--stdin] [--work FOLDER] [--scripts FOLDER] [--home FOLDER]`.
    ///
    /// # Errors
    /// A message that names the argument in question.
    pub(crate) fn from_arguments(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut settings, mut arguments) = (Self::default(), arguments);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a folder after it"));
            match argument.as_str() {
                "--stdin" => settings.transport = Transport::Stdin,
                "--work" => settings.work = value()?.into(),
                "--scripts" => settings.scripts = value()?.into(),
                "--home" => settings.home = value()?,
                _ => {
                    return Err(format!(
                        "unknown argument {argument}; use --stdin, --work FOLDER, --scripts FOLDER or --home FOLDER"
                    ));
                }
            }
        }
        Ok(settings)
    }

    /// Takes the image's variables for steps: `NAME=VALUE` lines.
    pub(crate) fn read_environment(&mut self, text: &str) {
        let settings = text.lines().filter_map(|line| line.split_once('='));
        self.environment = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    }

    /// Takes `nestling.transport=DEVICE`, `nestling.net=ADDRESS/PREFIX,GATEWAY,DNS`, `root=DEVICE` and `rootfstype=NAME` from the
    /// kernel's command line.
    pub(crate) fn read_kernel_command_line(&mut self, line: &str) {
        let (mut device, mut kind) = (None, "ext4");
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("nestling.transport", path)) => self.transport = Transport::Device(path.into()),
                Some(("nestling.net", text)) => {
                    let network = text.parse().map_err(std::io::Error::other);
                    optional("set the network up", network.map(|network| self.network = Some(network)));
                }
                Some(("root", path)) => device = Some(PathBuf::from(path)),
                Some(("rootfstype", name)) => kind = name,
                _ => {}
            }
        }
        self.root = device.map(|device| RootDisk { device, kind: kind.to_owned() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Settings, String> {
        Settings::from_arguments(arguments.iter().map(|&argument| argument.to_owned()))
    }

    #[test]
    fn without_arguments_the_agent_calls_the_node_over_vsock() {
        assert_eq!(parse(&[]).unwrap().transport, Transport::Vsock);
    }

    #[test]
    fn folders_and_the_transport_can_be_named() {
        let settings = parse(&["--stdin", "--work", "/w", "--scripts", "/s", "--home", "/h"]).unwrap();
        assert_eq!(settings.transport, Transport::Stdin);
        assert_eq!((settings.work, settings.scripts), ("/w".into(), "/s".into()));
        assert_eq!(settings.home, "/h");
    }

    #[test]
    fn an_unknown_or_incomplete_argument_is_named_in_the_error() {
        assert!(parse(&["--wrok", "/w"]).unwrap_err().contains("--wrok"));
        assert!(parse(&["--work"]).unwrap_err().contains("--work"));
    }

    #[test]
    fn the_kernel_command_line_can_name_a_device() {
        let mut settings = Settings::default();
        settings.read_kernel_command_line("quiet console=ttyS0\n");
        assert_eq!(settings.transport, Transport::Vsock);
        settings.read_kernel_command_line("quiet nestling.transport=/dev/ttyS1 panic=-1\n");
        assert_eq!(settings.transport, Transport::Device("/dev/ttyS1".into()));
        assert_eq!(settings.root, None);
    }

    #[test]
    fn the_images_variables_are_lines_of_name_and_value() {
        let mut settings = Settings::default();
        settings.read_environment("LANG=C.UTF-8\nodd\nOPTIONS=-a=b -c\n");
        let expected = [("LANG", "C.UTF-8"), ("OPTIONS", "-a=b -c")];
        assert_eq!(settings.environment, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn the_kernel_command_line_can_set_the_network_up() {
        let mut settings = Settings::default();
        settings.read_kernel_command_line("quiet nestling.net=rubbish");
        assert_eq!(settings.network, None);
        settings.read_kernel_command_line("quiet nestling.net=192.0.0.2/29,192.0.0.1,192.0.0.1");
        assert_eq!(settings.network, "192.0.0.2/29,192.0.0.1,192.0.0.1".parse().ok());
    }

    #[test]
    fn the_kernel_command_line_can_name_the_root() {
        let mut settings = Settings::default();
        settings.read_kernel_command_line("panic=-1 root=/dev/vda nestling.root=x");
        assert_eq!(settings.root, Some(RootDisk { device: "/dev/vda".into(), kind: "ext4".into() }));
        settings.read_kernel_command_line("rootfstype=xfs root=/dev/vdb");
        assert_eq!(settings.root, Some(RootDisk { device: "/dev/vdb".into(), kind: "xfs".into() }));
    }
}
