//! What runs L1's instructions: QEMU's emulator, or KVM where it can nest.

use std::fmt;
use std::fs::{self, OpenOptions};

/// How QEMU executes L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's own emulator: runs everywhere, slowly, and emulates AMD's SVM.
    Tcg,
    /// The host's KVM, which must offer AMD's SVM to its guests.
    Kvm,
}

impl Accelerator {
    /// The value of QEMU's `-accel`.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Accelerator::Tcg => "tcg,thread=multi",
            Accelerator::Kvm => "kvm",
        }
    }

    /// The value of QEMU's `-cpu` unless a caller wants another. L1 uses four-level paging, and QEMU's nested paging
    /// follows L1's mode: la57 stays off.
    pub fn default_cpu(self) -> &'static str {
        match self {
            Accelerator::Tcg => "max,-la57",
            Accelerator::Kvm => "host,-la57",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Tcg => "qemu-tcg",
            Accelerator::Kvm => "qemu-kvm",
        })
    }
}

/// The facts about this computer the choice rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Why `/dev/kvm` cannot be opened, or `None` when it can.
    pub kvm_refused: Option<String>,
    /// The CPU's vendor string, such as `AuthenticAMD`.
    pub cpu_vendor: String,
    /// What the module kvm_amd says of nesting (`1` or `Y` when it can), when it is loaded.
    pub kvm_amd_nested: Option<String>,
}

impl HostFacts {
    /// Reads them.
    pub fn read() -> HostFacts {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu_vendor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("vendor_id")?.split_once(':'))
            .map_or("unknown", |(_, vendor)| vendor.trim())
            .to_owned();
        HostFacts {
            kvm_refused: OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .err()
                .map(|error| error.to_string()),
            cpu_vendor,
            kvm_amd_nested: fs::read_to_string("/sys/module/kvm_amd/parameters/nested")
                .ok()
                .map(|value| value.trim().to_owned()),
        }
    }

    /// The faster accelerator that can run this release's L1, and the reason in a few words.
    pub fn choose(&self) -> (Accelerator, String) {
        match self.kvm_obstacle() {
            None => (Accelerator::Kvm, "KVM can nest here".to_owned()),
            Some(obstacle) => (Accelerator::Tcg, format!("emulated, since {obstacle}")),
        }
    }

    /// What keeps L1 from running on KVM, or `None`. This release's L1 drives AMD's SVM only.
    pub fn kvm_obstacle(&self) -> Option<String> {
        if let Some(error) = &self.kvm_refused {
            return Some(format!("/dev/kvm cannot be used ({error})"));
        }
        if self.cpu_vendor != "AuthenticAMD" {
            return Some(format!("this release needs AMD's SVM and the CPU's vendor is {}", self.cpu_vendor));
        }
        match self.kvm_amd_nested.as_deref() {
            Some("1" | "Y" | "y") => None,
            Some(_) => Some("kvm_amd was loaded without nested=1".to_owned()),
            None => Some("the module kvm_amd is not loaded".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd() -> HostFacts {
        HostFacts {
            kvm_refused: None,
            cpu_vendor: "AuthenticAMD".to_owned(),
            kvm_amd_nested: Some("1".to_owned()),
        }
    }

    #[test]
    fn kvm_is_chosen_only_where_it_can_nest_svm() {
        assert_eq!(amd().choose().0, Accelerator::Kvm);
        let refused = HostFacts { kvm_refused: Some("Permission denied".to_owned()), ..amd() };
        let intel = HostFacts { cpu_vendor: "GenuineIntel".to_owned(), ..amd() };
        let flat = HostFacts { kvm_amd_nested: Some("0".to_owned()), ..amd() };
        let unloaded = HostFacts { kvm_amd_nested: None, ..amd() };
        for (facts, reason) in [
            (refused, "Permission denied"),
            (intel, "GenuineIntel"),
            (flat, "nested=1"),
            (unloaded, "not loaded"),
        ] {
            let (accelerator, why) = facts.choose();
            assert_eq!(accelerator, Accelerator::Tcg);
            assert!(why.contains(reason), "{why}");
        }
    }
}
