//! The bed with a kernel of a few instructions: what a bed does must not depend on nestling's own kernel.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nestling::bed::{Bed, BedBuilder, BedError, BedKind, Network};

/// Long enough for any computer; nothing here waits for it to pass.
const LONG: Duration = Duration::from_secs(60);

/// A 32-bit ELF with a PVH note and a Multiboot2 header that writes `words` to the serial port and then switches the computer off by
/// this port (PM1a_CNT), or halts.
fn kernel(dir: &Path, words: &str, switch_off: Option<u16>) -> PathBuf {
    const LOAD: u32 = 0x10_0000;
    const HEADERS: u32 = 52 + 2 * 32;
    const NOTE: u32 = 20;
    const MULTIBOOT: u32 = 24;
    // mov edx, 0x3fb (line control); mov al, 3 (eight bits); out dx, al
    let mut code = vec![0xba, 0xfb, 0x03, 0, 0, 0xb0, 3, 0xee];
    // mov edx, 0x3fd (line status); in al, dx; test al, 0x40 (all sent); jz back to the in
    let sent = [0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x40, 0x74, 0xfb];
    for byte in words.bytes() {
        code.extend(sent);
        code.extend([0xba, 0xf8, 0x03, 0, 0, 0xb0, byte, 0xee]); // mov edx, 0x3f8; mov al, byte; out dx, al
    }
    code.extend(sent);
    if let Some(port) = switch_off {
        // mov edx, port; mov eax, SLP_EN; out dx, ax. SLP_TYP is 0 for "off" in both emulators.
        code.push(0xba);
        code.extend(u32::from(port).to_le_bytes());
        code.extend([0xb8, 0, 0x20, 0, 0, 0x66, 0xef]);
    }
    // All interrupts masked: mov al, 0xff; out 0x21, al; out 0xa1, al; sti; hlt; jmp back to it
    code.extend([0xb0, 0xff, 0xe6, 0x21, 0xe6, 0xa1, 0xfb, 0xf4, 0xeb, 0xfd]);
    let entry = LOAD + HEADERS + NOTE + MULTIBOOT;
    let size = HEADERS + NOTE + MULTIBOOT + u32::try_from(code.len()).unwrap();
    let mut elf = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0];
    for word in [1, entry, 52, 0, 0, 52 | 32 << 16, 2 | 40 << 16, 0] {
        elf.extend(u32::to_le_bytes(word));
    }
    for (kind, offset, length) in [(1, 0, size), (4, HEADERS, NOTE)] {
        for word in [kind, offset, LOAD + offset, LOAD + offset, length, length, 7, 4] {
            elf.extend(u32::to_le_bytes(word));
        }
    }
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
        elf.extend(u32::to_le_bytes(word));
    }
    // Magic number, i386, length, checksum; then the tag that ends the list. Its place is a multiple of eight.
    for word in [0xE852_50D6, 0, MULTIBOOT, 0_u32.wrapping_sub(0xE852_50D6 + MULTIBOOT), 0, 8] {
        elf.extend(u32::to_le_bytes(word));
    }
    elf.extend(code);
    let path = dir.join("kernel");
    fs::write(&path, elf).unwrap();
    path
}

/// A bed in QEMU.
fn bed(dir: &Path, words: &str, switch_off: bool) -> BedBuilder {
    let port = switch_off.then_some(0x604);
    Bed::builder().no_image().memory_mib(64).kernel(kernel(dir, words, port))
}

/// A bed in Bochs.
fn bochs(dir: &Path, words: &str, switch_off: bool) -> BedBuilder {
    let port = switch_off.then_some(0xb004);
    Bed::builder().kind(BedKind::bochs()).no_image().memory_mib(64).kernel(kernel(dir, words, port))
}

#[test]
fn what_the_kernel_writes_is_read_and_its_end_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let node = bed(dir.path(), "hello\nworld\n", true).network(Network::None).start().unwrap();
    assert!(node.wait_serial("world", LONG).is_some());
    assert_eq!(node.wait_exit(LONG), Some(0));
    assert_eq!(node.wait_serial("never", LONG), None);
    assert_eq!(node.serial_log(), "hello\nworld\n");
}

#[test]
fn a_kernel_that_refuses_to_run_is_told_in_its_own_words() {
    let dir = tempfile::tempdir().unwrap();
    let node = bed(dir.path(), "ERROR this node cannot run: no SVM\n", true).start().unwrap();
    let BedError::NotReady(error) = node.wait_ready(LONG).unwrap_err() else { panic!("another error") };
    assert!(error.serial.iter().any(|line| line.contains("no SVM")), "{error}");
}

#[test]
fn dropping_the_bed_ends_qemu_and_removes_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let node = bed(dir.path(), "up\n", false).start().unwrap();
    assert!(node.wait_serial("up", LONG).is_some());
    let (pid, log) = (node.pid().unwrap(), node.serial_log_path());
    let config = log.with_file_name("qemu.conf");
    assert_eq!(fs::metadata(&config).unwrap().permissions().mode() & 0o777, 0o600);
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(node.token().unwrap()));
    assert!(fs::read_to_string(&config).unwrap().contains(node.token().unwrap()));
    assert!(node.port() > 0);
    drop(node);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!log.exists());
}

#[test]
fn a_process_that_is_killed_with_its_group_leaves_no_qemu_and_no_files() {
    const NAME: &str = "a_process_that_is_killed_with_its_group_leaves_no_qemu_and_no_files";
    const ROLE: &str = "NESTLING_TEST_OWNER_IN";
    if let Some(dir) = std::env::var_os(ROLE) {
        // This is the process that is killed.
        let node = bed(Path::new(&dir), "up\n", false).start().unwrap();
        println!("pid {} of {}", node.pid().unwrap(), node.serial_log_path().display());
        std::thread::sleep(LONG);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", NAME])
        .env(ROLE, dir.path())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let line =
        lines.map(Result::unwrap).find_map(|line| line.split_once("pid ").map(|(_, rest)| rest.to_owned()));
    let (pid, log) = line.as_deref().and_then(|line| line.split_once(" of ")).unwrap();
    let status = Command::new("kill").args(["-KILL", "--", &format!("-{}", owner.id())]).status().unwrap();
    assert!(status.success());
    owner.wait().unwrap();
    let start = Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() || Path::new(log).exists() {
        assert!(start.elapsed() < LONG, "QEMU or its files outlive the process");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_qemu_refuses_is_told_in_its_words() {
    let dir = tempfile::tempdir().unwrap();
    let error = bed(dir.path(), "", true).cpu("no-such-cpu").start().unwrap_err();
    assert!(matches!(&error, BedError::Refused(_, words) if words.contains("no-such-cpu")), "{error}");
    let error = bed(dir.path(), "", true).qemu_args(["-no-such-option"]).start().unwrap_err();
    assert!(error.to_string().contains("no-such-option"), "{error}");
}

#[test]
fn a_node_in_bochs_boots_by_grub_and_its_end_is_told_from_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let node = bochs(dir.path(), "hello\nworld\n", true).network(Network::None).start().unwrap();
    assert!(node.wait_serial("world", LONG).is_some());
    assert_eq!(node.wait_exit(LONG), Some(0));
    assert_eq!(node.serial_log(), "hello\nworld\n");
    let node = bochs(dir.path(), "up\n", false).network(Network::None).start().unwrap();
    assert!(node.wait_serial("up", LONG).is_some());
    assert!(
        Command::new("kill").args(["-KILL", &node.pid().unwrap().to_string()]).status().unwrap().success()
    );
    assert_eq!(node.wait_exit(LONG), Some(128 + 9));
}

#[test]
fn dropping_a_bed_in_bochs_ends_it_and_removes_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let node = bochs(dir.path(), "up\n", false).start().unwrap();
    let (pid, log) = (node.pid().unwrap(), node.serial_log_path());
    // It listens before its node runs.
    assert!(std::net::TcpStream::connect(("127.0.0.1", node.port())).is_ok());
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(node.token().unwrap()));
    assert_eq!(fs::metadata(log.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    drop(node);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!log.parent().unwrap().exists());
}

#[test]
fn what_bochs_cannot_do_is_told_with_what_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let other = BedKind::Bochs { model: "corei9_nowhere".into() };
    let error = bochs(dir.path(), "", true).kind(other).start().unwrap_err().to_string();
    assert!(
        error.contains("no CPU model corei9_nowhere") && error.contains("corei7_haswell_4770, "),
        "{error}"
    );
    let error = bochs(dir.path(), "", true).memory_mib(2049).start().unwrap_err().to_string();
    assert!(error.contains("at most 2048 MiB"), "{error}");
    let error = bochs(dir.path(), "", true).store("/s/images.tar").start().unwrap_err().to_string();
    assert!(error.contains("instead of --store"), "{error}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = bochs(dir.path(), "", true).network(Network::User { port }).start().unwrap_err().to_string();
    assert!(error.contains(&format!("port {port} of 127.0.0.1 cannot be had")), "{error}");
}

#[test]
fn up_ends_with_the_kernels_reason_and_leaves_nothing_running() {
    let (home, bundle) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
        command
            .args(arguments)
            .env("XDG_STATE_HOME", home.path())
            .env_remove("NESTLING_NODE")
            .env_remove("NESTLING_TOKEN");
        command.output().unwrap()
    };
    // The kernel starts only on a computer that can run it: 64 MiB without an image cannot.
    let up =
        command(&["up", "--bed", "qemu-tcg", "--memory", "64", "--image", bundle.path().to_str().unwrap()]);
    let words = String::from_utf8_lossy(&up.stderr);
    assert_eq!(up.status.code(), Some(1), "{words}");
    assert!(words.contains("node.log"), "{words}");
    let directory = home.path().join("nestling/local");
    assert!(directory.join("node.log").exists());
    for gone in ["node.json", "qemu.conf", "qmp", "pid", "kernel.elf"] {
        assert!(!directory.join(gone).exists(), "{gone}");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let (home, bundle) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let image = bundle.path().to_str().unwrap();
    let up = Command::new(env!("CARGO_BIN_EXE_nestling"))
        .args(["up", "--bed", "qemu-tcg", "--port", &port, "--image", image])
        .env("XDG_STATE_HOME", home.path())
        .env_remove("NESTLING_TOKEN")
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&up.stderr);
    assert!(words.contains(&format!("port {port} of 127.0.0.1 cannot be had")), "{words}");
}
