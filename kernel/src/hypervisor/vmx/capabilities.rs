//! What this processor's VMX can do: the IA32_VMX_* registers, read once.
//!
//! Intel SDM vol. 3, appendix A.

use super::controls::{allows, primary, secondary};
use core::fmt;

const BASIC: u32 = 0x480;
const PIN: u32 = 0x481;
const PRIMARY: u32 = 0x482;
const EXIT: u32 = 0x483;
const ENTRY: u32 = 0x484;
const MISC: u32 = 0x485;
const CR0_FIXED0: u32 = 0x486;
const CR0_FIXED1: u32 = 0x487;
const CR4_FIXED0: u32 = 0x488;
const CR4_FIXED1: u32 = 0x489;
const VMCS_ENUM: u32 = 0x48A;
const SECONDARY: u32 = 0x48B;
const EPT_VPID: u32 = 0x48C;
/// From the four plain ones to their TRUE counterparts, which let the controls that used to be fixed at 1 be 0.
const TRUE_OFFSET: u32 = 0x48D - 0x481;
const VMFUNC: u32 = 0x491;
const TERTIARY: u32 = 0x492;

/// In IA32_VMX_BASIC: the TRUE registers exist.
const HAS_TRUE_CONTROLS: u64 = 1 << 55;

/// The values. A control register's lower half has the bits that must be 1, its upper half the bits that may be 1.
#[derive(Clone, Copy, Debug)]
pub struct Capabilities {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// IA32_VMX_(TRUE_)PINBASED_CTLS.
    pub pin: u64,
    /// IA32_VMX_(TRUE_)PROCBASED_CTLS.
    pub primary: u64,
    /// IA32_VMX_PROCBASED_CTLS2; 0 where there are no secondary controls.
    pub secondary: u64,
    /// IA32_VMX_PROCBASED_CTLS3, the bits that may be 1; 0 where there are no tertiary controls.
    pub tertiary: u64,
    /// IA32_VMX_(TRUE_)EXIT_CTLS.
    pub exit: u64,
    /// IA32_VMX_(TRUE_)ENTRY_CTLS.
    pub entry: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_CR0_FIXED0: bits of CR0 that must be 1.
    pub cr0_fixed0: u64,
    /// IA32_VMX_CR0_FIXED1: bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// IA32_VMX_CR4_FIXED0: bits of CR4 that must be 1.
    pub cr4_fixed0: u64,
    /// IA32_VMX_CR4_FIXED1: bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_EPT_VPID_CAP; 0 where there is neither EPT nor VPID.
    pub ept_vpid: u64,
    /// IA32_VMX_VMFUNC; 0 where there are no VM functions.
    pub vmfunc: u64,
    /// IA32_VMX_VMCS_ENUM.
    pub vmcs_enum: u64,
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, value)) in self.entries().enumerate() {
            let name = name.strip_prefix("IA32_VMX_").unwrap_or(name);
            write!(f, "{}{name} {value:#x}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl Capabilities {
    /// Reads each register that exists once, by `read_msr`.
    pub fn read(mut read_msr: impl FnMut(u32) -> u64) -> Self {
        let basic = read_msr(BASIC);
        let shift = if basic & HAS_TRUE_CONTROLS != 0 { TRUE_OFFSET } else { 0 };
        let (pin, primary) = (read_msr(PIN + shift), read_msr(PRIMARY + shift));
        let (exit, entry) = (read_msr(EXIT + shift), read_msr(ENTRY + shift));
        let mut read_if = |there: bool, index| if there { read_msr(index) } else { 0 };
        let secondary = read_if(allows(primary, primary::SECONDARY_CONTROLS), SECONDARY);
        Self {
            basic,
            pin,
            primary,
            secondary,
            tertiary: read_if(allows(primary, primary::TERTIARY_CONTROLS), TERTIARY),
            exit,
            entry,
            ept_vpid: read_if(allows(secondary, secondary::EPT | secondary::VPID), EPT_VPID),
            vmfunc: read_if(allows(secondary, secondary::VM_FUNCTIONS), VMFUNC),
            misc: read_msr(MISC),
            cr0_fixed0: read_msr(CR0_FIXED0),
            cr0_fixed1: read_msr(CR0_FIXED1),
            cr4_fixed0: read_msr(CR4_FIXED0),
            cr4_fixed1: read_msr(CR4_FIXED1),
            vmcs_enum: read_msr(VMCS_ENUM),
        }
    }

    /// The registers that exist, by their names in the manual.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let plain = self.basic & HAS_TRUE_CONTROLS == 0;
        let name = |without, with| if plain { without } else { with };
        let has_secondary = allows(self.primary, primary::SECONDARY_CONTROLS);
        let has_tertiary = allows(self.primary, primary::TERTIARY_CONTROLS);
        let has_ept_vpid = allows(self.secondary, secondary::EPT | secondary::VPID);
        let has_vmfunc = allows(self.secondary, secondary::VM_FUNCTIONS);
        [
            ("IA32_VMX_BASIC", self.basic, true),
            (name("IA32_VMX_PINBASED_CTLS", "IA32_VMX_TRUE_PINBASED_CTLS"), self.pin, true),
            (name("IA32_VMX_PROCBASED_CTLS", "IA32_VMX_TRUE_PROCBASED_CTLS"), self.primary, true),
            ("IA32_VMX_PROCBASED_CTLS2", self.secondary, has_secondary),
            ("IA32_VMX_PROCBASED_CTLS3", self.tertiary, has_tertiary),
            (name("IA32_VMX_EXIT_CTLS", "IA32_VMX_TRUE_EXIT_CTLS"), self.exit, true),
            (name("IA32_VMX_ENTRY_CTLS", "IA32_VMX_TRUE_ENTRY_CTLS"), self.entry, true),
            ("IA32_VMX_MISC", self.misc, true),
            ("IA32_VMX_CR0_FIXED0", self.cr0_fixed0, true),
            ("IA32_VMX_CR0_FIXED1", self.cr0_fixed1, true),
            ("IA32_VMX_CR4_FIXED0", self.cr4_fixed0, true),
            ("IA32_VMX_CR4_FIXED1", self.cr4_fixed1, true),
            ("IA32_VMX_VMCS_ENUM", self.vmcs_enum, true),
            ("IA32_VMX_EPT_VPID_CAP", self.ept_vpid, has_ept_vpid),
            ("IA32_VMX_VMFUNC", self.vmfunc, has_vmfunc),
        ]
        .into_iter()
        .filter(|(_, _, exists)| *exists)
        .map(|(name, value, _)| (name, value))
    }

    /// What the first four bytes of a VMXON region and of a VMCS must say.
    pub const fn revision(&self) -> u32 {
        self.basic as u32 & 0x7FFF_FFFF
    }

    /// The memory type that the processor uses for VMCSs and what they point to: 0 uncacheable, 6 write-back.
    pub const fn memory_type(&self) -> u8 {
        (self.basic >> 50 & 0xF) as u8
    }

    /// Whether physical addresses in a VMCS are limited to 32 bits.
    pub const fn has_32_bit_addresses(&self) -> bool {
        self.basic & 1 << 48 != 0
    }

    /// Whether an entry may inject a hardware exception with or without an error code, whatever its vector.
    pub const fn injects_any_error_code(&self) -> bool {
        self.basic & 1 << 56 != 0
    }

    /// The preemption timer counts down once every 2 to the power of this many TSC ticks.
    pub const fn preemption_timer_shift(&self) -> u32 {
        self.misc as u32 & 0x1F
    }

    /// Whether a guest may be entered in an activity state of `fields::activity` other than active.
    pub const fn allows_activity_state(&self, state: u32) -> bool {
        matches!(state, 1..=3) && self.misc >> (5 + state) & 1 != 0
    }

    /// How many CR3-target values there are.
    pub const fn cr3_targets(&self) -> u32 {
        self.misc as u32 >> 16 & 0x1FF
    }

    /// How many entries an MSR-load or MSR-store list should have at most.
    pub const fn msr_list_entries(&self) -> u32 {
        512 * ((self.misc as u32 >> 25 & 0b111) + 1)
    }

    /// Whether an entry may inject a software interrupt or exception with an instruction length of 0.
    pub const fn injects_zero_length_software_events(&self) -> bool {
        self.misc & 1 << 30 != 0
    }

    /// EPT with a walk of four levels.
    pub const fn has_four_level_ept(&self) -> bool {
        self.ept_vpid & 1 << 6 != 0
    }

    /// The processor may keep EPT structures in its caches.
    pub const fn has_write_back_ept(&self) -> bool {
        self.ept_vpid & 1 << 14 != 0
    }

    /// EPT leaves of 2 MiB.
    pub const fn has_2mib_ept(&self) -> bool {
        self.ept_vpid & 1 << 16 != 0
    }

    /// EPT leaves of 1 GiB.
    pub const fn has_1gib_ept(&self) -> bool {
        self.ept_vpid & 1 << 17 != 0
    }

    /// Accessed and dirty flags in EPT entries.
    pub const fn has_ept_access_dirty(&self) -> bool {
        self.ept_vpid & 1 << 21 != 0
    }

    /// INVEPT.
    pub const fn has_invept(&self) -> bool {
        self.ept_vpid & 1 << 20 != 0
    }

    /// INVEPT of one EPT pointer (type 1).
    pub const fn has_single_context_invept(&self) -> bool {
        self.has_invept() && self.ept_vpid & 1 << 25 != 0
    }

    /// INVEPT of all EPT pointers (type 2).
    pub const fn has_all_context_invept(&self) -> bool {
        self.has_invept() && self.ept_vpid & 1 << 26 != 0
    }

    /// INVVPID.
    pub const fn has_invvpid(&self) -> bool {
        self.ept_vpid & 1 << 32 != 0
    }

    /// INVVPID of one VPID (type 1).
    pub const fn has_single_context_invvpid(&self) -> bool {
        self.has_invvpid() && self.ept_vpid & 1 << 41 != 0
    }

    /// INVVPID of all VPIDs but 0 (type 2).
    pub const fn has_all_context_invvpid(&self) -> bool {
        self.has_invvpid() && self.ept_vpid & 1 << 42 != 0
    }
}
