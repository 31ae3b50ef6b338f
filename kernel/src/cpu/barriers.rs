//! What keeps speculation from carrying secrets between a guest, L1 and the next guest.
//!
//! Intel "Speculative Execution Side Channel Mitigations" (CPUID leaf 7, IA32_ARCH_CAPABILITIES, IA32_SPEC_CTRL, IBPB, L1D_FLUSH,
//! MD_CLEAR), "L1 Terminal Fault", "Microarchitectural Data Sampling", "TSX Asynchronous Abort", "Register File Data Sampling", "Branch
//! History Injection"; AMD "Indirect Branch Control Extension" and "Transient Scheduler Attacks". AMD's automatic IBRS is `svm`'s.

use super::features::{cpuid, is_intel};
use alloc::vec::Vec;
use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU32, Ordering};
use x86_64::registers::model_specific::Msr;

const SPEC_CTRL: u32 = 0x48;
const SPEC_CTRL_IBRS: u32 = 1 << 0;
const SPEC_CTRL_BHI_DIS_S: u32 = 1 << 10;
const PRED_CMD: u32 = 0x49;
const PRED_CMD_IBPB: u64 = 1;
const ARCH_CAPABILITIES: u32 = 0x10A;
const FLUSH_CMD: u32 = 0x10B;
const FLUSH_CMD_L1D: u64 = 1;

/// IA32_ARCH_CAPABILITIES: what the processor is immune to, or the hypervisor below takes care of.
pub mod arch_capability {
    /// No rogue data cache load, hence no L1 terminal fault.
    pub const RDCL_NO: u64 = 1 << 0;
    /// Enhanced IBRS: switched on once, it holds.
    pub const IBRS_ALL: u64 = 1 << 1;
    /// The hypervisor below flushes the L1 data cache when it enters a guest.
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    /// No microarchitectural data sampling.
    pub const MDS_NO: u64 = 1 << 5;
    /// No TSX asynchronous abort.
    pub const TAA_NO: u64 = 1 << 8;
    /// No branch history injection.
    pub const BHI_NO: u64 = 1 << 20;
    /// No register file data sampling.
    pub const RFDS_NO: u64 = 1 << 27;
    /// VERW clears what register file data sampling reads.
    pub const RFDS_CLEAR: u64 = 1 << 28;
}

/// What the processor says of itself that matters here.
#[derive(Clone, Copy, Default, Debug)]
pub struct Processor {
    /// Made by Intel.
    pub is_intel: bool,
    /// CPUID leaf 7, subleaf 0, EDX.
    pub leaf_7_edx: u32,
    /// CPUID leaf 7, subleaf 2, EDX.
    pub leaf_7_2_edx: u32,
    /// CPUID leaf 0x8000_0008 EBX.
    pub extended_8_ebx: u32,
    /// CPUID leaf 0x8000_0021 EAX.
    pub extended_21_eax: u32,
    /// CPUID leaf 0x8000_0021 ECX.
    pub extended_21_ecx: u32,
    /// IA32_ARCH_CAPABILITIES; 0 where it does not exist, which means vulnerable to all.
    pub arch_capabilities: u64,
}

/// Leaf 7 EDX: the MD_CLEAR function of VERW.
pub const LEAF_7_MD_CLEAR: u32 = 1 << 10;
/// Leaf 7 EDX: IA32_SPEC_CTRL.IBRS and IBPB.
pub const LEAF_7_IBRS_IBPB: u32 = 1 << 26;
/// Leaf 7 EDX: IA32_FLUSH_CMD.
pub const LEAF_7_L1D_FLUSH: u32 = 1 << 28;
/// Leaf 7 EDX: IA32_ARCH_CAPABILITIES.
pub const LEAF_7_ARCH_CAPABILITIES: u32 = 1 << 29;
/// Leaf 7, subleaf 2, EDX: IA32_SPEC_CTRL.BHI_DIS_S.
pub const LEAF_7_2_BHI_CTRL: u32 = 1 << 4;
/// Leaf 0x8000_0008 EBX: IBPB.
pub const EXTENDED_8_IBPB: u32 = 1 << 12;
/// Leaf 0x8000_0021 EAX: VERW clears what transient scheduler attacks read.
pub const EXTENDED_21_VERW_CLEAR: u32 = 1 << 5;
/// Leaf 0x8000_0021 ECX: no transient scheduler attack, neither by the store queue nor by the L1 data cache.
pub const EXTENDED_21_TSA_NO: u32 = 1 << 1 | 1 << 2;

/// What L1 does about it, as a set of the bits below.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Barriers(u32);

impl Barriers {
    /// Enhanced IBRS is on: predictions that a guest has trained do not steer L1.
    pub const ENHANCED_IBRS: Self = Self(1 << 0);
    /// BHI_DIS_S is on: neither does a guest's branch history.
    pub const NO_FOREIGN_HISTORY: Self = Self(1 << 1);
    /// IBPB between machines.
    pub const PREDICTORS_BETWEEN: Self = Self(1 << 2);
    /// L1D flush between machines.
    pub const L1_DATA_BETWEEN: Self = Self(1 << 3);
    /// VERW between machines.
    pub const BUFFERS_BETWEEN: Self = Self(1 << 4);
    /// L1D flush before every entry.
    pub const L1_DATA_AT_ENTRY: Self = Self(1 << 5);
    /// VERW before every entry.
    pub const BUFFERS_AT_ENTRY: Self = Self(1 << 6);

    const NAMES: [(Self, &'static str); 7] = [
        (Self::ENHANCED_IBRS, "enhanced_ibrs"),
        (Self::NO_FOREIGN_HISTORY, "bhi_dis_s"),
        (Self::PREDICTORS_BETWEEN, "ibpb_between_machines"),
        (Self::L1_DATA_BETWEEN, "l1d_flush_between_machines"),
        (Self::BUFFERS_BETWEEN, "verw_between_machines"),
        (Self::L1_DATA_AT_ENTRY, "l1d_flush_at_entry"),
        (Self::BUFFERS_AT_ENTRY, "verw_at_entry"),
    ];

    /// Whether any of these bits is set.
    pub const fn has(self, any: Self) -> bool {
        self.0 & any.0 != 0
    }

    /// What is needed and there, by name.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(bit, _)| self.has(*bit)).map(|(_, name)| name)
    }

    /// What is needed on this processor, of what it has.
    pub fn decide(processor: &Processor) -> Self {
        use arch_capability::{
            BHI_NO, IBRS_ALL, MDS_NO, RDCL_NO, RFDS_CLEAR, RFDS_NO, SKIP_L1DFL_VMENTRY, TAA_NO,
        };
        let leaf_7 = processor.leaf_7_edx;
        let immune = processor.arch_capabilities;
        let has_buffer_clear = leaf_7 & LEAF_7_MD_CLEAR != 0;
        let has_flush = leaf_7 & LEAF_7_L1D_FLUSH != 0;
        let has_ibrs = leaf_7 & LEAF_7_IBRS_IBPB != 0;
        let has_verw_clear = processor.extended_21_eax & EXTENDED_21_VERW_CLEAR != 0;
        let has_ibpb = has_ibrs || processor.extended_8_ebx & EXTENDED_8_IBPB != 0;
        let scheduler =
            has_verw_clear && processor.extended_21_ecx & EXTENDED_21_TSA_NO != EXTENDED_21_TSA_NO;

        let enhanced_ibrs = processor.is_intel && has_ibrs && immune & IBRS_ALL != 0;
        let history =
            enhanced_ibrs && processor.leaf_7_2_edx & LEAF_7_2_BHI_CTRL != 0 && immune & BHI_NO == 0;
        let flush = processor.is_intel && has_flush && immune & (RDCL_NO | SKIP_L1DFL_VMENTRY) == 0;
        // A processor that does not say it is free of TAA may have TSX even where CPUID hides it.
        let sampling = has_buffer_clear && immune & (MDS_NO | TAA_NO) != MDS_NO | TAA_NO;
        let register_file = immune & RFDS_CLEAR != 0 && immune & RFDS_NO == 0;
        // On what MDS affects, the flush overwrites the buffers as well; on what RFDS affects, it does not.
        let buffers = processor.is_intel && (sampling && !flush || register_file) || scheduler;

        let bits = [
            (enhanced_ibrs, Self::ENHANCED_IBRS),
            (history, Self::NO_FOREIGN_HISTORY),
            (has_ibpb, Self::PREDICTORS_BETWEEN),
            (has_flush, Self::L1_DATA_BETWEEN),
            (has_buffer_clear || has_verw_clear, Self::BUFFERS_BETWEEN),
            (flush, Self::L1_DATA_AT_ENTRY),
            (buffers, Self::BUFFERS_AT_ENTRY),
        ];
        Self(bits.into_iter().filter(|(needed, _)| *needed).fold(0, |set, (_, bit)| set | bit.0))
    }
}

fn this_processor() -> Processor {
    let basic = |leaf, subleaf| if cpuid(0, 0)[0] >= leaf { cpuid(leaf, subleaf) } else { [0; 4] };
    let extended = |leaf| if cpuid(0x8000_0000, 0)[0] >= leaf { cpuid(leaf, 0) } else { [0; 4] };
    let [subleaves, _, _, leaf_7_edx] = basic(7, 0);
    let [_, _, _, leaf_7_2_edx] = if subleaves >= 2 { basic(7, 2) } else { [0; 4] };
    let [_, extended_8_ebx, ..] = extended(0x8000_0008);
    let [extended_21_eax, _, extended_21_ecx, _] = extended(0x8000_0021);
    let arch_capabilities = if leaf_7_edx & LEAF_7_ARCH_CAPABILITIES != 0 {
        // SAFETY: CPUID says that the MSR exists; reading it has no effect.
        unsafe { Msr::new(ARCH_CAPABILITIES).read() }
    } else {
        0
    };
    Processor {
        is_intel: is_intel(),
        leaf_7_edx,
        leaf_7_2_edx,
        extended_8_ebx,
        extended_21_eax,
        extended_21_ecx,
        arch_capabilities,
    }
}

/// The decision, or [`UNDECIDED`].
static NEEDED: AtomicU32 = AtomicU32::new(UNDECIDED);
const UNDECIDED: u32 = 1 << 31;

fn needed() -> Barriers {
    match NEEDED.load(Ordering::Relaxed) {
        UNDECIDED => {
            let barriers = Barriers::decide(&this_processor());
            NEEDED.store(barriers.0, Ordering::Relaxed);
            barriers
        }
        known => Barriers(known),
    }
}

/// Switches on what holds for good on the core that booted, and logs what is needed.
pub fn init() {
    init_here();
    let names = needed().names().collect::<Vec<_>>().join(" ");
    log::info!("barriers: {}", if names.is_empty() { "none" } else { &names });
}

/// Switches on what holds for good on this core, another one. To be called once, before its first guest.
pub fn init_here() {
    let barriers = needed();
    let mut value = 0;
    if barriers.has(Barriers::ENHANCED_IBRS) {
        value |= SPEC_CTRL_IBRS;
    }
    if barriers.has(Barriers::NO_FOREIGN_HISTORY) {
        value |= SPEC_CTRL_BHI_DIS_S;
    }
    if value != 0 {
        let mut register = Msr::new(SPEC_CTRL);
        // SAFETY: CPUID offers the register and the bits; they only restrict predictions.
        unsafe { register.write(register.read() | u64::from(value)) };
    }
}

/// To be called right before a guest is entered: what L1 has touched is not the guest's to read. No more than a test of one word where
/// the processor needs nothing.
pub fn before_entry() {
    const ANY: Barriers = Barriers(Barriers::L1_DATA_AT_ENTRY.0 | Barriers::BUFFERS_AT_ENTRY.0);
    let barriers = needed();
    if !barriers.has(ANY) {
        return;
    }
    if barriers.has(Barriers::L1_DATA_AT_ENTRY) {
        flush_l1_data();
    }
    if barriers.has(Barriers::BUFFERS_AT_ENTRY) {
        clear_buffers();
    }
}

/// To be called before a core runs another machine than it last did.
pub fn between_machines() {
    let barriers = needed();
    if barriers.has(Barriers::PREDICTORS_BETWEEN) {
        // SAFETY: a write-only command MSR that CPUID offers; it changes no architectural state.
        unsafe { Msr::new(PRED_CMD).write(PRED_CMD_IBPB) };
    }
    if barriers.has(Barriers::L1_DATA_BETWEEN) {
        flush_l1_data();
    }
    if barriers.has(Barriers::BUFFERS_BETWEEN) {
        clear_buffers();
    }
}

fn flush_l1_data() {
    // SAFETY: a write-only command MSR; every caller knows that CPUID offers it. It changes no architectural state.
    unsafe { Msr::new(FLUSH_CMD).write(FLUSH_CMD_L1D) };
}

fn clear_buffers() {
    // SAFETY: VERW of the data segment's own selector only sets ZF.
    unsafe {
        asm!("mov {0:x}, ds", "push {0}", "verw word ptr [rsp]", "pop {0}", out(reg) _);
    }
}

/// Overwrites the processor's stack of predicted return addresses, which a guest may have filled, and waits until that is done. To be
/// called, from assembly, after an exit and before the first RET; changes RSP's surroundings (256 bytes below) and RFLAGS only.
///
/// Unconditional: a test could itself be mispredicted. It takes 32 calls and a few mispredicted returns, some 100 to 200 cycles where an
/// exit costs thousands. Enhanced and automatic IBRS do not cover every processor's return predictions (post-barrier RSB), and without
/// them nothing else does.
///
/// # Safety
/// To be called with the stack in use and 264 bytes of it free.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn overwrite_return_predictions() {
    naked_asm!(
        ".rept 32",
        "call 2f",
        // Speculation that follows the stale entry ends here.
        "3:",
        "pause",
        "lfence",
        "jmp 3b",
        "2:",
        ".endr",
        "add rsp, 32 * 8",
        "lfence",
        "ret",
    )
}
