//! `nestling up`.

use anyhow::{Result, bail};
use nestling::bed::{BedKind, HostFacts};
use nestling::local::{self, Options};
use nestling::random;
use nestling::state::{LocalNode, State};

use super::interrupt::Interrupt;
use crate::cli::{BedChoice, Up};
use crate::terminal::{self, Progress};

/// As many cores of this computer a node gets unless it is told otherwise.
const MOST_DEFAULT_CORES: usize = 2;

pub(crate) fn up(options: &Up) -> Result<u8> {
    let interrupt = Interrupt::watch(|| {})?;
    let progress = Progress::new(options.quiet);
    let started = start(options, &interrupt, &progress);
    if let (Err(_), Some(code)) = (&started, interrupt.exit_code()) {
        // That no node is up then is no failure.
        return Ok(code);
    }
    let (node, was_up) = started?;
    progress.finish();
    let already = if was_up { "already " } else { "" };
    terminal::print(&format!("node {} is {already}up at {}\n", node.name, node.url))?;
    if !options.quiet {
        terminal::say("run a job: nestling run -- uname -a");
        if node.token.is_some() {
            let record = State::of_user()?.node(&node.name)?.record();
            terminal::say(format_args!("for other clients, the token is in {}", record.display()));
        }
    }
    Ok(0)
}

/// The node the options name and whether it was up before, starting it if it was not.
pub(super) fn start(options: &Up, interrupt: &Interrupt, progress: &Progress) -> Result<(LocalNode, bool)> {
    let dir = State::of_user()?.node(&options.name)?;
    let _lock = dir.lock()?;
    // A record that cannot be read is written anew; what it tells of cannot be found again.
    if let Some(node) = dir.read().unwrap_or(None).filter(LocalNode::is_running) {
        if !node.url.is_empty() {
            return Ok((node, true));
        }
        // The command that started it was ended meanwhile: we have the lock.
        local::stop(&dir, &node)?;
    }
    let (bed, reason) = choose(&options.bed, &HostFacts::read())?;
    progress.say(&format!("starting node {} in {bed}: {reason}", options.name));
    let token = match &options.token {
        _ if options.no_auth => None,
        Some(token) => Some(token.clone()),
        None => Some(random::hex(32)),
    };
    // Bochs runs one core after the other: more of them only make each slower.
    let host_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let default_cores = if bed.is_qemu() { host_cores.min(MOST_DEFAULT_CORES) as u32 } else { 1 };
    let start = Options {
        bed,
        memory_mib: options.memory,
        cores: options.cpus.unwrap_or(default_cores),
        port: options.port,
        image: options.image.clone(),
        store: options.store.clone(),
        token,
    };
    let interrupted = || interrupt.exit_code().is_some();
    let phase = |phase: &str| progress.phase(phase);
    Ok((local::start(&dir, &options.name, &start, interrupted, phase)?, false))
}

/// What executes the node, and why.
fn choose(asked: &BedChoice, facts: &HostFacts) -> Result<(BedKind, String)> {
    match asked {
        BedChoice::Auto => Ok(facts.choose()),
        BedChoice::Named(BedKind::QemuKvm) => match facts.kvm_obstacle() {
            None => Ok((BedKind::QemuKvm, "as asked for".to_owned())),
            Some(obstacle) => {
                bail!("--bed qemu-kvm is not possible here: {obstacle}; leave out --bed, or give qemu-tcg")
            }
        },
        BedChoice::Named(bed) => Ok((bed.clone(), "as asked for".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_refused_with_the_reason_where_it_cannot_nest() {
        let facts =
            HostFacts { kvm_refused: None, kvm_module: Some("kvm_intel"), kvm_nested: Some("N".to_owned()) };
        let error = choose(&BedChoice::Named(BedKind::QemuKvm), &facts).unwrap_err().to_string();
        assert!(error.contains("kvm_intel") && error.contains("qemu-tcg"), "{error}");
        assert_eq!(choose(&BedChoice::Auto, &facts).unwrap().0, BedKind::QemuTcg);
    }

    #[test]
    fn a_bed_that_is_named_is_taken() {
        let facts =
            HostFacts { kvm_refused: None, kvm_module: Some("kvm_amd"), kvm_nested: Some("1".to_owned()) };
        for bed in [BedKind::QemuTcg, BedKind::QemuKvm, BedKind::bochs()] {
            assert_eq!(choose(&BedChoice::Named(bed.clone()), &facts).unwrap().0, bed);
        }
        assert_eq!(choose(&BedChoice::Auto, &facts).unwrap().0, BedKind::QemuKvm);
    }
}
