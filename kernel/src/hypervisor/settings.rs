//! What the operator decided of cores, on the kernel's command line.

use crate::boot::CommandLine;
use alloc::format;
use alloc::string::String;

/// How many vCPUs share a core at most, unless the command line says otherwise.
const VCPUS_PER_CORE: usize = 4;
/// More would each get next to nothing.
const VCPUS_PER_CORE_MAX: usize = 64;

/// The command line's words, understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// How many cores to use at most.
    pub cores: usize,
    /// How many vCPUs there may be at once for each core in use.
    pub vcpus_per_core: usize,
}

impl Settings {
    /// Reads `cores=` and `vcpus_per_core=`. Other words are other modules' business.
    ///
    /// # Errors
    /// A message that names the word and what it should be.
    pub fn read(line: &CommandLine) -> Result<Self, String> {
        let cores = number(line, "cores", usize::MAX, usize::MAX, "a number of cores, 1 or more")?;
        let vcpus_per_core =
            number(line, "vcpus_per_core", VCPUS_PER_CORE, VCPUS_PER_CORE_MAX, "a number of vCPUs, 1 to 64")?;
        Ok(Self { cores, vcpus_per_core })
    }
}

fn number(line: &CommandLine, key: &str, default: usize, most: usize, what: &str) -> Result<usize, String> {
    let Some(text) = line.value(key) else { return Ok(default) };
    let number = text.parse().ok().filter(|number| (1..=most).contains(number));
    number.ok_or_else(|| format!("{key}={text} is not {what}"))
}
