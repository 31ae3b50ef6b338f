//! Whether VMX is there and suffices.
//!
//! Intel SDM vol. 3, 24.6 (discovering VMX), 24.7 (IA32_FEATURE_CONTROL), appendix A (capability registers).

use super::capabilities::Capabilities;
use super::controls::{allows, entry, exit, primary, secondary};
use crate::hypervisor::refusal::Refusal;

/// Leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;

/// IA32_FEATURE_CONTROL: may not be written until the next reset.
const LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON is allowed outside SMX operation.
const VMX_OUTSIDE_SMX: u64 = 1 << 2;

const WRITE_BACK: u8 = 6;

const TURN_ON: &str = "turn on nested virtualization for this VM: AWS an 8th-generation Intel type (c8i, m8i, r8i) launched with \
     --cpu-options NestedVirtualization=enabled; GCP --enable-nested-virtualization (enableNestedVirtualization) on an Intel type \
     other than E2; Azure a Dv3-v5 or Ev3-v5 Intel size; VMware \"Virtualize Intel VT-x/EPT\"; QEMU -cpu host with kvm_intel \
     nested=1; on bare metal VT-x in the firmware set-up";
const FIRMWARE: &str = "enable VT-x (Intel Virtualization Technology) in the firmware set-up and power-cycle; in a cloud or VM turn on \
     nested virtualization (AWS NestedVirtualization=enabled, GCP enableNestedVirtualization, VMware \"Virtualize Intel VT-x/EPT\", \
     QEMU -cpu host with kvm_intel nested=1)";
const NEWER: &str = "choose a CPU model made since 2010 (Westmere; AWS c8i, m8i, r8i; GCP Haswell or later), or let the hypervisor \
     below pass it on (VMware \"Virtualize Intel VT-x/EPT\", QEMU -cpu host with kvm_intel nested=1 ept=1 unrestricted_guest=1)";

/// Whether VMX is there and usable.
///
/// Values come in by argument, so that every refusal can be tested, and by `Option`, since each may be read only when the ones before
/// suffice: `leaf1_ecx` is CPUID leaf 1's ECX, `feature_control` IA32_FEATURE_CONTROL, which exists where CPUID offers VMX.
///
/// # Errors
/// [`Refusal`] that names the register and bit, and the setting that enables it.
pub fn check(
    leaf1_ecx: u32,
    feature_control: Option<u64>,
    capabilities: Option<&Capabilities>,
) -> Result<(), Refusal> {
    if leaf1_ecx & VMX == 0 {
        return refuse("the CPU does not offer VMX (CPUID 1 ECX bit 5 is clear)", TURN_ON);
    }
    if feature_control.is_some_and(|value| value & (LOCKED | VMX_OUTSIDE_SMX) == LOCKED) {
        return refuse(
            "VMX is disabled and locked by the firmware (IA32_FEATURE_CONTROL, MSR 0x3a: bit 0, lock, is set, bit 2, VMX outside SMX, is \
             clear)",
            FIRMWARE,
        );
    }
    capabilities.map_or(Ok(()), suffice)
}

/// What to write to IA32_FEATURE_CONTROL so that VMXON works; `None` when it is locked, and then [`check`] says whether that will do.
pub const fn feature_control_to_write(value: u64) -> Option<u64> {
    if value & LOCKED == 0 { Some(value | LOCKED | VMX_OUTSIDE_SMX) } else { None }
}

const fn refuse(missing: &'static str, remedy: &'static str) -> Result<(), Refusal> {
    Err(Refusal { missing, remedy })
}

fn suffice(capabilities: &Capabilities) -> Result<(), Refusal> {
    let lacks: [(bool, &'static str); _] = [
        (
            !allows(capabilities.primary, primary::SECONDARY_CONTROLS),
            "VMX has no secondary controls, hence no EPT (IA32_VMX_PROCBASED_CTLS, MSR 0x482: bit 63 is clear)",
        ),
        (
            !allows(capabilities.secondary, secondary::EPT),
            "VMX has no EPT, extended page tables (IA32_VMX_PROCBASED_CTLS2, MSR 0x48b: bit 33 is clear)",
        ),
        (
            !allows(capabilities.secondary, secondary::UNRESTRICTED_GUEST),
            "VMX has no unrestricted guest, so none in real mode (IA32_VMX_PROCBASED_CTLS2, MSR 0x48b: bit 39 is clear)",
        ),
        (
            !capabilities.has_four_level_ept(),
            "EPT has no walk of four levels (IA32_VMX_EPT_VPID_CAP, MSR 0x48c: bit 6 is clear)",
        ),
        (
            !capabilities.has_write_back_ept(),
            "EPT structures cannot be cached write-back (IA32_VMX_EPT_VPID_CAP, MSR 0x48c: bit 14 is clear)",
        ),
        (
            !capabilities.has_2mib_ept(),
            "EPT has no 2 MiB pages (IA32_VMX_EPT_VPID_CAP, MSR 0x48c: bit 16 is clear)",
        ),
        (
            !capabilities.has_single_context_invept() && !capabilities.has_all_context_invept(),
            "EPT has no usable INVEPT (IA32_VMX_EPT_VPID_CAP, MSR 0x48c: bit 20, or both of bits 25 and 26, are clear)",
        ),
        (
            !allows(capabilities.exit, exit::SAVE_EFER) || !allows(capabilities.exit, exit::LOAD_EFER),
            "VMX does not save and load EFER at exits (IA32_VMX_EXIT_CTLS, MSR 0x483: bit 52 or 53 is clear)",
        ),
        (
            !allows(capabilities.entry, entry::LOAD_EFER),
            "VMX does not load EFER at entries (IA32_VMX_ENTRY_CTLS, MSR 0x484: bit 47 is clear)",
        ),
        (
            capabilities.memory_type() != WRITE_BACK,
            "VMCSs cannot be cached write-back (IA32_VMX_BASIC, MSR 0x480: bits 50-53 are not 6)",
        ),
        (
            capabilities.has_32_bit_addresses(),
            "VMCSs hold physical addresses of 32 bits only (IA32_VMX_BASIC, MSR 0x480: bit 48 is set)",
        ),
    ];
    match lacks.into_iter().find(|(lacking, _)| *lacking) {
        Some((_, missing)) => refuse(missing, NEWER),
        None => Ok(()),
    }
}
