//! Nodes for tests: shared by the tests of one theme, or a test's own. A test that fails prints the serial logs of the nodes it used.
//!
//! Tests of QEMU's options and devices use `Bed::builder`; those that hold on any bed use [`any_bed`], which `NESTLING_BED` chooses.

use nestling::bed::{Bed, BedBuilder, BedKind, RunningBed};
use nestling::client::types::HostMemory;
use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::sync::{Once, OnceLock};
use std::time::Duration;

/// The variable that chooses the bed of [`any_bed`]: `qemu-tcg` (the default), `qemu-kvm`, `bochs` or `bochs:MODEL`.
pub const BED: &str = "NESTLING_BED";

/// Longest wait for a node to take jobs, in QEMU. Two emulated nodes share two cores with the tests.
const READY: Duration = Duration::from_secs(60);

/// How much of a serial log a failing test prints.
const LOG_LINES: usize = 120;

thread_local! {
    /// Serial logs of the nodes that this thread's test has used.
    static LOGS: RefCell<Vec<PathBuf>> = const { RefCell::new(Vec::new()) };
}

/// A node that several tests use; it starts with the first of them and ends with the process.
pub struct Shared {
    bed: OnceLock<RunningBed>,
    builder: fn() -> BedBuilder,
}

impl Shared {
    /// A node that `builder` describes.
    pub const fn new(builder: fn() -> BedBuilder) -> Self {
        Self { bed: OnceLock::new(), builder }
    }

    /// The node, ready for jobs.
    ///
    /// # Panics
    /// When it does not become ready; the message has its serial log.
    pub fn get(&self) -> &RunningBed {
        let bed = self.bed.get_or_init(|| ready((self.builder)()));
        watch(bed);
        bed
    }
}

/// The bed that `NESTLING_BED` names.
///
/// # Panics
/// When it names none.
pub fn bed_kind() -> BedKind {
    match std::env::var(BED) {
        Ok(name) if !name.is_empty() => name.parse().unwrap_or_else(|error| panic!("{BED}: {error}")),
        _ => BedKind::default(),
    }
}

/// A node in the bed that `NESTLING_BED` names.
///
/// # Panics
/// When it names none.
pub fn any_bed() -> BedBuilder {
    Bed::builder().kind(bed_kind())
}

/// Starts a node of a test's own and waits until it takes jobs.
///
/// # Panics
/// When it does not become ready; the message has its serial log.
pub fn ready(builder: BedBuilder) -> RunningBed {
    let bed = start(builder);
    if let Err(error) = bed.wait_ready(READY) {
        panic!("{error}");
    }
    bed
}

/// Starts a node of a test's own.
///
/// # Panics
/// When the emulator does not start.
pub fn start(builder: BedBuilder) -> RunningBed {
    let bed = builder.start().unwrap_or_else(|error| panic!("{error}"));
    watch(&bed);
    bed
}

/// The node's frames and heap, now.
///
/// # Panics
/// When it does not answer.
pub fn memory(bed: &RunningBed) -> HostMemory {
    bed.client().host().unwrap_or_else(|error| panic!("GET /v1/host: {error}")).memory
}

/// Sees to it that a panic of this thread prints the node's serial log.
fn watch(bed: &RunningBed) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            LOGS.with_borrow(|logs| logs.iter().for_each(print_log));
        }));
    });
    LOGS.with_borrow_mut(|logs| {
        let log = bed.serial_log_path();
        if !logs.contains(&log) {
            logs.push(log);
        }
    });
}

fn print_log(path: &PathBuf) {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let left_out = lines.len().saturating_sub(LOG_LINES);
    eprintln!("---- the node's serial log, {left_out} lines left out");
    lines[left_out..].iter().for_each(|line| eprintln!("  | {line}"));
    eprintln!("----");
}
