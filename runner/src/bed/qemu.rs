//! The QEMU command line of a node.
//!
//! The kernel's command line carries the node's token, so it goes by a configuration file only the user can read
//! (`-readconfig`), not by `-append`: every user of the computer can read a process's arguments.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::machine::{Arguments, NODE_PORT, check_command_line};
use super::{BedError, BedKind, Machine, Network, Program, write_private};

/// The program, as Debian names it.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How to get the program, for messages.
pub(super) const INSTALL_HINT: &str = "install it with `apt-get install --no-install-recommends qemu-system-x86 seabios` (Debian, \
                                       Ubuntu), `dnf install qemu-system-x86-core` (Fedora) or `pacman -S qemu-system-x86` (Arch)";

/// The name of the configuration file in a node's directory.
pub(crate) const CONFIG: &str = "qemu.conf";

/// The value of `-cpu` unless a caller wants another. L1 uses four-level paging, and QEMU's nested paging follows L1's mode:
/// la57 stays off.
fn default_cpu(bed: &BedKind) -> &'static str {
    if *bed == BedKind::QemuKvm { "host,-la57" } else { "max,-la57" }
}

/// Writes the configuration file; QEMU's command line.
pub(super) fn prepare(machine: &Machine) -> Result<Program, BedError> {
    let config = machine.dir.join(CONFIG);
    write_private(&config, &config_file(&machine.command_line)?).map_err(BedError::Files)?;
    Ok(Program {
        name: PROGRAM,
        arguments: arguments(machine, config),
        environment: Vec::new(),
        stop_signal: "TERM",
        forwarded_port: None,
    })
}

/// The contents of the configuration file.
fn config_file(command_line: &str) -> Result<String, BedError> {
    check_command_line(command_line)?;
    Ok(if command_line.is_empty() {
        String::new()
    } else {
        format!("[machine]\n  append = \"{command_line}\"\n")
    })
}

fn arguments(machine: &Machine, config: PathBuf) -> Vec<OsString> {
    // QEMU counts instructions with one thread only.
    let counts = machine.qemu_arguments.iter().any(|argument| argument == "-icount");
    let accelerator = match machine.bed {
        BedKind::QemuKvm => "kvm",
        _ if counts => "tcg,thread=single",
        _ => "tcg,thread=multi",
    };
    let mut arguments = Arguments::default();
    arguments.pair("-M", "pc");
    arguments.pair("-accel", accelerator);
    arguments.pair("-cpu", machine.cpu.as_deref().unwrap_or(default_cpu(&machine.bed)));
    arguments.pair("-smp", machine.cores.to_string());
    arguments.pair("-m", machine.memory_mib.to_string());
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        arguments.0.push(flag.into());
    }
    arguments.pair("-display", "none");
    arguments.pair("-readconfig", config);
    arguments.pair("-kernel", &machine.kernel);
    if let Some(image) = &machine.image {
        arguments.pair("-initrd", image);
    }
    if let Some(store) = &machine.store {
        arguments.pair("-drive", option("if=none,id=images,format=raw,readonly=on,file=", store, ""));
        arguments.pair("-device", "virtio-blk-pci,drive=images");
    }
    arguments.pair("-chardev", option("file,id=serial,path=", &machine.serial_log_path(), ""));
    arguments.pair("-serial", "chardev:serial");
    arguments.pair("-chardev", option("socket,id=qmp,path=", &machine.qmp_socket, ",server=on,wait=off"));
    arguments.pair("-mon", "chardev=qmp,mode=control");
    match machine.network {
        Network::User { port } => {
            arguments.pair("-netdev", format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:{NODE_PORT}"));
        }
        Network::Silent => arguments.pair("-netdev", "hubport,id=n0,hubid=0"),
        Network::None => {}
    }
    if machine.network != Network::None {
        // The card's boot ROM is of no use here, and a separate package in some distributions.
        arguments.pair("-device", "virtio-net-pci,netdev=n0,romfile=");
    }
    arguments.0.extend(machine.qemu_arguments.iter().cloned());
    arguments.0
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

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            bed: BedKind::QemuTcg,
            cpu: None,
            memory_mib: 2048,
            cores: 1,
            kernel: "/s/kernel".into(),
            image: Some("/s/minimal.tar".into()),
            store: None,
            command_line: "token=00ff ip=dhcp".into(),
            network: Network::User { port: 0 },
            dir: "/s/a,b".into(),
            serial_log: "node.log",
            qmp_socket: "/s/qmp".into(),
            qemu_arguments: vec!["-snapshot".into()],
        }
    }

    fn line(machine: &Machine) -> String {
        let arguments = arguments(machine, "/s/conf".into());
        arguments.iter().map(|argument| argument.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_token_is_in_the_configuration_file_and_not_in_the_arguments() {
        let machine = machine();
        let config = config_file(&machine.command_line).unwrap();
        assert_eq!(config, "[machine]\n  append = \"token=00ff ip=dhcp\"\n");
        assert!(!line(&machine).contains("00ff"));
        assert!(line(&machine).contains("-readconfig /s/conf"));
        assert_eq!(config_file("").unwrap(), "");
    }

    #[test]
    fn a_store_of_images_is_a_disk_that_cannot_be_written() {
        let mut machine = machine();
        assert!(!line(&machine).contains("virtio-blk"));
        machine.store = Some("/s/images.tar".into());
        let expected = "-drive if=none,id=images,format=raw,readonly=on,file=/s/images.tar -device virtio-blk-pci,drive=images";
        assert!(line(&machine).contains(expected));
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert!(line(&machine()).contains("path=/s/a,,b/node.log"));
    }

    #[test]
    fn the_cpu_is_the_accelerators_unless_one_is_named() {
        let mut machine = machine();
        assert!(line(&machine).contains("-accel tcg,thread=multi -cpu max,-la57 "));
        machine.bed = BedKind::QemuKvm;
        assert!(line(&machine).contains("-accel kvm -cpu host,-la57 "));
        machine.cpu = Some("qemu64".into());
        assert!(line(&machine).contains("-cpu qemu64 "));
    }

    #[test]
    fn the_network_is_what_was_asked_for() {
        let mut machine = machine();
        assert!(line(&machine).contains("hostfwd=tcp:127.0.0.1:0-:8080"));
        machine.network = Network::Silent;
        assert!(line(&machine).contains("hubport") && line(&machine).contains("virtio-net-pci"));
        machine.network = Network::None;
        assert!(!line(&machine).contains("netdev") && !line(&machine).contains("virtio-net"));
    }
}
