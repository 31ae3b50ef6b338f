//! Capabilities, refusals and the choice of controls.

use crate::hypervisor::vmx::capabilities::Capabilities;
use crate::hypervisor::vmx::controls::{self, Controls, entry, exit, pin, primary, secondary};
use crate::hypervisor::vmx::features::{check, feature_control_to_write};
use crate::{HASWELL, capabilities, haswell, haswell_with};

const TRUE_PIN: u32 = 0x48D;
const TRUE_PRIMARY: u32 = 0x48E;
const TRUE_EXIT: u32 = 0x48F;
const TRUE_ENTRY: u32 = 0x490;
const SECONDARY: u32 = 0x48B;
const EPT_VPID: u32 = 0x48C;

fn value(register: u32) -> u64 {
    HASWELL.iter().find(|(at, _)| *at == register).unwrap().1
}

/// A Haswell that does not let these controls of a register be 1.
fn haswell_without(register: u32, controls: u32) -> Capabilities {
    haswell_with(&[(register, value(register) & !(u64::from(controls) << 32))])
}

/// A Haswell that insists on these controls of a register.
fn haswell_insisting(register: u32, controls: u32) -> Capabilities {
    haswell_with(&[(register, value(register) | u64::from(controls))])
}

fn registers_read(registers: &[(u32, u64)]) -> Vec<u32> {
    let mut read = Vec::new();
    Capabilities::read(|index| {
        read.push(index);
        registers.iter().find(|(at, _)| *at == index).unwrap_or_else(|| panic!("MSR {index:#x} faults")).1
    });
    read.sort_unstable();
    read
}

#[test]
fn each_capability_register_that_exists_is_read_once_and_printed_by_its_name() {
    let expected: Vec<u32> = [0x480].into_iter().chain(0x485..=0x491).collect();
    assert_eq!(registers_read(&HASWELL), expected);
    let entries: Vec<_> = haswell().entries().collect();
    assert_eq!(entries.len(), expected.len());
    assert!(entries.contains(&("IA32_VMX_TRUE_EXIT_CTLS", value(TRUE_EXIT))), "{entries:x?}");
}

#[test]
fn registers_that_fault_on_old_processors_are_left_alone() {
    // Westmere: no VM functions. Merom: neither TRUE registers nor secondary controls.
    let westmere = haswell_without(SECONDARY, secondary::VM_FUNCTIONS);
    assert!(westmere.entries().all(|(name, _)| name != "IA32_VMX_VMFUNC"));
    let merom = [
        (0x480, 0x001A_0400_0000_0007),
        (0x481, 0x0000_003F_0000_0016),
        (0x482, 0x77B9_FFFE_0401_E172),
        (0x483, 0x0003_EFFF_0003_6DFF),
        (0x484, 0x0000_1FFF_0000_11FF),
        (0x485, 0x0004_03C0),
        (0x486, 0x8000_0021),
        (0x487, 0xFFFF_FFFF),
        (0x488, 0x2000),
        (0x489, 0x27FF),
        (0x48A, 0x2C),
    ];
    assert_eq!(registers_read(&merom), (0x480..=0x48A).collect::<Vec<_>>());
    let merom = capabilities(&merom);
    assert!(merom.entries().any(|entry| entry == ("IA32_VMX_PROCBASED_CTLS", 0x77B9_FFFE_0401_E172)));
    assert_eq!((merom.secondary, merom.ept_vpid, merom.vmfunc), (0, 0, 0));
}

#[test]
fn nothing_is_offered_by_a_register_that_was_not_read() {
    let none = haswell_without(SECONDARY, secondary::EPT | secondary::VPID);
    assert!(!none.has_four_level_ept() && !none.has_invept() && !none.has_invvpid());
    let only_vpid = haswell_without(SECONDARY, secondary::EPT);
    assert!(only_vpid.has_single_context_invvpid());
}

#[test]
fn the_basic_facts_are_where_the_manual_has_them() {
    let known = haswell();
    assert_eq!((known.revision(), known.memory_type()), (0x12, 6));
    assert_eq!(haswell_with(&[(0x480, 0x00DA_1000_8000_0012)]).revision(), 0x12, "bit 31 is no revision");
    assert_eq!(known.preemption_timer_shift(), 5);
    assert!(!known.injects_zero_length_software_events());
    assert!(haswell_with(&[(0x485, 1 << 30)]).injects_zero_length_software_events());
    assert_eq!((known.cr3_targets(), known.msr_list_entries()), (4, 512));
    assert!((1..=3).all(|state| known.allows_activity_state(state)));
    assert!(!known.allows_activity_state(4) && !known.allows_activity_state(u32::MAX));
    assert!(known.has_1gib_ept() && known.has_2mib_ept() && known.has_ept_access_dirty());
    assert!(known.has_single_context_invept() && known.has_all_context_invept());
    assert!(known.has_single_context_invvpid() && known.has_all_context_invvpid());
}

#[test]
fn a_flush_of_a_kind_is_offered_only_together_with_its_instruction() {
    let no_invept = haswell_with(&[(EPT_VPID, value(EPT_VPID) & !(1 << 20))]);
    assert!(!no_invept.has_single_context_invept() && !no_invept.has_all_context_invept());
    let no_invvpid = haswell_with(&[(EPT_VPID, value(EPT_VPID) & !(1 << 32))]);
    assert!(!no_invvpid.has_single_context_invvpid() && !no_invvpid.has_all_context_invvpid());
}

const VMX: u32 = 1 << 5;

fn refusal(feature_control: u64, capabilities: &Capabilities) -> String {
    check(VMX, Some(feature_control), Some(capabilities)).expect_err("this must be refused").to_string()
}

#[test]
fn a_cpu_without_vmx_is_refused_with_the_settings_of_the_clouds() {
    let refusal = check(!VMX, None, None).unwrap_err().to_string();
    for part in [
        "CPUID 1 ECX bit 5",
        "NestedVirtualization=enabled",
        "enableNestedVirtualization",
        "Azure",
        "nested=1",
    ] {
        assert!(refusal.contains(part), "{part}: {refusal}");
    }
    assert!(check(VMX, None, None).is_ok(), "the first stage");
}

#[test]
fn vmx_that_the_firmware_locked_away_is_refused_and_an_unlocked_register_is_written() {
    for locked in [0b001, 0b011] {
        let refusal = check(VMX, Some(locked), None).unwrap_err().to_string();
        assert!(refusal.contains("MSR 0x3a") && refusal.contains("firmware"), "{refusal}");
        assert_eq!(feature_control_to_write(locked), None);
    }
    for (usable, written) in [(0b101, None), (0, Some(0b101)), (0b010, Some(0b111)), (0b100, Some(0b101))] {
        assert!(check(VMX, Some(usable), Some(&haswell())).is_ok(), "{usable:#b}");
        assert_eq!(feature_control_to_write(usable), written, "{usable:#b}");
    }
}

#[test]
fn every_missing_feature_is_refused_by_register_and_bit() {
    let without_ept_bit = |bits: u64| haswell_with(&[(EPT_VPID, value(EPT_VPID) & !bits)]);
    for (capabilities, parts) in [
        (haswell_without(TRUE_PRIMARY, primary::SECONDARY_CONTROLS), ["0x482", "bit 63"]),
        (haswell_without(SECONDARY, secondary::EPT), ["0x48b", "bit 33"]),
        (haswell_without(SECONDARY, secondary::UNRESTRICTED_GUEST), ["0x48b", "bit 39"]),
        (haswell_without(TRUE_EXIT, exit::SAVE_EFER), ["0x483", "bit 52"]),
        (haswell_without(TRUE_EXIT, exit::LOAD_EFER), ["0x483", "53"]),
        (haswell_without(TRUE_ENTRY, entry::LOAD_EFER), ["0x484", "bit 47"]),
        (without_ept_bit(1 << 6), ["0x48c", "bit 6"]),
        (without_ept_bit(1 << 14), ["0x48c", "bit 14"]),
        (without_ept_bit(1 << 16), ["0x48c", "bit 16"]),
        (without_ept_bit(1 << 20), ["0x48c", "bit 20"]),
        (without_ept_bit(1 << 25 | 1 << 26), ["0x48c", "25 and 26"]),
        (haswell_with(&[(0x480, value(0x480) & !(0xF << 50))]), ["0x480", "bits 50-53"]),
        (haswell_with(&[(0x480, value(0x480) | 1 << 48)]), ["0x480", "bit 48"]),
    ] {
        let refusal = refusal(5, &capabilities);
        assert!(parts.iter().all(|part| refusal.contains(part)), "{parts:?}: {refusal}");
        assert!(refusal.contains("QEMU"), "says what to do: {refusal}");
    }
    for bit in [25, 26] {
        let one_kind = without_ept_bit(1 << bit);
        assert!(check(VMX, Some(5), Some(&one_kind)).is_ok(), "either kind of INVEPT will do");
    }
}

#[test]
fn a_haswell_gets_exactly_these_controls() {
    let chosen = Controls::choose(&haswell()).unwrap();
    assert_eq!(
        chosen,
        Controls {
            // External interrupts, NMIs, virtual NMIs, preemption timer.
            pin: 0x16 | 0x69,
            primary: 0x0400_6172 | 0x8000_0000 | 0x3000_0000 | 0x0118_0000 | 0xC88,
            // EPT, RDTSCP, VPID, WBINVD, unrestricted guest, INVPCID; no XSAVES yet.
            secondary: 0x10EA,
            // Debug controls, 64-bit host, EFER, the preemption timer's value.
            exit: 0x0003_6DFB | 0x0070_0204,
            entry: 0x11FB | 0x8004,
        }
    );
}

#[test]
fn a_required_control_that_is_not_offered_is_refused_by_its_name() {
    for (register, control, parts) in [
        (
            TRUE_PIN,
            pin::EXTERNAL_INTERRUPT_EXITING,
            ["external-interrupt exiting", "PINBASED_CTLS: control bit 0"],
        ),
        (TRUE_PIN, pin::NMI_EXITING, ["NMI exiting", "bit 3"]),
        (TRUE_PIN, pin::VIRTUAL_NMIS, ["virtual NMIs", "bit 5"]),
        (TRUE_PRIMARY, primary::TSC_OFFSETTING, ["TSC offsetting", "PROCBASED_CTLS: control bit 3"]),
        (TRUE_PRIMARY, primary::HLT_EXITING, ["HLT exiting", "bit 7"]),
        (TRUE_PRIMARY, primary::MWAIT_EXITING, ["MWAIT exiting", "bit 10"]),
        (TRUE_PRIMARY, primary::RDPMC_EXITING, ["RDPMC exiting", "bit 11"]),
        (TRUE_PRIMARY, primary::CR8_LOAD_EXITING, ["CR8-load exiting", "bit 19"]),
        (TRUE_PRIMARY, primary::CR8_STORE_EXITING, ["CR8-store exiting", "bit 20"]),
        (TRUE_PRIMARY, primary::UNCONDITIONAL_IO_EXITING, ["unconditional I/O exiting", "bit 24"]),
        (TRUE_PRIMARY, primary::MSR_BITMAPS, ["MSR bitmaps", "bit 28"]),
        (TRUE_PRIMARY, primary::MONITOR_EXITING, ["MONITOR exiting", "bit 29"]),
        (TRUE_PRIMARY, primary::SECONDARY_CONTROLS, ["secondary controls", "bit 31"]),
        (SECONDARY, secondary::EPT, ["extended page tables", "PROCBASED_CTLS2: control bit 1"]),
        (SECONDARY, secondary::WBINVD_EXITING, ["WBINVD exiting", "bit 6"]),
        (SECONDARY, secondary::UNRESTRICTED_GUEST, ["unrestricted guest", "bit 7"]),
        (TRUE_EXIT, exit::SAVE_DEBUG_CONTROLS, ["saving of debug controls", "EXIT_CTLS: control bit 2"]),
        (TRUE_EXIT, exit::HOST_64_BIT, ["64-bit host", "bit 9"]),
        (TRUE_EXIT, exit::SAVE_EFER, ["saving of EFER", "bit 20"]),
        (TRUE_EXIT, exit::LOAD_EFER, ["loading of EFER at exits", "bit 21"]),
        (TRUE_ENTRY, entry::LOAD_DEBUG_CONTROLS, ["loading of debug controls", "ENTRY_CTLS: control bit 2"]),
        (TRUE_ENTRY, entry::LOAD_EFER, ["loading of EFER at entries", "bit 15"]),
    ] {
        let refusal = Controls::choose(&haswell_without(register, control)).unwrap_err().to_string();
        assert!(parts.iter().all(|part| refusal.contains(part)), "{parts:?}: {refusal}");
    }
}

#[test]
fn a_control_that_must_be_off_and_is_forced_on_is_refused_by_its_name() {
    for (register, control, part) in [
        (TRUE_PRIMARY, primary::INVLPG_EXITING, "INVLPG exiting"),
        (TRUE_PRIMARY, primary::RDTSC_EXITING, "RDTSC exiting"),
        (TRUE_PRIMARY, primary::CR3_LOAD_EXITING, "CR3-load exiting"),
        (TRUE_PRIMARY, primary::CR3_STORE_EXITING, "CR3-store exiting"),
        (TRUE_PRIMARY, primary::MOV_DR_EXITING, "MOV-DR exiting"),
        (SECONDARY, secondary::DESCRIPTOR_TABLE_EXITING, "descriptor-table exiting"),
        (TRUE_PRIMARY, primary::MONITOR_TRAP_FLAG, "IA32_VMX_TRUE_PROCBASED_CTLS"),
        (TRUE_PIN, pin::POSTED_INTERRUPTS, "IA32_VMX_PINBASED_CTLS"),
        (SECONDARY, secondary::ENCLS_EXITING, "IA32_VMX_PROCBASED_CTLS2"),
        (TRUE_EXIT, exit::ACKNOWLEDGE_INTERRUPT, "IA32_VMX_EXIT_CTLS"),
        (TRUE_ENTRY, entry::ENTRY_TO_SMM, "IA32_VMX_ENTRY_CTLS"),
    ] {
        let refusal = Controls::choose(&haswell_insisting(register, control)).unwrap_err().to_string();
        assert!(refusal.contains("insists") && refusal.contains(part), "{part}: {refusal}");
    }
}

#[test]
fn a_processor_without_true_registers_is_refused_because_it_insists_on_cr3_exits() {
    let plain = haswell_with(&[
        (0x480, value(0x480) & !(1 << 55)),
        (0x481, value(TRUE_PIN)),
        (0x482, value(TRUE_PRIMARY) | 0x0401_E172),
        (0x483, value(TRUE_EXIT) | 0x0003_6DFF),
        (0x484, value(TRUE_ENTRY) | 0x11FF),
    ]);
    let refusal = Controls::choose(&plain).unwrap_err().to_string();
    assert!(refusal.contains("CR3-load exiting"), "{refusal}");
}

#[test]
fn what_is_optional_is_used_when_offered_and_not_missed_otherwise() {
    for (register, control) in [
        (TRUE_PIN, pin::PREEMPTION_TIMER),
        (SECONDARY, secondary::VPID),
        (SECONDARY, secondary::RDTSCP),
        (SECONDARY, secondary::INVPCID),
    ] {
        let (with, without) = (haswell(), haswell_without(register, control));
        let field = |controls: Controls| if register == TRUE_PIN { controls.pin } else { controls.secondary };
        assert_ne!(field(Controls::choose(&with).unwrap()) & control, 0, "{control:#x}");
        assert_eq!(field(Controls::choose(&without).unwrap()) & control, 0, "{control:#x}");
    }
    let no_timer = Controls::choose(&haswell_without(TRUE_PIN, pin::PREEMPTION_TIMER)).unwrap();
    assert_eq!(no_timer.exit & exit::SAVE_PREEMPTION_TIMER, 0, "nothing to save");
    let offered = u64::from(secondary::XSAVES | secondary::TSC_SCALING | secondary::PAUSE_LOOP_EXITING) << 32;
    let newer = haswell_with(&[(SECONDARY, value(SECONDARY) | offered)]);
    let secondary_controls = Controls::choose(&newer).unwrap().secondary;
    let reported = secondary::XSAVES | secondary::TSC_SCALING | secondary::PAUSE_LOOP_EXITING;
    assert_eq!(secondary_controls & reported, 0, "only reported");
}

#[test]
fn a_vpid_that_cannot_be_flushed_is_not_used() {
    let no_invvpid = haswell_with(&[(EPT_VPID, value(EPT_VPID) & !(1 << 32))]);
    assert_eq!(Controls::choose(&no_invvpid).unwrap().secondary & secondary::VPID, 0);
    assert!(controls::features(&no_invvpid).contains(&("vpid", false)));
}

#[test]
fn the_report_says_of_each_feature_whether_it_is_offered() {
    let missing: Vec<_> = controls::features(&haswell())
        .into_iter()
        .filter(|(_, there)| !there)
        .map(|(name, _)| name)
        .collect();
    assert_eq!(missing, ["tsc_scaling", "posted_interrupts", "xsaves", "mode_based_execute"]);
    let none = controls::features(&haswell_with(&[(TRUE_PIN, 0), (TRUE_PRIMARY, 0)]));
    assert!(none.iter().all(|(_, there)| !there), "{none:?}");
}
