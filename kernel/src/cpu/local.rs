//! What belongs to one core: found by the base address of its GS segment, which every exit from a guest brings back.

use core::arch::asm;
use core::sync::atomic::AtomicU64;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::GsBase;

/// One core's own data. It lives for ever, because an interrupt may ask for it at any time.
#[repr(C)]
pub struct Local {
    /// First, so that it can be read relative to GS.
    this: u64,
    /// Number among the cores in use; 0 is the one that booted.
    pub index: usize,
    /// The deadline in the APIC timer, in nanoseconds since boot; zero when it is off.
    pub(super) timer_armed: AtomicU64,
    /// For the virtualization's use: what is set up on this core.
    pub virtualization: AtomicU64,
}

/// Gives this core its data. To be called once on each, before anything else of `cpu`.
pub fn init(index: usize) {
    let local = alloc::boxed::Box::leak(alloc::boxed::Box::new(Local {
        this: 0,
        index,
        timer_armed: AtomicU64::new(0),
        virtualization: AtomicU64::new(0),
    }));
    local.this = &raw const *local as u64;
    GsBase::write(VirtAddr::new(local.this));
}

/// This core's data.
pub fn this_core() -> &'static Local {
    let address: u64;
    // SAFETY: `init` has pointed GS to a `Local`, whose first word is its address; it is never freed, and only atomics change.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) address, options(nostack, preserves_flags, readonly));
        &*(address as *const Local)
    }
}
