//! The virtual machine control block.
//!
//! AMD APM vol. 2, Appendix B (layout), 15.5-15.13 (meaning), 15.20 (event injection), 15.21 (interrupts).

use core::mem::offset_of;
use nestling_machine::state::Segment;

/// Intercepts of the word at offset 0x0C.
pub mod intercept1 {
    pub const INTR: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 1;
    pub const INIT: u32 = 1 << 3;
    pub const RDPMC: u32 = 1 << 15;
    pub const CPUID: u32 = 1 << 18;
    pub const IRET: u32 = 1 << 20;
    pub const INVD: u32 = 1 << 22;
    pub const PAUSE: u32 = 1 << 23;
    pub const HLT: u32 = 1 << 24;
    pub const INVLPGA: u32 = 1 << 26;
    pub const IOIO_PROT: u32 = 1 << 27;
    pub const MSR_PROT: u32 = 1 << 28;
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Intercepts of the word at offset 0x10.
pub mod intercept2 {
    pub const VMRUN: u32 = 1 << 0;
    pub const VMMCALL: u32 = 1 << 1;
    pub const VMLOAD: u32 = 1 << 2;
    pub const VMSAVE: u32 = 1 << 3;
    pub const STGI: u32 = 1 << 4;
    pub const CLGI: u32 = 1 << 5;
    pub const SKINIT: u32 = 1 << 6;
    pub const ICEBP: u32 = 1 << 8;
    pub const WBINVD: u32 = 1 << 9;
    pub const MONITOR: u32 = 1 << 10;
    pub const MWAIT: u32 = 1 << 11;
    pub const MWAIT_ARMED: u32 = 1 << 12;
    pub const XSETBV: u32 = 1 << 13;
    pub const RDPRU: u32 = 1 << 14;
}

/// Exit codes, Appendix C.
pub mod exit_code {
    pub const WRITE_CR8: u32 = 0x18;
    pub const EXCP_BASE: u32 = 0x40;
    pub const EXCP_LAST: u32 = 0x5F;
    pub const INTR: u32 = 0x60;
    pub const NMI: u32 = 0x61;
    pub const VINTR: u32 = 0x64;
    pub const RDPMC: u32 = 0x6F;
    pub const CPUID: u32 = 0x72;
    pub const IRET: u32 = 0x74;
    pub const INVD: u32 = 0x76;
    pub const PAUSE: u32 = 0x77;
    pub const HLT: u32 = 0x78;
    pub const INVLPGA: u32 = 0x7A;
    pub const IOIO: u32 = 0x7B;
    pub const MSR: u32 = 0x7C;
    pub const SHUTDOWN: u32 = 0x7F;
    pub const VMRUN: u32 = 0x80;
    pub const SKINIT: u32 = 0x86;
    pub const ICEBP: u32 = 0x88;
    pub const WBINVD: u32 = 0x89;
    pub const MONITOR: u32 = 0x8A;
    pub const MWAIT_CONDITIONAL: u32 = 0x8C;
    pub const XSETBV: u32 = 0x8D;
    pub const RDPRU: u32 = 0x8E;
    pub const NPF: u32 = 0x400;
}

/// Of the word at offset 0x00: writes of CR8.
pub const INTERCEPT_CR8_WRITE: u32 = 1 << 24;

/// V_IRQ: a virtual interrupt is pending.
pub const V_IRQ: u32 = 1 << 8;
/// V_INTR_PRIO: the virtual interrupt's priority, compared with V_TPR.
pub const V_INTR_PRIO: u32 = 0xF << V_INTR_PRIO_SHIFT;
/// Where V_INTR_PRIO stands.
pub const V_INTR_PRIO_SHIFT: u32 = 16;
/// V_INTR_MASKING: RFLAGS.IF and CR8 of the guest are its own.
pub const V_INTR_MASKING: u32 = 1 << 24;
/// V_TPR's bits: the task priority as CR8 shows it.
pub const V_TPR: u32 = 0xF;

/// EVENTINJ and EXITINTINFO: the event is valid.
pub const EVENT_VALID: u64 = 1 << 31;
/// EVENTINJ and EXITINTINFO: an error code is in the upper half.
pub const EVENT_HAS_ERROR: u64 = 1 << 11;
/// EVENTINJ and EXITINTINFO: the event's type.
pub const EVENT_TYPE: u64 = 7 << 8;
/// Event type: external or virtual interrupt.
pub const EVENT_INTERRUPT: u64 = 0 << 8;
/// Event type: NMI.
pub const EVENT_NMI: u64 = 2 << 8;
/// Event type: exception.
pub const EVENT_EXCEPTION: u64 = 3 << 8;
/// Event type: INT n.
pub const EVENT_SOFTWARE: u64 = 4 << 8;

/// TLB_CONTROL: flush everything at entry; the only value every processor (and emulator) acts on.
pub const TLB_FLUSH_ALL: u8 = 1;

/// The VMCB: control area, then state save area.
#[repr(C, align(4096))]
pub struct Vmcb {
    pub intercept_cr: u32,
    pub intercept_dr: u32,
    pub intercept_exceptions: u32,
    pub intercept1: u32,
    pub intercept2: u32,
    _reserved_14: [u8; 0x28],
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base: u64,
    pub msrpm_base: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u8,
    _reserved_5d: [u8; 3],
    pub int_control: u32,
    pub int_vector: u32,
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info1: u64,
    pub exit_info2: u64,
    pub exit_int_info: u64,
    pub np_enable: u64,
    _reserved_98: [u8; 0x10],
    pub event_inject: u64,
    pub nested_cr3: u64,
    pub lbr_control: u64,
    pub clean_bits: u64,
    pub next_rip: u64,
    _reserved_d0: [u8; 0x330],
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub gdtr: Segment,
    pub ldtr: Segment,
    pub idtr: Segment,
    pub tr: Segment,
    _reserved_4a0: [u8; 0x2B],
    pub cpl: u8,
    _reserved_4cc: [u8; 4],
    pub efer: u64,
    _reserved_4d8: [u8; 0x70],
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    _reserved_580: [u8; 0x58],
    pub rsp: u64,
    _reserved_5e0: [u8; 0x18],
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    _reserved_648: [u8; 0x20],
    pub g_pat: u64,
    pub debug_control: u64,
    _reserved_678: [u8; 0x988],
}

const _: () = {
    assert!(offset_of!(Vmcb, iopm_base) == 0x40);
    assert!(offset_of!(Vmcb, asid) == 0x58);
    assert!(offset_of!(Vmcb, int_control) == 0x60);
    assert!(offset_of!(Vmcb, exit_code) == 0x70);
    assert!(offset_of!(Vmcb, np_enable) == 0x90);
    assert!(offset_of!(Vmcb, event_inject) == 0xA8);
    assert!(offset_of!(Vmcb, next_rip) == 0xC8);
    assert!(offset_of!(Vmcb, es) == 0x400);
    assert!(offset_of!(Vmcb, tr) == 0x490);
    assert!(offset_of!(Vmcb, cpl) == 0x4CB);
    assert!(offset_of!(Vmcb, efer) == 0x4D0);
    assert!(offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, rip) == 0x578);
    assert!(offset_of!(Vmcb, rsp) == 0x5D8);
    assert!(offset_of!(Vmcb, rax) == 0x5F8);
    assert!(offset_of!(Vmcb, cr2) == 0x640);
    assert!(offset_of!(Vmcb, g_pat) == 0x668);
    assert!(size_of::<Vmcb>() == 0x1000);
};
