//! Kernel modules: where they are in a kernel's package, and what they depend on.
//!
//! The package has no `modules.dep` (it is made when a kernel is installed), so the dependencies are read from the modules
//! themselves: the `depends=` entry of their `.modinfo` section, NUL-terminated strings.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::archive::unpacked_bytes;
use crate::content::Content;
use crate::directory;
use crate::tree::{Kind, Tree};

/// Most bytes of a module: the largest there are have some ten million.
const MAX_MODULE: u64 = 256 << 20;
/// How a module's file may be compressed.
const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];

/// The modules of one kernel.
pub struct Modules {
    files: BTreeMap<String, Content>,
    built_in: HashSet<String>,
}

/// One module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The file's bytes, not compressed.
    pub contents: Vec<u8>,
}

impl Modules {
    /// The modules below `root`, a kernel's unpacked package.
    ///
    /// # Errors
    /// When there are none.
    pub fn of_package(root: &Path) -> Result<Self> {
        let mut tree = Tree::new();
        directory::add(&mut tree, "", &root.join("lib/modules"))?;
        Self::find(&tree).with_context(|| root.display().to_string())
    }

    /// The modules anywhere in `tree`.
    ///
    /// # Errors
    /// When there are none.
    pub fn find(tree: &Tree) -> Result<Self> {
        let (mut files, mut built_in) = (BTreeMap::new(), HashSet::new());
        for (_, file, id) in tree.walk() {
            let (Kind::File(content), Ok(file)) = (&tree.node(id).kind, std::str::from_utf8(file)) else {
                continue;
            };
            if let Some(name) = SUFFIXES.iter().find_map(|suffix| file.strip_suffix(suffix)) {
                files.insert(normalized(name), content.clone());
            } else if file == "modules.builtin" {
                let list = String::from_utf8(content.read(MAX_MODULE)?)?;
                let names = list.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
                built_in.extend(names.map(normalized));
            }
        }
        if files.is_empty() {
            bail!("there are no modules (*.ko)");
        }
        Ok(Self { files, built_in })
    }

    /// Whether the kernel has `name`, in itself or as a module.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(&normalized(name)) || self.built_in.contains(&normalized(name))
    }

    /// The modules `wanted` and everything they depend on, in an order in which they can be loaded.
    ///
    /// # Errors
    /// When one is missing, is not a module or depends on itself; the message names it.
    pub fn closure(&self, wanted: &[String]) -> Result<Vec<Module>> {
        let mut modules = Vec::new();
        for name in wanted {
            self.add(&normalized(name), &mut modules, &mut Vec::new())?;
        }
        Ok(modules)
    }

    fn add(&self, name: &str, modules: &mut Vec<Module>, above: &mut Vec<String>) -> Result<()> {
        if modules.iter().any(|module| module.name == name) || self.built_in.contains(name) {
            return Ok(());
        }
        if above.iter().any(|other| other == name) {
            bail!("the module {name} depends on itself, through {}", above.join(", "));
        }
        let content = self.files.get(name).with_context(|| format!("the kernel has no module {name}"))?;
        let read = || unpacked_bytes(&content.read(MAX_MODULE)?);
        let contents = read().with_context(|| format!("cannot read the module {name}"))?;
        let depends = depends(&contents).with_context(|| format!("{name}.ko is not a module"))?;
        above.push(name.to_owned());
        for other in depends {
            self.add(&other, modules, above)?;
        }
        above.pop();
        modules.push(Module { name: name.to_owned(), contents });
        Ok(())
    }
}

/// `virtio-rng.ko` is the module `virtio_rng`.
fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

/// The modules that a module names in its `depends=` entry; none if there is no such entry.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    const ENTRY: &[u8] = b"\0depends=";
    let start = module.windows(ENTRY.len()).position(|window| window == ENTRY)?.checked_add(ENTRY.len())?;
    let list = module.get(start..)?.split(|&byte| byte == 0).next()?;
    let list = std::str::from_utf8(list).ok()?;
    Some(list.split(',').filter(|name| !name.is_empty()).map(normalized).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn modules(name: &str, dependencies: &[(&str, &str)]) -> (PathBuf, Modules) {
        let root = std::env::temp_dir().join(format!("nestling-modules-{name}-{}", std::process::id()));
        let folder = root.join("lib/modules/6.1/kernel");
        fs::create_dir_all(&folder).unwrap();
        fs::write(root.join("lib/modules/6.1/modules.builtin"), "kernel/drivers/rng-core.ko\n").unwrap();
        for (name, depends) in dependencies {
            fs::write(
                folder.join(format!("{name}.ko")),
                format!("ELF\0license=GPL\0depends={depends}\0name=x\0"),
            )
            .unwrap();
        }
        let found = Modules::of_package(&root).unwrap();
        (root, found)
    }

    #[test]
    fn a_module_comes_after_those_it_depends_on_and_only_once() {
        let tree = [
            ("virtio", "ring"),
            ("ring", ""),
            ("virtio-pci", "ring,virtio"),
            ("virtio-rng", "virtio,rng-core"),
        ];
        let (root, modules) = modules("order", &tree);
        let names: Vec<_> = modules.closure(&["virtio_rng".into(), "virtio_pci".into()]).unwrap();
        let names: Vec<_> = names.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["ring", "virtio", "virtio_rng", "virtio_pci"]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_missing_module_is_named() {
        let (root, modules) = modules("missing", &[("a", "b")]);
        let error = modules.closure(&["a".into()]).unwrap_err().to_string();
        assert!(error.contains("no module b"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_circle_of_modules_is_refused() {
        let (root, modules) = modules("circle", &[("a", "b"), ("b", "a")]);
        let error = modules.closure(&["a".into()]).unwrap_err().to_string();
        assert!(error.contains("depends on itself"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }
}
