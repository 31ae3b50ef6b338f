//! Benchmarks.
mod machine;
mod peer;
use crate::setup::Toolchain;
use anyhow::Result;
use std::process::ExitCode;

/// Which rows to measure.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Measures.
pub(crate) fn run(_toolchain: &Toolchain, _arguments: &Arguments) -> Result<ExitCode> {
    let peer = peer::Peer::build()?;
    for count in [false, true, false] {
        let run = peer.run(count)?;
        println!("{:?} {:?} {:?} {:?}", run.cold, run.boot, run.job, run.exits);
    }
    Ok(ExitCode::SUCCESS)
}
