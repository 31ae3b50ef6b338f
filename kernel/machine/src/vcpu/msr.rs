//! Model-specific registers: which a guest has, and what they do.
//!
//! Intel SDM vol. 4; AMD APM vol. 2, appendix A; Linux, Documentation/virt/kvm/x86/msr.rst. A register that is not named here
//! raises #GP, as on a processor without it.

use super::{ControlRegisters, Vcpu};
use crate::address::{GuestTsc, MsrIndex};
use crate::memory::GuestMemory;
use crate::state::{EFER_LMA, EFER_LME, EFER_NXE, Exception};

/// What the hypervisor loop must carry out after a WRMSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrEffect {
    /// Nothing.
    None,
    /// Load this EFER (as the guest sees it, without SVME).
    Efer(u64),
    /// Load this TSC_AUX.
    TscAux(u64),
    /// Load this page attribute table.
    Pat(u64),
    /// Add this to the TSC offset.
    TscOffsetDelta(i64),
}

/// MSRs that live in the vendor's control block and never exit.
pub const PASS_THROUGH: &[MsrIndex] = &[
    MsrIndex(0x174),       // SYSENTER_CS
    MsrIndex(0x175),       // SYSENTER_ESP
    MsrIndex(0x176),       // SYSENTER_EIP
    MsrIndex(0xC000_0081), // STAR
    MsrIndex(0xC000_0082), // LSTAR
    MsrIndex(0xC000_0083), // CSTAR
    MsrIndex(0xC000_0084), // SFMASK
    MsrIndex(0xC000_0100), // FS_BASE
    MsrIndex(0xC000_0101), // GS_BASE
    MsrIndex(0xC000_0102), // KERNEL_GS_BASE
];

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const APIC_BASE: u32 = 0x1B;
const FEATURE_CONTROL: u32 = 0x3A;
const TSC_ADJUST: u32 = 0x3B;
const MICROCODE_REVISION: u32 = 0x8B;
const MTRR_CAPABILITIES: u32 = 0xFE;
const MACHINE_CHECK_CAPABILITIES: u32 = 0x179;
const MACHINE_CHECK_STATUS: u32 = 0x17A;
const MISC_ENABLE: u32 = 0x1A0;
const DEBUG_CONTROL: u32 = 0x1D9;
const PAT: u32 = 0x277;
const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
const TSC_DEADLINE: u32 = 0x6E0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8FF;
const EFER: u32 = 0xC000_0080;
const TSC_AUX: u32 = 0xC000_0103;
const AMD_SYSTEM_CONFIGURATION: u32 = 0xC001_0010;
const AMD_HARDWARE_CONFIGURATION: u32 = 0xC001_0015;
const AMD_NORTHBRIDGE_CONFIGURATION: u32 = 0xC001_001F;
const AMD_PATCH_LOADER: u32 = 0xC001_0020;
const AMD_INTERRUPT_PENDING: u32 = 0xC001_0055;
const AMD_MMIO_CONFIGURATION_BASE: u32 = 0xC001_0058;
const AMD_VM_CONTROL: u32 = 0xC001_0114;
const AMD_DECODE_CONFIGURATION: u32 = 0xC001_1029;
const KVM_WALL_CLOCK: u32 = 0x4B56_4D00;
const KVM_SYSTEM_TIME: u32 = 0x4B56_4D01;
const KVM_PV_EOI: u32 = 0x4B56_4D04;

/// The page attribute table after reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

const FEATURE_CONTROL_LOCKED: u64 = 1;
/// Fast strings; branch trace storage and precise event sampling are not available.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// What a guest may change of it: fast strings, thermal control, limit CPUID, execute-disable.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 3 | 1 << 22 | 1 << 34;
/// Last branch records and branch single-step: taken, with no effect.
const DEBUG_CONTROL_WRITABLE: u64 = 0b11;
/// MTRRs are on and the default type is write-back; there are no fixed and no variable ranges.
const MTRR_DEFAULT_TYPE_RESET: u64 = 1 << 11 | 6;
const MTRR_DEFAULT_TYPE_WRITABLE: u64 = 1 << 11 | 0xFF;

const EFER_SCE: u64 = 1 << 0;
const EFER_FFXSR: u64 = 1 << 14;
const CR0_PG: u64 = 1 << 31;

/// TscFreqSel: the TSC counts at the P0 frequency.
const HWCR_RESET: u64 = 1 << 24;
/// TLB cache, FFDIS, IGNNE, McStatusWrEn: what Linux and firmware set in HWCR, none with an effect here.
const HWCR_WRITABLE: u64 = 1 << 3 | 1 << 6 | 1 << 8 | 1 << 18;
/// LFENCE serializes.
const DECODE_CONFIGURATION: u64 = 1 << 1;
/// SVM is disabled and locked.
const VM_CONTROL: u64 = 1 << 3 | 1 << 4;

const INTEL_MICROCODE: u64 = 1 << 32;
const AMD_MICROCODE: u64 = 0x0100_0065;

/// Registers that are only stored.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) tsc_aux: u64,
    tsc_adjust: i64,
    pat: u64,
    misc_enable: u64,
    debug_control: u64,
    mtrr_default_type: u64,
    hardware_configuration: u64,
    is_amd: bool,
    efer_allowed: u64,
}

impl Stored {
    pub(super) fn new(is_amd: bool, has_fast_fxsr: bool) -> Self {
        let ffxsr = if has_fast_fxsr { EFER_FFXSR } else { 0 };
        Self {
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE_RESET,
            debug_control: 0,
            mtrr_default_type: MTRR_DEFAULT_TYPE_RESET,
            hardware_configuration: HWCR_RESET,
            is_amd,
            efer_allowed: EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | ffxsr,
        }
    }

    fn read_amd(&self, index: u32) -> Result<u64, Exception> {
        match index {
            _ if !self.is_amd => Err(Exception::GENERAL_PROTECTION),
            AMD_HARDWARE_CONFIGURATION => Ok(self.hardware_configuration),
            AMD_DECODE_CONFIGURATION => Ok(DECODE_CONFIGURATION),
            AMD_VM_CONTROL => Ok(VM_CONTROL),
            AMD_SYSTEM_CONFIGURATION
            | AMD_NORTHBRIDGE_CONFIGURATION
            | AMD_INTERRUPT_PENDING
            | AMD_MMIO_CONFIGURATION_BASE => Ok(0),
            _ => Err(Exception::GENERAL_PROTECTION),
        }
    }

    fn write_amd(&mut self, index: u32, value: u64) -> Result<MsrEffect, Exception> {
        match index {
            _ if !self.is_amd => return Err(Exception::GENERAL_PROTECTION),
            AMD_HARDWARE_CONFIGURATION if value & !(HWCR_WRITABLE | HWCR_RESET) == 0 => {
                self.hardware_configuration = value | HWCR_RESET;
            }
            // The bit is there to stay, as on a processor where LFENCE always serializes.
            AMD_DECODE_CONFIGURATION if value & !DECODE_CONFIGURATION == 0 => {}
            AMD_SYSTEM_CONFIGURATION | AMD_NORTHBRIDGE_CONFIGURATION | AMD_INTERRUPT_PENDING
                if value == 0 => {}
            AMD_PATCH_LOADER => {}
            _ => return Err(Exception::GENERAL_PROTECTION),
        }
        Ok(MsrEffect::None)
    }
}

impl Vcpu {
    /// RDMSR at guest time `now`. The processor has checked the privilege level before the exit (SDM vol. 3, 26.1.1; APM vol. 2, 15.9).
    ///
    /// # Errors
    /// The exception to deliver: the MSR does not exist or may not be read.
    pub fn read_msr(
        &mut self,
        index: MsrIndex,
        now: GuestTsc,
        context: &dyn ControlRegisters,
    ) -> Result<u64, Exception> {
        match index.0 {
            X2APIC_FIRST..=X2APIC_LAST => self.lapic.msr_read(index, now),
            TSC_DEADLINE => Ok(self.lapic.tsc_deadline(now)),
            TSC => Ok(now.0),
            TSC_ADJUST => Ok(self.stored.tsc_adjust as u64),
            TSC_AUX => Ok(self.stored.tsc_aux),
            APIC_BASE => Ok(self.lapic.base()),
            EFER => Ok(context.efer()),
            PAT => Ok(self.stored.pat),
            KVM_WALL_CLOCK => Ok(self.clock.wall_clock()),
            KVM_SYSTEM_TIME => Ok(self.clock.system_time()),
            KVM_PV_EOI => Ok(self.pv_eoi.msr()),
            MISC_ENABLE => Ok(self.stored.misc_enable),
            DEBUG_CONTROL => Ok(self.stored.debug_control),
            MTRR_DEFAULT_TYPE => Ok(self.stored.mtrr_default_type),
            MICROCODE_REVISION => Ok(if self.stored.is_amd { AMD_MICROCODE } else { INTEL_MICROCODE }),
            FEATURE_CONTROL => Ok(FEATURE_CONTROL_LOCKED),
            PLATFORM_ID | MTRR_CAPABILITIES | MACHINE_CHECK_CAPABILITIES | MACHINE_CHECK_STATUS => Ok(0),
            other => self.stored.read_amd(other),
        }
    }

    /// WRMSR at guest time `now`, which is `wall_ns` nanoseconds after the Unix epoch.
    ///
    /// # Errors
    /// The exception to deliver: the MSR does not exist or does not take this value.
    pub fn write_msr(
        &mut self,
        index: MsrIndex,
        value: u64,
        now: GuestTsc,
        context: &dyn ControlRegisters,
        wall_ns: u64,
        memory: &mut dyn GuestMemory,
    ) -> Result<MsrEffect, Exception> {
        const REFUSED: Result<MsrEffect, Exception> = Err(Exception::GENERAL_PROTECTION);
        match index.0 {
            X2APIC_FIRST..=X2APIC_LAST => self.lapic.msr_write(index, value, now)?,
            TSC_DEADLINE => self.lapic.set_tsc_deadline(value, now),
            TSC => {
                let delta = value.wrapping_sub(now.0) as i64;
                self.stored.tsc_adjust = self.stored.tsc_adjust.wrapping_add(delta);
                return Ok(self.shift_time(delta, memory));
            }
            TSC_ADJUST => {
                let delta = (value as i64).wrapping_sub(self.stored.tsc_adjust);
                self.stored.tsc_adjust = value as i64;
                return Ok(self.shift_time(delta, memory));
            }
            TSC_AUX => {
                if value > u64::from(u32::MAX) {
                    return REFUSED;
                }
                self.stored.tsc_aux = value;
                return Ok(MsrEffect::TscAux(value));
            }
            APIC_BASE => self.lapic.set_base(value)?,
            EFER => return self.write_efer(value, context),
            PAT => {
                let valid = value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7));
                if !valid {
                    return REFUSED;
                }
                self.stored.pat = value;
                return Ok(MsrEffect::Pat(value));
            }
            KVM_WALL_CLOCK => self.clock.set_wall_clock(value, now, wall_ns, memory)?,
            KVM_SYSTEM_TIME => self.clock.set_system_time(value, memory)?,
            KVM_PV_EOI => self.pv_eoi.set_msr(value, memory)?,
            MISC_ENABLE if (value ^ MISC_ENABLE_RESET) & !MISC_ENABLE_WRITABLE == 0 => {
                self.stored.misc_enable = value;
            }
            DEBUG_CONTROL if value & !DEBUG_CONTROL_WRITABLE == 0 => self.stored.debug_control = value,
            MTRR_DEFAULT_TYPE
                if value & !MTRR_DEFAULT_TYPE_WRITABLE == 0 && matches!(value as u8, 0 | 1 | 4..=6) =>
            {
                self.stored.mtrr_default_type = value;
            }
            // Linux clears the revision before it asks CPUID for it.
            MICROCODE_REVISION => {}
            MACHINE_CHECK_STATUS if value == 0 => {}
            other => return self.stored.write_amd(other, value),
        }
        Ok(MsrEffect::None)
    }

    fn shift_time(&mut self, delta: i64, memory: &mut dyn GuestMemory) -> MsrEffect {
        if delta == 0 {
            return MsrEffect::None;
        }
        self.lapic.shift_time(delta);
        self.clock.shift(delta, memory);
        MsrEffect::TscOffsetDelta(delta)
    }

    /// AMD APM vol. 2, 3.1.7 and 14.6: LMA follows LME and CR0.PG, and is not the guest's to write.
    fn write_efer(&self, value: u64, context: &dyn ControlRegisters) -> Result<MsrEffect, Exception> {
        let changes_mode = (value ^ context.efer()) & EFER_LME != 0;
        if value & !self.stored.efer_allowed != 0 || changes_mode && context.cr0() & CR0_PG != 0 {
            return Err(Exception::GENERAL_PROTECTION);
        }
        Ok(MsrEffect::Efer(value & !EFER_LMA | context.efer() & EFER_LMA))
    }
}
