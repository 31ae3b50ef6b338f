//! Tests.
use crate::setup::Toolchain;
use anyhow::Result;
use std::process::ExitCode;

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

impl Arguments {
    pub(crate) fn lints() -> Self {
        Self {}
    }
}

/// Runs the tests.
pub(crate) fn run(_toolchain: &Toolchain, _arguments: &Arguments) -> Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
