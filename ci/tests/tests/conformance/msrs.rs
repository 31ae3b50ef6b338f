//! Model-specific registers: which exist, which values they take, what they do.
//!
//! Intel SDM vol. 4 and vol. 3, 10.12 (x2APIC), 12.12 (PAT), 18.17.3 (TSC_ADJUST); AMD APM vol. 2, 3.1.7 (EFER) and appendix A.

use crate::{is_emulated_by_qemu, run};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Outcome, Program, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("msr-unknown", unknown),
    ("msr-virtualization", virtualization),
    ("msr-non-canonical", non_canonical),
    ("msr-efer", efer),
    ("msr-tsc", tsc),
    ("msr-tsc-aux", tsc_aux),
    ("msr-pat", pat),
    ("msr-apic-base", apic_base),
    ("msr-x2apic", x2apic),
    ("msr-user", at_user_privilege),
    ("msr-halves", halves),
];

const GP: u64 = 13;

const FEATURE_CONTROL: u32 = 0x3A;
const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3B;
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xC000_0103;
const VM_CR: u32 = 0xC001_0114;

/// Registers that no machine has: performance counters, last branches, machine checks, system management, resource control,
/// processor trace, XSS, speculation control (which CPUID does not offer), Hyper-V's, and numbers nobody uses.
const UNKNOWN: &[u32] = &[
    0x2,
    0x48,
    0x49,
    0x9E,
    0xC1,
    0x10A,
    0x186,
    0x1C9,
    0x280,
    0x38F,
    0x400,
    0x570,
    0x600,
    0xC8F,
    0xDA0,
    0x1234,
    0x1FFF,
    0x2000,
    0x4000_0000,
    0x4B56_4D02,
    0x8000_0000,
    0xBFFF_FFFF,
    0xC000_0104,
    0xC000_1FFF,
    0xC000_2000,
    0xC001_0000,
    0xC001_0117,
    0xC001_1FFF,
    0xC001_2000,
    0xFFFF_FFFF,
];

fn read(guest: &mut Guest, name: &str, index: u32) -> Asm {
    guest.mov(ecx, index)?;
    guest.attempt(name, |guest| guest.rdmsr())
}

fn write(guest: &mut Guest, name: &str, index: u32, value: u64) -> Asm {
    guest.mov(ecx, index)?;
    guest.mov(eax, value as u32)?;
    guest.mov(edx, (value >> 32) as u32)?;
    guest.attempt(name, |guest| guest.wrmsr())
}

/// Reports an MSR's value.
fn value(guest: &mut Guest, name: &str, index: u32) -> Asm {
    guest.rdmsr_value(index)?;
    guest.fact(name, rax)
}

fn unknown(guest: &mut Guest) -> Asm {
    for &index in UNKNOWN {
        read(guest, &format!("r{index:x}"), index)?;
        write(guest, &format!("w{index:x}"), index, 0)?;
    }
    Ok(())
}

fn virtualization(guest: &mut Guest) -> Asm {
    for index in 0x480..=0x491 {
        read(guest, &format!("r{index:x}"), index)?;
    }
    read(guest, "r-feature-control", FEATURE_CONTROL)?;
    value(guest, "feature-control", FEATURE_CONTROL)?;
    write(guest, "w-feature-control", FEATURE_CONTROL, 5)?;
    write(guest, "w-feature-control-0", FEATURE_CONTROL, 0)?;
    guest.mov(eax, 0)?;
    guest.mov(edx, 0)?;
    read(guest, "r-vm-cr", VM_CR)?;
    guest.fact("vm-cr", rax)?;
    write(guest, "w-vm-cr", VM_CR, 0)?;
    write(guest, "w-hsave", 0xC001_0117, 0x1000)
}

const CANONICAL: &[(&str, u32)] = &[
    ("lstar", msr::LSTAR),
    ("cstar", msr::CSTAR),
    ("fs", msr::FS_BASE),
    ("gs", msr::GS_BASE),
    ("kernel-gs", msr::KERNEL_GS_BASE),
    ("sysenter-eip", msr::SYSENTER_EIP),
    ("sysenter-esp", msr::SYSENTER_ESP),
];

/// The lowest and the highest address that is not canonical, and two that are.
const BOTTOM: u64 = 0x0000_8000_0000_0000;
const TOP: u64 = 0xFFFF_7FFF_FFFF_FFFF;
const HIGH: u64 = 0xFFFF_8000_1234_5678;

fn non_canonical(guest: &mut Guest) -> Asm {
    for &(name, index) in CANONICAL {
        write(guest, &format!("{name}-ok"), index, HIGH)?;
        write(guest, &format!("{name}-bottom"), index, BOTTOM)?;
        write(guest, &format!("{name}-top"), index, TOP)?;
        value(guest, name, index)?;
        write(guest, &format!("{name}-0"), index, 0)?;
    }
    Ok(())
}

fn efer(guest: &mut Guest) -> Asm {
    value(guest, "efer", msr::EFER)?;
    for (name, bits) in [
        ("bit1", 1 << 1),
        ("bit2", 1 << 2),
        ("bit9", 1 << 9),
        ("svme", 1 << 12),
        ("bit16", 1 << 16),
        ("bit22", 1 << 22),
        ("bit63", 1 << 63),
        ("no-lme", 1 << 8),
    ] {
        write(guest, name, msr::EFER, 0x500 ^ bits)?;
    }
    value(guest, "after", msr::EFER)?;
    write(guest, "sce-nxe", msr::EFER, 0xD01)?;
    value(guest, "with-sce-nxe", msr::EFER)?;
    write(guest, "back", msr::EFER, 0x500)?;
    value(guest, "without", msr::EFER)
}

/// Writes TSC and TSC_ADJUST and tells how far the counter moved. A word of slack is the time the guest itself takes.
fn tsc(guest: &mut Guest) -> Asm {
    value(guest, "adjust", TSC_ADJUST)?;
    value(guest, "msr", TSC)?;
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.fact("rdtsc", rax)?;
    guest.wrmsr_value(TSC, 0x1234_5678_0000_0000)?;
    value(guest, "set", TSC)?;
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.fact("set-rdtsc", rax)?;
    value(guest, "set-adjust", TSC_ADJUST)?;
    guest.wrmsr_value(TSC_ADJUST, 0)?;
    value(guest, "restored", TSC)?;
    guest.wrmsr_value(TSC_ADJUST, 0x10_0000_0000_0000)?;
    value(guest, "adjusted", TSC)?;
    guest.wrmsr_value(TSC_ADJUST, -0x1000_i64 as u64)?;
    value(guest, "back-adjust", TSC_ADJUST)?;
    value(guest, "back", TSC)
}

fn tsc_aux(guest: &mut Guest) -> Asm {
    value(guest, "reset", TSC_AUX)?;
    write(guest, "write", TSC_AUX, 0x8765_4321)?;
    write(guest, "reserved", TSC_AUX, 1 << 32)?;
    value(guest, "value", TSC_AUX)?;
    let mut without = guest.create_label();
    guest.cpuid_leaf(0x8000_0001, 0)?;
    guest.bt(edx, 27)?;
    guest.jnc(without)?;
    guest.mov(rcx, -1_i64 as u64)?;
    guest.rdtscp()?;
    guest.fact("rdtscp", rcx)?;
    guest.set_label(&mut without)?;
    guest.nop()
}

fn pat(guest: &mut Guest) -> Asm {
    value(guest, "reset", PAT)?;
    for (name, value) in [
        ("type-2", 0x0007_0406_0007_0402),
        ("type-3", 0x0307_0406_0007_0406),
        ("type-8", 0x0007_0408_0007_0406),
        ("type-86", 0x0007_0406_8607_0406),
    ] {
        write(guest, name, PAT, value)?;
    }
    value(guest, "kept", PAT)?;
    write(guest, "write", PAT, 0x0105_0406_0007_0106)?;
    value(guest, "value", PAT)
}

fn apic_base(guest: &mut Guest) -> Asm {
    value(guest, "reset", msr::APIC_BASE)?;
    for (name, value) in [
        ("reserved-0", 0xFEE0_0D01),
        ("reserved-9", 0xFEE0_0F00),
        ("reserved-63", 0x8000_0000_FEE0_0D00),
        ("to-xapic", 0xFEE0_0900),
        ("x2apic-without-enable", 0xFEE0_0500),
    ] {
        write(guest, name, msr::APIC_BASE, value)?;
    }
    value(guest, "kept", msr::APIC_BASE)?;
    write(guest, "off", msr::APIC_BASE, 0xFEE0_0100)?;
    guest.cpuid_leaf(1, 0)?;
    guest.fact("off-cpuid", rdx)?;
    read(guest, "off-msr", msr::TPR)?;
    write(guest, "off-to-x2apic", msr::APIC_BASE, 0xFEE0_0D00)?;
    write(guest, "xapic", msr::APIC_BASE, 0xFEE0_0900)?;
    guest.cpuid_leaf(1, 0)?;
    guest.fact("xapic-cpuid", rdx)?;
    read(guest, "xapic-msr", msr::TPR)?;
    guest.mov(eax, dword_ptr(0xFEE0_0030_u64))?;
    guest.fact("xapic-version", rax)?;
    write(guest, "x2apic", msr::APIC_BASE, 0xFEE0_0D00)?;
    read(guest, "x2apic-msr", msr::TPR)?;
    value(guest, "x2apic-version", 0x803)
}

/// Registers of the x2APIC that do not exist.
const X2APIC_ABSENT: &[u32] =
    &[0x800, 0x801, 0x804, 0x807, 0x809, 0x80C, 0x80E, 0x829, 0x82E, 0x831, 0x83A, 0x83D, 0x840, 0x8FF];
/// Registers of the x2APIC that can only be read: ID, version, PPR, LDR, ISR, TMR, IRR, current count.
const X2APIC_READ_ONLY: &[u32] = &[0x802, 0x803, 0x80A, 0x80D, 0x810, 0x817, 0x818, 0x820, 0x827, 0x839];

fn x2apic(guest: &mut Guest) -> Asm {
    for &index in X2APIC_ABSENT {
        read(guest, &format!("r{index:x}"), index)?;
        write(guest, &format!("w{index:x}"), index, 0)?;
    }
    for &index in X2APIC_READ_ONLY {
        read(guest, &format!("r{index:x}"), index)?;
        write(guest, &format!("w{index:x}"), index, 0)?;
    }
    // Write-only ones, and reserved bits: each upper half, and what SDM vol. 3, 10.12.1.2 says per register.
    read(guest, "r-eoi", msr::EOI)?;
    read(guest, "r-self-ipi", msr::SELF_IPI)?;
    write(guest, "eoi-1", msr::EOI, 1)?;
    write(guest, "esr-1", 0x828, 1)?;
    write(guest, "tpr-8", msr::TPR, 0x100)?;
    write(guest, "tpr-32", msr::TPR, 1 << 32)?;
    write(guest, "svr-13", msr::SPURIOUS, 0x2000)?;
    write(guest, "lvt-19", msr::LVT_TIMER, 0x8_0000 | 0x1_0000)?;
    write(guest, "divide-4", msr::DIVIDE, 0x10)?;
    write(guest, "icr-20", msr::ICR, 0x10_0030)?;
    write(guest, "self-8", msr::SELF_IPI, 0x130)?;
    write(guest, "count-32", msr::INITIAL_COUNT, 1 << 32)?;
    write(guest, "tpr", msr::TPR, 0x5A)?;
    value(guest, "tpr-value", msr::TPR)?;
    guest.mov(rax, cr8)?;
    guest.fact("cr8", rax)?;
    value(guest, "id", 0x802)
}

fn at_user_privilege(guest: &mut Guest) -> Asm {
    guest.allow_user()?;
    guest.user(|guest| {
        for (name, index) in [("tsc", TSC), ("efer", msr::EFER), ("fs", msr::FS_BASE), ("unknown", 0x1234)] {
            read(guest, &format!("r-{name}"), index)?;
            write(guest, &format!("w-{name}"), index, 0x500)?;
        }
        Ok(())
    })?;
    value(guest, "fs", msr::FS_BASE)?;
    value(guest, "efer", msr::EFER)
}

/// RDMSR clears the upper halves; only ECX, EDX and EAX count.
fn halves(guest: &mut Guest) -> Asm {
    for (name, index) in [("lstar", msr::LSTAR), ("pat", PAT)] {
        guest.mov(rax, -1_i64 as u64)?;
        guest.mov(rdx, 0xFFFF_FFFF_0007_0406_u64)?;
        guest.mov(rcx, 0xFFFF_FFFF_0000_0000 | u64::from(index))?;
        guest.mov(eax, 0x0007_0406)?;
        guest.mov(r8, 0xFFFF_FFFF_0000_0000_u64)?;
        guest.or(rax, r8)?;
        if name == "lstar" {
            guest.mov(rdx, 0xFFFF_FFFF_0000_7ABC_u64)?;
        }
        guest.wrmsr()?;
        guest.mov(rax, -1_i64 as u64)?;
        guest.mov(rdx, rax)?;
        guest.rdmsr()?;
        guest.facts(name, &[rax, rdx])?;
    }
    Ok(())
}

fn assert_refused(facts: &Facts, names: &[&str]) {
    names.iter().for_each(|name| facts.assert_fault(name, GP, 0));
}

#[test]
fn an_msr_that_does_not_exist_faults() {
    let facts = run("msr-unknown");
    for index in UNKNOWN {
        facts.assert_fault(&format!("r{index:x}"), GP, 0);
        facts.assert_fault(&format!("w{index:x}"), GP, 0);
    }
}

#[test]
fn the_msrs_of_the_virtualization_extensions_are_locked_or_absent() {
    let facts = run("msr-virtualization");
    for index in 0x480..=0x491 {
        facts.assert_fault(&format!("r{index:x}"), GP, 0);
    }
    // Locked with VMX off, as firmware leaves it that has VMX disabled.
    facts.assert("feature-control", 1);
    assert_refused(&facts, &["w-feature-control", "w-feature-control-0", "w-vm-cr", "w-hsave"]);
    // VM_CR is AMD's: SVM disabled and locked.
    if facts.outcome("r-vm-cr") == Outcome::Completed {
        facts.assert("vm-cr", 0x18);
    } else {
        facts.assert_fault("r-vm-cr", GP, 0);
    }
}

#[test]
fn an_address_that_is_not_canonical_does_not_get_into_an_msr() {
    let facts = run("msr-non-canonical");
    for (name, _) in CANONICAL {
        facts.assert_completed(&format!("{name}-ok"));
        facts.assert_completed(&format!("{name}-0"));
        if is_emulated_by_qemu() && facts.outcome(&format!("{name}-top")) == Outcome::Completed {
            // VMRUN makes the bases of segments canonical.
            facts.assert_that(name, "what was written", |found| [TOP, TOP << 16 >> 16].contains(&found));
            continue;
        }
        facts.assert_fault(&format!("{name}-bottom"), GP, 0);
        facts.assert_fault(&format!("{name}-top"), GP, 0);
        facts.assert(name, HIGH);
    }
}

#[test]
fn efer_refuses_reserved_bits_svme_and_a_change_of_mode() {
    let facts = run("msr-efer");
    facts.assert("efer", 0x500);
    assert_refused(&facts, &["bit1", "bit2", "bit9", "svme", "bit16", "bit22", "bit63", "no-lme"]);
    facts.assert("after", 0x500);
    facts.assert_completed("sce-nxe");
    facts.assert("with-sce-nxe", 0xD01);
    facts.assert("without", 0x500);
}

#[test]
fn the_tsc_can_be_written_and_tsc_adjust_goes_along() {
    let facts = run("msr-tsc");
    // A guest that takes longer than 2^40 ticks has other problems.
    let close = |name: &str, to: u64| {
        facts.assert_that(name, &format!("{to:#x} and a little more"), |found| {
            found.wrapping_sub(to) < 1 << 40
        });
    };
    facts.assert("adjust", 0);
    close("msr", 0);
    close("rdtsc", facts.value("msr"));
    close("set", 0x1234_5678_0000_0000);
    close("set-rdtsc", facts.value("set"));
    facts.assert_that("set-adjust", "what was added", |found| {
        let before = 0x1234_5678_0000_0000_u64.wrapping_sub(found);
        before >= facts.value("rdtsc") && before < facts.value("rdtsc") + (1 << 40)
    });
    close("restored", facts.value("rdtsc"));
    close("adjusted", facts.value("restored") + 0x10_0000_0000_0000);
    facts.assert("back-adjust", -0x1000_i64 as u64);
    close("back", facts.value("restored") - 0x1000);
}

#[test]
fn tsc_aux_takes_32_bits_and_rdtscp_reads_them() {
    let facts = run("msr-tsc-aux");
    facts.assert("reset", 0);
    facts.assert_completed("write");
    facts.assert_fault("reserved", GP, 0);
    facts.assert("value", 0x8765_4321);
    if facts.has("rdtscp") {
        facts.assert("rdtscp", 0x8765_4321);
    }
}

#[test]
fn pat_refuses_reserved_memory_types() {
    let facts = run("msr-pat");
    facts.assert("reset", 0x0007_0406_0007_0406);
    assert_refused(&facts, &["type-2", "type-3", "type-8", "type-86"]);
    facts.assert("kept", 0x0007_0406_0007_0406);
    facts.assert_completed("write");
    facts.assert("value", 0x0105_0406_0007_0106);
}

#[test]
fn apic_base_allows_the_changes_of_mode_that_the_architecture_allows() {
    let facts = run("msr-apic-base");
    facts.assert("reset", 0xFEE0_0D00);
    let refused = ["reserved-0", "reserved-9", "reserved-63", "to-xapic", "x2apic-without-enable"];
    assert_refused(&facts, &refused);
    facts.assert("kept", 0xFEE0_0D00);
    facts.assert_completed("off");
    facts.assert_that("off-cpuid", "no APIC", |found| found >> 9 & 1 == 0);
    // SDM vol. 3, 10.12.5: from disabled to x2APIC mode only through xAPIC mode.
    assert_refused(&facts, &["off-msr", "off-to-x2apic", "xapic-msr"]);
    facts.assert_completed("xapic");
    facts.assert_that("xapic-cpuid", "an APIC", |found| found >> 9 & 1 == 1);
    facts.assert_completed("x2apic");
    facts.assert_completed("x2apic-msr");
    let version = facts.value("x2apic-version");
    facts.assert("xapic-version", version);
}

#[test]
fn x2apic_registers_that_do_not_exist_and_reserved_bits_fault() {
    let facts = run("msr-x2apic");
    for index in X2APIC_ABSENT {
        facts.assert_fault(&format!("r{index:x}"), GP, 0);
        facts.assert_fault(&format!("w{index:x}"), GP, 0);
    }
    for index in X2APIC_READ_ONLY {
        facts.assert_completed(&format!("r{index:x}"));
        facts.assert_fault(&format!("w{index:x}"), GP, 0);
    }
    assert_refused(&facts, &["r-eoi", "r-self-ipi", "eoi-1", "esr-1", "tpr-8", "tpr-32", "svr-13", "lvt-19"]);
    assert_refused(&facts, &["divide-4", "icr-20", "self-8", "count-32"]);
    facts.assert("tpr-value", 0x5A);
    facts.assert("cr8", 5);
    facts.assert("id", 0);
}

#[test]
fn programs_reach_no_msr() {
    let facts = run("msr-user");
    for name in ["tsc", "efer", "fs", "unknown"] {
        assert_refused(&facts, &[&format!("r-{name}"), &format!("w-{name}")]);
    }
    facts.assert("fs", 0);
    facts.assert("efer", 0x500);
}

#[test]
fn msr_accesses_use_the_lower_halves_alone() {
    let facts = run("msr-halves");
    facts.assert_words("lstar", &[0x0007_0406, 0x7ABC]);
    facts.assert_words("pat", &[0x0007_0406, 0x0007_0406]);
}
