//! `cargo xtask`: set-up, images, tests, demo and benchmarks of the workspace.
//!
//! Every command installs what it needs first; `cargo xtask setup` does that alone.

mod bench;
mod build;
mod demo;
mod image;
mod matrix;
mod process;
mod setup;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// What to do with the workspace.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Set-up, images, tests, demo and benchmarks of nestling"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need (Debian packages, the kernel's target); every other command installs what it needs itself
    Setup,
    /// Build everything, start a node, run a job that inspects its machine, and show where the time went
    Demo(demo::Arguments),
    /// Check formatting and lints, run the host tests and the booting tests, build the documentation
    Test(test::Arguments),
    /// Run the tests that hold everywhere on every CPU model of a list, in Bochs: takes long, for the night
    Matrix(matrix::Arguments),
    /// Build a guest image: `cargo xtask image minimal`, `cargo xtask image debian`
    Image {
        /// The image's name
        #[arg(default_value = "minimal")]
        name: String,
    },
    /// Compare with a Linux L1 running KVM and QEMU, both sides in one invocation
    Bench(bench::Arguments),
    /// Check formatting and lints only
    Lint,
    /// Build the kernel and the command, release profile
    Build,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    std::env::set_current_dir(build::workspace_root())?;
    let toolchain = setup::ensure()?;
    match command {
        Command::Setup => setup::ensure_bochs().map(|()| ExitCode::SUCCESS),
        Command::Demo(arguments) => demo::run(&toolchain, &arguments),
        Command::Test(arguments) => test::run(&toolchain, &arguments),
        Command::Matrix(arguments) => matrix::run(&toolchain, &arguments),
        Command::Lint => test::run(&toolchain, &test::Arguments::lints()),
        Command::Image { name } => {
            println!("{}", build::image(&name)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Bench(arguments) => bench::run(&toolchain, &arguments),
        Command::Build => {
            println!("{}", build::kernel(&toolchain)?.display());
            println!("{}", build::runner(&toolchain)?.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}
