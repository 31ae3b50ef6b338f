//! Intel's virtualization: VMX with extended page tables.
//!
//! Intel SDM vol. 3, chapters 24-31 and appendices A-C.

mod capabilities;
mod controls;
mod enter;
mod entry_checks;
mod ept;
mod exit_reason;
mod features;
mod fields;
mod host_state;
mod msr_bitmap;
mod vcpu;
mod vmcs;

use super::backend::Backend;
use super::refusal::Refusal;
use crate::cpu::features::cpuid;
use crate::memory::heap::Pages;
use alloc::boxed::Box;
use alloc::sync::Arc;
use capabilities::Capabilities;
use controls::{Controls, FEATURES, secondary};
use core::arch::asm;
use core::sync::atomic::{AtomicU16, Ordering};
pub use ept::EptEntry;
use msr_bitmap::MsrBitmap;
use nestling_machine::state::VcpuState;
pub use vcpu::VmxVcpu;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

const FEATURE_CONTROL: u32 = 0x3A;

const LEAF7_EBX_INVPCID: u32 = 1 << 10;
const LEAF7_ECX_RDPID: u32 = 1 << 22;
const EXTENDED1_EDX_RDTSCP: u32 = 1 << 27;

/// VMX, switched on on every core in use.
pub struct Vmx {
    features: [(&'static str, bool); FEATURES],
    shared: Arc<Shared>,
    next_vpid: AtomicU16,
}

/// The checks, and this core's capabilities.
fn find() -> Result<Capabilities, Refusal> {
    let [_, _, ecx, _] = cpuid(1, 0);
    features::check(ecx, None, None)?;
    // SAFETY: the MSRs exist where CPUID offers VMX; each is read only where the ones before say that it exists.
    let read = |index| unsafe { Msr::new(index).read() };
    let feature_control = read(FEATURE_CONTROL);
    features::check(ecx, Some(feature_control), None)?;
    let capabilities = Capabilities::read(read);
    features::check(ecx, Some(feature_control), Some(&capabilities))?;
    Ok(capabilities)
}

/// Switches VMX on on this core, which has passed the checks.
fn switch_on(capabilities: &Capabilities) -> Result<(), Refusal> {
    // SAFETY: the MSR exists where CPUID offers VMX.
    let feature_control = unsafe { Msr::new(FEATURE_CONTROL).read() };
    if let Some(value) = features::feature_control_to_write(feature_control) {
        // SAFETY: the register is not locked; the bits only allow VMXON.
        unsafe { Msr::new(FEATURE_CONTROL).write(value) };
    }
    // The processor's own; never read, never freed.
    let region = Box::leak(Box::new(Pages::new(1)));
    region.bytes_mut()[..4].copy_from_slice(&capabilities.revision().to_le_bytes());
    let address = region.physical();
    let failed: u8;
    // SAFETY: CPUID offers VMX and FEATURE_CONTROL allows it; CR0 and CR4 get the bits that VMX wants; the region is 4 KiB, has the
    // revision, and stays allocated for ever.
    unsafe {
        Cr0::update(|cr0| cr0.insert(Cr0Flags::NUMERIC_ERROR));
        Cr4::update(|cr4| cr4.insert(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS));
        asm!("vmxon [{}]", "setbe {}", in(reg) &raw const address, out(reg_byte) failed, options(nostack));
    }
    if failed != 0 {
        return Err(Refusal {
            missing: "VMXON failed",
            remedy: "the hypervisor below offers VMX but does not carry it out: check its nested virtualization",
        });
    }
    Ok(())
}

/// What every vCPU uses.
struct Shared {
    capabilities: Capabilities,
    controls: Controls,
    msr_bitmap: MsrBitmap,
}

impl Shared {
    /// Drops every cached translation of an EPT pointer and of a VPID.
    fn forget_translations(&self, ept_pointer: u64, vpid: u16) {
        const SINGLE_CONTEXT: u64 = 1;
        const ALL_CONTEXTS: u64 = 2;
        let kind = if self.capabilities.has_single_context_invept() { SINGLE_CONTEXT } else { ALL_CONTEXTS };
        let descriptor = [ept_pointer, 0];
        let failed: u8;
        // SAFETY: the processor has the instruction and the kind; it only drops what can be found again.
        unsafe {
            asm!("invept {}, [{}]", "setbe {}", in(reg) kind, in(reg) &raw const descriptor, out(reg_byte) failed, options(nostack));
        }
        assert!(failed == 0, "INVEPT of {ept_pointer:#x} failed: machines would see each other's memory");
        if self.controls.secondary & secondary::VPID != 0 {
            let single = self.capabilities.has_single_context_invvpid();
            let kind = if single { SINGLE_CONTEXT } else { ALL_CONTEXTS };
            let descriptor = [u64::from(vpid), 0];
            let failed: u8;
            // SAFETY: as above.
            unsafe {
                asm!("invvpid {}, [{}]", "setbe {}", in(reg) kind, in(reg) &raw const descriptor, out(reg_byte) failed, options(nostack));
            }
            assert!(failed == 0, "INVVPID of {vpid} failed: machines would see each other's memory");
        }
    }
}

impl Backend for Vmx {
    type Vcpu = VmxVcpu;
    type Entry = EptEntry;
    const VENDOR: &'static str = "intel";

    fn enable() -> Result<Self, Refusal> {
        let capabilities = find()?;
        log::info!("vmx: {capabilities}");
        let controls = Controls::choose(&capabilities)?;
        switch_on(&capabilities)?;
        let features = controls::features(&capabilities);
        let shared = Shared { capabilities, controls, msr_bitmap: MsrBitmap::new() };
        Ok(Self { features, shared: Arc::new(shared), next_vpid: AtomicU16::new(1) })
    }

    fn enable_here(&self) -> Result<(), Refusal> {
        let capabilities = find()?;
        let is_alike = Controls::choose(&capabilities)? == self.shared.controls
            && capabilities.revision() == self.shared.capabilities.revision();
        if !is_alike {
            return Err(Refusal {
                missing: "the core's VMX is not like the first core's",
                remedy: "give the VM cores of one kind",
            });
        }
        switch_on(&capabilities)
    }

    fn features(&self) -> &[(&'static str, bool)] {
        &self.features
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [eax, mut ebx, mut ecx, mut edx] = cpuid(leaf, subleaf);
        let controls = self.shared.controls.secondary;
        match leaf {
            7 if subleaf == 0 => {
                if controls & secondary::INVPCID == 0 {
                    ebx &= !LEAF7_EBX_INVPCID;
                }
                if controls & secondary::RDTSCP == 0 {
                    ecx &= !LEAF7_ECX_RDPID;
                }
            }
            0x8000_0001 if controls & secondary::RDTSCP == 0 => edx &= !EXTENDED1_EDX_RDTSCP,
            _ => {}
        }
        [eax, ebx, ecx, edx]
    }

    fn vcpu(&self, nested_root: u64, state: &VcpuState) -> VmxVcpu {
        VmxVcpu::new(nested_root, state, self.next_vpid(), Arc::clone(&self.shared))
    }

    fn thaw(&self, nested_root: u64, snapshot: &vcpu::Snapshot) -> VmxVcpu {
        VmxVcpu::thaw(nested_root, snapshot, self.next_vpid(), Arc::clone(&self.shared))
    }
}

impl Vmx {
    /// VPID 0 is L1's. A reused one is harmless: a vCPU that is new on a core drops all its translations there.
    fn next_vpid(&self) -> u16 {
        self.next_vpid.fetch_add(1, Ordering::Relaxed).max(1)
    }
}
