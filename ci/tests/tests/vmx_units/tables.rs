//! Encodings and formats.

use crate::hypervisor::nested::NestedEntry;
use crate::hypervisor::vmx::ept::{self, EptEntry};
use crate::hypervisor::vmx::exit_reason::{self, CrAccess, PioAccess, reason};
use crate::hypervisor::vmx::fields::Field;
use crate::hypervisor::vmx::msr_bitmap;
use nestling_machine::vcpu::msr;

// Kinds of fields, bits 10-11 of an encoding, and widths, bits 13-14.
const CONTROL: u32 = 0;
const READ_ONLY: u32 = 1;
const GUEST: u32 = 2;
const HOST: u32 = 3;
const BITS_16: u32 = 0;
const BITS_64: u32 = 1;
const BITS_32: u32 = 2;
const NATURAL: u32 = 3;

const EXIT_INFORMATION: [Field; 15] = [
    Field::GuestPhysicalAddress,
    Field::VmInstructionError,
    Field::ExitReason,
    Field::ExitInterruptionInfo,
    Field::ExitInterruptionErrorCode,
    Field::IdtVectoringInfo,
    Field::IdtVectoringErrorCode,
    Field::ExitInstructionLength,
    Field::ExitInstructionInfo,
    Field::ExitQualification,
    Field::IoRcx,
    Field::IoRsi,
    Field::IoRdi,
    Field::IoRip,
    Field::GuestLinearAddress,
];

#[test]
fn every_field_has_the_kind_that_its_name_says() {
    for &field in Field::ALL {
        let (name, encoding) = (format!("{field:?}"), field.encoding());
        let kind = if EXIT_INFORMATION.contains(&field) {
            READ_ONLY
        } else if name.starts_with("Host") {
            HOST
        } else if name.starts_with("Guest") || matches!(field, Field::VmcsLinkPointer | Field::PmlIndex) {
            GUEST
        } else {
            CONTROL
        };
        assert_eq!(encoding >> 10 & 3, kind, "{name}");
        assert_eq!(encoding & !0x6FFE, 0, "{name}: access in full, and reserved bits clear");
    }
}

#[test]
fn every_field_has_the_width_that_its_name_says() {
    for &field in Field::ALL {
        let name = format!("{field:?}");
        let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
        let width = if ends(&["Selector"]) {
            BITS_16
        } else if ends(&["Limit", "AccessRights", "Count", "SysenterCs"]) || field == Field::ExceptionBitmap {
            BITS_32
        } else if ends(&["Base", "Cr0", "Cr3", "Cr4", "Rip", "Rsp", "SysenterEsp", "SysenterEip"]) {
            NATURAL
        } else if name.contains("Bitmap") || name.contains("Ia32") && !ends(&["SCet"]) {
            BITS_64
        } else {
            continue;
        };
        assert_eq!(field.encoding() >> 13, width, "{name}");
    }
}

#[test]
fn the_last_field_of_each_row_of_the_manual_stands_where_counting_up_gets_to() {
    for (field, encoding) in [
        (Field::GuestTrSelector, 0x080E),
        (Field::HostTrSelector, 0x0C0C),
        (Field::EoiExitBitmap3, 0x2022),
        (Field::TscMultiplier, 0x2032),
        (Field::GuestPdpte3, 0x2810),
        (Field::HostIa32PerfGlobalCtrl, 0x2C04),
        (Field::PleWindow, 0x4022),
        (Field::ExitInstructionInfo, 0x440E),
        (Field::GuestTrAccessRights, 0x4822),
        (Field::GuestPreemptionTimer, 0x482E),
        (Field::Cr3Target3, 0x600E),
        (Field::GuestLinearAddress, 0x640A),
        (Field::GuestSysenterEip, 0x6826),
        (Field::HostRip, 0x6C16),
    ] {
        assert_eq!(field.encoding(), encoding, "{field:?}");
    }
}

#[test]
fn a_guest_reaches_the_shared_list_of_msrs_and_no_other_without_an_exit() {
    let mut page = vec![0; 4096];
    msr_bitmap::fill(&mut page);
    let exits = |index: u32, write: usize| {
        let (range, offset) = if index >= 0xC000_0000 { (1024, index - 0xC000_0000) } else { (0, index) };
        page[write * 2048 + range + offset as usize / 8] >> (offset % 8) & 1 != 0
    };
    for index in (0..0x2000).chain(0xC000_0000..0xC000_2000) {
        let passes = msr::PASS_THROUGH.iter().any(|passed| passed.0 == index);
        assert_eq!((exits(index, 0), exits(index, 1)), (!passes, !passes), "{index:#x}");
    }
    let open: u32 = page.iter().map(|byte| byte.count_zeros()).sum();
    assert_eq!(open as usize, 2 * msr::PASS_THROUGH.len());
}

#[test]
fn an_ept_entry_is_present_by_any_access_and_keeps_only_its_address() {
    const PHYSICAL: u64 = 0x000F_1234_5660_0000;
    let (table, leaf) = (EptEntry::table(PHYSICAL), EptEntry::large_leaf(PHYSICAL));
    // Read, write, execute; a leaf: write-back, PAT ignored, large.
    assert_eq!((table, leaf), (PHYSICAL | 0b111, PHYSICAL | 0b111 | 6 << 3 | 1 << 6 | 1 << 7));
    for entry in [table, leaf, u64::MAX] {
        assert!(EptEntry::is_present(entry));
        assert_eq!(EptEntry::address(entry) & 0xFFF0_0000_0000_0FFF, 0);
    }
    assert_eq!((EptEntry::address(table), EptEntry::address(leaf)), (PHYSICAL, PHYSICAL));
    assert!((0..3).all(|bit| EptEntry::is_present(1 << bit)));
    assert!(!EptEntry::is_present(!0b111), "nothing but accesses makes an entry present");
    assert_eq!(EptEntry::table(PHYSICAL | 0xFFF0_0000_0000_0FFF), table, "no stray bits");
}

#[test]
fn the_ept_pointer_says_write_back_and_four_levels() {
    assert_eq!(ept::pointer(0x1234_5FFF), 0x1234_5000 | 6 | 3 << 3);
}

#[test]
fn an_io_instruction_is_decoded_from_its_qualification() {
    let out_dx_al = PioAccess { port: 0x3F8, width: 1, input: false, string: false };
    assert_eq!(PioAccess::decode(0x3F8 << 16), out_dx_al);
    let in_immediate_word = PioAccess { port: 0x64, width: 2, input: true, string: false };
    assert_eq!(PioAccess::decode(0x64 << 16 | 1 << 6 | 1 << 3 | 1), in_immediate_word);
    let rep_insd = PioAccess { port: 0xFFFF, width: 4, input: true, string: true };
    assert_eq!(PioAccess::decode(0xFFFF << 16 | 1 << 5 | 1 << 4 | 1 << 3 | 3), rep_insd);
}

#[test]
fn an_access_to_a_control_register_is_decoded_from_its_qualification() {
    for (qualification, access) in [
        (0x0F00, CrAccess::Write { cr: 0, gpr: 15 }),
        (0x0004, CrAccess::Write { cr: 4, gpr: 0 }),
        (0x0318, CrAccess::Read { cr: 8, gpr: 3 }),
        (0x0020, CrAccess::Clts),
        (0xABCD_0030, CrAccess::Lmsw { value: 0xABCD }),
        // From memory; the general-purpose register field is undefined.
        (0x0001_0F70, CrAccess::Lmsw { value: 1 }),
    ] {
        assert_eq!(CrAccess::decode(qualification), access, "{qualification:#x}");
    }
}

#[test]
fn reasons_and_errors_have_their_names_whatever_flags_stand_beside() {
    assert_eq!(exit_reason::name(reason::EPT_VIOLATION), "EPT violation");
    let failed = exit_reason::ENTRY_FAILURE | reason::INVALID_GUEST_STATE;
    assert_eq!(exit_reason::name(failed), "entry failure due to invalid guest state");
    assert_eq!((exit_reason::name(35), exit_reason::name(0xFFFF)), ("unknown", "unknown"));
    assert_eq!(exit_reason::instruction_error(7), "VM entry with invalid control field(s)");
    assert_eq!(
        (exit_reason::instruction_error(0), exit_reason::instruction_error(u32::MAX)),
        ("unknown", "unknown")
    );
}
