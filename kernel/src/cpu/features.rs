//! What this processor and the hypervisor below offer L1. Each leaf is read once: CPUID exits to L0.

use core::arch::x86_64::__cpuid_count;
use core::sync::atomic::{AtomicU32, Ordering};

/// CPUID leaf and subleaf: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let result = __cpuid_count(leaf, subleaf);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Leaf 1's ECX with its top bit (a hypervisor is present) cleared, or [`UNREAD`].
static LEAF_1_ECX: AtomicU32 = AtomicU32::new(UNREAD);
const UNREAD: u32 = 1 << 31;

fn leaf_1_ecx() -> u32 {
    match LEAF_1_ECX.load(Ordering::Relaxed) {
        UNREAD => {
            let value = cpuid(1, 0)[2] & !UNREAD;
            LEAF_1_ECX.store(value, Ordering::Relaxed);
            value
        }
        value => value,
    }
}

/// Whether Intel made the processor, or L0 shows it as Intel's.
pub fn is_intel() -> bool {
    let [_, ebx, ecx, edx] = cpuid(0, 0);
    [ebx, edx, ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

/// x2APIC mode.
pub fn has_x2apic() -> bool {
    leaf_1_ecx() & 1 << 21 != 0
}

/// The APIC timer's TSC-deadline mode.
pub fn has_tsc_deadline() -> bool {
    leaf_1_ecx() & 1 << 24 != 0
}

/// XSAVE and its control register.
pub fn has_xsave() -> bool {
    leaf_1_ecx() & 1 << 26 != 0
}

/// RDTSCP and its MSR, TSC_AUX.
pub fn has_rdtscp() -> bool {
    static CACHED: AtomicU32 = AtomicU32::new(UNREAD);
    let mut value = CACHED.load(Ordering::Relaxed);
    if value == UNREAD {
        value = cpuid(0x8000_0001, 0)[3] >> 27 & 1;
        CACHED.store(value, Ordering::Relaxed);
    }
    value != 0
}

fn hypervisor_leaves() -> Option<(u32, [u8; 12])> {
    let [_, _, ecx, _] = cpuid(1, 0);
    if ecx & 1 << 31 == 0 {
        return None;
    }
    let [max, ebx, ecx, edx] = cpuid(0x4000_0000, 0);
    let mut signature = [0; 12];
    for (bytes, word) in signature.chunks_exact_mut(4).zip([ebx, ecx, edx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Some((max, signature))
}

/// KVM's feature bits (leaf 0x4000_0001) when L0 is KVM.
pub fn kvm_features() -> Option<u32> {
    let (_, signature) = hypervisor_leaves()?;
    (&signature == b"KVMKVMKVM\0\0\0").then(|| cpuid(0x4000_0001, 0)[0])
}

/// The TSC's rate by leaf 0x4000_0010, which KVM and VMware fill.
pub fn hypervisor_tsc_khz() -> Option<u32> {
    let (max, signature) = hypervisor_leaves()?;
    let known = &signature == b"KVMKVMKVM\0\0\0" || &signature == b"VMwareVMware";
    if !known || !(0x4000_0010..0x4001_0000).contains(&max) {
        return None;
    }
    let khz = cpuid(0x4000_0010, 0)[0];
    (khz != 0).then_some(khz)
}

/// The TSC's rate by leaf 0x15, where the processor states its crystal.
pub fn tsc_hz_by_crystal() -> Option<u64> {
    let [max, ..] = cpuid(0, 0);
    if max < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal_hz, _] = cpuid(0x15, 0);
    (denominator != 0 && numerator != 0 && crystal_hz != 0)
        .then(|| u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator))
}
