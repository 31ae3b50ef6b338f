//! Non-maskable interrupts: what holds them back and what lets them through again.
//!
//! Intel SDM vol. 3, 6.7 (NMI), 6.8.3 (MOV SS), 6.9 (priorities).

use crate::interrupts::{assert_taken, here, place};
use crate::{is_svm_in_bochs, run};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Guest, Program, gdt, layout, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("nmi", nmi),
    ("nmi-blocked", nmi_blocked),
    ("nmi-first", nmi_first),
    ("nmi-shadow", nmi_shadow),
    ("nmi-nested-iret", nmi_nested_iret),
    ("nmi-hlt", nmi_hlt),
    ("nmi-stepping", nmi_stepping),
];

/// With interrupts off.
fn nmi(guest: &mut Guest) -> Asm {
    let (mut after, mut again) = (guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.self_nmi()?;
    here(guest, &mut after)?;
    guest.wrmsr_value(msr::ICR, 1 << 18 | 4 << 8)?;
    here(guest, &mut again)?;
    place(guest, "after", after)?;
    place(guest, "again", again)?;
    guest.record("first", 0)?;
    guest.record("second", 1)?;
    guest.record_count("count")
}

#[test]
fn an_nmi_is_delivered_with_interrupts_off() {
    let facts = run("nmi");
    assert_taken(&facts, "first", 2, "after");
    assert_taken(&facts, "second", 2, "again");
    facts.assert("count", 2);
}

/// Sent under single step, by an instruction whose trap comes first; then nothing that exits.
fn nmi_stepping(guest: &mut Guest) -> Asm {
    let mut labels = [(); 4].map(|()| guest.create_label());
    let [on_step, on_nmi, begin, again] = &mut labels;
    guest.jmp(*begin)?;
    guest.set_label(on_step)?;
    guest.and(dword_ptr(rsp + 16), !(1 << 8))?;
    guest.iretq()?;
    guest.set_label(on_nmi)?;
    guest.inc(qword_ptr(NMI_COUNT))?;
    // Bochs keeps NMIs blocked for the machines that come after one that ends in here.
    guest.iretq()?;
    guest.set_label(begin)?;
    guest.gate(1, *on_step, 0)?;
    guest.gate(2, *on_nmi, 0)?;
    guest.enable_apic()?;
    guest.mov(ecx, msr::ICR)?;
    guest.mov(eax, 4 << 8)?;
    guest.xor(edx, edx)?;
    guest.pushfq()?;
    guest.or(qword_ptr(rsp), 1 << 8)?;
    guest.popfq()?;
    guest.wrmsr()?;
    guest.set_label(again)?;
    guest.cmp(qword_ptr(NMI_COUNT), 0)?;
    guest.je(*again)?;
    guest.fact_at("count", NMI_COUNT)
}

#[test]
fn an_nmi_comes_after_the_trap_of_the_instruction_that_sent_it() {
    // Bochs' SVM does not come back from a step with an NMI behind it.
    if !is_svm_in_bochs() {
        run("nmi-stepping").assert("count", 1);
    }
}

/// Words that the NMI handlers of this file keep.
const NMI_DEPTH: u64 = layout::SCRATCH;
const NMI_COUNT: u64 = layout::SCRATCH + 8;
const NMI_DEEPEST: u64 = layout::SCRATCH + 16;
const NMI_RIP: u64 = layout::SCRATCH + 24;

/// The handler's first run sends two more, of which one is kept.
fn nmi_blocked(guest: &mut Guest) -> Asm {
    let mut labels = [(); 5].map(|()| guest.create_label());
    let [handler, begin, not_deeper, only_return, after] = &mut labels;
    guest.jmp(*begin)?;
    guest.set_label(handler)?;
    guest.push(rax)?;
    guest.push(rcx)?;
    guest.push(rdx)?;
    guest.inc(qword_ptr(NMI_DEPTH))?;
    guest.mov(rax, qword_ptr(NMI_DEPTH))?;
    guest.cmp(rax, qword_ptr(NMI_DEEPEST))?;
    guest.jbe(*not_deeper)?;
    guest.mov(qword_ptr(NMI_DEEPEST), rax)?;
    guest.set_label(not_deeper)?;
    guest.mov(rax, qword_ptr(NMI_COUNT))?;
    guest.inc(qword_ptr(NMI_COUNT))?;
    // RIP of each delivery's frame.
    guest.mov(rcx, qword_ptr(rsp + 24))?;
    guest.mov(qword_ptr(rax * 8 + NMI_RIP as i32), rcx)?;
    guest.test(rax, rax)?;
    guest.jnz(*only_return)?;
    guest.self_nmi()?;
    guest.nop()?;
    guest.self_nmi()?;
    guest.cpuid_leaf(0, 0)?;
    guest.set_label(only_return)?;
    guest.dec(qword_ptr(NMI_DEPTH))?;
    guest.pop(rdx)?;
    guest.pop(rcx)?;
    guest.pop(rax)?;
    guest.iretq()?;

    guest.set_label(begin)?;
    guest.gate(2, *handler, 1)?;
    guest.enable_apic()?;
    guest.self_nmi()?;
    here(guest, after)?;
    place(guest, "after", *after)?;
    guest.fact_at("count", NMI_COUNT)?;
    guest.fact_at("deepest", NMI_DEEPEST)?;
    guest.facts_at("rips", NMI_RIP, 2)?;
    guest.fact_at("depth", NMI_DEPTH)?;
    // And none is blocked for ever.
    guest.self_nmi()?;
    guest.nop()?;
    guest.fact_at("later", NMI_COUNT)
}

#[test]
fn one_nmi_is_held_back_until_the_handler_has_returned() {
    let facts = run("nmi-blocked");
    facts.assert("count", 2);
    facts.assert("deepest", 1);
    facts.assert("depth", 0);
    // Both interrupted the same place: the second came after the first one's IRET, not before it.
    let after = facts.value("after");
    facts.assert_words("rips", &[after, after]);
    facts.assert("later", 3);
}

/// An NMI and an interrupt become deliverable at the same boundary, after the WRMSR in the shadow of STI.
fn nmi_first(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.mov(ecx, msr::ICR)?;
    guest.mov(eax, 4 << 8)?;
    guest.xor(edx, edx)?;
    guest.sti()?;
    guest.wrmsr()?;
    here(guest, &mut after)?;
    guest.cli()?;
    place(guest, "after", after)?;
    guest.record("first", 0)?;
    guest.record("second", 1)?;
    guest.record_count("count")
}

#[test]
fn an_nmi_comes_before_an_interrupt() {
    let facts = run("nmi-first");
    assert_taken(&facts, "first", 2, "after");
    assert_taken(&facts, "second", 0x40, "after");
    facts.assert("count", 2);
}

/// MOV SS holds back NMIs as well (SDM vol. 3, 6.8.3).
fn nmi_shadow(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    guest.enable_apic()?;
    guest.mov(ebx, u32::from(gdt::DATA))?;
    guest.mov(ecx, msr::ICR)?;
    guest.mov(eax, 4 << 8)?;
    guest.xor(edx, edx)?;
    guest.mov(ss, ebx)?;
    guest.wrmsr()?;
    here(guest, &mut after)?;
    place(guest, "after", after)?;
    guest.record("taken", 0)?;
    guest.record_count("count")
}

#[test]
fn an_nmi_in_the_shadow_of_mov_ss_is_taken_after_the_instruction() {
    let facts = run("nmi-shadow");
    assert_taken(&facts, "taken", 2, "after");
    facts.assert("count", 1);
}

/// Any IRET unblocks NMIs, that of an exception's handler inside the NMI's too (SDM vol. 3, 6.7.1).
fn nmi_nested_iret(guest: &mut Guest) -> Asm {
    let mut labels = [(); 5].map(|()| guest.create_label());
    let [handler, begin, second, after_int3, after] = &mut labels;
    guest.jmp(*begin)?;
    guest.set_label(handler)?;
    guest.inc(qword_ptr(NMI_COUNT))?;
    guest.cmp(qword_ptr(NMI_COUNT), 1)?;
    guest.jne(*second)?;
    guest.push(rax)?;
    guest.push(rcx)?;
    guest.push(rdx)?;
    guest.self_nmi()?;
    guest.fact_at("blocked", NMI_COUNT)?;
    guest.pop(rdx)?;
    guest.pop(rcx)?;
    guest.pop(rax)?;
    guest.int3()?;
    guest.set_label(after_int3)?;
    guest.nop()?;
    guest.iretq()?;
    guest.set_label(second)?;
    guest.pop(qword_ptr(NMI_RIP))?;
    guest.push(qword_ptr(NMI_RIP))?;
    guest.iretq()?;

    guest.set_label(begin)?;
    guest.gate(2, *handler, 0)?;
    guest.enable_apic()?;
    guest.self_nmi()?;
    here(guest, after)?;
    guest.fact_at("count", NMI_COUNT)?;
    place(guest, "after-int3", *after_int3)?;
    guest.fact_at("rip", NMI_RIP)
}

#[test]
fn the_return_from_an_exception_in_its_handler_unblocks_nmis() {
    let facts = run("nmi-nested-iret");
    facts.assert("blocked", 1);
    facts.assert("count", 2);
    facts.assert("rip", facts.value("after-int3"));
}

/// NMIs are blocked, one waits, and the handler halts with interrupts on: the timer's handler returns, which unblocks it, and its own
/// handler comes before the instruction after HLT.
fn nmi_hlt(guest: &mut Guest) -> Asm {
    let mut labels = [(); 5].map(|()| guest.create_label());
    let [handler, begin, second, after_hlt, after] = &mut labels;
    guest.jmp(*begin)?;
    guest.set_label(handler)?;
    guest.inc(qword_ptr(NMI_COUNT))?;
    guest.cmp(qword_ptr(NMI_COUNT), 1)?;
    guest.jne(*second)?;
    guest.push(rax)?;
    guest.push(rcx)?;
    guest.push(rdx)?;
    guest.self_nmi()?;
    guest.timer(0x40, 0, 1_000_000)?;
    guest.pop(rdx)?;
    guest.pop(rcx)?;
    guest.pop(rax)?;
    guest.sti()?;
    guest.hlt()?;
    guest.set_label(after_hlt)?;
    guest.cli()?;
    guest.iretq()?;
    guest.set_label(second)?;
    guest.pop(qword_ptr(NMI_RIP))?;
    guest.push(qword_ptr(NMI_RIP))?;
    guest.iretq()?;

    guest.set_label(begin)?;
    guest.gate(2, *handler, 0)?;
    guest.enable_apic()?;
    guest.self_nmi()?;
    here(guest, after)?;
    guest.fact_at("count", NMI_COUNT)?;
    guest.record_count("interrupts")?;
    guest.record("taken", 0)?;
    place(guest, "after-hlt", *after_hlt)?;
    guest.fact_at("rip", NMI_RIP)
}

#[test]
fn a_blocked_nmi_does_not_end_hlt_and_is_not_forgotten_there() {
    let facts = run("nmi-hlt");
    facts.assert("count", 2);
    facts.assert("interrupts", 1);
    assert_taken(&facts, "taken", 0x40, "after-hlt");
    facts.assert("rip", facts.value("after-hlt"));
}
