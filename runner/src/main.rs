//! `nestling`, the command.

mod cli;
mod commands;
mod terminal;

use std::io;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

/// Exit code when the system failed rather than the job (docker's habit).
const SYSTEM_FAILURE: u8 = 125;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // `run` ends with the job's code: a failure of its own must not look like one.
    let failure = if matches!(command, Command::Run(_)) { SYSTEM_FAILURE } else { 1 };
    let result = match command {
        Command::Up(options) => commands::up::up(&options),
        Command::Down(options) => commands::down::down(&options),
        Command::Run(options) => commands::run::run(&options),
        Command::Status(options) => commands::status::status(&options),
        Command::Jobs(options) => commands::jobs::jobs(&options),
        Command::Logs(options) => commands::logs::logs(&options),
        Command::Artifacts(options) => commands::artifacts::artifacts(&options),
        Command::Connections(options) => commands::connections::connections(&options),
        Command::Cancel(options) => commands::cancel::cancel(&options),
        Command::Image(command) => commands::image::image(&command),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::say(format_args!("{error:#}"));
            ExitCode::from(failure)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
