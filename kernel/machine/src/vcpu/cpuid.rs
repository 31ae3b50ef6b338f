//! CPUID.

/// The physical processor's CPUID leaves.
#[derive(Debug)]
pub struct HostCpuid {}

impl HostCpuid {
    /// Reads every leaf that matters; `cpuid` gets leaf and subleaf and returns EAX, EBX, ECX, EDX.
    pub fn read(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let _ = cpuid(0, 0);
        Self {}
    }
}
