//! MSRs.

use crate::address::MsrIndex;

/// What the hypervisor loop must carry out after a WRMSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Load this EFER (as the guest sees it, without SVME).
    Efer(u64),
    /// Load this TSC_AUX.
    TscAux(u64),
    /// Load this page attribute table.
    Pat(u64),
    /// Add this to the TSC offset.
    TscOffsetDelta(i64),
}

/// MSRs that live in the vendor's control block and never exit.
pub const PASS_THROUGH: &[MsrIndex] = &[
    MsrIndex(0xC000_0100), // FS_BASE
    MsrIndex(0xC000_0101), // GS_BASE
    MsrIndex(0xC000_0102), // KERNEL_GS_BASE
    MsrIndex(0xC000_0081), // STAR
    MsrIndex(0xC000_0082), // LSTAR
    MsrIndex(0xC000_0083), // CSTAR
    MsrIndex(0xC000_0084), // SFMASK
    MsrIndex(0x174),       // SYSENTER_CS
    MsrIndex(0x175),       // SYSENTER_ESP
    MsrIndex(0x176),       // SYSENTER_EIP
];
