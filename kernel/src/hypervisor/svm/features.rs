//! Which features of SVM are there, and whether they suffice.
//!
//! AMD APM vol. 3, E.4.9 (CPUID leaf 0x8000_000A); vol. 2, 15.30.1 (VM_CR).

use crate::hypervisor::refusal::Refusal;

const VM_CR_SVMDIS: u64 = 1 << 4;
const VM_CR_LOCK: u64 = 1 << 3;

/// Leaf 0x8000_000A EDX: what nestling requires or can use.
pub mod feature {
    pub const NESTED_PAGING: u32 = 1 << 0;
    pub const SVM_LOCK: u32 = 1 << 2;
    pub const NRIP_SAVE: u32 = 1 << 3;
    pub const TSC_RATE: u32 = 1 << 4;
    pub const CLEAN_BITS: u32 = 1 << 5;
    pub const FLUSH_BY_ASID: u32 = 1 << 6;
    pub const DECODE_ASSISTS: u32 = 1 << 7;
    pub const PAUSE_FILTER: u32 = 1 << 10;
    pub const VIRTUAL_VMLOAD: u32 = 1 << 15;
    pub const VIRTUAL_GIF: u32 = 1 << 16;
    pub const AVIC: u32 = 1 << 13;
}

/// Whether SVM is there and usable.
///
/// Leaf and MSR values come in by argument, so that every refusal can be tested: `max_leaf` is leaf 0x8000_0000's EAX, `ecx` leaf
/// 0x8000_0001's ECX, `edx` leaf 0x8000_000A's EDX.
pub fn check(max_leaf: u32, ecx: u32, edx: u32, vm_cr: u64) -> Result<(), Refusal> {
    const SVM: u32 = 1 << 2;
    if max_leaf < 0x8000_000A || ecx & SVM == 0 {
        return Err(Refusal {
            missing: "the CPU offers neither SVM nor VMX (CPUID 0x8000_0001 ECX bit 2 is clear)",
            remedy: "turn on nested virtualization for this VM or choose an instance type that has it (QEMU: -cpu max or -cpu host with kvm_amd nested=1)",
        });
    }
    if vm_cr & VM_CR_SVMDIS != 0 {
        let locked = vm_cr & VM_CR_LOCK != 0 || edx & feature::SVM_LOCK != 0;
        return Err(Refusal {
            missing: if locked {
                "SVM is disabled and locked by the firmware (VM_CR.SVMDIS and LOCK)"
            } else {
                "SVM is disabled (VM_CR.SVMDIS)"
            },
            remedy: "enable SVM (AMD-V) in the firmware set-up, then boot again",
        });
    }
    if edx & feature::NESTED_PAGING == 0 {
        return Err(Refusal {
            missing: "SVM has no nested paging (CPUID 0x8000_000A EDX bit 0 is clear)",
            remedy: "choose a CPU model with NPT, made since 2007 (QEMU: -cpu max or add +npt)",
        });
    }
    Ok(())
}
