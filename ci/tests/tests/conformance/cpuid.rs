//! CPUID: what is hidden, what follows control registers, what a leaf that does not exist says.
//!
//! Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst.

use crate::run;
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Program};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("cpuid", leaves),
    ("cpuid-osxsave", osxsave),
    ("cpuid-xstate", xstate),
    ("cpuid-user", at_user_privilege),
    ("cpuid-ospke", ospke),
];

const ECX: usize = 2;
const EDX: usize = 3;
const CR4_OSXSAVE: i32 = 1 << 18;
const CR4_PKE: i32 = 1 << 22;

/// Leaves and subleaves that are read.
const LEAVES: &[(u32, u32)] = &[
    (0, 0),
    (1, 0),
    (7, 0),
    (0xA, 0),
    (0xB, 0),
    (0xD, 0),
    (0xE, 0),
    (0x14, 0),
    (0x1F, 0),
    (0x3FFF_FFFF, 0),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x4000_0010, 0),
    (0x4000_0011, 0),
    (0x4000_0100, 0),
    (0x7FFF_FFFF, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0008, 0),
    (0x8000_000A, 0),
    (0x8000_FFFF, 0),
    (0xC000_0000, 0),
    (0xFFFF_FFFF, 0xFFFF_FFFF),
];

fn leaves(guest: &mut Guest) -> Asm {
    for &(leaf, subleaf) in LEAVES {
        // What stands in the upper halves and in the registers that are only written must not matter.
        guest.mov(rax, 0xDEAD_BEEF_0000_0000 | u64::from(leaf))?;
        guest.mov(rcx, 0xDEAD_BEEF_0000_0000 | u64::from(subleaf))?;
        guest.mov(rbx, -1_i64 as u64)?;
        guest.mov(rdx, rbx)?;
        guest.cpuid()?;
        guest.facts(&format!("{leaf:x}"), &[rax, rbx, rcx, rdx])?;
    }
    Ok(())
}

/// Goes past `body` unless bit `bit` of ECX of leaf 1 or 7 is set.
pub(crate) fn if_feature(
    guest: &mut Guest,
    leaf: u32,
    bit: u32,
    body: impl FnOnce(&mut Guest) -> Asm,
) -> Asm {
    let mut without = guest.create_label();
    guest.cpuid_leaf(leaf, 0)?;
    guest.bt(ecx, bit)?;
    guest.jnc(without)?;
    body(guest)?;
    guest.set_label(&mut without)?;
    guest.nop()
}

/// If there is XSAVE: switches it on and runs `body`.
pub(crate) fn with_xsave(guest: &mut Guest, body: impl FnOnce(&mut Guest) -> Asm) -> Asm {
    if_feature(guest, 1, 26, |guest| {
        guest.mov(rax, cr4)?;
        guest.or(eax, CR4_OSXSAVE)?;
        guest.mov(cr4, rax)?;
        body(guest)
    })
}

fn osxsave(guest: &mut Guest) -> Asm {
    guest.cpuid_leaf(1, 0)?;
    guest.fact("off", rcx)?;
    with_xsave(guest, |guest| {
        guest.cpuid_leaf(1, 0)?;
        guest.fact("on", rcx)?;
        guest.mov(rax, cr4)?;
        guest.and(eax, !CR4_OSXSAVE)?;
        guest.mov(cr4, rax)?;
        guest.cpuid_leaf(1, 0)?;
        guest.fact("off-again", rcx)
    })
}

fn ospke(guest: &mut Guest) -> Asm {
    guest.cpuid_leaf(7, 0)?;
    guest.fact("off", rcx)?;
    if_feature(guest, 7, 3, |guest| {
        guest.mov(rax, cr4)?;
        guest.or(eax, CR4_PKE)?;
        guest.mov(cr4, rax)?;
        guest.cpuid_leaf(7, 0)?;
        guest.fact("on", rcx)
    })
}

/// Leaf 0xD with XCR0 = x87, x87 + SSE, and with AVX where there is AVX.
fn xstate(guest: &mut Guest) -> Asm {
    with_xsave(guest, |guest| {
        for (name, xcr0) in [("1", 1), ("3", 3), ("7", 7), ("1-again", 1)] {
            let mut without = guest.create_label();
            guest.cpuid_leaf(0xD, 0)?;
            guest.mov(ebx, xcr0)?;
            guest.and(eax, ebx)?;
            guest.cmp(eax, ebx)?;
            guest.jne(without)?;
            guest.mov(eax, ebx)?;
            guest.xor(ecx, ecx)?;
            guest.xor(edx, edx)?;
            guest.xsetbv()?;
            for subleaf in [0, 1, 2] {
                guest.cpuid_leaf(0xD, subleaf)?;
                guest.facts(&format!("xcr0-{name}.{subleaf}"), &[rax, rbx, rcx, rdx])?;
            }
            guest.set_label(&mut without)?;
            guest.nop()?;
        }
        Ok(())
    })
}

fn at_user_privilege(guest: &mut Guest) -> Asm {
    for leaf in [1, 0x4000_0000] {
        guest.cpuid_leaf(leaf, 0)?;
        guest.facts(&format!("{leaf:x}"), &[rax, rbx, rcx, rdx])?;
    }
    guest.allow_user()?;
    guest.user(|guest| {
        for leaf in [1, 0x4000_0000] {
            guest.cpuid_leaf(leaf, 0)?;
            guest.facts(&format!("user-{leaf:x}"), &[rax, rbx, rcx, rdx])?;
        }
        Ok(())
    })
}

fn leaf(facts: &Facts, leaf: u32) -> [u64; 4] {
    facts.words(&format!("{leaf:x}")).try_into().expect("a leaf is four registers")
}

fn assert_bits(facts: &Facts, leaf_number: u32, register: usize, expected: &[(u32, bool, &str)]) {
    let value = leaf(facts, leaf_number)[register];
    for (bit, set, name) in expected {
        assert!(value >> bit & 1 == u64::from(*set), "{name}: expected {set} in {value:#x}\n{facts}");
    }
}

#[test]
fn cpuid_clears_the_upper_halves_and_ignores_those_it_is_given() {
    let facts = run("cpuid");
    for &(number, _) in LEAVES {
        assert!(leaf(&facts, number).iter().all(|value| *value < 1 << 32), "leaf {number:#x}\n{facts}");
    }
}

#[test]
fn cpuid_shows_a_hypervisor_and_hides_what_a_machine_does_not_have() {
    let facts = run("cpuid");
    assert_bits(
        &facts,
        1,
        ECX,
        &[
            (3, false, "MONITOR"),
            (5, false, "VMX"),
            (6, false, "SMX"),
            (15, false, "PDCM"),
            (21, true, "x2APIC"),
            (24, true, "TSC deadline"),
            (27, false, "OSXSAVE"),
            (31, true, "hypervisor"),
        ],
    );
    assert_bits(
        &facts,
        1,
        EDX,
        &[
            (4, true, "TSC"),
            (5, true, "MSR"),
            (6, true, "PAE"),
            (7, false, "MCE"),
            (9, true, "APIC"),
            (12, false, "MTRR"),
            (14, false, "MCA"),
            (25, true, "SSE"),
            (26, true, "SSE2"),
        ],
    );
    assert_bits(&facts, 0x8000_0001, ECX, &[(2, false, "SVM"), (12, false, "SKINIT")]);
    assert_bits(&facts, 0x8000_0001, EDX, &[(20, true, "NX"), (29, true, "long mode")]);
    assert_eq!(leaf(&facts, 0x8000_000A), [0; 4], "SVM's own leaf\n{facts}");
    assert_eq!(leaf(&facts, 0xA), [0; 4], "performance counters\n{facts}");
}

#[test]
fn cpuid_leaves_that_do_not_exist_are_zero() {
    let facts = run("cpuid");
    assert_eq!(leaf(&facts, 0)[0], 0xD, "the highest basic leaf\n{facts}");
    for number in [
        0xE,
        0x14,
        0x1F,
        0x3FFF_FFFF,
        0x4000_0011,
        0x4000_0100,
        0x7FFF_FFFF,
        0x8000_FFFF,
        0xC000_0000,
        0xFFFF_FFFF,
    ] {
        assert_eq!(leaf(&facts, number), [0; 4], "leaf {number:#x}\n{facts}");
    }
}

#[test]
fn cpuid_says_kvm_with_a_clock_and_a_frequency() {
    let facts = run("cpuid");
    let [max, signature @ ..] = leaf(&facts, 0x4000_0000);
    let text: Vec<u8> = signature.iter().flat_map(|word| (*word as u32).to_le_bytes()).collect();
    assert_eq!((max, &text[..]), (0x4000_0010, &b"KVMKVMKVM\0\0\0"[..]), "{facts}");
    // KVM_FEATURE_CLOCKSOURCE2 and CLOCKSOURCE_STABLE_BIT; no asynchronous page faults, no steal time.
    let features = leaf(&facts, 0x4000_0001)[0];
    assert_eq!(features & (1 << 3 | 1 << 24 | 1 << 4 | 1 << 5), 1 << 3 | 1 << 24, "{facts}");
    let [tsc_khz, apic_khz, ..] = leaf(&facts, 0x4000_0010);
    assert!(tsc_khz > 1000 && apic_khz > 0, "{facts}");
}

#[test]
fn cpuid_osxsave_follows_cr4() {
    let facts = run("cpuid-osxsave");
    assert_eq!(facts.value("off") >> 27 & 1, 0, "{facts}");
    if facts.value("off") >> 26 & 1 != 0 {
        assert_eq!(facts.value("on") >> 27 & 1, 1, "{facts}");
        assert_eq!(facts.value("off-again") >> 27 & 1, 0, "{facts}");
    }
}

#[test]
fn cpuid_ospke_follows_cr4() {
    let facts = run("cpuid-ospke");
    assert_eq!(facts.value("off") >> 4 & 1, 0, "{facts}");
    if facts.value("off") >> 3 & 1 != 0 {
        assert_eq!(facts.value("on") >> 4 & 1, 1, "{facts}");
    }
}

#[test]
fn cpuid_sizes_of_the_extended_state_follow_xcr0() {
    let facts = run("cpuid-xstate");
    // SDM vol. 1, 13.4: 512 bytes of legacy region and 64 of header hold x87 and SSE; AVX is 256 bytes more, at 576.
    for (name, size) in [("1", 576), ("3", 576), ("7", 832), ("1-again", 576)] {
        if !facts.has(&format!("xcr0-{name}.0")) {
            continue;
        }
        let [supported, now, max, high] = facts.words(&format!("xcr0-{name}.0")) else { panic!("{facts}") };
        assert_eq!(*now, size, "XCR0 {name}\n{facts}");
        assert!(*max >= *now && supported & 3 == 3 && *high == 0, "{facts}");
        let [instructions, compacted, supervisor, _] = facts.words(&format!("xcr0-{name}.1")) else {
            panic!("{facts}")
        };
        assert_eq!((instructions & 8, *supervisor), (0, 0), "no XSAVES\n{facts}");
        assert!(*compacted == if instructions & 2 != 0 { size } else { 0 }, "XCR0 {name}\n{facts}");
        if supported & 4 != 0 {
            facts.assert_words(&format!("xcr0-{name}.2"), &[256, 576, 0, 0]);
        }
    }
}

#[test]
fn cpuid_says_the_same_to_programs() {
    let facts = run("cpuid-user");
    for number in [1, 0x4000_0000] {
        let kernel = leaf(&facts, number);
        facts.assert_words(&format!("user-{number:x}"), &kernel);
    }
}
