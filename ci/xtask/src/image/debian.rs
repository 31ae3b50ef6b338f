//! A root file system installed from a Debian suite by mmdebstrap, without privileges where it is not root who calls it.
//!
//! It is fetched as this computer's apt fetches, and a job in the image fetches from the same servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nestling_image_builder::build::{self, FREE_MIB, KernelSource, Request, Source};
use nestling_image_builder::{Content, Tree, sha256};

use super::recipe::{Distribution, Recipe};
use crate::process::{output, run};
use crate::setup;

/// Debian's keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// dpkg's settings in the image, which hold while it is made, too.
const DPKG: &str = "etc/dpkg/dpkg.cfg.d/nestling";
/// What mmdebstrap leaves behind of how this computer fetches.
const LEFTOVERS: [&str; 2] = ["etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap"];

/// A root that can be built.
pub(super) struct Plan {
    /// What decides how it comes out, beside the recipe: the versions of the packages that the recipe names.
    pub(super) inputs: String,
    distribution: Distribution,
}

impl Plan {
    /// Asks apt for versions.
    pub(super) fn new(recipe: &Recipe, distribution: &Distribution) -> Result<Self> {
        setup::ensure_images()?;
        let mut show = Command::new("apt-cache");
        show.args(["show", "--no-all-versions"]).args(&distribution.packages);
        let shown =
            output(&mut show).with_context(|| format!("the packages of the image {}", recipe.name))?;
        let wanted = |line: &&str| line.starts_with("Package: ") || line.starts_with("SHA256: ");
        let inputs = shown.lines().filter(wanted).collect::<Vec<_>>().join("\n");
        Ok(Self { inputs, distribution: distribution.clone() })
    }

    /// Builds the image.
    pub(super) fn build(&self, recipe: &Recipe, agent: &[u8], out: &Path, cache: &Path) -> Result<()> {
        let root = self.root(recipe, cache)?;
        let prepare = |tree: &mut Tree| {
            LEFTOVERS.iter().try_for_each(|path| tree.remove(path.as_bytes()))?;
            for (path, (contents, executable)) in &recipe.files {
                tree.file(path, Content::bytes(contents.clone()), if *executable { 0o755 } else { 0o644 })?;
            }
            Ok(())
        };
        let environment: Vec<_> = self.distribution.environment.clone().into_iter().collect();
        let request = Request {
            name: &recipe.name,
            from: &Source::Path(root),
            prepare: &prepare,
            kernel: &KernelSource::Package(recipe.kernel.clone()),
            agent,
            version: env!("CARGO_PKG_VERSION"),
            command_line: &recipe.command_line,
            modules: &recipe.modules,
            environment: &environment,
            free_mib: FREE_MIB,
            cache,
        };
        let written = build::build(&request, out, &mut |_| {})?;
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let disk = written.disk.unwrap_or(0);
        eprintln!("image: {}: disk {} MiB, bundle {} MiB", recipe.name, mib(disk), mib(written.size));
        Ok(())
    }

    /// The root as an archive, kept so that a change of the agent does not install everything anew.
    fn root(&self, recipe: &Recipe, cache: &Path) -> Result<PathBuf> {
        fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
        let dpkg = recipe.files.get(DPKG).map(|(text, _)| text.clone()).unwrap_or_default();
        let inputs = [self.inputs.as_bytes(), &serde_json::to_vec(&self.distribution)?, &dpkg].concat();
        let path = cache.join(format!("{}-root-{}.tar", recipe.name, &sha256(&inputs)[..16]));
        if path.is_file() {
            return Ok(path);
        }
        eprintln!("image: installing the root of {}: some minutes", recipe.name);
        let folder = cache.join(format!("{}-root.new", recipe.name));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder)?;
        let (settings, lists, new) =
            (folder.join("apt.conf"), folder.join("debian.list"), folder.join("root.tar"));
        fs::write(folder.join("dpkg.cfg"), &dpkg)?;
        fs::write(&settings, fetching()?)?;
        fs::write(&lists, self.sources()?)?;
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap.args(["--quiet", "--mode=auto", "--format=tar", "--variant=minbase"]);
        mmdebstrap.arg(format!("--include={}", self.distribution.packages.join(",")));
        mmdebstrap.arg("--aptopt").arg(&settings).arg("--dpkgopt").arg(folder.join("dpkg.cfg"));
        mmdebstrap.arg(&self.distribution.suite).arg(&new).arg(&lists);
        if let Some(time) = newest_release()? {
            mmdebstrap.env("SOURCE_DATE_EPOCH", time);
        }
        run(&mut mmdebstrap)?;
        fs::rename(&new, &path)?;
        fs::remove_dir_all(&folder)?;
        Ok(path)
    }

    /// Where this computer's apt gets the suite from.
    fn sources(&self) -> Result<String> {
        const FORMAT: &str = "$(ORIGIN) $(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)";
        let suite = &self.distribution.suite;
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            FORMAT,
            "Created-By: Packages",
        ]))?;
        let sources = sources_of(&targets, suite);
        if sources.is_empty() {
            bail!(
                "this computer's apt knows no Debian {suite}: build the image on Debian {suite}, or in a container of it, after `apt-get update`"
            );
        }
        Ok(sources)
    }
}

/// Lines of a sources.list for `suite` and its updates, from `ORIGIN CODENAME URI RELEASE COMPONENT` lines.
fn sources_of(targets: &str, suite: &str) -> String {
    let mut lines = String::new();
    for target in targets.lines() {
        let [origin, codename, uri, release, component] = target.split(' ').collect::<Vec<_>>()[..] else {
            continue;
        };
        let own = codename.strip_prefix(suite).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        if origin == "Debian" && own {
            lines.push_str(&format!("deb [signed-by={KEYRING}] {uri} {release} {component}\n"));
        }
    }
    lines
}

/// This computer's settings for fetching: proxies, retries.
fn fetching() -> Result<String> {
    let settings = output(Command::new("apt-config").args(["dump", "--format", "%F \"%v\";%n", "Acquire"]))?;
    let wanted = ["Acquire::http", "Acquire::https", "Acquire::Retries"];
    Ok(settings
        .lines()
        .filter(|line| wanted.iter().any(|name| line.starts_with(name)) && !line.ends_with(" \"\";"))
        .map(|line| format!("{line}\n"))
        .collect())
}

/// When the newest of apt's lists was made, in seconds since 1970: nothing in the image has a later time, and packages' files have earlier
/// ones, so that they keep theirs.
fn newest_release() -> Result<Option<String>> {
    let mut newest = None;
    for entry in fs::read_dir("/var/lib/apt/lists").into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().contains("Release") {
            continue;
        }
        let text = fs::read(entry.path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let Some(date) = text.lines().take(40).find_map(|line| line.strip_prefix("Date: ")) else { continue };
        let seconds: Option<u64> =
            output(Command::new("date").args(["-u", "+%s", "-d", date]))?.trim().parse().ok();
        newest = newest.max(seconds);
    }
    Ok(newest.map(|seconds| seconds.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_suite_is_a_source() {
        let targets = "Debian bookworm http://host/debian/ bookworm main\n\
            Debian bookworm-security http://host/security/ bookworm-security main\n\
            Debian trixie http://host/debian/ trixie main\nNode nodistro http://node/ nodistro main\nodd\n";
        assert_eq!(
            sources_of(targets, "bookworm"),
            format!(
                "deb [signed-by={KEYRING}] http://host/debian/ bookworm main\n\
                 deb [signed-by={KEYRING}] http://host/security/ bookworm-security main\n"
            )
        );
        assert_eq!(sources_of(targets, "sid"), "");
    }
}
