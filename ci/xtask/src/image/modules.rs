//! Kernel modules: where they are in a kernel's package, and what they depend on.
//!
//! The package has no `modules.dep` (it is made when a kernel is installed), so the dependencies are read from the modules
//! themselves: the `depends=` entry of their `.modinfo` section, NUL-terminated strings.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The modules of one kernel.
pub(crate) struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
}

/// One module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name, with underscores.
    pub(crate) name: String,
    /// The file's bytes.
    pub(crate) contents: Vec<u8>,
}

impl Modules {
    /// Finds the modules below `root`, a kernel's unpacked package.
    pub(crate) fn find(root: &Path) -> Result<Self> {
        let folder = root.join("lib/modules");
        let (mut files, mut built_in) = (BTreeMap::new(), Vec::new());
        let mut folders = vec![folder.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let path = entry?.path();
                let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = file.strip_suffix(".ko") {
                    files.insert(normalized(name), path);
                } else if file == "modules.builtin" {
                    let list = fs::read_to_string(&path)?;
                    let names = list.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
                    built_in.extend(names.map(normalized));
                }
            }
        }
        if files.is_empty() {
            bail!("there are no uncompressed modules (*.ko) in {}", folder.display());
        }
        Ok(Self { files, built_in })
    }

    /// The modules `wanted` and everything they depend on, in an order in which they can be loaded.
    pub(crate) fn closure(&self, wanted: &[String]) -> Result<Vec<Module>> {
        let mut modules = Vec::new();
        for name in wanted {
            self.add(&normalized(name), &mut modules, &mut Vec::new())?;
        }
        Ok(modules)
    }

    fn add(&self, name: &str, modules: &mut Vec<Module>, above: &mut Vec<String>) -> Result<()> {
        if modules.iter().any(|module| module.name == name) || self.built_in.iter().any(|other| other == name)
        {
            return Ok(());
        }
        if above.iter().any(|other| other == name) {
            bail!("the module {name} depends on itself, through {}", above.join(", "));
        }
        let path =
            self.files.get(name).with_context(|| format!("the kernel's package has no module {name}"))?;
        let contents = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let depends = depends(&contents).with_context(|| format!("{} is not a module", path.display()))?;
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
        let found = Modules::find(&root).unwrap();
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
