//! A node in Bochs: its configuration files, and what its process tells from outside. Read Bochs' user manual, "bochsrc", first.
//!
//! Debian's Bochs is built with its debugger, so it waits for commands: a file tells it to go on. It has no virtio and no way to load a
//! kernel: the node boots from a CD (`boot_disk.rs`) and its network card is an e1000. All paths in its files are relative to the node's
//! directory, in which it runs, since the format knows no quotes.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use super::machine::{Arguments, NODE_PORT, check_command_line};
use super::{BedError, BedKind, Machine, Network, OUTPUT, Program, boot_disk, write_private};
use crate::random;

/// The program.
const PROGRAM: &str = "bochs";
/// The configuration file's name in a node's directory.
pub(crate) const CONFIG: &str = "bochsrc";
const NETWORK: &str = "slirp.conf";
const DEBUGGER: &str = "debugger.rc";
const LOG: &str = "bochs.log";

/// Most memory it has, in MiB.
const MAX_MEMORY_MIB: u32 = 2048;
/// Instructions in a second of the node's time, about what a computer of today emulates.
const INSTRUCTIONS_PER_SECOND: u32 = 50_000_000;

/// Ports are chosen here, below those the system gives to connections.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Triple faults of guests a Bochs with SVM goes on after.
const TRIPLE_FAULTS: usize = 10_000;

/// How many of them are tried.
const PORT_TRIES: usize = 64;

/// Writes all files; Bochs' command line.
pub(super) fn prepare(machine: &Machine) -> Result<Program, BedError> {
    let BedKind::Bochs { model } = &machine.bed else { unreachable!("only Bochs is prepared here") };
    let unsupported = |what: String| Err(BedError::Unsupported(machine.bed.clone(), what));
    if machine.memory_mib > MAX_MEMORY_MIB {
        let asked = machine.memory_mib;
        return unsupported(format!(
            "at most {MAX_MEMORY_MIB} MiB of memory can be had; {asked} were asked for"
        ));
    }
    if machine.cpu.is_some() || !machine.qemu_arguments.is_empty() {
        return unsupported("options of QEMU mean nothing there; the CPU is given as bochs:MODEL".to_owned());
    }
    if machine.store.is_some() {
        return unsupported(
            "its disks are not virtio; put the images into the bundle instead of --store".to_owned(),
        );
    }
    check_command_line(&machine.command_line)?;
    let known = models()?;
    if !known.contains(model) {
        return Err(BedError::Model { given: model.clone(), known });
    }
    let port = match machine.network {
        Network::User { port: 0 } => Some(free_port().map_err(BedError::Files)?),
        Network::User { port } if TcpListener::bind(("127.0.0.1", port)).is_err() => {
            return Err(BedError::PortTaken(port));
        }
        Network::User { port } => Some(port),
        Network::Silent | Network::None => None,
    };
    remove(&machine.dir).map_err(BedError::Files)?;
    boot_disk::write(machine)?;
    let files = || -> io::Result<()> {
        let dir = &machine.dir;
        // Written at the first byte only: one of an earlier node would be taken for this one's.
        match fs::remove_file(machine.serial_log_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Go on, and at the end leave. Where a guest's triple fault is no panic, it stops the debugger: go on each time.
        let times = if triple_faults_panic(model) { 1 } else { TRIPLE_FAULTS };
        write_private(&dir.join(DEBUGGER), &("c\n".repeat(times) + "q\n"))?;
        if let Some(port) = port {
            // The first line is how Bochs tells the format.
            let text = format!("# slirp config\nhostfwd = tcp:127.0.0.1:{port}-10.0.2.15:{NODE_PORT}\n");
            write_private(&dir.join(NETWORK), &text)?;
        }
        write_private(&dir.join(CONFIG), &config(machine, model))
    };
    files().map_err(BedError::Files)?;
    let mut arguments = Arguments::default();
    arguments.0.push("-q".into());
    // Whole, so that the process can be told by it.
    arguments.pair("-f", machine.dir.join(CONFIG));
    arguments.pair("-rc", DEBUGGER);
    Ok(Program {
        name: PROGRAM,
        arguments: arguments.0,
        // Its display is a terminal nobody reads. This kind cannot hide its cursor: with one that can, each blink of it
        // is written, and once the terminal's 20 KiB are full Bochs waits for ever.
        environment: vec![("TERM", "vt100")],
        // It catches the others, and goes on.
        stop_signal: "KILL",
        forwarded_port: port,
    })
}

/// The CPU models there are.
///
/// # Errors
/// When Bochs is not installed.
pub fn models() -> Result<Vec<String>, BedError> {
    let output = match Command::new(PROGRAM).args(["-help", "cpu"]).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BedError::NoBochs(PROGRAM.to_owned()));
        }
        Err(error) => return Err(BedError::Files(error)),
    };
    let told = [output.stdout, output.stderr].concat();
    let known = model_lines(&String::from_utf8_lossy(&told));
    if known.is_empty() {
        return Err(BedError::Refused(PROGRAM, "`bochs -help cpu` lists no CPU models".to_owned()));
    }
    Ok(known)
}

/// The lines of `bochs -help cpu` that are models: single words after the headline.
fn model_lines(text: &str) -> Vec<String> {
    let lines = text.lines().skip_while(|line| !line.starts_with("Supported CPU models"));
    let word = |line: &&str| {
        !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    lines.skip(1).map(str::trim).filter(word).map(str::to_owned).collect()
}

/// The configuration file.
fn config(machine: &Machine, model: &str) -> String {
    let (memory, cores, serial) = (machine.memory_mib, machine.cores, machine.serial_log);
    let network = match machine.network {
        Network::User { .. } => format!("ethmod=slirp, script={NETWORK}"),
        Network::Silent => "ethmod=null".to_owned(),
        Network::None => String::new(),
    };
    let card = if network.is_empty() {
        String::new()
    } else {
        format!("e1000: card=0, enabled=1, mac=52:54:00:12:34:56, {network}\n")
    };
    let plugin = if network.is_empty() { "" } else { ", e1000=1" };
    let disk = boot_disk::FILE;
    let panics = if triple_faults_panic(model) { "" } else { ", cpu0=report" };
    // The clock is slowed down to the computer's while the node idles: an idle node then takes no time of the computer, and waits
    // last as long as they say. ATA channel 0 alone: the BIOS waits for disks on any other.
    format!(
        "\
plugin_ctrl: unmapped=1, biosdev=1, speaker=0{plugin}
config_interface: textconfig
display_library: term
memory: guest={memory}, host={memory}
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
cpu: model={model}, count={cores}, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, ignore_bad_msrs=1, msrs=\"\"
clock: sync=slowdown, time0=utc
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={disk}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
{card}pci: enabled=1, chipset=i440fx
vga: extension=vbe, update_freq=1, realtime=0
mouse: enabled=0
private_colormap: enabled=0
panic: action=fatal{panics}
error: action=ignore
info: action=ignore
debug: action=ignore
log: {LOG}
"
    )
}

/// Whether Bochs may end at a triple fault. With VMX one of a guest is an exit before it is anything else, so only the node's own ends
/// Bochs. With SVM the exit comes after the panic, which must not be fatal then; a triple fault of the node leaves a Bochs that stands still.
fn triple_faults_panic(model: &str) -> bool {
    !["athlon64_", "turion64_", "phenom_", "zambezi", "trinity_", "ryzen"]
        .iter()
        .any(|amd| model.starts_with(amd))
}

/// A port of 127.0.0.1 nobody has now. Bochs cannot be told to take any.
fn free_port() -> io::Result<u16> {
    let mut ports = (0..PORT_TRIES).map(|_| {
        let random = u16::from_str_radix(&random::hex(2), 16).unwrap_or_default();
        PORTS.start + random % (PORTS.end - PORTS.start)
    });
    ports
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .ok_or_else(|| io::Error::other(format!("no free port of 127.0.0.1 was found in {PORTS:?}")))
}

/// Whether the process listens on this port of 127.0.0.1.
pub(crate) fn listens(pid: u32, port: u16) -> bool {
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let Some(inode) = listener(&table, port) else { return false };
    let socket = format!("socket:[{inode}]");
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files
        .flatten()
        .any(|file| fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == socket.as_str()))
}

/// The inode of the socket that listens on a port of 127.0.0.1, in the table of `/proc/net/tcp` (`proc(5)`).
fn listener(table: &str, port: u16) -> Option<&str> {
    let local = format!("0100007F:{port:04X}");
    table.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        (columns.get(1) == Some(&local.as_str()) && columns.get(3) == Some(&"0A"))
            .then(|| columns.get(9).copied())?
    })
}

/// Why a Bochs that ran in `dir` ended, in its own words; empty when it did not say.
pub(crate) fn last_words(dir: &Path) -> String {
    let text = fs::read(dir.join(OUTPUT)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines =
        text.lines().skip_while(|line| !line.starts_with("Bochs is exiting with the following message"));
    lines.nth(1).unwrap_or_default().trim().to_owned()
}

/// Whether these are the words of a Bochs whose machine switched itself off. Its exit code is that of a crash.
pub(crate) fn switched_off(last_words: &str) -> bool {
    last_words.contains("soft power off")
}

/// Removes all files but the serial log.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    for name in [CONFIG, NETWORK, DEBUGGER, LOG, OUTPUT] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    boot_disk::remove(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(network: Network) -> Machine {
        Machine {
            bed: BedKind::bochs(),
            cpu: None,
            memory_mib: 1024,
            cores: 1,
            kernel: "/s/kernel".into(),
            image: None,
            store: None,
            command_line: "token=00ff".into(),
            network,
            dir: "/s/a,b \"c".into(),
            serial_log: "node.log",
            qmp_socket: "/s/qmp".into(),
            qemu_arguments: Vec::new(),
        }
    }

    #[test]
    fn the_configuration_has_no_secret_and_no_path_that_would_need_quotes() {
        let text = config(&machine(Network::User { port: 0 }), "ryzen");
        assert!(!text.contains("00ff") && !text.contains("/s/"), "{text}");
        for line in ["memory: guest=1024, host=1024\n", "cpu: model=ryzen, count=1,", "dev=node.log\n"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn the_network_is_what_was_asked_for() {
        assert!(
            config(&machine(Network::User { port: 0 }), "ryzen").contains("ethmod=slirp, script=slirp.conf")
        );
        assert!(config(&machine(Network::Silent), "ryzen").contains("ethmod=null"));
        assert!(!config(&machine(Network::None), "ryzen").contains("e1000"));
    }

    #[test]
    fn a_guests_triple_fault_ends_no_bochs() {
        let text = |model: &str| config(&machine(Network::None), model);
        assert!(text("ryzen").contains("panic: action=fatal, cpu0=report\n"));
        assert!(text("corei7_haswell_4770").contains("panic: action=fatal\n"));
    }

    #[test]
    fn more_memory_than_it_has_and_options_of_qemu_are_refused() {
        let large = Machine { memory_mib: 4096, ..machine(Network::None) };
        let error = prepare(&large).unwrap_err().to_string();
        assert!(error.contains("at most 2048 MiB") && error.contains("4096"), "{error}");
        for machine in [
            Machine { cpu: Some("max".into()), ..machine(Network::None) },
            Machine { qemu_arguments: vec!["-snapshot".into()], ..machine(Network::None) },
        ] {
            assert!(prepare(&machine).unwrap_err().to_string().contains("bochs:MODEL"));
        }
    }

    #[test]
    fn models_are_the_words_below_the_headline() {
        let text = "00000i[      ] LTDL not set\nSupported CPU models:\n\nbx_generic\nryzen\n\n0000i[SIM   ] quit_sim called\n";
        assert_eq!(model_lines(text), ["bx_generic", "ryzen"]);
        assert_eq!(model_lines("bochs: unknown option"), [""; 0]);
    }

    #[test]
    fn a_listening_socket_is_found_in_the_systems_table() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(std::process::id(), port));
        drop(listener);
        assert!(!listens(std::process::id(), port));
        let table =
            "  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 01 0:0 0:0 0 0 0 77 1\n";
        assert_eq!(super::listener(table, 8080), None, "it is connected, and does not listen");
    }

    #[test]
    fn why_it_ended_is_read_from_what_it_printed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_words(dir.path()), "");
        let text = "i[] using log file\n====\nBochs is exiting with the following message:\n[ACPI  ] ACPI control: soft power off\n==\n";
        fs::write(dir.path().join(OUTPUT), text).unwrap();
        assert!(switched_off(&last_words(dir.path())));
        assert!(!switched_off("[CPU0  ] exception(): 3rd (13) exception with no resolution"));
    }
}
