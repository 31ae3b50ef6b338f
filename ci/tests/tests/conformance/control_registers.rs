//! CR0, CR3, CR4 and EFER: what they keep, what they refuse, and what their paging bits do.
//!
//! Intel SDM vol. 3, 2.5 (control registers), 5.6 (write protection), 5.10 (PCIDs, global pages); vol. 2, LMSW, SMSW, CLTS; AMD APM vol. 2,
//! 14.6 (EFER.LME).

use crate::{is_emulated_by_qemu, is_svm_in_bochs, run};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Guest, Program, layout, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("cr0", cr0_bits),
    ("cr0-nonsense", cr0_nonsense),
    ("machine-status-word", machine_status_word),
    ("cr4-nonsense", cr4_nonsense),
    ("efer-lme", efer_lme),
    ("pcid", pcid),
    ("global-pages", global_pages),
    ("write-protect", write_protect),
];

const GP: u64 = 13;
const PF: u64 = 14;
const CR0_TS: u64 = 1 << 3;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_PCIDE: u64 = 1 << 17;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// MOV to CR0 of its present value with the bits `set` and without `clear`, as an attempt, and what CR0 is then.
fn try_cr0(guest: &mut Guest, name: &str, set: u64, clear: u64) -> Asm {
    guest.mov(r12, cr0)?;
    guest.mov(rax, r12)?;
    guest.mov(rbx, set)?;
    guest.or(rax, rbx)?;
    guest.mov(rbx, !clear)?;
    guest.and(rax, rbx)?;
    guest.attempt(name, |guest| guest.mov(cr0, rax))?;
    guest.mov(rax, cr0)?;
    guest.xor(rax, r12)?;
    guest.fact(&format!("{name}-change"), rax)?;
    guest.mov(cr0, r12)
}

fn cr0_bits(guest: &mut Guest) -> Asm {
    guest.mov(rax, cr0)?;
    guest.fact("cr0", rax)?;
    try_cr0(guest, "ne", CR0_NE, 0)?;
    try_cr0(guest, "cd", CR0_CD, 0)?;
    try_cr0(guest, "cd-nw", CR0_CD | CR0_NW, 0)?;
    try_cr0(guest, "wp", CR0_WP, 0)?;
    try_cr0(guest, "ts", CR0_TS, 0)?;
    try_cr0(guest, "et", 0, CR0_ET)
}

fn cr0_nonsense(guest: &mut Guest) -> Asm {
    try_cr0(guest, "nw", CR0_NW, CR0_CD)?;
    try_cr0(guest, "high", 1 << 63, 0)?;
    if has_paged_real_mode() {
        return Ok(());
    }
    try_cr0(guest, "pg-without-pe", 0, 1)
}

/// SVM has paging without protection for VMRUN (AMD APM vol. 2, 15.19); Bochs lets guests switch to it themselves.
fn has_paged_real_mode() -> bool {
    is_svm_in_bochs()
}

#[test]
fn cr0_keeps_what_is_written_to_it() {
    let facts = run("cr0");
    for (name, bits) in
        [("ne", CR0_NE), ("cd", CR0_CD), ("cd-nw", CR0_CD | CR0_NW), ("wp", CR0_WP), ("ts", CR0_TS)]
    {
        facts.assert_completed(name);
        facts.assert(&format!("{name}-change"), bits);
    }
    // ET is always set.
    facts.assert_completed("et");
    facts.assert("et-change", 0);
}

#[test]
fn a_cr0_that_makes_no_sense_is_a_protection_fault() {
    if is_emulated_by_qemu() {
        // QEMU checks none of these, and refuses to go on with the result at the next entry.
        return;
    }
    let facts = run("cr0-nonsense");
    assert_eq!(facts.has("pg-without-pe"), !has_paged_real_mode(), "{facts}");
    for name in ["nw", "high", "pg-without-pe"].into_iter().filter(|name| facts.has(name)) {
        facts.assert_fault(name, GP, 0);
        facts.assert(&format!("{name}-change"), 0);
    }
}

/// LMSW sets PE, MP, EM and TS and cannot clear PE; CLTS clears TS; SMSW reads (SDM vol. 2).
fn machine_status_word(guest: &mut Guest) -> Asm {
    guest.mov(eax, CR0_TS as u32)?;
    guest.lmsw(ax)?;
    guest.mov(rax, cr0)?;
    guest.and(eax, 0xF)?;
    guest.fact("lmsw", rax)?;
    guest.xor(eax, eax)?;
    guest.smsw(eax)?;
    guest.mov(rbx, cr0)?;
    guest.xor(eax, ebx)?;
    guest.fact("smsw", rax)?;
    guest.clts()?;
    guest.mov(rax, cr0)?;
    guest.and(eax, 0xF)?;
    guest.fact("clts", rax)?;
    guest.xor(eax, eax)?;
    guest.cpuid()?;
    guest.mov(rax, cr0)?;
    guest.and(eax, 0xF)?;
    guest.fact("after-exit", rax)
}

#[test]
fn the_machine_status_word_is_the_low_part_of_cr0() {
    let facts = run("machine-status-word");
    facts.assert("lmsw", 1 | CR0_TS);
    facts.assert("smsw", 0);
    facts.assert("clts", 1);
    facts.assert("after-exit", 1);
}

/// MOV to CR4 as in [`try_cr0`].
fn try_cr4(guest: &mut Guest, name: &str, set: u64, clear: u64) -> Asm {
    guest.mov(r12, cr4)?;
    guest.mov(rax, r12)?;
    guest.mov(rbx, set)?;
    guest.or(rax, rbx)?;
    guest.mov(rbx, !clear)?;
    guest.and(rax, rbx)?;
    guest.attempt(name, |guest| guest.mov(cr4, rax))?;
    guest.mov(rax, cr4)?;
    guest.xor(rax, r12)?;
    guest.fact(&format!("{name}-change"), rax)?;
    guest.mov(cr4, r12)
}

fn cr4_nonsense(guest: &mut Guest) -> Asm {
    try_cr4(guest, "reserved-15", 1 << 15, 0)?;
    try_cr4(guest, "reserved-31", 1 << 31, 0)?;
    try_cr4(guest, "reserved-63", 1 << 63, 0)?;
    try_cr4(guest, "no-pae", 0, CR4_PAE)
}

#[test]
fn a_reserved_bit_of_cr4_is_a_protection_fault() {
    if is_emulated_by_qemu() {
        return;
    }
    let facts = run("cr4-nonsense");
    for name in ["reserved-15", "reserved-31", "reserved-63"] {
        facts.assert_fault(name, GP, 0);
        facts.assert(&format!("{name}-change"), 0);
    }
}

#[test]
fn long_mode_cannot_go_without_pae() {
    if is_emulated_by_qemu() {
        return;
    }
    let facts = run("cr4-nonsense");
    facts.assert_fault("no-pae", GP, 0);
    facts.assert("no-pae-change", 0);
}

/// LME cannot change while paging is on (AMD APM vol. 2, 14.6.1).
fn efer_lme(guest: &mut Guest) -> Asm {
    guest.mov(ecx, msr::EFER)?;
    guest.xor(eax, eax)?;
    guest.xor(edx, edx)?;
    guest.attempt("clear", |guest| guest.wrmsr())?;
    guest.rdmsr_value(msr::EFER)?;
    guest.fact("efer", rax)?;
    // LMA is not the guest's to write: without it, nothing changes.
    guest.wrmsr_value(msr::EFER, EFER_LME | 1)?;
    guest.rdmsr_value(msr::EFER)?;
    guest.fact("sce", rax)
}

#[test]
fn lme_cannot_change_while_paging_is_on() {
    let facts = run("efer-lme");
    facts.assert_fault("clear", GP, 0);
    facts.assert("efer", EFER_LME | EFER_LMA);
    facts.assert("sce", EFER_LME | EFER_LMA | 1);
}

/// CR3 with a process-context identifier, where CPUID offers them.
fn pcid(guest: &mut Guest) -> Asm {
    let mut without = guest.create_label();
    guest.cpuid_leaf(1, 0)?;
    guest.mov(eax, ecx)?;
    guest.and(eax, 1 << 17)?;
    guest.fact("offered", rax)?;
    guest.test(eax, eax)?;
    guest.jz(without)?;
    guest.mov(r12, cr3)?;
    guest.mov(rax, cr4)?;
    guest.or(rax, CR4_PCIDE as i32)?;
    guest.mov(rbx, rax)?;
    // Not with a CR3 whose low bits are set.
    guest.lea(rcx, ptr(r12 + 8))?;
    guest.mov(cr3, rcx)?;
    guest.attempt("low-bits", |guest| guest.mov(cr4, rbx))?;
    guest.mov(cr3, r12)?;
    guest.attempt("enable", |guest| guest.mov(cr4, rbx))?;
    guest.lea(rax, ptr(r12 + 5))?;
    guest.bts(rax, 63)?;
    guest.attempt("no-flush", |guest| guest.mov(cr3, rax))?;
    guest.cpuid_leaf(0, 0)?;
    guest.mov(rax, cr3)?;
    guest.sub(rax, r12)?;
    guest.fact("cr3", rax)?;
    guest.mov(cr3, r12)?;
    guest.set_label(&mut without)?;
    guest.nop()
}

#[test]
fn cr3_takes_a_process_context_identifier_where_cpuid_offers_them() {
    let facts = run("pcid");
    if facts.value("offered") == 0 {
        return;
    }
    facts.assert_fault("low-bits", GP, 0);
    facts.assert_completed("enable");
    facts.assert_completed("no-flush");
    facts.assert("cr3", 5);
}

/// Bits of a page table entry: present, writable, global.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const GLOBAL: u64 = 1 << 8;

/// A change of CR4.PGE drops global translations too (SDM vol. 3, 5.10.4.1).
fn global_pages(guest: &mut Guest) -> Asm {
    let (one, other) = (layout::SCRATCH + 0x1000, layout::SCRATCH + 0x2000);
    guest.mov(dword_ptr(one), 1)?;
    guest.mov(dword_ptr(other), 2)?;
    guest.mov(rax, cr4)?;
    guest.or(rax, CR4_PGE as i32)?;
    guest.mov(cr4, rax)?;
    let linear = guest.map(0, one | PRESENT | WRITABLE | GLOBAL)?;
    guest.mov(rbx, linear)?;
    guest.mov(eax, dword_ptr(rbx))?;
    guest.fact("before", rax)?;
    guest.mov(rax, other | PRESENT | WRITABLE | GLOBAL)?;
    guest.mov(qword_ptr(layout::WINDOW_TABLE), rax)?;
    guest.mov(rax, cr4)?;
    guest.btr(rax, CR4_PGE.ilog2())?;
    guest.mov(cr4, rax)?;
    guest.mov(eax, dword_ptr(rbx))?;
    guest.fact("after", rax)
}

#[test]
fn a_change_of_pge_drops_global_translations() {
    let facts = run("global-pages");
    facts.assert("before", 1);
    facts.assert("after", 2);
}

fn write_protect(guest: &mut Guest) -> Asm {
    let linear = guest.map(0, (layout::SCRATCH + 0x1000) | PRESENT)?;
    guest.mov(rbx, linear)?;
    guest.attempt("without", |guest| guest.mov(dword_ptr(rbx), eax))?;
    guest.mov(rax, cr0)?;
    guest.or(rax, CR0_WP as i32)?;
    guest.mov(cr0, rax)?;
    guest.attempt("with", |guest| guest.mov(dword_ptr(rbx), eax))
}

#[test]
fn write_protection_holds_for_the_supervisor_with_wp_only() {
    let facts = run("write-protect");
    facts.assert_completed("without");
    facts.assert_fault("with", PF, 3);
}
