//! Which exits a guest takes and which features it runs with: the VM-execution, VM-exit and VM-entry controls.
//!
//! Intel SDM vol. 3, 25.6 (execution controls), 25.7 (exit controls), 25.8 (entry controls), A.2-A.5 (which bits may be 0 and 1).

use super::capabilities::Capabilities;
use crate::hypervisor::refusal::Refusal;

/// Pin-based VM-execution controls.
#[allow(missing_docs, reason = "the manual's names")]
#[allow(dead_code, reason = "a list as the manual has it")]
pub mod pin {
    pub const EXTERNAL_INTERRUPT_EXITING: u32 = 1 << 0;
    pub const NMI_EXITING: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls.
#[allow(missing_docs, reason = "the manual's names")]
#[allow(dead_code, reason = "a list as the manual has it")]
pub mod primary {
    pub const INTERRUPT_WINDOW_EXITING: u32 = 1 << 2;
    pub const TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT_EXITING: u32 = 1 << 7;
    pub const INVLPG_EXITING: u32 = 1 << 9;
    pub const MWAIT_EXITING: u32 = 1 << 10;
    pub const RDPMC_EXITING: u32 = 1 << 11;
    pub const RDTSC_EXITING: u32 = 1 << 12;
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    pub const CR3_STORE_EXITING: u32 = 1 << 16;
    pub const TERTIARY_CONTROLS: u32 = 1 << 17;
    pub const CR8_LOAD_EXITING: u32 = 1 << 19;
    pub const CR8_STORE_EXITING: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW_EXITING: u32 = 1 << 22;
    pub const MOV_DR_EXITING: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO_EXITING: u32 = 1 << 24;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP_FLAG: u32 = 1 << 27;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR_EXITING: u32 = 1 << 29;
    pub const PAUSE_EXITING: u32 = 1 << 30;
    pub const SECONDARY_CONTROLS: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
#[allow(missing_docs, reason = "the manual's names")]
#[allow(dead_code, reason = "a list as the manual has it")]
pub mod secondary {
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    pub const EPT: u32 = 1 << 1;
    pub const DESCRIPTOR_TABLE_EXITING: u32 = 1 << 2;
    pub const RDTSCP: u32 = 1 << 3;
    pub const VIRTUALIZE_X2APIC_MODE: u32 = 1 << 4;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD_EXITING: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const APIC_REGISTER_VIRTUALIZATION: u32 = 1 << 8;
    pub const VIRTUAL_INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub const PAUSE_LOOP_EXITING: u32 = 1 << 10;
    pub const RDRAND_EXITING: u32 = 1 << 11;
    pub const INVPCID: u32 = 1 << 12;
    pub const VM_FUNCTIONS: u32 = 1 << 13;
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    pub const ENCLS_EXITING: u32 = 1 << 15;
    pub const RDSEED_EXITING: u32 = 1 << 16;
    pub const PAGE_MODIFICATION_LOGGING: u32 = 1 << 17;
    pub const EPT_VIOLATION_EXCEPTION: u32 = 1 << 18;
    pub const CONCEAL_VMX_FROM_PT: u32 = 1 << 19;
    pub const XSAVES: u32 = 1 << 20;
    pub const MODE_BASED_EXECUTE: u32 = 1 << 22;
    pub const SUB_PAGE_WRITE_PERMISSIONS: u32 = 1 << 23;
    pub const PT_GUEST_PHYSICAL: u32 = 1 << 24;
    pub const TSC_SCALING: u32 = 1 << 25;
    pub const USER_WAIT_AND_PAUSE: u32 = 1 << 26;
    pub const PCONFIG: u32 = 1 << 27;
    pub const ENCLV_EXITING: u32 = 1 << 28;
    pub const BUS_LOCK_DETECTION: u32 = 1 << 30;
    pub const INSTRUCTION_TIMEOUT: u32 = 1 << 31;
}

/// VM-exit controls.
#[allow(missing_docs, reason = "the manual's names")]
#[allow(dead_code, reason = "a list as the manual has it")]
pub mod exit {
    pub const SAVE_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const HOST_64_BIT: u32 = 1 << 9;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
    pub const SAVE_PREEMPTION_TIMER: u32 = 1 << 22;
    pub const CLEAR_BNDCFGS: u32 = 1 << 23;
    pub const LOAD_CET_STATE: u32 = 1 << 28;
    pub const LOAD_PKRS: u32 = 1 << 29;
    pub const SECONDARY_CONTROLS: u32 = 1 << 31;
}

/// VM-entry controls.
#[allow(missing_docs, reason = "the manual's names")]
#[allow(dead_code, reason = "a list as the manual has it")]
pub mod entry {
    pub const LOAD_DEBUG_CONTROLS: u32 = 1 << 2;
    pub const IA32E_MODE_GUEST: u32 = 1 << 9;
    pub const ENTRY_TO_SMM: u32 = 1 << 10;
    pub const DEACTIVATE_DUAL_MONITOR: u32 = 1 << 11;
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
    pub const LOAD_BNDCFGS: u32 = 1 << 16;
    pub const LOAD_RTIT_CTL: u32 = 1 << 18;
    pub const LOAD_CET_STATE: u32 = 1 << 20;
    pub const LOAD_PKRS: u32 = 1 << 22;
}

/// The five control fields, as a guest starts with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Controls {
    /// [`pin`].
    pub pin: u32,
    /// [`primary`].
    pub primary: u32,
    /// [`secondary`].
    pub secondary: u32,
    /// [`exit`].
    pub exit: u32,
    /// [`entry`].
    pub entry: u32,
}

/// A control and the refusal when the processor does not let it be as it must.
struct Control {
    bit: u32,
    refusal: Refusal,
}

/// What one control field is to hold.
struct Wish {
    required: &'static [Control],
    optional: u32,
    never: &'static [Control],
    /// Bits that the manual wants to be 1 unless a TRUE register says otherwise (A.3.1, A.3.2, A.4, A.5: the default1 class).
    default1: u32,
    /// For a bit that the processor insists on and none of the above names.
    forced: Refusal,
}

const OTHER_CPU: &str = "choose a newer CPU model or machine type for this VM (QEMU: -cpu host)";

macro_rules! control {
    (must be 1: $module:ident::$control:ident = $number:literal, $name:literal, $register:literal) => {
        control!($module::$control, $number, "VMX does not offer ", $name, $register, ", cannot be 1)")
    };
    (must be 0: $module:ident::$control:ident = $number:literal, $name:literal, $register:literal) => {
        control!($module::$control, $number, "VMX insists on ", $name, $register, ", cannot be 0)")
    };
    ($bit:expr, $number:literal, $verb:literal, $name:literal, $register:literal, $cannot:literal) => {
        Control {
            bit: {
                assert!($bit == 1 << $number);
                $bit
            },
            refusal: Refusal {
                missing: concat!($verb, $name, " (", $register, ": control bit ", $number, $cannot),
                remedy: OTHER_CPU,
            },
        }
    };
}

macro_rules! forced {
    ($register:literal) => {
        Refusal {
            missing: concat!(
                "VMX insists on a control that nestling does not use (lower half of ",
                $register,
                ")"
            ),
            remedy: OTHER_CPU,
        }
    };
}

const PIN: Wish = Wish {
    required: &[
        control!(must be 1: pin::EXTERNAL_INTERRUPT_EXITING = 0, "external-interrupt exiting", "IA32_VMX_PINBASED_CTLS"),
        control!(must be 1: pin::NMI_EXITING = 3, "NMI exiting", "IA32_VMX_PINBASED_CTLS"),
        control!(must be 1: pin::VIRTUAL_NMIS = 5, "virtual NMIs", "IA32_VMX_PINBASED_CTLS"),
    ],
    optional: pin::PREEMPTION_TIMER,
    never: &[],
    default1: 0x0000_0016,
    forced: forced!("IA32_VMX_PINBASED_CTLS"),
};

const PRIMARY: Wish = Wish {
    required: &[
        control!(must be 1: primary::TSC_OFFSETTING = 3, "TSC offsetting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::HLT_EXITING = 7, "HLT exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::MWAIT_EXITING = 10, "MWAIT exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::RDPMC_EXITING = 11, "RDPMC exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::CR8_LOAD_EXITING = 19, "CR8-load exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::CR8_STORE_EXITING = 20, "CR8-store exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::UNCONDITIONAL_IO_EXITING = 24, "unconditional I/O exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::MSR_BITMAPS = 28, "MSR bitmaps", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::MONITOR_EXITING = 29, "MONITOR exiting", "IA32_VMX_PROCBASED_CTLS"),
        control!(must be 1: primary::SECONDARY_CONTROLS = 31, "secondary controls", "IA32_VMX_PROCBASED_CTLS"),
    ],
    optional: 0,
    never: &[
        control!(must be 0: primary::INVLPG_EXITING = 9, "INVLPG exiting", "IA32_VMX_TRUE_PROCBASED_CTLS"),
        control!(must be 0: primary::RDTSC_EXITING = 12, "RDTSC exiting", "IA32_VMX_TRUE_PROCBASED_CTLS"),
        control!(must be 0: primary::CR3_LOAD_EXITING = 15, "CR3-load exiting", "IA32_VMX_TRUE_PROCBASED_CTLS"),
        control!(must be 0: primary::CR3_STORE_EXITING = 16, "CR3-store exiting", "IA32_VMX_TRUE_PROCBASED_CTLS"),
        control!(must be 0: primary::MOV_DR_EXITING = 23, "MOV-DR exiting", "IA32_VMX_TRUE_PROCBASED_CTLS"),
    ],
    default1: 0x0401_E172,
    forced: forced!("IA32_VMX_TRUE_PROCBASED_CTLS"),
};

const SECONDARY: Wish = Wish {
    required: &[
        control!(must be 1: secondary::EPT = 1, "extended page tables", "IA32_VMX_PROCBASED_CTLS2"),
        control!(must be 1: secondary::WBINVD_EXITING = 6, "WBINVD exiting", "IA32_VMX_PROCBASED_CTLS2"),
        control!(must be 1: secondary::UNRESTRICTED_GUEST = 7, "unrestricted guest", "IA32_VMX_PROCBASED_CTLS2"),
    ],
    optional: secondary::RDTSCP | secondary::VPID | secondary::INVPCID,
    never: &[control!(
        must be 0: secondary::DESCRIPTOR_TABLE_EXITING = 2, "descriptor-table exiting", "IA32_VMX_PROCBASED_CTLS2"
    )],
    default1: 0,
    forced: forced!("IA32_VMX_PROCBASED_CTLS2"),
};

const EXIT: Wish = Wish {
    required: &[
        control!(must be 1: exit::SAVE_DEBUG_CONTROLS = 2, "saving of debug controls at exits", "IA32_VMX_EXIT_CTLS"),
        control!(must be 1: exit::HOST_64_BIT = 9, "a 64-bit host", "IA32_VMX_EXIT_CTLS"),
        control!(must be 1: exit::SAVE_EFER = 20, "saving of EFER at exits", "IA32_VMX_EXIT_CTLS"),
        control!(must be 1: exit::LOAD_EFER = 21, "loading of EFER at exits", "IA32_VMX_EXIT_CTLS"),
    ],
    optional: exit::SAVE_PREEMPTION_TIMER,
    never: &[],
    default1: 0x0003_6DFF,
    forced: forced!("IA32_VMX_EXIT_CTLS"),
};

const ENTRY: Wish = Wish {
    required: &[
        control!(must be 1: entry::LOAD_DEBUG_CONTROLS = 2, "loading of debug controls at entries", "IA32_VMX_ENTRY_CTLS"),
        control!(must be 1: entry::LOAD_EFER = 15, "loading of EFER at entries", "IA32_VMX_ENTRY_CTLS"),
    ],
    optional: 0,
    never: &[],
    default1: 0x0000_11FF,
    forced: forced!("IA32_VMX_ENTRY_CTLS"),
};

impl Wish {
    /// The field's value under a capability register's lower half (must be 1) and upper half (may be 1).
    fn round(&self, capability: u64, optional: u32) -> Result<u32, Refusal> {
        let (must, may) = (capability as u32, (capability >> 32) as u32);
        let mut value = optional & self.optional & may;
        for control in self.required {
            if may & control.bit == 0 {
                return Err(control.refusal);
            }
            value |= control.bit;
        }
        if let Some(control) = self.never.iter().find(|control| must & control.bit != 0) {
            return Err(control.refusal);
        }
        if must & !(value | self.default1) != 0 {
            return Err(self.forced);
        }
        Ok(value | must)
    }
}

impl Controls {
    /// The controls for a guest on this processor: all that is required, and of the optional ones what is offered.
    ///
    /// # Errors
    /// [`Refusal`] when the processor does not offer a required control or insists on one that must be off.
    pub fn choose(capabilities: &Capabilities) -> Result<Self, Refusal> {
        // A VPID whose translations cannot be dropped is of no use.
        let unusable = if has_usable_vpid(capabilities) { 0 } else { secondary::VPID };
        let pin = PIN.round(capabilities.pin, u32::MAX)?;
        // The timer goes on where it stopped, so that it need not be written at each entry; without a timer there is none to save.
        let save = if pin & pin::PREEMPTION_TIMER != 0 { u32::MAX } else { !exit::SAVE_PREEMPTION_TIMER };
        Ok(Self {
            pin,
            primary: PRIMARY.round(capabilities.primary, u32::MAX)?,
            secondary: SECONDARY.round(capabilities.secondary, !unusable)?,
            exit: EXIT.round(capabilities.exit, save)?,
            entry: ENTRY.round(capabilities.entry, u32::MAX)?,
        })
    }
}

const fn has_usable_vpid(capabilities: &Capabilities) -> bool {
    allows(capabilities.secondary, secondary::VPID)
        && (capabilities.has_single_context_invvpid() || capabilities.has_all_context_invvpid())
}

/// Whether a capability register lets a control be 1.
pub const fn allows(capability: u64, control: u32) -> bool {
    capability >> 32 & control as u64 != 0
}

/// How many optional features [`features`] reports.
pub const FEATURES: usize = 13;

/// Optional features by name, and whether the processor offers them; not all that are offered are used.
pub const fn features(capabilities: &Capabilities) -> [(&'static str, bool); FEATURES] {
    let (pin, primary, secondary) = (capabilities.pin, capabilities.primary, capabilities.secondary);
    [
        ("vpid", has_usable_vpid(capabilities)),
        ("preemption_timer", allows(pin, pin::PREEMPTION_TIMER)),
        ("tsc_scaling", allows(secondary, secondary::TSC_SCALING)),
        ("apic_register_virtualization", allows(secondary, secondary::APIC_REGISTER_VIRTUALIZATION)),
        ("virtual_interrupt_delivery", allows(secondary, secondary::VIRTUAL_INTERRUPT_DELIVERY)),
        ("posted_interrupts", allows(pin, pin::POSTED_INTERRUPTS)),
        ("pause_loop_exiting", allows(secondary, secondary::PAUSE_LOOP_EXITING)),
        ("invpcid", allows(secondary, secondary::INVPCID)),
        ("xsaves", allows(secondary, secondary::XSAVES)),
        ("ept_1gib_pages", capabilities.has_1gib_ept()),
        ("ept_access_dirty", capabilities.has_ept_access_dirty()),
        ("tpr_shadow", allows(primary, primary::TPR_SHADOW)),
        ("mode_based_execute", allows(secondary, secondary::MODE_BASED_EXECUTE)),
    ]
}
