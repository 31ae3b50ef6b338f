//! Building guest images: a Debian kernel, unmodified, and an initramfs of the agent, some Debian packages and modules.
//!
//! An image is described by `images/guest/NAME/recipe.json` and the files under `images/guest/NAME/root`. What comes out is
//! `target/images/NAME.tar`, a bundle as the node reads it. The same inputs give the same bytes: nothing in a bundle has a time, an
//! owner or an order of its own.

mod agent;
mod bundle;
pub(crate) mod modules;
pub(crate) mod packages;
pub(crate) mod recipe;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::build::workspace_root;
use recipe::Recipe;

/// What decides how the same inputs are put together: a change here makes every image anew.
const BUILDER: [&str; 4] = [
    include_str!("image/agent.rs"),
    include_str!("image/bundle.rs"),
    include_str!("image/modules.rs"),
    include_str!("cpio.rs"),
];

/// What the last build was made from and what came out, kept beside the bundle.
#[derive(PartialEq, Serialize, Deserialize)]
struct Stamp {
    inputs: String,
    bundle: String,
}

/// Builds the image `name`, unless it stands and its inputs have not changed; the path of its bundle.
pub(crate) fn build(name: &str) -> Result<PathBuf> {
    let recipe = Recipe::read(&workspace_root().join("images/guest"), name)?;
    let folder = images();
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    // One build at a time: tests, demo and bench may all ask for the same image.
    let lock = fs::File::create(folder.join(".lock")).context("cannot create a lock in target/images")?;
    lock.lock().context("cannot lock target/images")?;

    let agent = agent::build(&folder.join("build"))?;
    let kernel = packages::resolve(&recipe.kernel)?;
    let others =
        recipe.packages.iter().map(|package| packages::resolve(package)).collect::<Result<Vec<_>>>()?;

    let mut inputs = Sha256::new();
    inputs.update(BUILDER.concat());
    inputs.update(Sha256::digest(&agent));
    for package in others.iter().chain([&kernel]) {
        inputs.update(format!("{} {}\n", package.name, package.sha256));
    }
    recipe.digest_into(&mut inputs)?;
    let inputs = hex(&inputs.finalize());

    let (path, stamp_path) = (folder.join(format!("{name}.tar")), folder.join(format!("{name}.stamp.json")));
    let stamp = fs::read(&stamp_path).ok().and_then(|text| serde_json::from_slice::<Stamp>(&text).ok());
    if let Some(stamp) = stamp
        && stamp.inputs == inputs
        && fs::read(&path).is_ok_and(|bytes| sha256(&bytes) == stamp.bundle)
    {
        return Ok(path);
    }

    let cache = folder.join("cache");
    let kernel_root = packages::unpack(&kernel, &cache)?;
    let roots = others.iter().map(|package| packages::unpack(package, &cache)).collect::<Result<Vec<_>>>()?;
    let contents = bundle::Contents::gather(&recipe, agent, &kernel, &kernel_root, &roots)?;
    let bytes = contents.bundle()?;
    write_at_once(&path, &bytes)?;
    let stamp = Stamp { inputs, bundle: sha256(&bytes) };
    write_at_once(&stamp_path, &serde_json::to_vec(&stamp)?)?;
    eprintln!(
        "image: {name}: agent {}, initramfs {}, kernel {}",
        kib(contents.agent_len),
        kib(contents.initramfs.len()),
        kib(contents.kernel.len())
    );
    eprintln!("image: {} sha256:{}", path.display(), stamp.bundle);
    Ok(path)
}

/// Where images, and what they are made from, are kept.
fn images() -> PathBuf {
    workspace_root().join("target/images")
}

/// Writes a file so that nobody ever sees half of it.
fn write_at_once(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, bytes).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, path).with_context(|| format!("cannot write {}", path.display()))
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn kib(bytes: usize) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}
