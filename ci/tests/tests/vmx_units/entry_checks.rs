//! Which check a refused entry fails: good states fail none, and each broken field is named.

use crate::hypervisor::vmx::capabilities::Capabilities;
use crate::hypervisor::vmx::controls::{Controls, entry, exit, pin, primary, secondary};
use crate::hypervisor::vmx::entry_checks::failing;
use crate::hypervisor::vmx::exit_reason::interruption;
use crate::hypervisor::vmx::fields::{Field, SEGMENT_UNUSABLE, activity, interruptibility};
use crate::{haswell, haswell_with};
use std::collections::BTreeMap;

/// A VMCS that knows the fields which were written; a check that reads another one panics.
#[derive(Clone)]
struct Vmcs(BTreeMap<u32, u64>);

impl Vmcs {
    fn set(&mut self, field: Field, value: impl Into<u64>) -> &mut Self {
        self.0.insert(field.encoding(), value.into());
        self
    }

    fn get(&self, field: Field) -> u64 {
        *self.0.get(&field.encoding()).unwrap_or_else(|| panic!("{field:?} is not in force"))
    }

    fn with(&self, changes: &[(Field, u64)]) -> Self {
        let mut changed = self.clone();
        for (field, value) in changes {
            changed.set(*field, *value);
        }
        changed
    }

    fn setting(&self, field: Field, bits: u32) -> Self {
        self.with(&[(field, self.get(field) | u64::from(bits))])
    }

    fn clearing(&self, field: Field, bits: u32) -> Self {
        self.with(&[(field, self.get(field) & !u64::from(bits))])
    }

    fn failing(&self, capabilities: &Capabilities) -> Vec<String> {
        failing(&mut |field| self.get(field), capabilities)
    }

    /// Exactly one check fails, and it says this.
    fn fails(&self, field: Field, rule: &str) {
        self.fails_on(&haswell(), field, rule);
    }

    fn fails_on(&self, capabilities: &Capabilities, field: Field, rule: &str) {
        let failing = self.failing(capabilities);
        let start = format!("{field:?} {:#x}: ", self.get(field));
        let named = failing.iter().any(|line| line.starts_with(&start) && line.contains(rule));
        assert!(named && failing.len() == 1, "expected {start}...{rule}..., got {failing:#?}");
    }

    fn passes(&self) {
        assert_eq!(self.failing(&haswell()), [""; 0]);
    }
}

/// Selector, base, limit, access rights.
type Segment = [Field; 4];

const CS: Segment =
    [Field::GuestCsSelector, Field::GuestCsBase, Field::GuestCsLimit, Field::GuestCsAccessRights];
const SS: Segment =
    [Field::GuestSsSelector, Field::GuestSsBase, Field::GuestSsLimit, Field::GuestSsAccessRights];
const DS: Segment =
    [Field::GuestDsSelector, Field::GuestDsBase, Field::GuestDsLimit, Field::GuestDsAccessRights];
const ES: Segment =
    [Field::GuestEsSelector, Field::GuestEsBase, Field::GuestEsLimit, Field::GuestEsAccessRights];
const FS: Segment =
    [Field::GuestFsSelector, Field::GuestFsBase, Field::GuestFsLimit, Field::GuestFsAccessRights];
const GS: Segment =
    [Field::GuestGsSelector, Field::GuestGsBase, Field::GuestGsLimit, Field::GuestGsAccessRights];
const TR: Segment =
    [Field::GuestTrSelector, Field::GuestTrBase, Field::GuestTrLimit, Field::GuestTrAccessRights];
const LDTR: Segment =
    [Field::GuestLdtrSelector, Field::GuestLdtrBase, Field::GuestLdtrLimit, Field::GuestLdtrAccessRights];

const CODE_64: u64 = 0xA09B;
const CODE_16: u64 = 0x9B;
const DATA: u64 = 0xC093;
const DATA_16: u64 = 0x93;
const BUSY_TSS: u64 = 0x8B;
const LOCAL_TABLE: u64 = 0x82;
const UNUSABLE: u64 = SEGMENT_UNUSABLE as u64;

const CR0_LONG: u64 = 0x8005_0033;
const CR4_LONG: u64 = 0x2620;
const EFER_LONG: u64 = 0xD01;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const NOT_CANONICAL: u64 = 0x8000_0000_0000;

fn segment(vmcs: &mut Vmcs, fields: Segment, values: [u64; 4]) {
    for (field, value) in fields.into_iter().zip(values) {
        vmcs.set(field, value);
    }
}

/// Controls as the backend chooses them, host state as L1 has it, and what every guest has.
fn common() -> Vmcs {
    let controls = Controls::choose(&haswell()).unwrap();
    let mut vmcs = Vmcs(BTreeMap::new());
    for (field, value) in [
        (Field::PinControls, controls.pin),
        (Field::PrimaryControls, controls.primary),
        (Field::SecondaryControls, controls.secondary),
        (Field::ExitControls, controls.exit),
        (Field::EntryControls, controls.entry),
    ] {
        vmcs.set(field, value);
    }
    vmcs.with(&[
        (Field::Cr3TargetCount, 0),
        (Field::ExitMsrStoreCount, 0),
        (Field::ExitMsrLoadCount, 0),
        (Field::EntryMsrLoadCount, 0),
        (Field::EntryInterruptionInfo, 0),
        (Field::EntryInstructionLength, 0),
        (Field::EntryExceptionErrorCode, 0),
        (Field::MsrBitmap, 0x12_3000),
        (Field::EptPointer, 0x45_6000 | 6 | 3 << 3 | 1 << 6),
        (Field::Vpid, 1),
        (Field::HostCr0, 0x8001_0033),
        (Field::HostCr3, 0x10_0000),
        (Field::HostCr4, 0x2620),
        (Field::HostEsSelector, 0),
        (Field::HostCsSelector, 8),
        (Field::HostSsSelector, 0x10),
        (Field::HostDsSelector, 0x10),
        (Field::HostFsSelector, 0),
        (Field::HostGsSelector, 0),
        (Field::HostTrSelector, 0x18),
        (Field::HostFsBase, 0),
        (Field::HostGsBase, 0),
        (Field::HostTrBase, 0x20_0000),
        (Field::HostGdtrBase, 0x20_1000),
        (Field::HostIdtrBase, 0x20_2000),
        (Field::HostSysenterEsp, 0),
        (Field::HostSysenterEip, 0),
        (Field::HostRip, 0x10_2000),
        (Field::HostIa32Efer, EFER_LONG),
        (Field::GuestSysenterEsp, 0),
        (Field::GuestSysenterEip, 0),
        (Field::GuestIa32Debugctl, 0),
        (Field::GuestDr7, 0x400),
        (Field::GuestGdtrBase, 0),
        (Field::GuestGdtrLimit, 0xFFFF),
        (Field::GuestIdtrBase, 0),
        (Field::GuestIdtrLimit, 0xFFFF),
        (Field::GuestRflags, 2),
        (Field::GuestActivityState, 0),
        (Field::GuestInterruptibility, 0),
        (Field::GuestPendingDebugExceptions, 0),
        (Field::VmcsLinkPointer, u64::MAX),
    ])
}

/// After reset: real mode at the top of the first 4 GiB.
fn real_mode() -> Vmcs {
    let mut vmcs = common().with(&[
        (Field::GuestCr0, 0x6000_0030),
        (Field::GuestCr3, 0),
        (Field::GuestCr4, 0x2000),
        (Field::GuestIa32Efer, 0),
        (Field::GuestRip, 0xFFF0),
    ]);
    segment(&mut vmcs, CS, [0xF000, 0xFFFF_0000, 0xFFFF, CODE_16]);
    for fields in [SS, DS, ES, FS, GS] {
        segment(&mut vmcs, fields, [0, 0, 0xFFFF, DATA_16]);
    }
    segment(&mut vmcs, LDTR, [0, 0, 0xFFFF, LOCAL_TABLE]);
    segment(&mut vmcs, TR, [0, 0, 0xFFFF, BUSY_TSS]);
    vmcs
}

/// A kernel in 64-bit mode, with interrupts on.
fn long_mode() -> Vmcs {
    let mut vmcs = common()
        .with(&[
            (Field::GuestCr0, CR0_LONG),
            (Field::GuestCr3, 0x1000),
            (Field::GuestCr4, CR4_LONG),
            (Field::GuestIa32Efer, EFER_LONG),
            (Field::GuestRip, 0xFFFF_FFFF_8100_0000),
            (Field::GuestRflags, 2 | RFLAGS_IF),
        ])
        .setting(Field::EntryControls, entry::IA32E_MODE_GUEST);
    segment(&mut vmcs, CS, [0x10, 0, u64::from(u32::MAX), CODE_64]);
    segment(&mut vmcs, SS, [0x18, 0, u64::from(u32::MAX), DATA]);
    for fields in [DS, ES, FS] {
        segment(&mut vmcs, fields, [0, 0, 0, UNUSABLE]);
    }
    segment(&mut vmcs, GS, [0, 0xFFFF_8880_0000_0000, 0, UNUSABLE]);
    segment(&mut vmcs, LDTR, [0, 0, 0, UNUSABLE]);
    segment(&mut vmcs, TR, [0x40, 0xFFFF_FE00_0000_3000, 0x206F, BUSY_TSS]);
    vmcs
}

/// A task in virtual-8086 mode.
fn virtual_8086() -> Vmcs {
    let mut vmcs = real_mode().with(&[
        (Field::GuestCr0, 0x31),
        (Field::GuestRflags, 2 | 1 << 17),
        (Field::GuestRip, 0x100),
    ]);
    for (index, fields) in [CS, SS, DS, ES, FS, GS].into_iter().enumerate() {
        let selector = 0x1000 + index as u64;
        segment(&mut vmcs, fields, [selector, selector << 4, 0xFFFF, 0xF3]);
    }
    vmcs
}

/// 32-bit protected mode with PAE paging.
fn pae_paging() -> Vmcs {
    let mut vmcs = real_mode().with(&[
        (Field::GuestCr0, 0x8000_0031),
        (Field::GuestCr4, 0x2020),
        (Field::GuestPdpte0, 0x1001),
        (Field::GuestPdpte1, 0),
        (Field::GuestPdpte2, 0x2019),
        // Not present: the rest is the guest's.
        (Field::GuestPdpte3, 0xFFFF_FFFF_FFFF_FFFE),
    ]);
    segment(&mut vmcs, CS, [8, 0, u64::from(u32::MAX), 0xC09B]);
    vmcs
}

#[test]
fn good_states_of_every_mode_fail_nothing() {
    for vmcs in [real_mode(), long_mode(), virtual_8086(), pae_paging()] {
        vmcs.passes();
    }
}

#[test]
fn controls_outside_the_capabilities_are_named_bit_by_bit() {
    let good = long_mode();
    for (field, bits, register) in [
        (Field::PinControls, pin::POSTED_INTERRUPTS, "IA32_VMX_PINBASED_CTLS"),
        (Field::ExitControls, 1 << 31, "IA32_VMX_EXIT_CTLS"),
        (Field::EntryControls, 1 << 30, "IA32_VMX_ENTRY_CTLS"),
        (Field::SecondaryControls, secondary::TSC_SCALING, "IA32_VMX_PROCBASED_CTLS2"),
    ] {
        let failing = good.setting(field, bits).with(&OTHER_PAGES).failing(&haswell());
        let rule = format!("bits {bits:#x} must be 0 by {register}");
        assert!(
            failing.iter().any(|line| line.starts_with(&format!("{field:?} ")) && line.ends_with(&rule)),
            "{failing:?}"
        );
    }
    good.clearing(Field::PinControls, 0x10).fails(Field::PinControls, "bits 0x10 must be 1");
    good.clearing(Field::PrimaryControls, 0x100).fails(Field::PrimaryControls, "bits 0x100 must be 1");
    good.with(&[(Field::Cr3TargetCount, 5)]).fails(Field::Cr3TargetCount, "more than");
}

/// Pages that controls ask for which are off in the good states.
const OTHER_PAGES: [(Field, u64); 9] = [
    (Field::PostedInterruptNotificationVector, 0xF2),
    (Field::PostedInterruptDescriptor, 0x7000),
    (Field::VirtualApicPage, 0x8000),
    (Field::TprThreshold, 0),
    (Field::ApicAccessPage, 0x9000),
    (Field::IoBitmapA, 0xA000),
    (Field::IoBitmapB, 0xB000),
    (Field::PmlAddress, 0xC000),
    (Field::VmreadBitmap, 0xD000),
];

#[test]
fn controls_that_need_each_other_are_named() {
    let good = long_mode().with(&OTHER_PAGES);
    let no_virtual_nmis = good.clearing(Field::PinControls, pin::VIRTUAL_NMIS);
    no_virtual_nmis.passes();
    no_virtual_nmis
        .setting(Field::PrimaryControls, primary::NMI_WINDOW_EXITING)
        .fails(Field::PrimaryControls, "NMI-window exiting needs virtual NMIs");
    good.clearing(Field::PinControls, pin::NMI_EXITING)
        .fails(Field::PinControls, "virtual NMIs need NMI exiting");
    good.setting(Field::ExitControls, exit::SAVE_PREEMPTION_TIMER)
        .clearing(Field::PinControls, pin::PREEMPTION_TIMER)
        .fails(Field::ExitControls, "needs the timer");
    good.setting(Field::SecondaryControls, secondary::APIC_REGISTER_VIRTUALIZATION)
        .fails(Field::SecondaryControls, "needs the TPR shadow");
    let shadowed = good.setting(Field::PrimaryControls, primary::TPR_SHADOW);
    let delivering = shadowed.setting(Field::SecondaryControls, secondary::VIRTUAL_INTERRUPT_DELIVERY);
    delivering.passes();
    delivering
        .clearing(Field::PinControls, pin::EXTERNAL_INTERRUPT_EXITING)
        .fails(Field::PinControls, "needs external-interrupt exiting");
    let both = secondary::VIRTUALIZE_APIC_ACCESSES | secondary::VIRTUALIZE_X2APIC_MODE;
    shadowed.setting(Field::SecondaryControls, both).fails(Field::SecondaryControls, "either");
    shadowed.with(&[(Field::TprThreshold, 0x10)]).fails(Field::TprThreshold, "task priority class");
    delivering.with(&[(Field::TprThreshold, 0x10)]).passes();
    good.clearing(Field::SecondaryControls, secondary::EPT)
        .fails(Field::SecondaryControls, "unrestricted guest needs EPT");
    for (control, rule) in
        [(entry::ENTRY_TO_SMM, "entry to SMM"), (entry::DEACTIVATE_DUAL_MONITOR, "dual-monitor")]
    {
        good.setting(Field::EntryControls, control).fails(Field::EntryControls, rule);
    }
}

#[test]
fn posted_interrupts_need_delivery_acknowledgement_and_their_descriptor() {
    let offered = haswell_with(&[(0x48D, 0x0000_00FF_0000_0016)]);
    let good = long_mode()
        .with(&OTHER_PAGES)
        .setting(Field::PrimaryControls, primary::TPR_SHADOW)
        .setting(Field::SecondaryControls, secondary::VIRTUAL_INTERRUPT_DELIVERY)
        .setting(Field::PinControls, pin::POSTED_INTERRUPTS)
        .setting(Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT);
    assert_eq!(good.failing(&offered), [""; 0]);
    for lacking in [
        good.clearing(Field::ExitControls, exit::ACKNOWLEDGE_INTERRUPT),
        good.clearing(Field::SecondaryControls, secondary::VIRTUAL_INTERRUPT_DELIVERY),
    ] {
        lacking.fails_on(&offered, Field::PinControls, "posted interrupts need");
    }
    let vector = Field::PostedInterruptNotificationVector;
    good.with(&[(vector, 0x1F2)]).fails_on(&offered, vector, "a vector");
    let descriptor = Field::PostedInterruptDescriptor;
    good.with(&[(descriptor, 0x7020)]).fails_on(&offered, descriptor, "alignment");
}

#[test]
fn tertiary_controls_outside_the_capabilities_are_named() {
    let offered = haswell_with(&[(0x48E, 0xFFFB_FFFE_0400_6172), (0x492, 1 << 4)]);
    let good = long_mode()
        .setting(Field::PrimaryControls, primary::TERTIARY_CONTROLS)
        .with(&[(Field::TertiaryControls, 1 << 4)]);
    assert_eq!(good.failing(&offered), [""; 0]);
    good.with(&[(Field::TertiaryControls, 1 << 5)]).fails_on(
        &offered,
        Field::TertiaryControls,
        "bits 0x20 must be 0",
    );
}

#[test]
fn secondary_controls_count_only_when_they_are_activated() {
    let inactive = long_mode().clearing(Field::PrimaryControls, primary::SECONDARY_CONTROLS).with(&[
        (Field::SecondaryControls, u64::MAX),
        (Field::EptPointer, 0),
        (Field::Vpid, 0),
    ]);
    inactive.passes();
}

#[test]
fn addresses_that_are_not_aligned_or_beyond_physical_memory_are_named() {
    let good = long_mode()
        .with(&OTHER_PAGES)
        .setting(Field::PrimaryControls, primary::TPR_SHADOW | primary::IO_BITMAPS)
        .setting(Field::SecondaryControls, secondary::VIRTUALIZE_APIC_ACCESSES);
    good.passes();
    for field in
        [Field::MsrBitmap, Field::IoBitmapA, Field::IoBitmapB, Field::VirtualApicPage, Field::ApicAccessPage]
    {
        good.with(&[(field, 0x12_3800)]).fails(field, "alignment");
        good.with(&[(field, 1 << 52)]).fails(field, "physical address width");
    }
    for (count, address) in [
        (Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress),
        (Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress),
        (Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress),
    ] {
        good.with(&[(count, 512), (address, 0x1230)]).passes();
        good.with(&[(count, 513), (address, 0x1230)]).fails(count, "more than IA32_VMX_MISC allows");
        good.with(&[(count, 1), (address, 0x1238)]).fails(address, "alignment");
    }
}

#[test]
fn a_vpid_of_zero_and_a_wrong_ept_pointer_are_named() {
    const FIELD: Field = Field::EptPointer;
    let good = long_mode();
    good.with(&[(Field::Vpid, 0)]).fails(Field::Vpid, "the host's");
    for (pointer, rule) in [
        (0x45_6000 | 5 | 3 << 3, "memory type"),
        (0x45_6000 | 6 | 2 << 3, "walk"),
        (0x45_6000 | 6 | 4 << 3, "walk"),
        (0x45_6000 | 6 | 3 << 3 | 1 << 7, "reserved"),
        (1 << 52 | 6 | 3 << 3, "physical address width"),
    ] {
        good.with(&[(FIELD, pointer)]).fails(FIELD, rule);
    }
    good.with(&[(FIELD, 0x45_6000 | 3 << 3)]).passes();
    let no_flags = haswell_with(&[(0x48C, 0x0000_0F01_0633_4141 & !(1 << 21))]);
    good.fails_on(&no_flags, FIELD, "no accessed and dirty flags");
}

/// An event to inject: type, vector, error code.
fn event(kind: u32, vector: u32, has_error_code: bool) -> u64 {
    let error_code = if has_error_code { interruption::HAS_ERROR_CODE } else { 0 };
    u64::from(interruption::VALID | kind | vector | error_code)
}

#[test]
fn events_that_may_be_injected_fail_nothing() {
    let good = long_mode();
    for (kind, vector, has_error_code) in [
        (interruption::EXTERNAL_INTERRUPT, 0xEC, false),
        (interruption::NMI, 2, false),
        (interruption::HARDWARE_EXCEPTION, 6, false),
        (interruption::HARDWARE_EXCEPTION, 13, true),
        (interruption::HARDWARE_EXCEPTION, 17, true),
        (interruption::OTHER_EVENT, 0, false),
    ] {
        good.with(&[(Field::EntryInterruptionInfo, event(kind, vector, has_error_code))]).passes();
    }
    for (kind, vector) in [
        (interruption::SOFTWARE_INTERRUPT, 0x80),
        (interruption::PRIVILEGED_SOFTWARE_EXCEPTION, 1),
        (interruption::SOFTWARE_EXCEPTION, 3),
    ] {
        let injecting = good.with(&[(Field::EntryInterruptionInfo, event(kind, vector, false))]);
        injecting.with(&[(Field::EntryInstructionLength, 15)]).passes();
        for length in [0, 16] {
            injecting
                .with(&[(Field::EntryInstructionLength, length)])
                .fails(Field::EntryInstructionLength, "its instruction's length");
        }
        assert_eq!(injecting.failing(&haswell_with(&[(0x485, 0x3004_81E5 | 1 << 30)])), [""; 0]);
    }
    // What is not valid is not looked at.
    good.with(&[(Field::EntryInterruptionInfo, 0x7FFF_FFFF)]).passes();
}

#[test]
fn events_that_may_not_be_injected_are_named() {
    const FIELD: Field = Field::EntryInterruptionInfo;
    let good = long_mode();
    for (info, rule) in [
        (event(interruption::NMI, 3, false), "an NMI has vector 2"),
        (event(interruption::HARDWARE_EXCEPTION, 32, false), "up to 31"),
        (event(interruption::OTHER_EVENT, 1, false), "monitor trap flag"),
        (event(1 << 8, 0, false), "type 1 is reserved"),
        (event(interruption::HARDWARE_EXCEPTION, 6, true), "has no error code"),
        (event(interruption::HARDWARE_EXCEPTION, 14, false), "has an error code"),
        (event(interruption::EXTERNAL_INTERRUPT, 0x30, true), "only a hardware exception"),
        (event(interruption::NMI, 2, false) | 1 << 12, "reserved"),
    ] {
        good.with(&[(FIELD, info)]).fails(FIELD, rule);
    }
    let fault = [(FIELD, event(interruption::HARDWARE_EXCEPTION, 13, true))];
    good.with(&fault)
        .with(&[(Field::EntryExceptionErrorCode, 0x1_0000)])
        .fails(Field::EntryExceptionErrorCode, "16 bits");
    real_mode().with(&fault).fails(FIELD, "real mode");
    real_mode().with(&[(FIELD, event(interruption::HARDWARE_EXCEPTION, 13, false))]).passes();
    let any_goes = haswell_with(&[(0x480, 0x01DA_0400_0000_0012)]);
    let undefined = good.with(&[(FIELD, event(interruption::HARDWARE_EXCEPTION, 6, true))]);
    assert_eq!(undefined.failing(&any_goes), [""; 0]);
}

#[test]
fn every_part_of_a_wrong_host_state_is_named() {
    let good = long_mode();
    for (field, value, rule) in [
        (Field::HostCr0, 0x8001_0013, "bits 0x20 must be 1 by IA32_VMX_CR0_FIXED"),
        (Field::HostCr0, 0x1_8001_0033, "bits 0x100000000 must be 0 by IA32_VMX_CR0_FIXED"),
        (Field::HostCr4, 0x620, "bits 0x2000 must be 1 by IA32_VMX_CR4_FIXED"),
        (Field::HostCr4, 0x2600, "PAE"),
        (Field::HostCr3, 1 << 52, "physical address width"),
        (Field::HostIa32Efer, EFER_LONG & !(1 << 10), "LME and LMA"),
        (Field::HostIa32Efer, EFER_LONG & !(1 << 8), "LME and LMA"),
        (Field::HostIa32Efer, EFER_LONG | 1 << 12, "reserved"),
        (Field::HostCsSelector, 0, "null"),
        (Field::HostTrSelector, 0, "null"),
        (Field::HostCsSelector, 0xB, "RPL"),
        (Field::HostEsSelector, 4, "table indicator"),
        (Field::HostSsSelector, 0x13, "RPL"),
        (Field::HostDsSelector, 1, "RPL"),
        (Field::HostFsSelector, 2, "RPL"),
        (Field::HostGsSelector, 3, "RPL"),
        (Field::HostTrSelector, 0x1C, "table indicator"),
        (Field::HostSysenterEsp, NOT_CANONICAL, "canonical"),
        (Field::HostSysenterEip, NOT_CANONICAL, "canonical"),
        (Field::HostFsBase, NOT_CANONICAL, "canonical"),
        (Field::HostGsBase, NOT_CANONICAL, "canonical"),
        (Field::HostTrBase, NOT_CANONICAL, "canonical"),
        (Field::HostGdtrBase, NOT_CANONICAL, "canonical"),
        (Field::HostIdtrBase, NOT_CANONICAL, "canonical"),
        (Field::HostRip, NOT_CANONICAL, "canonical"),
    ] {
        good.with(&[(field, value)]).fails(field, rule);
    }
    good.setting(Field::ExitControls, exit::LOAD_PAT)
        .with(&[(Field::HostIa32Pat, 0x0007_0406_0007_0402)])
        .fails(Field::HostIa32Pat, "each byte");
    let narrow = good.clearing(Field::ExitControls, exit::HOST_64_BIT);
    narrow.fails(Field::ExitControls, "64-bit mode");
}

#[test]
fn control_flow_enforcement_needs_write_protection() {
    let offered = haswell_with(&[(0x489, 0x0097_27FF)]);
    let good = long_mode().setting(Field::HostCr4, 1 << 23).setting(Field::GuestCr4, 1 << 23);
    assert_eq!(good.failing(&offered), [""; 0]);
    good.clearing(Field::HostCr0, 1 << 16).fails_on(&offered, Field::HostCr4, "CET needs CR0.WP");
    good.clearing(Field::GuestCr0, 1 << 16).fails_on(&offered, Field::GuestCr4, "CET needs CR0.WP");
}

#[test]
fn a_processor_with_wider_linear_addresses_takes_wider_ones() {
    let wide = haswell_with(&[(0x489, 0x0017_27FF | 1 << 12)]);
    let vmcs = long_mode().with(&[(Field::HostFsBase, NOT_CANONICAL)]);
    assert_eq!(vmcs.failing(&wide), [""; 0]);
    vmcs.with(&[(Field::HostFsBase, 1 << 56)]).fails_on(&wide, Field::HostFsBase, "canonical");
}

#[test]
fn wrong_control_registers_of_a_guest_are_named() {
    let good = long_mode();
    for (field, value, rule) in [
        (Field::GuestCr0, CR0_LONG & !0x20, "bits 0x20 must be 1 by IA32_VMX_CR0_FIXED"),
        (Field::GuestCr0, CR0_LONG | 1 << 32, "must be 0 by IA32_VMX_CR0_FIXED"),
        (Field::GuestCr4, CR4_LONG & !0x2000, "bits 0x2000 must be 1 by IA32_VMX_CR4_FIXED"),
        (Field::GuestCr4, CR4_LONG | 1 << 23, "bits 0x800000 must be 0 by IA32_VMX_CR4_FIXED"),
        (Field::GuestCr4, CR4_LONG & !0x20, "an IA-32e mode guest has PAE"),
        (Field::GuestCr3, 1 << 63, "physical address width"),
        (Field::GuestDr7, 1 << 32, "upper half"),
        (Field::GuestIa32Debugctl, 1 << 3, "bits 0x8 must be 0"),
        (Field::GuestSysenterEsp, NOT_CANONICAL, "canonical"),
        (Field::GuestSysenterEip, NOT_CANONICAL, "canonical"),
        (Field::GuestIa32Efer, EFER_LONG | 1 << 12, "reserved"),
        (Field::GuestIa32Efer, EFER_LONG & !(1 << 8), "with paging LMA must equal LME"),
    ] {
        good.with(&[(field, value)]).fails(field, rule);
    }
    let no_paging = CR0_LONG & !(1 << 31);
    good.with(&[(Field::GuestCr0, no_paging)]).fails(Field::GuestCr0, "an IA-32e mode guest has PG");
    real_mode().with(&[(Field::GuestCr4, 0x2_2000)]).fails(Field::GuestCr4, "PCIDE");
    real_mode()
        .with(&[(Field::GuestIa32Efer, 0x500)])
        .fails(Field::GuestIa32Efer, "LMA must equal the entry control");
    // LME alone is how a guest begins to enter long mode.
    real_mode().with(&[(Field::GuestIa32Efer, 0x100)]).passes();
    pae_paging().with(&[(Field::GuestIa32Efer, 0x100)]).fails(Field::GuestIa32Efer, "LMA must equal LME");
    good.setting(Field::EntryControls, entry::LOAD_PAT)
        .with(&[(Field::GuestIa32Pat, 0x08)])
        .fails(Field::GuestIa32Pat, "each byte");
}

#[test]
fn paging_without_protection_is_named() {
    let failing = real_mode().with(&[(Field::GuestCr0, 0x8000_0030)]).failing(&haswell());
    assert!(failing.contains(&"GuestCr0 0x80000030: PG needs PE".into()), "{failing:?}");
}

#[test]
fn real_mode_needs_unrestricted_guest() {
    let restricted = real_mode().clearing(Field::SecondaryControls, secondary::UNRESTRICTED_GUEST);
    restricted.fails(Field::GuestCr0, "bits 0x80000001 must be 1");
}

#[test]
fn wrong_code_segments_are_named() {
    const FIELD: Field = Field::GuestCsAccessRights;
    let good = long_mode();
    for (rights, rule) in [
        (CODE_64 & !0x10, "S (bit 4) must be 1"),
        (CODE_64 & !0x80, "P (bit 7) must be 1"),
        (CODE_64 | 0x100, "bits 0x100 must be 0"),
        (CODE_64 | 1 << 17, "bits 0x20000 must be 0"),
        (CODE_64 | UNUSABLE, "CS must be usable"),
        (CODE_64 & !1, "the type of CS"),
        (CODE_64 | 1 << 14, "D/B (bit 14)"),
        (CODE_64 | 3 << 5, "DPL of SS"),
        (0xA0FF, "no higher DPL"),
        (CODE_64 & !(1 << 15), "G (bit 15) must be 1"),
    ] {
        good.with(&[(FIELD, rights)]).fails(FIELD, rule);
    }
    good.with(&[(Field::GuestCsLimit, 0xFFFF_FFFE)]).fails(FIELD, "G (bit 15) must be 0");
    good.with(&[(Field::GuestCsBase, 1 << 32)]).fails(Field::GuestCsBase, "upper half");
    // D/B beside L is reserved in IA-32e mode only.
    pae_paging().with(&[(FIELD, 0xE09B)]).passes();
}

#[test]
fn a_data_segment_in_cs_is_for_unrestricted_guests_of_privilege_level_0() {
    const FIELD: Field = Field::GuestCsAccessRights;
    real_mode().with(&[(FIELD, DATA_16)]).passes();
    real_mode().with(&[(FIELD, DATA_16 | 1 << 5)]).fails(FIELD, "DPL 0");
    let restricted = long_mode().clearing(Field::SecondaryControls, secondary::UNRESTRICTED_GUEST);
    restricted.passes();
    restricted.with(&[(FIELD, DATA), (Field::GuestRip, 0)]).fails(FIELD, "needs unrestricted guest");
}

#[test]
fn wrong_stack_segments_are_named() {
    const FIELD: Field = Field::GuestSsAccessRights;
    let good = long_mode();
    for (rights, rule) in [
        (DATA & !0x10, "S (bit 4)"),
        (DATA & !0x80, "P (bit 7)"),
        (DATA | 0x800, "bits 0x800"),
        (DATA & !1, "the type of SS"),
        (DATA & !2, "the type of SS"),
        (DATA & !(1 << 15), "G (bit 15)"),
    ] {
        good.with(&[(FIELD, rights)]).fails(FIELD, rule);
    }
    good.with(&[(Field::GuestSsBase, 1 << 32)]).fails(Field::GuestSsBase, "upper half");
    good.with(&[(FIELD, UNUSABLE), (Field::GuestSsBase, 1 << 32)]).passes();
    real_mode()
        .with(&[(FIELD, DATA_16 | 3 << 5), (Field::GuestCsAccessRights, CODE_16 | 3 << 5)])
        .fails(FIELD, "the DPL of SS must be 0 in real mode");
    let restricted = good.clearing(Field::SecondaryControls, secondary::UNRESTRICTED_GUEST);
    restricted.with(&[(Field::GuestCsSelector, 0x13)]).fails(Field::GuestSsSelector, "the RPL of SS");
    restricted
        .with(&[(Field::GuestCsSelector, 0x13), (Field::GuestSsSelector, 0x1B)])
        .fails(FIELD, "the DPL of SS must be its RPL");
    // With unrestricted guest neither is looked at.
    good.with(&[(Field::GuestCsSelector, 0x13)]).passes();
}

#[test]
fn wrong_data_segments_are_named_for_each_register() {
    let good = pae_paging();
    for [selector, base, limit, rights] in [DS, ES, FS, GS] {
        for (value, rule) in [
            (DATA_16 & !0x10, "S (bit 4)"),
            (DATA_16 & !0x80, "P (bit 7)"),
            (DATA_16 | 0x400, "bits 0x400"),
            (DATA_16 & !1, "accessed"),
            (0x99, "readable"),
        ] {
            good.with(&[(rights, value)]).fails(rights, rule);
        }
        good.with(&[(rights, UNUSABLE | 0xF00), (limit, 0x12_3456)]).passes();
        good.with(&[(limit, 0x10_0000)]).fails(rights, "G (bit 15) must be 1");
        good.with(&[(base, NOT_CANONICAL)]).fails(
            base,
            if matches!(base, Field::GuestDsBase | Field::GuestEsBase) { "upper half" } else { "canonical" },
        );
        let restricted = long_mode()
            .clearing(Field::SecondaryControls, secondary::UNRESTRICTED_GUEST)
            .with(&[(rights, DATA), (limit, u64::from(u32::MAX)), (base, 0)]);
        restricted.passes();
        restricted.with(&[(selector, 0x2B)]).fails(rights, "lower than the RPL");
        restricted.with(&[(selector, 0x2B), (rights, DATA | 3 << 5)]).passes();
    }
}

#[test]
fn wrong_system_segments_are_named() {
    const TASK: Field = Field::GuestTrAccessRights;
    const LOCAL: Field = Field::GuestLdtrAccessRights;
    for good in [real_mode(), long_mode(), virtual_8086()] {
        good.with(&[(TASK, BUSY_TSS | UNUSABLE)]).fails(TASK, "TR must be usable");
        good.with(&[(TASK, BUSY_TSS | 0x10)]).fails(TASK, "S (bit 4) must be 0");
        good.with(&[(TASK, BUSY_TSS & !0x80)]).fails(TASK, "P (bit 7)");
        good.with(&[(TASK, 0x89)]).fails(TASK, "the type of TR");
        good.with(&[(Field::GuestTrSelector, 0x44)]).fails(Field::GuestTrSelector, "table indicator");
        good.with(&[(Field::GuestTrBase, NOT_CANONICAL)]).fails(Field::GuestTrBase, "canonical");
    }
    real_mode().with(&[(TASK, 0x83)]).passes();
    long_mode().with(&[(TASK, 0x83)]).fails(TASK, "64-bit TSS");
    let good = real_mode();
    good.with(&[(LOCAL, 0x83)]).fails(LOCAL, "the type of LDTR must be 2");
    good.with(&[(LOCAL, 0x92)]).fails(LOCAL, "S (bit 4) must be 0");
    good.with(&[(Field::GuestLdtrSelector, 4)]).fails(Field::GuestLdtrSelector, "table indicator");
    good.with(&[(Field::GuestLdtrBase, NOT_CANONICAL)]).fails(Field::GuestLdtrBase, "canonical");
    long_mode().with(&[(Field::GuestLdtrSelector, 4), (Field::GuestLdtrBase, NOT_CANONICAL)]).passes();
    for field in [Field::GuestGdtrBase, Field::GuestIdtrBase] {
        good.with(&[(field, NOT_CANONICAL)]).fails(field, "canonical");
    }
    for field in [Field::GuestGdtrLimit, Field::GuestIdtrLimit] {
        good.with(&[(field, 0x1_0000)]).fails(field, "16 bits");
    }
}

#[test]
fn virtual_8086_segments_follow_from_their_selectors() {
    let good = virtual_8086();
    for [selector, base, limit, rights] in [CS, SS, DS, ES, FS, GS] {
        good.with(&[(selector, 0x2000)]).fails(base, "16 times the selector");
        good.with(&[(limit, 0xFFFE)]).fails(limit, "0xffff");
        good.with(&[(rights, 0x93)]).fails(rights, "0xf3");
    }
    real_mode().with(&[(Field::GuestRflags, 2)]).passes();
}

#[test]
fn wrong_flags_and_instruction_pointers_are_named() {
    const FLAGS: Field = Field::GuestRflags;
    for good in [real_mode(), long_mode()] {
        good.with(&[(FLAGS, 0)]).fails(FLAGS, "bit 1");
        for bit in [3, 5, 15, 22, 31, 32, 63] {
            good.with(&[(FLAGS, 2 | 1 << bit)]).fails(FLAGS, "reserved");
        }
    }
    let failing = long_mode().with(&[(FLAGS, 2 | 1 << 17)]).failing(&haswell());
    assert!(
        failing.contains(&"GuestRflags 0x20002: VM is for protected mode outside IA-32e mode".into()),
        "{failing:?}"
    );
    let interrupt = [(Field::EntryInterruptionInfo, event(interruption::EXTERNAL_INTERRUPT, 0x30, false))];
    long_mode().with(&interrupt).with(&[(FLAGS, 2)]).fails(FLAGS, "needs IF");
    real_mode().with(&[(Field::GuestRip, 1 << 32)]).fails(Field::GuestRip, "no 64-bit segment");
    long_mode().with(&[(Field::GuestRip, 1 << 48)]).fails(Field::GuestRip, "equal");
    // The upper bits need to be equal only among themselves: the fetch raises the exception.
    long_mode().with(&[(Field::GuestRip, NOT_CANONICAL)]).passes();
}

#[test]
fn wrong_activity_states_are_named() {
    const FIELD: Field = Field::GuestActivityState;
    let good = long_mode();
    let halted = good.with(&[(FIELD, u64::from(activity::HLT))]);
    halted.passes();
    good.with(&[(FIELD, 4)]).fails(FIELD, "does not offer");
    halted.fails_on(&haswell_with(&[(0x485, 0x3004_8125)]), FIELD, "does not offer");
    halted.with(&[(Field::GuestInterruptibility, 1)]).fails(FIELD, "shadow");
    halted
        .with(&[(Field::GuestSsAccessRights, DATA | 3 << 5), (Field::GuestCsAccessRights, CODE_64 | 3 << 5)])
        .fails(FIELD, "privilege level 0");
    let injecting = |state: u32, kind, vector, error_code| {
        good.with(&[
            (FIELD, u64::from(state)),
            (Field::EntryInterruptionInfo, event(kind, vector, error_code)),
        ])
    };
    injecting(activity::HLT, interruption::EXTERNAL_INTERRUPT, 0x30, false).passes();
    injecting(activity::HLT, interruption::NMI, 2, false).passes();
    injecting(activity::HLT, interruption::HARDWARE_EXCEPTION, 1, false).passes();
    injecting(activity::HLT, interruption::HARDWARE_EXCEPTION, 13, true).fails(FIELD, "cannot occur");
    injecting(activity::SHUTDOWN, interruption::NMI, 2, false).passes();
    injecting(activity::SHUTDOWN, interruption::HARDWARE_EXCEPTION, 18, false).passes();
    injecting(activity::SHUTDOWN, interruption::EXTERNAL_INTERRUPT, 0x30, false).fails(FIELD, "cannot occur");
    injecting(activity::WAIT_FOR_SIPI, interruption::NMI, 2, false).fails(FIELD, "cannot occur");
}

#[test]
fn wrong_interruptibility_is_named() {
    use interruptibility::{BLOCKING_BY_MOV_SS, BLOCKING_BY_NMI, BLOCKING_BY_SMI, BLOCKING_BY_STI, ENCLAVE};
    const FIELD: Field = Field::GuestInterruptibility;
    let good = long_mode();
    for value in [BLOCKING_BY_STI, BLOCKING_BY_MOV_SS, BLOCKING_BY_NMI] {
        good.with(&[(FIELD, u64::from(value))]).passes();
    }
    for (value, rule) in [
        (1 << 5, "reserved"),
        (BLOCKING_BY_SMI, "SMM"),
        (ENCLAVE, "enclave"),
        (BLOCKING_BY_STI | BLOCKING_BY_MOV_SS, "exclude each other"),
    ] {
        good.with(&[(FIELD, u64::from(value))]).fails(FIELD, rule);
    }
    good.with(&[(FIELD, 1), (Field::GuestRflags, 2)]).fails(FIELD, "needs RFLAGS.IF");
    let injecting = |value: u32, kind, vector| {
        good.with(&[(FIELD, u64::from(value)), (Field::EntryInterruptionInfo, event(kind, vector, false))])
    };
    injecting(BLOCKING_BY_STI, interruption::EXTERNAL_INTERRUPT, 0x30).fails(FIELD, "interrupts are blocked");
    injecting(BLOCKING_BY_MOV_SS, interruption::EXTERNAL_INTERRUPT, 0x30)
        .fails(FIELD, "interrupts are blocked");
    injecting(BLOCKING_BY_MOV_SS, interruption::NMI, 2).fails(FIELD, "MOV SS blocks it");
    injecting(BLOCKING_BY_STI, interruption::NMI, 2).fails(FIELD, "some processors");
    injecting(BLOCKING_BY_NMI, interruption::NMI, 2).fails(FIELD, "NMIs are blocked");
    injecting(BLOCKING_BY_NMI, interruption::NMI, 2).clearing(Field::PinControls, pin::VIRTUAL_NMIS).passes();
}

#[test]
fn a_pending_single_step_must_agree_with_the_flags_in_a_shadow() {
    const FIELD: Field = Field::GuestPendingDebugExceptions;
    const SINGLE_STEP: u64 = 1 << 14;
    let good = long_mode();
    good.with(&[(FIELD, SINGLE_STEP | 1 << 12 | 0xF)]).passes();
    for bit in [4, 10, 13, 15, 17, 63] {
        good.with(&[(FIELD, 1 << bit)]).fails(FIELD, "reserved");
    }
    let stepping = (Field::GuestRflags, 2 | RFLAGS_IF | RFLAGS_TF);
    let shadow = (Field::GuestInterruptibility, 2);
    good.with(&[stepping]).passes();
    good.with(&[stepping, shadow]).fails(FIELD, "bit 14");
    good.with(&[stepping, shadow, (FIELD, SINGLE_STEP)]).passes();
    good.with(&[shadow, (FIELD, SINGLE_STEP)]).fails(FIELD, "bit 14");
    let by_branch = (Field::GuestIa32Debugctl, 2);
    good.with(&[stepping, shadow, by_branch]).passes();
    good.with(&[stepping, (Field::GuestActivityState, 1)]).fails(FIELD, "bit 14");
}

#[test]
fn a_link_pointer_without_shadowing_and_reserved_pdpte_bits_are_named() {
    const LINK: Field = Field::VmcsLinkPointer;
    let good = pae_paging();
    good.with(&[(LINK, 0x1000)]).fails(LINK, "all ones");
    for field in [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3] {
        for bit in [1, 2, 5, 8, 52, 63] {
            good.with(&[(field, 1 << bit | 1)]).fails(field, "reserved");
            good.with(&[(field, 1 << bit)]).passes();
        }
    }
}

#[test]
fn no_rubbish_of_any_kind_makes_the_checks_panic() {
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..20_000 {
        let mut word = || match next() & 3 {
            0 => 0,
            1 => u64::MAX,
            _ => next(),
        };
        let registers: Vec<(u32, u64)> = (0x480..=0x492).map(|at| (at, word())).collect();
        let capabilities = crate::capabilities(&registers);
        let lines = failing(&mut |_| word(), &capabilities);
        assert!(lines.iter().all(|line| line.contains(": ")), "{lines:?}");
        let _ = Controls::choose(&capabilities);
        let _ = crate::hypervisor::vmx::features::check(word() as u32, Some(word()), Some(&capabilities));
    }
}
