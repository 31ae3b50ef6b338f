//! Port I/O: widths, string I/O with its registers, faults in the middle of it.
//!
//! Intel SDM vol. 1, 19 (I/O); vol. 2, IN, OUT, INS, OUTS, REP.
//!
//! What is read and written: the serial port's scratch register (a byte), `driver_feature_select` of the entropy device (a
//! doubleword), and ports that nobody has, which read all ones.

use crate::run;
use iced_x86::code_asm::*;
use nestling_tests::bare::layout::{SCRATCH, WINDOW};
use nestling_tests::bare::{Asm, Guest, Outcome, Program};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("ports-widths", widths),
    ("ports-devices", devices),
    ("ports-string", string),
    ("ports-backwards", backwards),
    ("ports-address-size", address_size),
    ("ports-segment", segment),
    ("ports-page-crossing", page_crossing),
    ("ports-fault", fault),
    ("ports-read-only", read_only),
    ("ports-long", long),
    ("ports-user", at_user_privilege),
];

const GP: u64 = 13;
const PF: u64 = 14;
/// A port without a device.
const NOBODY: u32 = 0x1234;
/// The serial port's scratch register.
const SERIAL_SCRATCH: u32 = 0x3FF;
/// Configuration space of the entropy device.
const RNG: u64 = 0xE000_0000 + (2 << 15);
/// Its register that holds any doubleword.
const DRIVER_FEATURE_SELECT: i32 = 8;
/// Any value, each byte another.
const PATTERN: u64 = 0x1122_3344_5566_7788;
const CR0_WP: u32 = 1 << 16;

/// Switches the entropy device's ports on; its first port is in RBX.
fn device_ports(guest: &mut Guest) -> Asm {
    guest.mov(ebx, RNG as u32)?;
    guest.mov(word_ptr(rbx + 4), 1)?;
    guest.mov(ebx, dword_ptr(rbx + 0x10))?;
    guest.and(ebx, 0xFFFC)
}

fn widths(guest: &mut Guest) -> Asm {
    guest.mov(rbx, PATTERN)?;
    guest.mov(edx, NOBODY)?;
    guest.mov(rax, rbx)?;
    guest.in_(al, dx)?;
    guest.fact("in-al", rax)?;
    guest.mov(rax, rbx)?;
    guest.in_(ax, dx)?;
    guest.fact("in-ax", rax)?;
    guest.mov(rax, rbx)?;
    guest.in_(eax, dx)?;
    guest.fact("in-eax", rax)?;
    // REX.W changes nothing: there is no 64-bit I/O.
    guest.mov(rax, rbx)?;
    guest.db(&[0x48, 0xED])?;
    guest.fact("in-rex", rax)?;
    guest.mov(rax, rbx)?;
    guest.in_(al, 0x80)?;
    guest.fact("in-imm-al", rax)?;
    guest.mov(rax, rbx)?;
    guest.in_(ax, 0x80)?;
    guest.fact("in-imm-ax", rax)?;
    guest.mov(rax, rbx)?;
    guest.in_(eax, 0x80)?;
    guest.fact("in-imm-eax", rax)?;
    // Only DX is the port, and the other registers stay.
    guest.mov(rdx, 0xFFFF_FFFF_FFFF_0000_u64 | u64::from(SERIAL_SCRATCH))?;
    guest.mov(rax, rbx)?;
    guest.out(dx, al)?;
    guest.fact("out-keeps-rax", rax)?;
    guest.fact("rdx", rdx)?;
    guest.mov(rax, rbx)?;
    guest.mov(al, 0)?;
    guest.in_(al, dx)?;
    guest.fact("scratch", rax)?;
    // A redundant prefix is part of the instruction's length.
    guest.mov(rax, rbx)?;
    guest.db(&[0x66, 0x66, 0xF2, 0xED])?;
    guest.fact("in-prefixed", rax)
}

fn devices(guest: &mut Guest) -> Asm {
    device_ports(guest)?;
    guest.lea(edx, ptr(rbx + DRIVER_FEATURE_SELECT))?;
    guest.mov(eax, 0x89AB_CDEF_u32)?;
    guest.out(dx, eax)?;
    guest.xor(eax, eax)?;
    guest.in_(eax, dx)?;
    guest.fact("dword", rax)?;
    // A word access to two byte registers is one access to each: modem status, scratch.
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(al, 0x5A)?;
    guest.out(dx, al)?;
    guest.dec(edx)?;
    guest.xor(eax, eax)?;
    guest.in_(ax, dx)?;
    guest.fact("word-of-bytes", rax)
}

/// Puts a register's value where all registers of a string instruction are reported.
fn report(guest: &mut Guest, name: &str) -> Asm {
    guest.facts(name, &[rcx, rsi, rdi])
}

fn string(guest: &mut Guest) -> Asm {
    let bytes = guest.data(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    // OUTSB: the last byte stays in the register.
    guest.cld()?;
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(rsi, bytes)?;
    guest.mov(ecx, 9)?;
    guest.mov(rdi, PATTERN)?;
    guest.rep().outsb()?;
    report(guest, "outsb")?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("outsb-scratch", rax)?;
    // INSB without REP, then with.
    guest.mov(rdi, SCRATCH + 8)?;
    guest.mov(ecx, 77)?;
    guest.mov(rsi, PATTERN)?;
    guest.insb()?;
    report(guest, "insb")?;
    guest.mov(rdi, SCRATCH + 16)?;
    guest.mov(ecx, 4)?;
    guest.rep().insb()?;
    report(guest, "rep-insb")?;
    guest.facts_at("insb-memory", SCRATCH, 4)?;
    // Nothing at all.
    guest.xor(ecx, ecx)?;
    guest.mov(rdi, 0x1000_0000_0000_u64)?;
    guest.mov(rsi, rdi)?;
    guest.attempt("none-ins", |guest| guest.rep().insd())?;
    guest.attempt("none-outs", |guest| guest.rep().outsd())?;
    report(guest, "none")?;
    // Words and doublewords.
    device_ports(guest)?;
    guest.lea(edx, ptr(rbx + DRIVER_FEATURE_SELECT))?;
    guest.mov(rsi, bytes)?;
    guest.mov(ecx, 2)?;
    guest.rep().outsd()?;
    report(guest, "outsd")?;
    guest.mov(rdi, SCRATCH + 0x48)?;
    guest.mov(ecx, 3)?;
    guest.rep().insd()?;
    report(guest, "insd")?;
    guest.facts_at("insd-memory", SCRATCH + 0x40, 4)?;
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, SCRATCH + 0x81)?;
    guest.mov(ecx, 2)?;
    guest.rep().insw()?;
    report(guest, "insw")?;
    guest.facts_at("insw-memory", SCRATCH + 0x80, 1)
}

fn backwards(guest: &mut Guest) -> Asm {
    let bytes = guest.data(&[1, 2, 3, 4, 5, 6, 7, 8]);
    guest.std()?;
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(rsi, bytes + 7)?;
    guest.mov(ecx, 6)?;
    guest.rep().outsb()?;
    report(guest, "outsb")?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("scratch", rax)?;
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, SCRATCH + 16)?;
    guest.mov(ecx, 2)?;
    guest.rep().insd()?;
    report(guest, "insd")?;
    guest.facts_at("memory", SCRATCH, 4)?;
    guest.pushfq()?;
    guest.pop(rax)?;
    guest.fact("rflags", rax)?;
    guest.cld()
}

/// With 32-bit addresses: ECX, ESI and EDI count, and their upper halves become zero.
fn address_size(guest: &mut Guest) -> Asm {
    const GARBAGE: u64 = 0xFFFF_FFFF_0000_0000;
    let bytes = guest.data(&[1, 2, 3, 4]);
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(rcx, GARBAGE | 3)?;
    guest.mov(rsi, GARBAGE | bytes)?;
    guest.mov(rdi, PATTERN)?;
    guest.db(&[0x67, 0xF3, 0x6E])?; // rep outsb, 32-bit addresses
    report(guest, "outsb")?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("scratch", rax)?;
    guest.mov(rcx, GARBAGE | 2)?;
    guest.mov(rdi, GARBAGE | SCRATCH)?;
    guest.mov(rsi, PATTERN)?;
    guest.db(&[0x67, 0xF3, 0x6C])?; // rep insb, 32-bit addresses
    report(guest, "insb")?;
    guest.fact_at("memory", SCRATCH)?;
    guest.mov(rcx, GARBAGE)?;
    guest.mov(rdi, GARBAGE | 0x1000)?;
    guest.attempt("none", |guest| guest.db(&[0x67, 0xF3, 0x6C]))?;
    guest.fact("none-rdi", rdi)
}

/// OUTS takes a segment override, INS does not.
fn segment(guest: &mut Guest) -> Asm {
    let bytes = guest.data(&[0x31, 0x32, 0x33, 0x34]);
    guest.wrmsr_value(0xC000_0100, bytes)?;
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(esi, 2)?;
    guest.db(&[0x64, 0x6E])?; // outs dx, byte ptr fs:[rsi]
    guest.fact("rsi", rsi)?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("scratch", rax)?;
    guest.mov(rdi, SCRATCH)?;
    guest.db(&[0x64, 0x6C])?; // ins byte ptr es:[rdi], dx
    guest.fact_at("memory", SCRATCH)
}

/// A buffer in two pages that are not neighbours in memory.
fn page_crossing(guest: &mut Guest) -> Asm {
    let (first, second) = (SCRATCH + 0x1000, SCRATCH + 0x4000);
    guest.map(0, first | 3)?;
    guest.map(1, second | 3)?;
    device_ports(guest)?;
    guest.lea(edx, ptr(rbx + DRIVER_FEATURE_SELECT))?;
    guest.mov(eax, 0x4433_2211)?;
    guest.mov(rdi, WINDOW + 0xFFE)?;
    guest.mov(dword_ptr(rdi), eax)?;
    guest.mov(rsi, rdi)?;
    guest.outsd()?;
    guest.fact("rsi", rsi)?;
    guest.xor(eax, eax)?;
    guest.in_(eax, dx)?;
    guest.fact("register", rax)?;
    guest.mov(rdi, WINDOW + 0xFFB)?;
    guest.mov(ecx, 3)?;
    guest.rep().insd()?;
    guest.fact("rdi", rdi)?;
    guest.fact_at("end-of-first", first + 0xFF8)?;
    guest.fact_at("start-of-second", second)?;
    guest.fact_at("behind-first", first + 0x1000)?;
    // Byte by byte over the boundary.
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(rsi, WINDOW + 0xFFC)?;
    guest.mov(ecx, 6)?;
    guest.rep().outsb()?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("sixth", rax)
}

/// The second page is not there until the guest has seen the fault.
fn fault(guest: &mut Guest) -> Asm {
    guest.map(0, (SCRATCH + 0x1000) | 3)?;
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, WINDOW + 0xFF0)?;
    guest.mov(rsi, PATTERN)?;
    guest.mov(rcx, 0x40_u64)?;
    guest.attempt("insb", |guest| guest.rep().insb())?;
    report(guest, "insb-registers")?;
    guest.mov(rax, cr2)?;
    guest.fact("insb-cr2", rax)?;
    guest.facts_at("insb-memory", SCRATCH + 0x1FE8, 4)?;
    guest.map(1, (SCRATCH + 0x3000) | 3)?;
    guest.attempt("insb-again", |guest| guest.rep().insb())?;
    report(guest, "insb-done")?;
    guest.fact_at("insb-rest", SCRATCH + 0x3028)?;
    guest.fact_at("insb-behind", SCRATCH + 0x3030)?;

    guest.map(1, 0)?;
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(rdi, PATTERN)?;
    guest.mov(rsi, WINDOW + 0xFFD)?;
    guest.mov(dword_ptr(SCRATCH + 0x1FFC), 0x0403_0201)?;
    guest.mov(ecx, 10)?;
    guest.attempt("outsb", |guest| guest.rep().outsb())?;
    report(guest, "outsb-registers")?;
    guest.mov(rax, cr2)?;
    guest.fact("outsb-cr2", rax)?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("outsb-scratch", rax)?;
    // An element half of which is in the missing page: nothing happens at all.
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, WINDOW + 0xFFE)?;
    guest.attempt("insd", |guest| guest.insd())?;
    guest.fact("insd-rdi", rdi)?;
    guest.mov(rax, cr2)?;
    guest.fact("insd-cr2", rax)?;
    guest.fact_at("insd-memory", SCRATCH + 0x1FF8)?;
    // Not canonical.
    guest.mov(rdi, 0x8000_0000_0000_u64)?;
    guest.attempt("non-canonical", |guest| guest.insb())
}

fn read_only(guest: &mut Guest) -> Asm {
    guest.mov(rax, cr0)?;
    guest.or(eax, CR0_WP)?;
    guest.mov(cr0, rax)?;
    guest.map(0, (SCRATCH + 0x1000) | 1)?;
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, WINDOW)?;
    guest.mov(rsi, rdi)?;
    guest.mov(ecx, 2)?;
    guest.attempt("ins", |guest| guest.rep().insb())?;
    guest.facts("ins-registers", &[rcx, rdi])?;
    guest.attempt("outs", |guest| guest.rep().outsb())?;
    guest.fact_at("memory", SCRATCH + 0x1000)
}

/// More than the hypervisor does at once.
fn long(guest: &mut Guest) -> Asm {
    const COUNT: u32 = 5000;
    guest.mov(edx, NOBODY)?;
    guest.mov(rdi, SCRATCH)?;
    guest.mov(ecx, COUNT)?;
    guest.rep().insb()?;
    report(guest, "registers")?;
    // Where the first byte is that is not all ones.
    guest.mov(rdi, SCRATCH)?;
    guest.mov(al, 0xFF)?;
    guest.mov(ecx, COUNT * 2)?;
    guest.repe().scasb()?;
    guest.fact("scanned", rdi)
}

fn at_user_privilege(guest: &mut Guest) -> Asm {
    guest.mov(edx, SERIAL_SCRATCH)?;
    guest.mov(al, 0x11)?;
    guest.out(dx, al)?;
    guest.allow_user()?;
    guest.user(|guest| {
        guest.mov(al, 0x22)?;
        guest.attempt("out", |guest| guest.out(dx, al))?;
        guest.attempt("in", |guest| guest.in_(al, dx))?;
        guest.attempt("in-imm", |guest| guest.in_(eax, 0x80))?;
        guest.mov(rdi, SCRATCH)?;
        guest.mov(rsi, rdi)?;
        guest.mov(ecx, 2)?;
        guest.attempt("ins", |guest| guest.rep().insb())?;
        guest.attempt("outs", |guest| guest.rep().outsb())
    })?;
    guest.fact("rcx", rcx)?;
    guest.xor(eax, eax)?;
    guest.in_(al, dx)?;
    guest.fact("scratch", rax)?;
    guest.fact_at("memory", SCRATCH)
}

#[test]
fn in_and_out_move_one_two_or_four_bytes() {
    let facts = run("ports-widths");
    for form in ["in", "in-imm"] {
        facts.assert(&format!("{form}-al"), 0x1122_3344_5566_77FF);
        facts.assert(&format!("{form}-ax"), 0x1122_3344_5566_FFFF);
        facts.assert(&format!("{form}-eax"), 0xFFFF_FFFF);
    }
    facts.assert("in-rex", 0xFFFF_FFFF);
    facts.assert("out-keeps-rax", PATTERN);
    facts.assert("rdx", 0xFFFF_FFFF_FFFF_03FF);
    facts.assert("scratch", PATTERN);
    // The scratch register and a port that nobody has.
    facts.assert("in-prefixed", 0x1122_3344_5566_FF88);
}

#[test]
fn a_port_access_reaches_each_register_it_covers() {
    let facts = run("ports-devices");
    facts.assert("dword", 0x89AB_CDEF);
    facts.assert("word-of-bytes", 0x5AB0);
}

#[test]
fn string_io_moves_its_registers_and_touches_no_more_memory_than_its_own() {
    let facts = run("ports-string");
    let bytes = facts.words("outsb")[1] - 9;
    facts.assert_words("outsb", &[0, bytes + 9, PATTERN]);
    facts.assert("outsb-scratch", 9);
    facts.assert_words("insb", &[77, PATTERN, SCRATCH + 9]);
    facts.assert_words("rep-insb", &[0, PATTERN, SCRATCH + 20]);
    facts.assert_words("insb-memory", &[0, 9, 0x0909_0909, 0]);
    facts.assert_completed("none-ins");
    facts.assert_completed("none-outs");
    facts.assert_words("none", &[0, 0x1000_0000_0000, 0x1000_0000_0000]);
    facts.assert_words("outsd", &[0, bytes + 8, 0x1000_0000_0000]);
    facts.assert_words("insd", &[0, bytes + 8, SCRATCH + 0x54]);
    facts.assert_words("insd-memory", &[0, 0x0807_0605_0807_0605, 0x0807_0605, 0]);
    facts.assert_words("insw", &[0, bytes + 8, SCRATCH + 0x85]);
    facts.assert("insw-memory", 0xFF_FFFF_FF00);
}

#[test]
fn string_io_goes_backwards_with_the_direction_flag() {
    let facts = run("ports-backwards");
    let first = facts.words("outsb")[1];
    facts.assert("scratch", 3);
    facts.assert_words("outsb", &[0, first, facts.words("outsb")[2]]);
    facts.assert_words("insd", &[0, first, SCRATCH + 8]);
    // Doublewords at 16 and at 12.
    facts.assert_words("memory", &[0, 0xFFFF_FFFF_0000_0000, 0xFFFF_FFFF, 0]);
    facts.assert_that("rflags", "DF is still set", |flags| flags >> 10 & 1 == 1);
}

#[test]
fn string_io_with_32_bit_addresses_uses_and_clears_the_upper_halves() {
    let facts = run("ports-address-size");
    let after = facts.words("outsb")[1];
    assert!(after < 1 << 32, "{facts}");
    facts.assert_words("outsb", &[0, after, PATTERN]);
    facts.assert("scratch", 3);
    facts.assert_words("insb", &[0, PATTERN, SCRATCH + 2]);
    facts.assert("memory", 0x0303);
    facts.assert_completed("none");
}

#[test]
fn outs_takes_a_segment_and_ins_does_not() {
    let facts = run("ports-segment");
    facts.assert("rsi", 3);
    facts.assert("scratch", 0x33);
    facts.assert("memory", 0x33);
}

#[test]
fn string_io_crosses_pages_by_the_guests_own_tables() {
    let facts = run("ports-page-crossing");
    facts.assert("rsi", WINDOW + 0x1002);
    facts.assert("register", 0x4433_2211);
    facts.assert("rdi", WINDOW + 0x1007);
    facts.assert("end-of-first", 0x1144_3322_1100_0000);
    facts.assert("start-of-second", 0x0044_3322_1144_3322);
    facts.assert("behind-first", 0);
    facts.assert("sixth", 0x33);
}

#[test]
fn a_fault_in_the_middle_of_string_io_leaves_exact_registers() {
    let facts = run("ports-fault");
    let fault = |error_code| Outcome::Fault { vector: PF, error_code, offset: 0 };
    facts.assert_outcome("insb", fault(2));
    facts.assert_words("insb-registers", &[0x30, PATTERN, WINDOW + 0x1000]);
    facts.assert("insb-cr2", WINDOW + 0x1000);
    facts.assert_words("insb-memory", &[0, u64::MAX, u64::MAX, 0]);
    facts.assert_completed("insb-again");
    facts.assert_words("insb-done", &[0, PATTERN, WINDOW + 0x1030]);
    facts.assert("insb-rest", u64::MAX);
    facts.assert("insb-behind", 0);
    facts.assert_outcome("outsb", fault(0));
    facts.assert_words("outsb-registers", &[7, WINDOW + 0x1000, PATTERN]);
    facts.assert("outsb-cr2", WINDOW + 0x1000);
    facts.assert("outsb-scratch", 4);
    facts.assert_outcome("insd", fault(2));
    facts.assert("insd-rdi", WINDOW + 0xFFE);
    facts.assert("insd-cr2", WINDOW + 0x1000);
    facts.assert("insd-memory", 0x0403_0201_FFFF_FFFF);
    facts.assert_fault("non-canonical", GP, 0);
}

#[test]
fn ins_obeys_write_protection() {
    let facts = run("ports-read-only");
    facts.assert_fault("ins", PF, 3);
    facts.assert_words("ins-registers", &[2, WINDOW]);
    facts.assert_completed("outs");
    facts.assert("memory", 0);
}

#[test]
fn a_long_string_input_comes_to_its_end() {
    let facts = run("ports-long");
    let words = facts.words("registers");
    assert_eq!((words[0], words[2]), (0, SCRATCH + 5000), "{facts}");
    facts.assert("scanned", SCRATCH + 5001);
}

#[test]
fn programs_reach_no_port() {
    let facts = run("ports-user");
    for name in ["out", "in", "in-imm", "ins", "outs"] {
        facts.assert_fault(name, GP, 0);
    }
    facts.assert("rcx", 2);
    facts.assert("scratch", 0x11);
    facts.assert("memory", 0);
}
