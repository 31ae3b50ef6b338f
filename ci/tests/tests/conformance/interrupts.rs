//! Interrupts: the shadows of STI and MOV SS, HLT, priorities, the interrupt command.
//!
//! Intel SDM vol. 3, 6.8 (masking, MOV SS), 9.4 (INIT, start-up), 11.6 (interrupt command), 11.8 (priorities, EOI), 11.12 (x2APIC); vol. 2,
//! STI, HLT.

use crate::{is_emulated_by_qemu, run, run_to_any_end};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Program, gdt, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("sti-shadow", sti_shadow),
    ("sti-shadow-exit", sti_shadow_exit),
    ("mov-ss-shadow", mov_ss_shadow),
    ("mov-ss-shadow-exit", mov_ss_shadow_exit),
    ("sti-hlt-pending", sti_hlt_pending),
    ("hlt-race", hlt_race),
    ("hlt-forever", hlt_forever),
    ("hlt-unmasked-later", hlt_masked),
    ("task-priority", task_priority),
    ("nested-interrupts", nested_interrupts),
    ("icr", icr),
    ("illegal-vector", illegal_vector),
    ("init", init),
    ("start-up", start_up),
];

/// x2APIC: processor priority.
const PPR: u32 = 0x80A;
/// x2APIC: in service, vectors 64-95.
const ISR_64: u32 = 0x812;
/// x2APIC: requested, vectors 32-63.
const IRR_32: u32 = 0x821;
/// x2APIC: error status.
const ESR: u32 = 0x828;

const RFLAGS_IF: i32 = 1 << 9;

/// Reports where `label` is.
pub(crate) fn place(guest: &mut Guest, name: &str, label: CodeLabel) -> Asm {
    guest.push(rax)?;
    guest.lea(rax, ptr(label))?;
    guest.fact(name, rax)?;
    guest.pop(rax)
}

/// Sets a label and leaves an instruction there.
pub(crate) fn here(guest: &mut Guest, label: &mut CodeLabel) -> Asm {
    guest.set_label(label)?;
    guest.nop()
}

/// Record `name` is of `vector`, which came before the instruction at the fact `place`.
#[track_caller]
pub(crate) fn assert_taken(facts: &Facts, name: &str, vector: u64, place: &str) {
    let record = facts.words(name);
    let expected = [vector, facts.value(place)];
    assert!(
        [record[0], record[2]] == expected,
        "{name}: expected vector and RIP {expected:x?}, found {record:x?}\n{facts}"
    );
}

/// An interrupt is pending when STI opens the window, and taken after exactly one more instruction (SDM vol. 2, STI).
fn sti_shadow(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.xor(ebx, ebx)?;
    guest.sti()?;
    guest.inc(ebx)?;
    here(guest, &mut after)?;
    guest.cli()?;
    place(guest, "after", after)?;
    guest.record("taken", 0)?;
    guest.record_count("count")
}

#[test]
fn an_interrupt_in_the_shadow_of_sti_is_taken_after_one_instruction() {
    let facts = run("sti-shadow");
    assert_taken(&facts, "taken", 0x40, "after");
    facts.assert("count", 1);
}

fn sti_shadow_exit(guest: &mut Guest) -> Asm {
    let (mut after_cpuid, mut after_out) = (guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.xor(eax, eax)?;
    guest.xor(ecx, ecx)?;
    guest.sti()?;
    guest.cpuid()?;
    here(guest, &mut after_cpuid)?;
    guest.cli()?;
    guest.self_ipi(0x41)?;
    guest.sti()?;
    guest.out(0x80, al)?;
    here(guest, &mut after_out)?;
    guest.cli()?;
    place(guest, "after-cpuid", after_cpuid)?;
    place(guest, "after-out", after_out)?;
    guest.record("cpuid", 0)?;
    guest.record("out", 1)?;
    guest.record_count("count")
}

#[test]
fn the_shadow_of_sti_ends_with_an_instruction_that_exits() {
    let facts = run("sti-shadow-exit");
    assert_taken(&facts, "cpuid", 0x40, "after-cpuid");
    assert_taken(&facts, "out", 0x41, "after-out");
    facts.assert("count", 2);
}

/// What makes the interrupt deliverable stands in the shadow itself, so that the shadow must end exactly there.
fn mov_ss_shadow(guest: &mut Guest) -> Asm {
    let (mut after_popf, mut after_cr8) = (guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.mov(ebx, u32::from(gdt::DATA))?;
    guest.pushfq()?;
    guest.or(qword_ptr(rsp), RFLAGS_IF)?;
    guest.mov(ss, ebx)?;
    guest.popfq()?;
    here(guest, &mut after_popf)?;

    guest.mov(eax, 15)?;
    guest.mov(cr8, rax)?;
    guest.self_ipi(0x41)?;
    guest.xor(eax, eax)?;
    guest.mov(ss, ebx)?;
    guest.mov(cr8, rax)?;
    here(guest, &mut after_cr8)?;
    guest.cli()?;
    place(guest, "after-popf", after_popf)?;
    place(guest, "after-cr8", after_cr8)?;
    guest.record("popf", 0)?;
    guest.record("cr8", 1)?;
    guest.record_count("count")
}

#[test]
fn the_shadow_of_mov_ss_covers_one_instruction() {
    let facts = run("mov-ss-shadow");
    assert_taken(&facts, "popf", 0x40, "after-popf");
    assert_taken(&facts, "cr8", 0x41, "after-cr8");
    facts.assert("count", 2);
}

/// The instruction in the shadow exits: it raises the interrupt itself, or the shadow of STI stands before it. Of STI and MOV SS in a row
/// only the first is sure to have a shadow (SDM vol. 2, MOV).
fn mov_ss_shadow_exit(guest: &mut Guest) -> Asm {
    let (mut after_wrmsr, mut after_mov, mut after_cpuid) =
        (guest.create_label(), guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.mov(ebx, u32::from(gdt::DATA))?;
    guest.mov(ecx, msr::SELF_IPI)?;
    guest.mov(eax, 0x40)?;
    guest.xor(edx, edx)?;
    guest.sti()?;
    guest.nop()?;
    guest.mov(ss, ebx)?;
    guest.wrmsr()?;
    here(guest, &mut after_wrmsr)?;
    guest.cli()?;

    guest.self_ipi(0x41)?;
    guest.xor(eax, eax)?;
    guest.mov(ebx, u32::from(gdt::DATA))?;
    guest.sti()?;
    guest.mov(ss, ebx)?;
    guest.set_label(&mut after_mov)?;
    guest.cpuid()?;
    here(guest, &mut after_cpuid)?;
    guest.cli()?;
    place(guest, "after-wrmsr", after_wrmsr)?;
    place(guest, "after-mov", after_mov)?;
    place(guest, "after-cpuid", after_cpuid)?;
    guest.record("wrmsr", 0)?;
    guest.record("both", 1)?;
    guest.record_count("count")
}

#[test]
fn the_shadow_of_mov_ss_ends_with_an_instruction_that_exits() {
    let facts = run("mov-ss-shadow-exit");
    assert_taken(&facts, "wrmsr", 0x40, "after-wrmsr");
    let rip = facts.words("both")[2];
    assert!([facts.value("after-mov"), facts.value("after-cpuid")].contains(&rip), "{rip:x}\n{facts}");
    facts.assert("count", 2);
}

fn sti_hlt_pending(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.sti()?;
    guest.hlt()?;
    here(guest, &mut after)?;
    guest.cli()?;
    place(guest, "after", after)?;
    guest.record("taken", 0)?;
    guest.record_count("count")
}

#[test]
fn hlt_after_sti_wakes_for_an_interrupt_that_is_already_pending() {
    let facts = run("sti-hlt-pending");
    assert_taken(&facts, "taken", 0x40, "after");
    facts.assert("count", 1);
}

/// How many times [`hlt_race`] halts; all of them fit in the records.
const RACES: u32 = 64;

/// Deadlines from far before HLT to far behind it.
fn hlt_race(guest: &mut Guest) -> Asm {
    let (mut again, mut after) = (guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.timer(0x40, 2, 0)?;
    guest.mov(r12d, RACES)?;
    guest.xor(r13d, r13d)?;
    guest.set_label(&mut again)?;
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)?;
    guest.add(rax, r13)?;
    guest.mov(rdx, rax)?;
    guest.shr(rdx, 32)?;
    guest.mov(ecx, msr::TSC_DEADLINE)?;
    guest.wrmsr()?;
    guest.sti()?;
    guest.hlt()?;
    here(guest, &mut after)?;
    guest.cli()?;
    guest.add(r13, 1999)?;
    guest.dec(r12d)?;
    guest.jnz(again)?;
    place(guest, "after", after)?;
    guest.record("first", 0)?;
    guest.record("last", u64::from(RACES) - 1)?;
    guest.record_count("count")
}

#[test]
fn a_timer_that_races_with_hlt_always_wakes_it() {
    let facts = run("hlt-race");
    facts.assert("count", u64::from(RACES));
    assert_taken(&facts, "first", 0x40, "after");
    assert_taken(&facts, "last", 0x40, "after");
}

fn hlt_forever(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.self_ipi(0x40)?;
    guest.hlt()
}

#[test]
fn hlt_with_interrupts_off_ends_the_machine() {
    run_to_any_end("hlt-forever").assert_ended("halted with interrupts off");
}

/// An interrupt that the task priority holds back does not end HLT (SDM vol. 3, 11.8.3.1); one above it does.
fn hlt_masked(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    guest.enable_apic()?;
    guest.mov(eax, 5)?;
    guest.mov(cr8, rax)?;
    guest.self_ipi(0x40)?;
    guest.timer(0x60, 0, 3_000_000)?;
    guest.sti()?;
    guest.hlt()?;
    here(guest, &mut after)?;
    guest.cli()?;
    place(guest, "after", after)?;
    guest.record_count("count")?;
    guest.record("taken", 0)
}

#[test]
fn an_interrupt_below_the_task_priority_does_not_wake_hlt() {
    let facts = run("hlt-unmasked-later");
    facts.assert("count", 1);
    assert_taken(&facts, "taken", 0x60, "after");
}

fn task_priority(guest: &mut Guest) -> Asm {
    let (mut masked, mut unmasked) = (guest.create_label(), guest.create_label());
    guest.enable_apic()?;
    guest.sti()?;
    guest.mov(eax, 4)?;
    guest.mov(cr8, rax)?;
    guest.self_ipi(0x4F)?;
    guest.self_ipi(0x50)?;
    here(guest, &mut masked)?;
    guest.record_count("masked-count")?;
    guest.mov(eax, 3)?;
    guest.mov(cr8, rax)?;
    here(guest, &mut unmasked)?;
    guest.cli()?;
    guest.record_count("unmasked-count")?;
    place(guest, "masked", masked)?;
    place(guest, "unmasked", unmasked)?;
    guest.record("first", 0)?;
    guest.record("second", 1)?;

    guest.wrmsr_value(msr::TPR, 0x5A)?;
    guest.mov(rax, cr8)?;
    guest.fact("cr8", rax)?;
    guest.rdmsr_value(msr::TPR)?;
    guest.fact("tpr", rax)?;
    guest.mov(eax, 7)?;
    guest.mov(cr8, rax)?;
    guest.rdmsr_value(msr::TPR)?;
    guest.fact("tpr-by-cr8", rax)?;
    guest.rdmsr_value(PPR)?;
    guest.fact("ppr", rax)?;
    guest.mov(eax, 16)?;
    guest.attempt("reserved", |guest| guest.mov(cr8, rax))?;
    guest.mov(rax, cr8)?;
    guest.fact("cr8-kept", rax)
}

#[test]
fn cr8_holds_back_its_priority_class_and_those_below() {
    let facts = run("task-priority");
    facts.assert("masked-count", 1);
    assert_taken(&facts, "first", 0x50, "masked");
    facts.assert("unmasked-count", 2);
    assert_taken(&facts, "second", 0x4F, "unmasked");
}

#[test]
fn cr8_and_the_task_priority_register_are_one() {
    let facts = run("task-priority");
    facts.assert("cr8", 5);
    facts.assert("tpr", 0x5A);
    facts.assert("tpr-by-cr8", 0x70);
    facts.assert("ppr", 0x70);
}

#[test]
fn a_cr8_above_15_is_a_protection_fault() {
    let facts = run("task-priority");
    if is_emulated_by_qemu() {
        // QEMU drops the bits that do not exist.
        return facts.assert_completed("reserved");
    }
    facts.assert_fault("reserved", 13, 0);
    facts.assert("cr8-kept", 7);
}

/// The handler of 0x40 opens the window with one interrupt above and one below it pending.
fn nested_interrupts(guest: &mut Guest) -> Asm {
    let (mut handler, mut begin, mut after) =
        (guest.create_label(), guest.create_label(), guest.create_label());
    guest.jmp(begin)?;
    guest.set_label(&mut handler)?;
    guest.self_ipi(0x35)?;
    guest.self_ipi(0x55)?;
    guest.record_count("closed")?;
    guest.sti()?;
    guest.nop()?;
    guest.nop()?;
    guest.cli()?;
    guest.record_count("open")?;
    guest.rdmsr_value(ISR_64)?;
    guest.fact("in-service", rax)?;
    guest.rdmsr_value(IRR_32)?;
    guest.fact("requested", rax)?;
    guest.rdmsr_value(PPR)?;
    guest.fact("ppr", rax)?;
    guest.wrmsr_value(msr::EOI, 0)?;
    guest.record_count("ended")?;
    guest.rdmsr_value(ISR_64)?;
    guest.fact("in-service-after", rax)?;
    guest.iretq()?;

    guest.set_label(&mut begin)?;
    guest.gate(0x40, handler, 0)?;
    guest.enable_apic()?;
    guest.sti()?;
    guest.self_ipi(0x40)?;
    here(guest, &mut after)?;
    guest.cli()?;
    place(guest, "after", after)?;
    guest.record_count("count")?;
    guest.record("first", 0)?;
    guest.record("second", 1)
}

#[test]
fn a_handler_is_interrupted_by_higher_priorities_only() {
    let facts = run("nested-interrupts");
    facts.assert("closed", 0);
    facts.assert("open", 1);
    assert_eq!(facts.words("first")[0], 0x55, "{facts}");
    // 0x40 alone is left in service, 0x35 waits.
    facts.assert("in-service", 1);
    facts.assert("requested", 1 << 0x15);
    facts.assert("ppr", 0x40);
}

#[test]
fn an_end_of_interrupt_lets_lower_priorities_through() {
    let facts = run("nested-interrupts");
    facts.assert("ended", 1);
    facts.assert("in-service-after", 0);
    facts.assert("count", 2);
    assert_taken(&facts, "second", 0x35, "after");
}

/// Every way to name the only processor: shorthand, id, logical id, broadcast; and one that does not.
fn icr(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.sti()?;
    for command in [
        1 << 18 | 0x41,
        0x42,
        1 << 32 | 1 << 11 | 0x43,
        0xFFFF_FFFF << 32 | 0x44,
        2 << 18 | 0x45,
        // Lowest priority, to itself.
        1 << 8 | 0x46,
        // All but itself.
        3 << 18 | 0x47,
        // A processor that is not there.
        9 << 32 | 0x48,
    ] {
        guest.wrmsr_value(msr::ICR, command)?;
    }
    guest.cli()?;
    guest.record_count("count")?;
    for index in 0..6 {
        guest.record("record", index)?;
    }
    guest.attempt("reserved", |guest| guest.wrmsr_value(msr::ICR, 1 << 13 | 0x41))
}

#[test]
fn an_interrupt_command_reaches_its_sender_by_every_name() {
    let facts = run("icr");
    facts.assert("count", 6);
    let vectors: Vec<u64> = facts.all("record").iter().map(|record| record[0]).collect();
    assert_eq!(vectors, [0x41, 0x42, 0x43, 0x44, 0x45, 0x46], "{facts}");
    assert!(matches!(facts.words("reserved"), [13, 0, _]), "{facts}");
}

/// Vectors below 16 are illegal for the local APIC (SDM vol. 3, 11.5.3): an error, and no interrupt.
fn illegal_vector(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.sti()?;
    guest.self_ipi(15)?;
    guest.wrmsr_value(ESR, 0)?;
    guest.cli()?;
    guest.rdmsr_value(ESR)?;
    guest.fact("errors", rax)?;
    guest.record_count("count")
}

#[test]
fn an_illegal_vector_is_an_error_and_no_interrupt() {
    let facts = run("illegal-vector");
    facts.assert_that("errors", "send illegal vector", |errors| errors & 1 << 5 != 0);
    facts.assert("count", 0);
}

fn init(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    // INIT, assert, to itself.
    guest.wrmsr_value(msr::ICR, 1 << 14 | 5 << 8)
}

#[test]
fn an_init_to_the_only_processor_ends_the_machine() {
    run_to_any_end("init").assert_ended("INIT");
}

/// A start-up interrupt means nothing to a processor that does not wait for one (SDM vol. 3, 9.4).
fn start_up(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.wrmsr_value(msr::ICR, 6 << 8 | 0x10)?;
    // INIT level de-assert, which processors since the Pentium 4 ignore.
    guest.wrmsr_value(msr::ICR, 1 << 15 | 5 << 8)?;
    guest.record_count("count")
}

#[test]
fn a_start_up_interrupt_to_a_running_processor_is_ignored() {
    run("start-up").assert("count", 0);
}
