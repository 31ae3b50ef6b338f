//! Why a node cannot run machines.

use core::fmt;

/// Why this node cannot run machines: what is missing, and what to enable where.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// The missing feature.
    pub missing: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.missing, self.remedy)
    }
}
