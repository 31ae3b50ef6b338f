//! Instructions whose behaviour the hypervisor decides: CPUID, MSRs, XSETBV, those of the virtualization extensions.

use crate::run;
use iced_x86::code_asm::*;
use nestling_machine::layout::{BOOT_PAGE_TABLES, BOOT_PARAMS};
use nestling_tests::bare::{Asm, Guest, Program, layout};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[("entry-state", entry_state), ("vmcall", vmcall)];

fn entry_state(guest: &mut Guest) -> Asm {
    guest.facts_at("registers", layout::ENTRY, 17)
}

fn vmcall(guest: &mut Guest) -> Asm {
    guest.mov(rcx, 7_u64)?;
    guest.attempt("vmcall", |guest| guest.vmcall())?;
    guest.fact("rcx", rcx)?;
    guest.attempt("nop", |guest| guest.nop())?;
    guest.allow_user()?;
    guest.user(|guest| {
        guest.attempt("user-vmcall", |guest| guest.vmcall())?;
        guest.mov(eax, cs)?;
        guest.fact("cs", rax)?;
        guest.attempt("user-hlt", |guest| guest.hlt())
    })
}

#[test]
fn a_machine_starts_with_clear_registers() {
    // Linux' 64-bit boot protocol asks for RSI; RSP is any stack.
    let mut expected = [0; 17];
    (expected[4], expected[6], expected[16]) = (BOOT_PAGE_TABLES, BOOT_PARAMS, 2);
    run("entry-state").assert_words("registers", &expected);
}

#[test]
fn vmcall_is_undefined() {
    let facts = run("vmcall");
    facts.assert_fault("vmcall", 6, 0);
    facts.assert("rcx", 7);
    facts.assert_completed("nop");
    facts.assert_fault("user-vmcall", 6, 0);
    facts.assert("cs", 0x2B);
    facts.assert_fault("user-hlt", 13, 0);
}
