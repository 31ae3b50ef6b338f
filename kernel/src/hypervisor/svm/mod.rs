//! AMD's virtualization: SVM with nested paging.
//!
//! AMD APM vol. 2, chapter 15; the feature bits are CPUID leaf 0x8000_000A (APM vol. 3, E.4.9).

mod enter;
mod features;
mod nmi;
mod permission_maps;
mod vcpu;
mod vmcb;

use super::backend::Backend;
use super::nested::NestedEntry;
use super::refusal::Refusal;
use crate::cpu::features::cpuid;
use crate::cpu::local::this_core;
use crate::memory::heap::Pages;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};
use features::{check, feature};
use nestling_machine::state::VcpuState;
use permission_maps::PermissionMaps;
pub use vcpu::SvmVcpu;
use x86_64::registers::model_specific::{Efer, EferFlags, Msr};

const EFER: u32 = 0xC000_0080;
const EFER_AIBRSE: u64 = 1 << 21;
const VM_CR: u32 = 0xC001_0114;
const VM_HSAVE_PA: u32 = 0xC001_0117;

/// SVM, switched on on every core in use.
pub struct Svm {
    features: [(&'static str, bool); 10],
    maps: Arc<PermissionMaps>,
    nrip_save: bool,
    pause_filter: bool,
    asids: u32,
    next_asid: AtomicU32,
}

/// What SVM needs on each core, for ever.
struct OnCore {
    /// L1's own VMSAVE state.
    host: Pages,
    /// The processor's own save area; never read.
    save_area: Pages,
}

/// Physical address of this core's own VMSAVE state.
fn host_state() -> u64 {
    this_core().virtualization.load(Ordering::Relaxed)
}

/// The checks, with the number of ASIDs and the feature bits.
fn find() -> Result<(u32, u32), Refusal> {
    let [max_leaf, ..] = cpuid(0x8000_0000, 0);
    let [_, _, ecx, _] = cpuid(0x8000_0001, 0);
    let [_, asids, _, edx] = if max_leaf >= 0x8000_000A { cpuid(0x8000_000A, 0) } else { [0; 4] };
    check(max_leaf, ecx, edx, 0)?;
    // SAFETY: VM_CR exists where CPUID offers SVM.
    check(max_leaf, ecx, edx, unsafe { Msr::new(VM_CR).read() })?;
    Ok((asids, edx))
}

/// Switches SVM on on this core, which has passed the checks.
fn switch_on() {
    let on_core = Box::leak(Box::new(OnCore { host: Pages::new(1), save_area: Pages::new(1) }));
    if has_automatic_ibrs() {
        let mut efer = Msr::new(EFER);
        // SAFETY: CPUID offers the bit. It keeps branch predictions that a guest has trained away from L1.
        unsafe { efer.write(efer.read() | EFER_AIBRSE) };
    }
    let host = on_core.host.physical();
    // SAFETY: CPUID offers SVM and VM_CR allows it; both pages are never freed.
    unsafe {
        Efer::update(|efer| efer.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE));
        Msr::new(VM_HSAVE_PA).write(on_core.save_area.physical());
        core::arch::asm!("vmsave rax", in("rax") host, options(nostack, preserves_flags));
    }
    this_core().virtualization.store(host, Ordering::Relaxed);
}

/// Automatic IBRS (CPUID leaf 0x8000_0021 EAX bit 8): AMD APM vol. 2, 3.1.7.
fn has_automatic_ibrs() -> bool {
    cpuid(0x8000_0000, 0)[0] >= 0x8000_0021 && cpuid(0x8000_0021, 0)[0] & 1 << 8 != 0
}

impl Backend for Svm {
    type Vcpu = SvmVcpu;
    type Entry = NptEntry;
    const VENDOR: &'static str = "amd";

    fn enable() -> Result<Self, Refusal> {
        let (asids, edx) = find()?;
        switch_on();
        let has = |bit| edx & bit != 0;
        Ok(Self {
            features: [
                ("nested_paging", true),
                ("nrip_save", has(feature::NRIP_SAVE)),
                ("decode_assists", has(feature::DECODE_ASSISTS)),
                ("flush_by_asid", has(feature::FLUSH_BY_ASID)),
                ("clean_bits", has(feature::CLEAN_BITS)),
                ("tsc_rate", has(feature::TSC_RATE)),
                ("pause_filter", has(feature::PAUSE_FILTER)),
                ("virtual_vmload", has(feature::VIRTUAL_VMLOAD) && has(feature::VIRTUAL_GIF)),
                ("avic", has(feature::AVIC)),
                ("automatic_ibrs", has_automatic_ibrs()),
            ],
            maps: Arc::new(PermissionMaps::new()),
            nrip_save: has(feature::NRIP_SAVE),
            pause_filter: has(feature::PAUSE_FILTER),
            asids: asids.max(2),
            next_asid: AtomicU32::new(0),
        })
    }

    fn enable_here(&self) -> Result<(), Refusal> {
        let (asids, edx) = find()?;
        let lacks_nrip_save = self.nrip_save && edx & feature::NRIP_SAVE == 0;
        if asids.max(2) < self.asids || lacks_nrip_save {
            return Err(Refusal {
                missing: "the core's SVM has less than the first core's",
                remedy: "give the VM cores of one kind",
            });
        }
        switch_on();
        Ok(())
    }

    fn features(&self) -> &[(&'static str, bool)] {
        &self.features
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        cpuid(leaf, subleaf)
    }

    fn vcpu(&self, nested_root: u64, state: &VcpuState) -> SvmVcpu {
        SvmVcpu::new(
            nested_root,
            state,
            self.next_asid(),
            self.nrip_save,
            self.pause_filter,
            Arc::clone(&self.maps),
        )
    }

    fn thaw(&self, nested_root: u64, snapshot: &vcpu::Snapshot) -> SvmVcpu {
        SvmVcpu::thaw(nested_root, snapshot, self.next_asid(), Arc::clone(&self.maps))
    }
}

impl Svm {
    /// ASID 0 is L1's. A reused ASID is harmless: a new vCPU's first entry flushes, and so does every later change of vCPU.
    fn next_asid(&self) -> u32 {
        self.next_asid.fetch_add(1, Ordering::Relaxed) % (self.asids - 1) + 1
    }
}

/// A nested page table entry: the long-mode format, every access a user access.
pub struct NptEntry;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Accessed and dirty, as the processor would set them: it then has no reason to write to the tables, which a template's clones share.
const USED: u64 = 1 << 5 | 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

impl NestedEntry for NptEntry {
    fn table(physical: u64) -> u64 {
        physical & ADDRESS | PRESENT | WRITABLE | USER | USED
    }

    fn large_leaf(physical: u64) -> u64 {
        physical & ADDRESS | PRESENT | WRITABLE | USER | USED | LARGE
    }

    fn small_leaf(physical: u64) -> u64 {
        physical & ADDRESS | PRESENT | WRITABLE | USER | USED
    }

    fn device_leaf(physical: u64) -> u64 {
        physical & ADDRESS | PRESENT | USER | USED
    }

    fn read_only(entry: u64) -> u64 {
        entry & !WRITABLE
    }

    fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    fn is_writable(entry: u64) -> bool {
        entry & WRITABLE != 0
    }

    fn is_large(entry: u64) -> bool {
        entry & LARGE != 0
    }

    fn address(entry: u64) -> u64 {
        entry & ADDRESS
    }
}
