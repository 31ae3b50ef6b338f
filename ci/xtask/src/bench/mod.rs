//! `cargo xtask bench`: nestling beside a Linux L1 with KVM and QEMU, both sides run in turn within one invocation.
//!
//! A row is one entry of [`rows::all`]; what it needs to be measured is one field of [`Samples`], filled by [`node`] and [`peer`].

mod loaded_peer;
mod loads;
mod machine;
mod node;
mod peer;
mod rows;
mod table;

use crate::build::{image, kernel, runner};
use crate::setup::{self, Toolchain};
use anyhow::{Result, bail};
use loaded_peer::LoadedPeer;
use loads::{LOADS, Servers};
use rows::{Needs, Result as RowResult, Row, Samples};
use std::path::PathBuf;
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
        for row in rows::all() {
            println!("{:<23} {}, {}; goal: {}", row.name, row.figure, row.unit, row.goal);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let rows = chosen(&arguments.names)?;
    let needs = |what: Needs| rows.iter().any(|row| row.needs == what);
    let wanted: Vec<usize> = (0..LOADS.len()).filter(|index| needs(Needs::Load(*index))).collect();
    let kernel = kernel(toolchain)?;
    let boots = if needs(Needs::Boot) || needs(Needs::Jobs) {
        Some((node::Node { kernel: kernel.clone(), images: image("minimal")? }, peer::Peer::build()?))
    } else {
        None
    };
    let loads = if wanted.is_empty() { None } else { Some(Loads::prepare(toolchain, &wanted)?) };
    let mut samples: Vec<(Samples, Samples)> = Vec::new();
    for number in 1..=arguments.runs {
        eprint!("bench: run {number} of {}:", arguments.runs);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        if let Some((node, peer)) = &boots {
            eprint!(" nestling");
            ours = node.run(needs(Needs::Jobs))?;
            eprint!(", peer");
            theirs = peer.run(false)?;
            if rows.iter().any(|row| row.name == "exits") {
                eprint!(", peer counting exits");
                theirs.exits = peer.run(true)?.exits;
            }
        }
        if let Some(loads) = &loads {
            let command = loads.servers.command(&loads.wanted);
            eprint!(" loads of nestling");
            ours.loads = node::run_loads(&kernel, &loads.store, &command)?.loads;
            eprint!(", loads of the peer");
            theirs.loads = loads.peer.run(&loads.root, &command)?.loads;
        }
        eprintln!();
        samples.push((ours, theirs));
    }
    let results: Vec<RowResult> = rows.into_iter().map(|row| RowResult::of(row, &samples)).collect();
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&table::json(&results)?)?);
    } else {
        print!("{}", table::text(&results));
    }
    Ok(if results.iter().all(RowResult::ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What the loads need.
struct Loads {
    wanted: Vec<usize>,
    /// The root file system for the peer, with a little to spare.
    root: PathBuf,
    /// A bundle with an image of the same root for a node.
    store: PathBuf,
    servers: Servers,
    peer: LoadedPeer,
}

impl Loads {
    fn prepare(toolchain: &Toolchain, wanted: &[usize]) -> Result<Self> {
        setup::ensure_loads()?;
        let root = loads::root()?;
        Ok(Self {
            wanted: wanted.to_vec(),
            root: loads::ext4(&root)?,
            store: loads::store(&root, &runner(toolchain)?)?,
            servers: Servers::start()?,
            peer: LoadedPeer::build()?,
        })
    }
}

/// The rows of these names; all of them if there is none.
fn chosen(names: &[String]) -> Result<Vec<Row>> {
    let rows = rows::all();
    if let Some(unknown) = names.iter().find(|name| rows.iter().all(|row| row.name != **name)) {
        let known: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        bail!("there is no row `{unknown}`; the rows are: {}", known.join(", "));
    }
    Ok(rows.into_iter().filter(|row| names.is_empty() || names.contains(&row.name)).collect())
}
