//! Interrupts: shadows, HLT, priorities, the local APIC's timer, NMI, and delivery that stops half-way for a nested fault.
//!
//! Intel SDM vol. 3, 6.7 (NMI), 6.8 (masking, MOV SS), 11.5.4 (timer), 11.8 (priorities, EOI), 11.12 (x2APIC); vol. 2, STI, HLT.

use crate::{is_emulated_by_qemu, is_svm_in_bochs, run, run_to_any_end};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Program, gdt, layout, msr};

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
    ("timer-one-shot", timer_one_shot),
    ("timer-periodic", timer_periodic),
    ("timer-deadline", timer_deadline),
    ("timer-masked", timer_masked),
    ("nmi", nmi),
    ("nmi-blocked", nmi_blocked),
    ("nmi-first", nmi_first),
    ("nmi-shadow", nmi_shadow),
    ("nmi-nested-iret", nmi_nested_iret),
    ("nmi-hlt", nmi_hlt),
    ("fresh-idt", fresh_idt),
    ("fresh-gdt", fresh_gdt),
    ("fresh-tss", fresh_tss),
    ("fresh-stack", fresh_stack),
    ("fresh-tables", fresh_tables),
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
fn place(guest: &mut Guest, name: &str, label: CodeLabel) -> Asm {
    guest.push(rax)?;
    guest.lea(rax, ptr(label))?;
    guest.fact(name, rax)?;
    guest.pop(rax)
}

/// Sets a label and leaves an instruction there.
fn here(guest: &mut Guest, label: &mut CodeLabel) -> Asm {
    guest.set_label(label)?;
    guest.nop()
}

/// Record `name` is of `vector`, which came before the instruction at the fact `place`.
#[track_caller]
fn assert_taken(facts: &Facts, name: &str, vector: u64, place: &str) {
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

fn timer_one_shot(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.timer(0x40, 0, 1_000_000)?;
    guest.rdmsr_value(msr::CURRENT_COUNT)?;
    guest.fact("running", rax)?;
    guest.sti()?;
    guest.hlt()?;
    guest.cli()?;
    guest.record_count("first")?;
    guest.rdmsr_value(msr::CURRENT_COUNT)?;
    guest.fact("expired", rax)?;
    // It fires once: until the next one, nothing more has come.
    guest.timer(0x41, 0, 1_000_000)?;
    guest.sti()?;
    guest.hlt()?;
    guest.cli()?;
    guest.record_count("second")?;
    guest.record("record", 1)
}

#[test]
fn the_timer_fires_once_in_one_shot_mode() {
    let facts = run("timer-one-shot");
    facts.assert_that("running", "a running count", |count| count > 0 && count <= 1_000_000);
    facts.assert("first", 1);
    facts.assert("expired", 0);
    facts.assert("second", 2);
    assert_eq!(facts.words("record")[0], 0x41, "{facts}");
}

fn timer_periodic(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.timer(0x40, 1, 1_000_000)?;
    for _ in 0..3 {
        guest.sti()?;
        guest.hlt()?;
        guest.cli()?;
    }
    guest.record_count("count")?;
    guest.rdmsr_value(msr::CURRENT_COUNT)?;
    guest.fact("running", rax)?;
    guest.wrmsr_value(msr::INITIAL_COUNT, 0)?;
    guest.rdmsr_value(msr::CURRENT_COUNT)?;
    guest.fact("stopped", rax)
}

#[test]
fn the_timer_fires_again_and_again_in_periodic_mode() {
    let facts = run("timer-periodic");
    facts.assert_that("count", "at least 3", |count| count >= 3);
    facts.assert_that("running", "a running count", |count| count > 0);
    facts.assert("stopped", 0);
}

/// Sets the deadline to RAX.
fn set_deadline(guest: &mut Guest) -> Asm {
    guest.mov(rdx, rax)?;
    guest.shr(rdx, 32)?;
    guest.mov(ecx, msr::TSC_DEADLINE)?;
    guest.wrmsr()
}

fn now(guest: &mut Guest) -> Asm {
    guest.rdtsc()?;
    guest.shl(rdx, 32)?;
    guest.or(rax, rdx)
}

fn timer_deadline(guest: &mut Guest) -> Asm {
    let mut past = guest.create_label();
    guest.enable_apic()?;
    guest.timer(0x40, 2, 0)?;
    guest.sti()?;
    guest.mov(eax, 1)?;
    set_deadline(guest)?;
    here(guest, &mut past)?;
    guest.cli()?;
    place(guest, "past-place", past)?;
    guest.record("past", 0)?;

    now(guest)?;
    guest.add(rax, 1_000_000)?;
    guest.mov(r12, rax)?;
    set_deadline(guest)?;
    guest.rdmsr_value(msr::TSC_DEADLINE)?;
    guest.cmp(rax, r12)?;
    guest.sete(bl)?;
    guest.movzx(ebx, bl)?;
    guest.fact("armed", rbx)?;
    guest.sti()?;
    guest.hlt()?;
    guest.cli()?;
    now(guest)?;
    guest.cmp(rax, r12)?;
    guest.setae(bl)?;
    guest.movzx(ebx, bl)?;
    guest.fact("not-early", rbx)?;
    guest.rdmsr_value(msr::TSC_DEADLINE)?;
    guest.fact("fired", rax)?;

    now(guest)?;
    guest.add(rax, 1 << 30)?;
    guest.add(rax, 1 << 30)?;
    set_deadline(guest)?;
    guest.xor(eax, eax)?;
    set_deadline(guest)?;
    guest.rdmsr_value(msr::TSC_DEADLINE)?;
    guest.fact("disarmed", rax)?;
    guest.record_count("count")?;

    // Outside its mode the register does nothing.
    guest.timer(0x41, 0, 0)?;
    guest.sti()?;
    guest.mov(eax, 1)?;
    set_deadline(guest)?;
    guest.nop()?;
    guest.cli()?;
    guest.rdmsr_value(msr::TSC_DEADLINE)?;
    guest.fact("other-mode", rax)?;
    guest.record_count("other-mode-count")
}

#[test]
fn a_deadline_in_the_past_fires_at_once() {
    let facts = run("timer-deadline");
    assert_taken(&facts, "past", 0x40, "past-place");
}

#[test]
fn a_deadline_fires_when_it_is_due_and_reads_zero_afterwards() {
    let facts = run("timer-deadline");
    for (name, value) in [("armed", 1), ("not-early", 1), ("fired", 0), ("disarmed", 0), ("count", 2)] {
        facts.assert(name, value);
    }
}

#[test]
fn a_deadline_has_no_effect_in_the_other_timer_modes() {
    let facts = run("timer-deadline");
    facts.assert("other-mode", 0);
    facts.assert("other-mode-count", 2);
}

/// A masked timer counts but does not interrupt.
fn timer_masked(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.timer(0x40, 0, 0)?;
    guest.wrmsr_value(msr::LVT_TIMER, 1 << 16 | 0x40)?;
    guest.wrmsr_value(msr::INITIAL_COUNT, 1)?;
    guest.sti()?;
    // Time passes: more than a tick of the timer's nanosecond.
    guest.cpuid_leaf(0, 0)?;
    guest.cpuid_leaf(0, 0)?;
    guest.rdmsr_value(msr::CURRENT_COUNT)?;
    guest.fact("current", rax)?;
    guest.cli()?;
    guest.record_count("count")
}

#[test]
fn a_masked_timer_counts_and_does_not_interrupt() {
    let facts = run("timer-masked");
    facts.assert("current", 0);
    facts.assert("count", 0);
}

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

/// An event that is delivered while something it needs is not backed by memory yet.
struct Event {
    name: &'static str,
    vector: u8,
    error_code: u64,
    /// RIP of the frame, in bytes from the start of `raise`.
    offset: u64,
    /// CR2, if the event sets it.
    cr2: Option<u64>,
    /// What comes before; changes RAX, RBX, RCX and RDX.
    prepare: fn(&mut Guest) -> Asm,
    /// The instruction that raises it, or after which it comes.
    raise: fn(&mut Guest) -> Asm,
}

/// A page of the window that is never mapped.
const NOT_MAPPED: u64 = layout::WINDOW + 511 * 0x1000;
/// A selector beyond the GDT's limit.
const NO_SELECTOR: u32 = 0x5F0;
/// An MSR that does not exist.
const NO_MSR: u32 = 0x1234;
/// A word that a breakpoint watches.
const WATCHED: u64 = layout::SCRATCH + 0x200;
/// The page directory of the window.
const WINDOW_DIRECTORY: u64 = layout::WINDOW_TABLE - 0x1000;

/// The events that the bed can have. QEMU loses track of its breakpoints when a guest exits with some armed, and may end. Bochs' SVM says
/// of a software interrupt that is cut short that it was the event before.
fn events() -> impl Iterator<Item = &'static Event> {
    EVENTS.iter().filter(|event| match event.name {
        "watchpoint" => !is_emulated_by_qemu(),
        "int-n" | "int3" => !is_svm_in_bochs(),
        _ => true,
    })
}

const EVENTS: [Event; 11] = [
    Event {
        name: "interrupt",
        vector: 0x40,
        error_code: 0,
        offset: 2,
        cr2: None,
        prepare: |guest| guest.self_ipi(0x40),
        raise: |guest| {
            guest.sti()?;
            guest.nop()
        },
    },
    Event {
        name: "nmi",
        vector: 2,
        error_code: 0,
        offset: 2,
        cr2: None,
        prepare: |guest| {
            guest.mov(ecx, msr::ICR)?;
            guest.mov(eax, 4 << 8)?;
            guest.xor(edx, edx)
        },
        raise: |guest| guest.wrmsr(),
    },
    Event {
        name: "ud2",
        vector: 6,
        error_code: 0,
        offset: 0,
        cr2: None,
        prepare: |_| Ok(()),
        raise: |guest| guest.ud2(),
    },
    Event {
        name: "general-protection",
        vector: 13,
        error_code: NO_SELECTOR as u64,
        offset: 0,
        cr2: None,
        prepare: |guest| guest.mov(ebx, NO_SELECTOR),
        raise: |guest| guest.mov(ds, ebx),
    },
    Event {
        name: "page-fault",
        vector: 14,
        error_code: 2,
        offset: 0,
        cr2: Some(NOT_MAPPED + 8),
        prepare: |guest| guest.mov(rbx, NOT_MAPPED + 8),
        raise: |guest| guest.mov(byte_ptr(rbx), al),
    },
    // These two are raised by the hypervisor.
    Event {
        name: "refused-msr",
        vector: 13,
        error_code: 0,
        offset: 0,
        cr2: None,
        prepare: |guest| guest.mov(ecx, NO_MSR),
        raise: |guest| guest.rdmsr(),
    },
    Event {
        name: "vmcall",
        vector: 6,
        error_code: 0,
        offset: 0,
        cr2: None,
        prepare: |_| Ok(()),
        raise: |guest| guest.vmcall(),
    },
    Event {
        name: "int-n",
        vector: 0x41,
        error_code: 0,
        offset: 2,
        cr2: None,
        prepare: |_| Ok(()),
        raise: |guest| guest.int(0x41),
    },
    Event {
        name: "int3",
        vector: 3,
        error_code: 0,
        offset: 1,
        cr2: None,
        prepare: |_| Ok(()),
        raise: |guest| guest.int3(),
    },
    Event {
        name: "int1",
        vector: 1,
        error_code: 0,
        offset: 1,
        cr2: None,
        prepare: |_| Ok(()),
        raise: |guest| guest.int1(),
    },
    Event {
        name: "watchpoint",
        vector: 1,
        error_code: 0,
        offset: 2,
        cr2: None,
        prepare: |guest| {
            guest.mov(ebx, WATCHED as u32)?;
            guest.mov(dr0, rbx)?;
            // DR0, writes of four bytes.
            guest.mov(eax, 0xD_0001)?;
            guest.mov(dr7, rax)
        },
        raise: |guest| guest.mov(dword_ptr(rbx), eax),
    },
];

/// Writes the `bytes` bytes at `from` to `to` without the processor touching `to`: string input is carried out by the hypervisor, so
/// that the memory is there but not mapped. What it reads is what the serial port's scratch register was told before. Changes RAX, RCX,
/// RDX, RSI and RDI.
fn write_unseen(guest: &mut Guest, to: u64, from: AsmRegister64, bytes: u32) -> Asm {
    let mut next = guest.create_label();
    guest.cld()?;
    guest.mov(rsi, from)?;
    guest.mov(rdi, to)?;
    guest.mov(ecx, bytes)?;
    guest.mov(dx, 0x3FF)?;
    guest.set_label(&mut next)?;
    guest.lodsb()?;
    guest.out(dx, al)?;
    guest.insb()?;
    guest.dec(ecx)?;
    guest.jnz(next)
}

/// LGDT or LIDT of a table at RAX. Keeps RAX.
fn load_table(guest: &mut Guest, limit: u32, load: fn(&mut Guest) -> Asm) -> Asm {
    guest.sub(rsp, 16)?;
    guest.mov(word_ptr(rsp), limit)?;
    guest.mov(qword_ptr(rsp + 2), rax)?;
    load(guest)?;
    guest.add(rsp, 16)
}

/// The stack that [`raise`] switches to just before the event.
#[derive(Clone, Copy)]
enum EventStack {
    Same,
    At(u64),
}

/// Raises the event and reports: how many came; vector, error code, RIP from the start of its instruction, CR2. Changes all registers
/// but RBP and those from R8 to R13.
fn raise(guest: &mut Guest, event: &Event, stack: EventStack) -> Asm {
    let (mut start, mut end) = (guest.create_label(), guest.create_label());
    guest.clear_records()?;
    guest.xor(eax, eax)?;
    guest.mov(cr2, rax)?;
    if event.vector < 32 {
        guest.resume_at(end)?;
    }
    guest.mov(r14, rsp)?;
    (event.prepare)(guest)?;
    if let EventStack::At(top) = stack {
        guest.mov(rsp, top)?;
    }
    guest.set_label(&mut start)?;
    (event.raise)(guest)?;
    guest.set_label(&mut end)?;
    guest.nop()?;
    guest.cli()?;
    guest.mov(rsp, r14)?;
    guest.mov(rsi, qword_ptr(layout::RECORD_COUNT))?;
    guest.mov(rax, qword_ptr(layout::RECORDS))?;
    guest.mov(rcx, qword_ptr(layout::RECORDS + 8))?;
    guest.mov(rdx, qword_ptr(layout::RECORDS + 16))?;
    guest.lea(rdi, ptr(start))?;
    guest.sub(rdx, rdi)?;
    guest.mov(rdi, qword_ptr(layout::RECORDS + 48))?;
    guest.facts(event.name, &[rsi, rax, rcx, rdx, rdi])
}

/// Every event came once and exact.
#[track_caller]
fn assert_events(facts: &Facts) {
    for event in events() {
        let address = event.cr2.unwrap_or(0);
        // QEMU has no INT1.
        if event.name == "int1" && is_emulated_by_qemu() {
            facts.assert_words(event.name, &[1, 6, 0, 0, 0]);
            continue;
        }
        facts
            .assert_words(event.name, &[1, u64::from(event.vector), event.error_code, event.offset, address]);
    }
}

/// The gates of the event's vector and of the vectors that a mistake would lead to.
fn write_gates(guest: &mut Guest, table: u64, vector: u8) -> Asm {
    for vector in [vector, 6, 8, 13, 14] {
        let offset = u64::from(vector) * 16;
        guest.mov(rbx, layout::IDT + offset)?;
        write_unseen(guest, table + offset, rbx, 16)?;
    }
    Ok(())
}

fn fresh_idt(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    for (event, region) in events().zip(layout::FRESH) {
        write_gates(guest, region, event.vector)?;
        guest.mov(rax, region)?;
        load_table(guest, 0xFFF, |guest| guest.lidt(ptr(rsp)))?;
        raise(guest, event, EventStack::Same)?;
        guest.mov(rax, layout::IDT)?;
        load_table(guest, 0xFFF, |guest| guest.lidt(ptr(rsp)))?;
    }
    Ok(())
}

#[test]
fn an_event_is_delivered_once_though_the_idt_has_to_be_mapped_first() {
    assert_events(&run("fresh-idt"));
}

fn fresh_gdt(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.sub(rsp, 16)?;
    guest.sgdt(ptr(rsp))?;
    guest.movzx(r12d, word_ptr(rsp))?;
    guest.mov(r13, qword_ptr(rsp + 2))?;
    guest.add(rsp, 16)?;
    for (event, region) in events().zip(layout::FRESH) {
        write_unseen(guest, region, r13, 12 * 8)?;
        guest.mov(rax, region)?;
        load_table(guest, 12 * 8 - 1, |guest| guest.lgdt(ptr(rsp)))?;
        raise(guest, event, EventStack::Same)?;
        guest.mov(rax, r13)?;
        load_table(guest, 12 * 8 - 1, |guest| guest.lgdt(ptr(rsp)))?;
    }
    guest.fact("limit", r12)
}

#[test]
fn an_event_is_delivered_once_though_the_gdt_has_to_be_mapped_first() {
    let facts = run("fresh-gdt");
    facts.assert("limit", 12 * 8 - 1);
    assert_events(&facts);
}

fn fresh_tss(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    guest.sub(rsp, 16)?;
    guest.sgdt(ptr(rsp))?;
    guest.mov(r13, qword_ptr(rsp + 2))?;
    guest.add(rsp, 16)?;
    for (event, region) in events().zip(layout::FRESH) {
        guest.mov(rbx, layout::TSS)?;
        write_unseen(guest, region, rbx, 0x68)?;
        // An available 64-bit TSS with this base.
        let descriptor = 0x0000_8900_0000_0067 | (region & 0xFF_FFFF) << 16 | (region >> 24 & 0xFF) << 56;
        guest.mov(rax, descriptor)?;
        guest.mov(qword_ptr(r13 + i32::from(gdt::TSS)), rax)?;
        guest.mov(eax, u32::from(gdt::TSS))?;
        guest.ltr(ax)?;
        let ist = layout::IDT + u64::from(event.vector) * 16 + 4;
        guest.mov(byte_ptr(ist), 1)?;
        raise(guest, event, EventStack::Same)?;
        guest.mov(byte_ptr(ist), 0)?;
    }
    Ok(())
}

#[test]
fn an_event_is_delivered_once_though_the_tss_has_to_be_mapped_first() {
    assert_events(&run("fresh-tss"));
}

fn fresh_stack(guest: &mut Guest) -> Asm {
    guest.enable_apic()?;
    for (event, region) in events().zip(layout::FRESH) {
        raise(guest, event, EventStack::At(region + 0x1000))?;
    }
    Ok(())
}

#[test]
fn an_event_is_delivered_once_though_the_stack_has_to_be_mapped_first() {
    assert_events(&run("fresh-stack"));
}

/// The stack's page and the page table that leads to it are both new.
fn fresh_tables(guest: &mut Guest) -> Asm {
    let entry = layout::SCRATCH + 0x100;
    guest.enable_apic()?;
    // The window's table, but in a new region for each event; its entry 0 leads to the page after it.
    guest.mov(r13, qword_ptr(WINDOW_DIRECTORY))?;
    for (event, region) in events().zip(layout::FRESH) {
        guest.mov(rax, layout::SCRATCH + 0x1000 | 3)?;
        guest.mov(qword_ptr(entry), rax)?;
        guest.mov(rbx, entry)?;
        write_unseen(guest, region, rbx, 8)?;
        guest.mov(rax, region | 7)?;
        guest.mov(qword_ptr(WINDOW_DIRECTORY), rax)?;
        guest.mov(rax, cr3)?;
        guest.mov(cr3, rax)?;
        raise(guest, event, EventStack::At(layout::WINDOW + 0x1000))?;
    }
    guest.mov(qword_ptr(WINDOW_DIRECTORY), r13)
}

#[test]
fn an_event_is_delivered_once_though_a_page_table_has_to_be_mapped_first() {
    assert_events(&run("fresh-tables"));
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
