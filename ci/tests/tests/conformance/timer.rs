//! The local APIC's timer: one-shot, periodic, TSC deadline.
//!
//! Intel SDM vol. 3, 11.5.4.

use crate::interrupts::{assert_taken, here, place};
use crate::run;
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Guest, Program, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("timer-one-shot", timer_one_shot),
    ("timer-periodic", timer_periodic),
    ("timer-deadline", timer_deadline),
    ("timer-masked", timer_masked),
];

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
