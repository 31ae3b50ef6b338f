//! What the operator decided of cores, on the kernel's command line.

use crate::boot::CommandLine;
use alloc::format;
use alloc::string::String;

/// How many vCPUs share a core at most, unless the command line says otherwise.
const VCPUS_PER_CORE: usize = 4;
/// More would each get next to nothing.
const VCPUS_PER_CORE_MAX: usize = 64;

const CLONE_RESERVE_MAX_MIB: usize = 1 << 20;

/// The command line's words, understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// How many cores to use at most.
    pub cores: usize,
    /// How many vCPUs there may be at once for each core in use.
    pub vcpus_per_core: usize,
    /// How much more memory than it has a clone may count on. `None`: as much as its size says, so that nothing that runs can ever fail for want
    /// of memory. With a number more clones fit, and one that finds nothing but what others were promised is ended.
    pub clone_reserve_bytes: Option<u64>,
    /// Whether each clone's end is followed by a look at every byte of its template, which must not have changed.
    pub check_templates: bool,
}

impl Settings {
    /// Reads `cores=`, `vcpus_per_core=`, `clone_reserve_mib=` and `check_templates=`. Other words are other modules' business.
    ///
    /// # Errors
    /// A message that names the word and what it should be.
    pub fn read(line: &CommandLine) -> Result<Self, String> {
        let cores = number(line, "cores", usize::MAX, usize::MAX, "a number of cores, 1 or more")?;
        let vcpus_per_core =
            number(line, "vcpus_per_core", VCPUS_PER_CORE, VCPUS_PER_CORE_MAX, "a number of vCPUs, 1 to 64")?;
        let reserve = line.value("clone_reserve_mib").map(|_| {
            number(line, "clone_reserve_mib", 0, CLONE_RESERVE_MAX_MIB, "a number of MiB, 1 to 1048576")
        });
        let clone_reserve_bytes = reserve.transpose()?.map(|mib| (mib as u64) << 20);
        let check_templates = match line.value("check_templates") {
            None | Some("off") => false,
            Some("on") => true,
            Some(other) => return Err(format!("check_templates={other} is neither on nor off")),
        };
        Ok(Self { cores, vcpus_per_core, clone_reserve_bytes, check_templates })
    }
}

fn number(line: &CommandLine, key: &str, default: usize, most: usize, what: &str) -> Result<usize, String> {
    let Some(text) = line.value(key) else { return Ok(default) };
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| format!("{key}={text} is not {what}"))
}
