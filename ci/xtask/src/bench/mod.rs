//! `cargo xtask bench`: nestling beside a Linux L1 with KVM and QEMU, both sides run in turn within one invocation.
//!
//! A row is one entry of [`rows::ROWS`]; what it needs to be measured is one field of [`Samples`], filled by [`node`] and [`peer`].

mod machine;
mod node;
mod peer;
mod rows;
mod table;

use crate::build::{image, kernel};
use crate::setup::Toolchain;
use anyhow::{Result, bail};
use rows::{ROWS, Result as RowResult, Row, Samples};
use std::process::ExitCode;

/// Which rows to measure and how to show them. Exits with 1 when a goal is missed.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Rows to measure; all of them by default
    names: Vec<String>,
    /// Print JSON, with every single run, instead of a table
    #[arg(long)]
    json: bool,
    /// Runs of each side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// List the rows and measure nothing
    #[arg(long)]
    list: bool,
}

/// Measures the rows asked for and prints them.
pub(crate) fn run(toolchain: &Toolchain, arguments: &Arguments) -> Result<ExitCode> {
    if arguments.list {
        for row in &ROWS {
            println!("{:<14} {}, {}; goal: {}", row.name, row.figure, row.unit, row.goal);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let rows = chosen(&arguments.names)?;
    let node = node::Node { kernel: kernel(toolchain)?, images: image("minimal")? };
    let peer = peer::Peer::build()?;
    let mut samples: Vec<(Samples, Samples)> = Vec::new();
    for number in 1..=arguments.runs {
        eprint!("bench: run {number} of {}: nestling", arguments.runs);
        let ours = node.run(rows.iter().any(|row| row.needs_jobs))?;
        eprint!(", peer");
        let mut theirs = peer.run(false)?;
        if rows.iter().any(|row| row.name == "exits") {
            eprint!(", peer counting exits");
            theirs.exits = peer.run(true)?.exits;
        }
        eprintln!();
        samples.push((ours, theirs));
    }
    let results: Vec<RowResult> = rows.iter().map(|row| RowResult::of(row, &samples)).collect();
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&table::json(&results)?)?);
    } else {
        print!("{}", table::text(&results));
    }
    Ok(if results.iter().all(RowResult::ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The rows of these names; all of them if there is none.
fn chosen(names: &[String]) -> Result<Vec<&'static Row>> {
    if let Some(unknown) = names.iter().find(|name| ROWS.iter().all(|row| row.name != name.as_str())) {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("there is no row `{unknown}`; the rows are: {}", known.join(", "));
    }
    Ok(ROWS.iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name)).collect())
}
