//! The demonstration.
use crate::setup::Toolchain;
use anyhow::Result;
use std::process::ExitCode;

/// What to show.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Runs the demonstration.
pub(crate) fn run(_toolchain: &Toolchain, _arguments: &Arguments) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
