//! Vector and x87 state. The kernel is compiled without either, so a guest's state stays in the registers until the
//! core switches to another vCPU.
//!
//! Processors before XSAVE (Intel's before 2011, AMD's before 2011) have x87 and SSE only, which FXSAVE keeps.
//!
//! Intel SDM vol. 1, 10.5 "FXSAVE and FXRSTOR", 13 "XSAVE"; AMD APM vol. 2, 11.5.

use super::features::{cpuid, has_xsave};
use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use core::arch::asm;
use core::ptr::NonNull;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::xcontrol::XCr0;

/// The components L1 knows how to keep apart between machines: x87, SSE, AVX, AVX-512, PKRU.
pub const MANAGED: u64 = 0b10_1110_0111;

/// What there is without XSAVE: x87 and SSE.
const LEGACY: u64 = 0b11;
/// Bytes of the area without state beyond the legacy region: 512, and the XSAVE header.
const LEGACY_BYTES: u32 = 576;

static NEUTRAL: u32 = 0;
const MXCSR_RESET: u32 = 0x1F80;
const FCW_RESET: u16 = 0x37F;

/// Switches on the vector units and, where there is XSAVE, every managed component that the processor has. The
/// components that are kept apart.
pub fn init() -> u64 {
    let xsave = if has_xsave() { Cr4Flags::OSXSAVE } else { Cr4Flags::empty() };
    // SAFETY: enables instructions that CPUID offers (every 64-bit processor has FXSAVE); the kernel itself uses no
    // vector register.
    unsafe {
        Cr0::update(|cr0| {
            cr0.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED);
            cr0.insert(Cr0Flags::MONITOR_COPROCESSOR | Cr0Flags::NUMERIC_ERROR);
        });
        Cr4::update(|cr4| cr4.insert(Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE | xsave));
    }
    if !has_xsave() {
        return LEGACY;
    }
    let [eax, _, _, edx] = cpuid(0xD, 0);
    let components = (u64::from(edx) << 32 | u64::from(eax)) & MANAGED;
    load_xcr0(components);
    components
}

/// Loads XCR0, which must be valid: a subset of what [`init`] returned that keeps the architecture's rules. Without
/// XSAVE there is none.
pub fn load_xcr0(value: u64) {
    if has_xsave() {
        // SAFETY: the caller passes a value already validated; it only decides which instructions fault.
        unsafe { XCr0::write_raw(value) };
    }
}

/// XCR0 as it is: a guest may have written it without an exit, since QEMU's emulation of SVM does not intercept XSETBV.
pub fn xcr0() -> u64 {
    if has_xsave() { XCr0::read_raw() } else { LEGACY }
}

/// A vCPU's saved state.
pub struct XsaveArea {
    area: NonNull<u8>,
    layout: Layout,
    components: u64,
}

// SAFETY: the area is owned like a box's content, and used by the core that has the vCPU.
unsafe impl Send for XsaveArea {}
// SAFETY: through a shared reference the area is only read.
unsafe impl Sync for XsaveArea {}

impl Clone for XsaveArea {
    fn clone(&self) -> Self {
        // SAFETY: the layout is not empty.
        let Some(area) = NonNull::new(unsafe { alloc_zeroed(self.layout) }) else {
            handle_alloc_error(self.layout)
        };
        // SAFETY: both areas have this layout and are initialised, and they are two allocations.
        unsafe { core::ptr::copy_nonoverlapping(self.area.as_ptr(), area.as_ptr(), self.layout.size()) };
        Self { area, layout: self.layout, components: self.components }
    }
}

impl XsaveArea {
    /// An area that restores the reset state of all `components`.
    pub fn new(components: u64) -> Self {
        load_xcr0(components);
        let size = if has_xsave() { cpuid(0xD, 0)[1].max(LEGACY_BYTES) } else { LEGACY_BYTES } as usize;
        let Ok(layout) = Layout::from_size_align(size, 64) else {
            unreachable!("the processor's save area is a few KiB")
        };
        // SAFETY: the layout is not empty.
        let Some(area) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        // SAFETY: within the 512-byte legacy region. A zero XSTATE_BV restores every component to its reset state, but
        // MXCSR is loaded from the area all the same.
        unsafe {
            area.as_ptr().cast::<u16>().write(FCW_RESET);
            area.as_ptr().add(24).cast::<u32>().write(MXCSR_RESET);
        }
        Self { area, layout, components }
    }

    /// Loads the registers from the area.
    pub fn restore(&self) {
        load_xcr0(self.components);
        // AMD processors before Zen keep the last x87 instruction's and operand's addresses across XRSTOR unless an
        // exception is pending: a load from an address of L1's overwrites them (AMD APM vol. 2, 11.4.4.3).
        // SAFETY: x87 instructions on a register file that is about to be replaced; the operand is a constant of L1's.
        unsafe {
            asm!("fnclex", "emms", "fild dword ptr [{}]", in(reg) &raw const NEUTRAL, options(nostack));
        }
        let area = self.area.as_ptr();
        // SAFETY: the area is 64-byte aligned, large enough for the enabled components, and has a valid header.
        unsafe {
            if has_xsave() {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") u32::MAX, in("edx") u32::MAX, options(nostack));
            } else {
                asm!("fxrstor64 [{}]", in(reg) area, options(nostack));
            }
        }
    }

    /// Keeps the registers in the area.
    pub fn save(&mut self) {
        load_xcr0(self.components);
        let area = self.area.as_ptr();
        // SAFETY: as above.
        unsafe {
            if has_xsave() {
                asm!("xsave64 [{}]", in(reg) area, in("eax") u32::MAX, in("edx") u32::MAX, options(nostack));
            } else {
                asm!("fxsave64 [{}]", in(reg) area, options(nostack));
            }
        }
    }
}

impl Drop for XsaveArea {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.area.as_ptr(), self.layout) };
    }
}
