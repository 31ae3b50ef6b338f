//! Building guest images: a Debian kernel, unmodified, the agent, and a root file system: in the initramfs, or on a disk.
//!
//! An image is described by `images/guest/NAME/recipe.json` and the files under `images/guest/NAME/root`. What comes out is
//! `target/images/NAME.tar`, a bundle as the node reads it. The same inputs give the same bytes: nothing in a bundle has a time, an
//! owner or an order of its own.

mod agent;
mod debian;
mod memory;
pub(crate) mod recipe;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nestling_image_builder::{hex, packages};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::build::workspace_root;
use recipe::Recipe;

/// The folders whose files decide how the same inputs are put together: a change there makes every image anew.
const BUILDER: [&str; 3] = ["ci/xtask/src/image", "images/builder/src", "images/builder/src/ext4"];

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
    let (path, cache) = (folder.join(format!("{name}.tar")), folder.join("cache"));
    let kernel = packages::resolve(&recipe.kernel)?;
    let others =
        recipe.packages.iter().map(|package| packages::resolve(package)).collect::<Result<Vec<_>>>()?;

    let mut inputs = Sha256::new();
    digest_builder(&mut inputs)?;
    inputs.update(Sha256::digest(&agent));
    for package in others.iter().chain([&kernel]) {
        inputs.update(format!("{} {}\n", package.name, package.sha256));
    }
    recipe.digest_into(&mut inputs)?;
    let root = recipe.root.as_ref().map(|root| debian::Plan::new(&recipe, root)).transpose()?;
    root.iter().for_each(|root| inputs.update(&root.inputs));
    let inputs = hex(&inputs.finalize());

    let stamp_path = folder.join(format!("{name}.stamp.json"));
    let stamp = fs::read(&stamp_path).ok().and_then(|text| serde_json::from_slice::<Stamp>(&text).ok());
    if let Some(stamp) = stamp
        && stamp.inputs == inputs
        && bundle_is(&path, &stamp.bundle)
    {
        return Ok(path);
    }

    if let Some(root) = root {
        root.build(&recipe, &agent, &path, &cache)?;
    } else {
        let kernel_root = packages::unpack(&kernel, &cache)?;
        let roots =
            others.iter().map(|package| packages::unpack(package, &cache)).collect::<Result<Vec<_>>>()?;
        let agent_len = agent.len();
        let image = memory::gather(&recipe, agent, &kernel, &kernel_root, &roots)?;
        image.write_to(&path, &mut |_, _| {})?;
        eprintln!(
            "image: {name}: agent {}, initramfs {}, kernel {}",
            kib(agent_len),
            kib(image.initramfs.len()),
            kib(image.kernel.len())
        );
    }
    let stamp = Stamp { inputs, bundle: digest(&path)? };
    write_at_once(&stamp_path, &serde_json::to_vec(&stamp)?)?;
    eprintln!("image: {} {}", path.display(), stamp.bundle);
    Ok(path)
}

/// Whether a bundle stands as it was built. A large one is known by its size: to read it would take longer than the build's other checks.
fn bundle_is(path: &Path, digest_then: &str) -> bool {
    const LARGE: u64 = 64 << 20;
    let len = fs::metadata(path).map_or(0, |bundle| bundle.len());
    if len > LARGE {
        return digest_then.ends_with(&format!(" {len} bytes"));
    }
    digest(path).is_ok_and(|now| now == digest_then)
}

/// A bundle's digest and size, as messages and stamps have them.
fn digest(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut hash, mut buffer, mut len) = (Sha256::new(), vec![0; 1 << 20], 0_u64);
    loop {
        match std::io::Read::read(&mut file, &mut buffer)? {
            0 => return Ok(format!("sha256:{} {len} bytes", hex(&hash.finalize()))),
            read => {
                hash.update(&buffer[..read]);
                len += read as u64;
            }
        }
    }
}

/// Adds the builder's own sources.
fn digest_builder(digest: &mut Sha256) -> Result<()> {
    for folder in BUILDER {
        let folder = workspace_root().join(folder);
        let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.sort();
        for file in files.iter().filter(|file| file.is_file()) {
            digest.update(Sha256::digest(fs::read(file)?));
        }
    }
    Ok(())
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

fn kib(bytes: usize) -> String {
    format!("{} KiB", bytes.div_ceil(1024))
}
