//! `nestling artifacts`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use nestling::ready::printable;

use super::files::{Fetch, Fetched, size};
use super::run::short;
use super::{table, target};
use crate::cli::Artifacts;
use crate::terminal::{self, Progress};

/// All there are.
const ALL: &str = "*";

pub(crate) fn artifacts(options: &Artifacts) -> Result<u8> {
    let client = target::require(&options.node)?.client;
    let id = target::job_id(&client, &options.id)?;
    let directory = match &options.dir {
        Some(directory) => directory.clone(),
        None => PathBuf::from(format!("artifacts-{}", short(&id))),
    };
    let globs = if options.artifact.is_empty() {
        must_be_empty(&directory)?;
        vec![ALL.to_owned()]
    } else {
        options.artifact.clone()
    };
    let progress = Progress::new(options.quiet);
    let fetch = Fetch {
        client: &client,
        id: &id,
        directory: &directory,
        globs: &globs,
        progress: &progress,
        alone: true,
    };
    let fetched = fetch.run(&AtomicBool::new(false));
    progress.finish();
    match fetched? {
        Fetched::Here(unpacked) => {
            let row = |(path, bytes): &(PathBuf, u64)| {
                vec![size(*bytes), printable(&directory.join(path).to_string_lossy())]
            };
            terminal::print(&table::format(&unpacked.names.iter().map(row).collect::<Vec<_>>()))?;
            Ok(0)
        }
        Fetched::None => Ok(0),
        Fetched::Over => {
            // The node knows best why.
            client.artifacts_tar(&id).map(drop)?;
            bail!("the artifacts of the job {id} are gone with its machine")
        }
    }
}

/// The machine names the files, and nobody trusts it: it must not be able to replace any of the user's.
fn must_be_empty(directory: &Path) -> Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| {
            format!("{} cannot be written; give --dir a new directory", directory.display())
        }),
    };
    if entries?.next().is_some() {
        bail!(
            "{} is not empty, and files in it could be replaced: give --dir a new directory, or say with --artifact GLOB \
             which files to take",
            directory.display()
        );
    }
    Ok(())
}
