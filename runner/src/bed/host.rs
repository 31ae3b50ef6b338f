//! Which bed this computer is good for, and why.

use std::fs::{self, OpenOptions};

use super::BedKind;

/// The facts about this computer the choice rests on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Why `/dev/kvm` cannot be opened, or `None` when it can.
    pub kvm_refused: Option<String>,
    /// KVM's module for this CPU's vendor, or `None` for a vendor L1 does not know.
    pub kvm_module: Option<&'static str>,
    /// What that module says of nesting (`1` or `Y` when it can), when it is loaded.
    pub kvm_nested: Option<String>,
}

impl HostFacts {
    /// Reads them.
    pub fn read() -> HostFacts {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let vendor =
            cpuinfo.lines().find_map(|line| Some(line.strip_prefix("vendor_id")?.split_once(':')?.1.trim()));
        let kvm_module = match vendor {
            Some("AuthenticAMD" | "HygonGenuine") => Some("kvm_amd"),
            Some("GenuineIntel") => Some("kvm_intel"),
            _ => None,
        };
        let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        let kvm_nested = kvm_module
            .and_then(|module| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok())
            .map(|value| value.trim().to_owned());
        HostFacts { kvm_refused: opened.err().map(|error| error.to_string()), kvm_module, kvm_nested }
    }

    /// The fastest bed that can run L1, and the reason in a few words. Never Bochs, which is for tests.
    pub fn choose(&self) -> (BedKind, String) {
        match self.kvm_obstacle() {
            None => (BedKind::QemuKvm, "KVM can nest here".to_owned()),
            Some(obstacle) => (BedKind::QemuTcg, format!("emulated, since {obstacle}")),
        }
    }

    /// What keeps L1 from running on KVM, or `None`.
    pub fn kvm_obstacle(&self) -> Option<String> {
        if let Some(error) = &self.kvm_refused {
            return Some(format!("/dev/kvm cannot be used ({error})"));
        }
        let Some(module) = self.kvm_module else {
            return Some("the CPU is neither AMD's nor Intel's".to_owned());
        };
        match self.kvm_nested.as_deref() {
            Some("1" | "Y" | "y") => None,
            Some(_) => Some(format!("{module} was loaded without nested=1")),
            None => Some(format!("the module {module} is not loaded")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(module: &'static str, nested: &str) -> HostFacts {
        HostFacts { kvm_refused: None, kvm_module: Some(module), kvm_nested: Some(nested.to_owned()) }
    }

    #[test]
    fn kvm_is_chosen_on_both_vendors_where_it_can_nest() {
        assert_eq!(facts("kvm_amd", "1").choose().0, BedKind::QemuKvm);
        assert_eq!(facts("kvm_intel", "Y").choose().0, BedKind::QemuKvm);
    }

    #[test]
    fn where_kvm_cannot_nest_the_emulator_is_chosen_with_the_reason() {
        let able = facts("kvm_intel", "Y");
        for (facts, reason) in [
            (
                HostFacts { kvm_refused: Some("Permission denied".to_owned()), ..able.clone() },
                "Permission denied",
            ),
            (HostFacts { kvm_module: None, ..able.clone() }, "neither AMD's nor Intel's"),
            (facts("kvm_amd", "0"), "kvm_amd was loaded without nested=1"),
            (facts("kvm_intel", "N"), "kvm_intel was loaded without nested=1"),
            (HostFacts { kvm_nested: None, ..able }, "the module kvm_intel is not loaded"),
        ] {
            let (bed, why) = facts.choose();
            assert_eq!(bed, BedKind::QemuTcg);
            assert!(why.contains(reason), "{why}");
        }
    }
}
