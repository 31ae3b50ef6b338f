//! `nestling image`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nestling::image::{default_store, find};
use nestling_image_builder::build::{self, COMMAND_LINE, KernelSource, MODULES, Phase, Request};
use nestling_image_builder::{kernel, store};

use super::table;
use crate::cli::{Image, ImageAdd, ImageBuild, ImageList, ImageRemove};
use crate::terminal::{self, Progress};

/// The image in a node's bundle that the agent is taken from.
const MINIMAL: &str = "minimal";

pub(crate) fn image(command: &Image) -> Result<u8> {
    match command {
        Image::Build(options) => build(options),
        Image::Add(options) => add(options),
        Image::List(options) => list(options),
        Image::Remove(options) => remove(options),
    }?;
    Ok(0)
}

fn build(options: &ImageBuild) -> Result<()> {
    let out = options.output.clone().unwrap_or_else(|| format!("{}.tar", options.name).into());
    let kernel = match &options.kernel {
        None => KernelSource::Package(kernel::DEBIAN.to_owned()),
        Some(own) if own.as_os_str() == "own" && options.modules.is_some() => {
            bail!("--modules belongs to --kernel FILE; the root's own kernel has its modules there")
        }
        Some(own) if own.as_os_str() == "own" => KernelSource::Own,
        Some(image) => KernelSource::Files { image: image.clone(), modules: options.modules.clone() },
    };
    let agent = build::agent_of_bundle(&find(None)?, MINIMAL)?;
    let request = Request {
        name: &options.name,
        from: &options.from,
        prepare: &|_| Ok(()),
        kernel: &kernel,
        agent: &agent,
        version: env!("CARGO_PKG_VERSION"),
        command_line: COMMAND_LINE,
        modules: &MODULES.map(str::to_owned),
        environment: &[],
        free_mib: options.free,
        cache: &cache()?,
    };
    let progress = Progress::new(options.quiet);
    let mut shown = u64::MAX;
    let written = build::build(&request, &out, &mut |phase| match phase {
        Phase::Reading => progress.phase("reading the root file system"),
        Phase::Kernel => progress.phase("fetching the kernel"),
        Phase::Writing(done, all) => {
            // Without a terminal every phase is a line: the first is enough.
            let mib = if progress.is_live() { mib(done) } else { 0 };
            if shown != mib {
                shown = mib;
                let all = self::mib(all);
                progress.phase(&if mib == 0 {
                    format!("writing {all} MiB of files")
                } else {
                    format!("writing {mib} of {all} MiB of files")
                });
            }
        }
    })?;
    progress.finish();
    terminal::print(&format!("{}\n", out.display()))?;
    if !options.quiet {
        let disk = written.disk.unwrap_or(0);
        terminal::say(format_args!(
            "the disk has {} MiB and {} MiB free; next: nestling image add {}",
            mib(disk),
            options.free,
            shlex::try_quote(&out.to_string_lossy()).unwrap_or_default()
        ));
    }
    Ok(())
}

fn add(options: &ImageAdd) -> Result<()> {
    let store = store_or_default(options.to.as_deref())?;
    let added = store::add(&store, &options.bundles, options.replace)?;
    terminal::print(&format!("{} in {}\n", added.join(", "), store.display()))?;
    Ok(())
}

fn list(options: &ImageList) -> Result<()> {
    let store = store_or_default(options.store.as_deref())?;
    if options.store.is_none() && !store.exists() {
        terminal::say(format_args!(
            "{} is not there yet; `nestling image add BUNDLE` makes it",
            store.display()
        ));
        return Ok(());
    }
    let mut rows = vec![["NAME", "SIZE", "DISK", "VERSION"].map(str::to_owned).to_vec()];
    for image in store::list(&store)? {
        let disk = image.disk.map_or_else(|| "none".to_owned(), |disk| format!("{} MiB", mib(disk)));
        let size = format!("{} MiB", mib(image.size()));
        rows.push(vec![image.name, size, disk, image.version]);
    }
    terminal::print(&table::format(&rows))?;
    Ok(())
}

fn remove(options: &ImageRemove) -> Result<()> {
    store::remove(&store_or_default(options.from.as_deref())?, &options.name)
}

fn store_or_default(given: Option<&Path>) -> Result<PathBuf> {
    match given {
        Some(path) => Ok(path.to_owned()),
        None => default_store().context("there is no home for a store of images; set HOME or name a store"),
    }
}

/// Where downloaded packages are kept.
fn cache() -> Result<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache")));
    Ok(cache
        .context("there is no place for downloads; set HOME or XDG_CACHE_HOME")?
        .join("nestling/packages"))
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
