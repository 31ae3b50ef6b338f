//! The beds a node can run in, by the names users give them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What executes L1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum BedKind {
    /// QEMU's own emulator: runs everywhere, and emulates AMD's SVM.
    #[default]
    QemuTcg,
    /// QEMU on the host's KVM, which must offer SVM or VMX to its guests.
    QemuKvm,
    /// Bochs: runs everywhere, and emulates Intel's VMX or AMD's SVM, by its CPU model.
    Bochs {
        /// One of `bochs -help cpu`.
        model: String,
    },
}

impl BedKind {
    /// The CPU of a Bochs that nobody gave another: VMX with all that L1 needs.
    pub const BOCHS_DEFAULT_MODEL: &str = "corei7_haswell_4770";

    /// Bochs with the model that has VMX.
    pub fn bochs() -> BedKind {
        BedKind::Bochs { model: BedKind::BOCHS_DEFAULT_MODEL.to_owned() }
    }

    /// How many times as long as QEMU's emulator this bed may take: limits on waiting are multiplied by it.
    pub fn slowness(&self) -> u32 {
        match self {
            BedKind::QemuTcg | BedKind::QemuKvm => 1,
            BedKind::Bochs { .. } => 8,
        }
    }

    /// Whether it is QEMU, with QEMU's control socket and options.
    pub fn is_qemu(&self) -> bool {
        !matches!(self, BedKind::Bochs { .. })
    }
}

impl fmt::Display for BedKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BedKind::QemuTcg => f.write_str("qemu-tcg"),
            BedKind::QemuKvm => f.write_str("qemu-kvm"),
            BedKind::Bochs { model } => write!(f, "bochs:{model}"),
        }
    }
}

impl FromStr for BedKind {
    type Err = UnknownBed;

    fn from_str(name: &str) -> Result<BedKind, UnknownBed> {
        match name {
            "qemu-tcg" => Ok(BedKind::QemuTcg),
            "qemu-kvm" => Ok(BedKind::QemuKvm),
            "bochs" => Ok(BedKind::bochs()),
            _ => match name.strip_prefix("bochs:") {
                // Bochs itself knows its models; the word goes into its configuration file.
                Some(model) if is_word(model) => Ok(BedKind::Bochs { model: model.to_owned() }),
                _ => Err(UnknownBed(name.to_owned())),
            },
        }
    }
}

fn is_word(model: &str) -> bool {
    !model.is_empty() && model.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

impl From<BedKind> for String {
    fn from(kind: BedKind) -> String {
        kind.to_string()
    }
}

impl TryFrom<String> for BedKind {
    type Error = UnknownBed;

    fn try_from(name: String) -> Result<BedKind, UnknownBed> {
        name.parse()
    }
}

/// Not the name of a bed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownBed(String);

impl fmt::Display for UnknownBed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no bed; give qemu-tcg, qemu-kvm, bochs or bochs:MODEL", self.0)
    }
}

impl std::error::Error for UnknownBed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bed_is_named_as_it_is_shown() {
        for name in ["qemu-tcg", "qemu-kvm", "bochs:ryzen"] {
            assert_eq!(name.parse::<BedKind>().unwrap().to_string(), name);
        }
        assert_eq!("bochs".parse::<BedKind>().unwrap().to_string(), "bochs:corei7_haswell_4770");
    }

    #[test]
    fn what_is_no_bed_is_refused_with_those_there_are() {
        for name in ["", "auto", "kvm", "bochs:", "bochs:a b", "bochs:x,msrs=\"f\"", "BOCHS"] {
            let error = name.parse::<BedKind>().unwrap_err().to_string();
            assert!(error.contains("qemu-tcg, qemu-kvm, bochs or bochs:MODEL"), "{error}");
        }
    }
}
