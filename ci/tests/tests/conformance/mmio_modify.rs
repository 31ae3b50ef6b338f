//! Instructions that change a device's memory in place: arithmetic, bits, exchanges, and those that follow a condition.
//!
//! Intel SDM vol. 2; vol. 1, 3.4.3.1 (status flags). For what is changed see [`crate::mmio`].

use crate::mmio::{DATA, NOBODY, PATTERN, VALUE, device, table};
use crate::run;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Program};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("mmio-arithmetic", arithmetic),
    ("mmio-narrow", narrow),
    ("mmio-bits", bits),
    ("mmio-exchange", exchange),
    ("mmio-conditional", conditional),
];

/// Carry, parity, adjust, zero, sign and overflow.
const STATUS: u64 = 0x8D5;

/// Puts `value` into the table's doubleword at 8 and clears the status flags.
fn prepare(guest: &mut Guest, value: u32) -> Asm {
    guest.mov(dword_ptr(rbx + 8), value as i32)?;
    guest.test(esp, esp)
}

/// Reports the table's doubleword at 8, and the status flags as the instruction has left them.
fn result(guest: &mut Guest, name: &str) -> Asm {
    guest.pushfq()?;
    guest.pop(r14)?;
    guest.and(r14d, STATUS as i32)?;
    guest.mov(r15d, dword_ptr(rbx + 8))?;
    guest.facts(name, &[r15, r14])
}

type Operation = (&'static str, fn(&mut Guest) -> Result<(), IcedError>, u32, u64, u64);

const CF: u64 = 1;
const PARITY: u64 = 4;
const AF: u64 = 0x10;
pub(crate) const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;

/// Name, operation on the doubleword at RBX + 8 (ECX is 0x0F0F_0F0F), its value before and after, flags after. The flags before are
/// those of TEST of a small positive number: carry and overflow clear.
const OPERATIONS: &[Operation] = &[
    ("and", |guest| guest.and(dword_ptr(rbx + 8), ecx), 0x1234_5678, 0x0204_0608, 0),
    ("and-imm", |guest| guest.and(dword_ptr(rbx + 8), -16), 0x8000_000F, 0x8000_0000, SF | PARITY),
    ("or", |guest| guest.or(dword_ptr(rbx + 8), ecx), 0xF0F0_F0F0, 0xFFFF_FFFF, SF | PARITY),
    ("xor", |guest| guest.xor(dword_ptr(rbx + 8), ecx), 0x0F0F_0F0F, 0, ZF | PARITY),
    ("add", |guest| guest.add(dword_ptr(rbx + 8), 1), 0xFFFF_FFFF, 0, CF | AF | ZF | PARITY),
    (
        "add-overflow",
        |guest| guest.add(dword_ptr(rbx + 8), 1),
        0x7FFF_FFFF,
        0x8000_0000,
        OF | SF | AF | PARITY,
    ),
    ("sub", |guest| guest.sub(dword_ptr(rbx + 8), ecx), 0, 0xF0F0_F0F1, CF | AF | SF),
    ("inc", |guest| guest.inc(dword_ptr(rbx + 8)), 0xFF, 0x100, AF | PARITY),
    ("dec", |guest| guest.dec(dword_ptr(rbx + 8)), 1, 0, ZF | PARITY),
    ("neg", |guest| guest.neg(dword_ptr(rbx + 8)), 1, 0xFFFF_FFFF, CF | AF | SF | PARITY),
    ("not", |guest| guest.not(dword_ptr(rbx + 8)), 0x0000_FFFF, 0xFFFF_0000, PARITY),
    ("cmp", |guest| guest.cmp(dword_ptr(rbx + 8), ecx), 0x0F0F_0F0F, 0x0F0F_0F0F, ZF | PARITY),
    ("cmp-reversed", |guest| guest.cmp(ecx, dword_ptr(rbx + 8)), 0x0F0F_0F10, 0x0F0F_0F10, CF | SF | PARITY),
    ("test", |guest| guest.test(dword_ptr(rbx + 8), ecx), 0xF0F0_F0F0, 0xF0F0_F0F0, ZF | PARITY),
    ("lock-add", |guest| guest.lock().add(dword_ptr(rbx + 8), ecx), 1, 0x0F0F_0F10, AF),
    ("lock-or", |guest| guest.lock().or(dword_ptr(rbx + 8), 3), 4, 7, 0),
    ("lock-inc", |guest| guest.lock().inc(dword_ptr(rbx + 8)), 1, 2, 0),
];

fn arithmetic(guest: &mut Guest) -> Asm {
    device(guest)?;
    for &(name, operation, before, ..) in OPERATIONS {
        guest.mov(ecx, 0x0F0F_0F0F)?;
        prepare(guest, before)?;
        operation(guest)?;
        result(guest, name)?;
    }
    // The other direction: a register takes the result, the device is only read.
    prepare(guest, 0x1000_0000)?;
    guest.mov(rax, PATTERN)?;
    guest.add(eax, dword_ptr(rbx + 8))?;
    guest.fact("add-from", rax)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(esi, DATA as u32)?;
    guest.xor(al, byte_ptr(rsi))?;
    guest.fact("xor-byte-from", rax)?;
    // With carry.
    prepare(guest, 5)?;
    guest.stc()?;
    guest.adc(dword_ptr(rbx + 8), 10)?;
    result(guest, "adc")?;
    prepare(guest, 5)?;
    guest.stc()?;
    guest.sbb(dword_ptr(rbx + 8), 5)?;
    result(guest, "sbb")
}

/// Bytes and words, which the neighbours must survive.
fn narrow(guest: &mut Guest) -> Asm {
    device(guest)?;
    let report = |guest: &mut Guest, name: &str| {
        guest.mov(eax, dword_ptr(rbp + 0x10))?;
        guest.mov(ecx, dword_ptr(rbp + 0x3C))?;
        guest.facts(name, &[rax, rcx])
    };
    guest.mov(dword_ptr(rbp + 0x10), 0x1234_C200)?;
    guest.mov(byte_ptr(rbp + 0x3C), 0x80)?;
    report(guest, "before")?;
    guest.add(byte_ptr(rbp + 0x3C), -1)?;
    guest.or(word_ptr(rbp + 0x12), 0x0101)?;
    report(guest, "changed")?;
    guest.and(byte_ptr(rbp + 0x13), 0x0F)?;
    guest.not(byte_ptr(rbp + 0x3C))?;
    report(guest, "changed-again")?;
    // What nobody has swallows everything.
    guest.mov(edx, NOBODY as u32)?;
    guest.mov(dword_ptr(rdx), 0)?;
    guest.inc(dword_ptr(rdx))?;
    guest.mov(rax, qword_ptr(rdx))?;
    guest.fact("nobody", rax)
}

fn bits(guest: &mut Guest) -> Asm {
    device(guest)?;
    for (name, before, operation) in [
        ("bt", 0x10, (|guest| guest.bt(dword_ptr(rbx + 8), 4)) as fn(&mut Guest) -> Asm),
        ("bt-clear", 0x10, |guest| guest.bt(dword_ptr(rbx + 8), 5)),
        ("bts", 0x10, |guest| guest.bts(dword_ptr(rbx + 8), 31)),
        ("btr", 0x30, |guest| guest.btr(dword_ptr(rbx + 8), 36)), // the immediate is taken modulo 32
        ("btc", 0x30, |guest| guest.btc(dword_ptr(rbx + 8), 5)),
        ("lock-bts", 0, |guest| guest.lock().bts(dword_ptr(rbx + 8), 0)),
    ] {
        prepare(guest, before)?;
        operation(guest)?;
        result(guest, name)?;
    }
    // A bit number in a register reaches beyond the operand, in both directions.
    prepare(guest, 0)?;
    guest.mov(rax, 64_u64)?;
    guest.bts(dword_ptr(rbx), eax)?;
    result(guest, "bts-beyond")?;
    prepare(guest, 0x8000_0000)?;
    guest.mov(eax, -1_i32 as u32)?;
    guest.btr(dword_ptr(rbx + 12), eax)?;
    result(guest, "btr-before")
}

fn exchange(guest: &mut Guest) -> Asm {
    device(guest)?;
    prepare(guest, 0x1111_1111)?;
    guest.mov(rax, PATTERN)?;
    guest.xchg(dword_ptr(rbx + 8), eax)?;
    guest.fact("xchg", rax)?;
    result(guest, "xchg-table")?;
    guest.mov(byte_ptr(rbp + 0x3C), 0x77)?;
    guest.mov(rcx, PATTERN)?;
    guest.xchg(byte_ptr(rbp + 0x3C), ch)?;
    guest.fact("xchg-ch", rcx)?;
    guest.movzx(eax, byte_ptr(rbp + 0x3C))?;
    guest.fact("xchg-line", rax)?;
    prepare(guest, 0x10)?;
    guest.mov(ecx, 0x20)?;
    guest.lock().xadd(dword_ptr(rbx + 8), ecx)?;
    result(guest, "xadd")?;
    guest.fact("xadd-register", rcx)?;
    // Equal, then not.
    prepare(guest, 0x10)?;
    guest.mov(rax, 0x10_u64)?;
    guest.mov(ecx, 0x99)?;
    guest.lock().cmpxchg(dword_ptr(rbx + 8), ecx)?;
    result(guest, "cmpxchg")?;
    guest.fact("cmpxchg-eax", rax)?;
    guest.mov(rax, 0x1111_1111_0000_0011_u64)?;
    guest.cmpxchg(dword_ptr(rbx + 8), ecx)?;
    result(guest, "cmpxchg-other")?;
    guest.fact("cmpxchg-other-eax", rax)?;
    guest.mov(rax, 0x0000_0002_0000_0010_u64)?;
    guest.mov(qword_ptr(rbx), rax)?;
    guest.mov(eax, 0x10)?;
    guest.mov(edx, 2)?;
    guest.mov(r8, rbx)?;
    guest.mov(ecx, 0x44)?;
    guest.push(rbx)?;
    guest.mov(ebx, 0x88)?;
    guest.lock().cmpxchg8b(qword_ptr(r8))?;
    guest.pop(rbx)?;
    table(guest, "cmpxchg8b")
}

fn conditional(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.mov(byte_ptr(rbp + 0x3C), 0x77)?;
    guest.xor(eax, eax)?;
    guest.setz(byte_ptr(rbp + 0x3C))?;
    guest.movzx(ecx, byte_ptr(rbp + 0x3C))?;
    guest.fact("setz", rcx)?;
    guest.xor(eax, eax)?;
    guest.setc(byte_ptr(rbp + 0x3C))?;
    guest.movzx(ecx, byte_ptr(rbp + 0x3C))?;
    guest.fact("setc", rcx)?;
    guest.mov(esi, DATA as u32)?;
    guest.mov(rdx, PATTERN)?;
    guest.xor(eax, eax)?;
    guest.cmovz(edx, dword_ptr(rsi))?;
    guest.fact("cmovz", rdx)?;
    // A move that is not made clears the upper half all the same.
    guest.mov(rdx, PATTERN)?;
    guest.xor(eax, eax)?;
    guest.cmovc(edx, dword_ptr(rsi))?;
    guest.fact("cmovc", rdx)
}

/// A result and its flags. The adjust flag is undefined after AND, OR, XOR and TEST.
fn assert_result(facts: &Facts, name: &str, after: u64, flags: u64) {
    let undefined =
        if ["and", "or", "xor", "test"].iter().any(|logic| name.contains(logic)) { AF } else { 0 };
    let [value, found] = facts.words(name) else { panic!("{name}\n{facts}") };
    assert!(
        *value == after && found & !undefined == flags & !undefined,
        "{name}: expected {after:x} with flags {flags:x}, found {value:x} with {found:x}\n{facts}"
    );
}

#[test]
fn arithmetic_on_a_device_gives_the_processors_results_and_flags() {
    let facts = run("mmio-arithmetic");
    for &(name, _, _, after, flags) in OPERATIONS {
        // NOT leaves the flags alone: those of the comparison before it, which the guest clears to parity at most.
        if name == "not" {
            assert_eq!(facts.words(name)[0], after, "{facts}");
        } else {
            assert_result(&facts, name, after, flags);
        }
    }
    facts.assert("add-from", (PATTERN & 0xFFFF_FFFF) + 0x1000_0000);
    facts.assert("xor-byte-from", PATTERN ^ 0xF4);
    assert_result(&facts, "adc", 16, AF);
    assert_result(&facts, "sbb", 0xFFFF_FFFF, CF | AF | SF | PARITY);
}

#[test]
fn narrow_accesses_to_a_device_leave_its_neighbours_alone() {
    let facts = run("mmio-narrow");
    facts.assert_words("before", &[0x1234_C201, 0x80]);
    facts.assert_words("changed", &[0x1335_C201, 0x7F]);
    facts.assert_words("changed-again", &[0x0335_C201, 0x80]);
    facts.assert("nobody", u64::MAX);
}

#[test]
fn bit_operations_reach_a_device_and_beyond_the_operand() {
    let facts = run("mmio-bits");
    for (name, after, carry) in [
        ("bt", 0x10, 1),
        ("bt-clear", 0x10, 0),
        ("bts", 0x8000_0010, 0),
        ("btr", 0x20, 1),
        ("btc", 0x10, 1),
        ("lock-bts", 1, 0),
        ("bts-beyond", 1, 0),
        ("btr-before", 0, 1),
    ] {
        let found = facts.words(name);
        assert!(found[0] == after && found[1] & CF == carry, "{name}: expected {after:x}, {carry}\n{facts}");
    }
}

#[test]
fn exchanges_with_a_device_move_both_ways() {
    let facts = run("mmio-exchange");
    facts.assert("xchg", 0x1111_1111);
    assert_eq!(facts.words("xchg-table")[0], 0x5566_7788, "{facts}");
    facts.assert("xchg-ch", PATTERN & !0xFF00 | 0x7700);
    facts.assert("xchg-line", 0x77);
    assert_result(&facts, "xadd", 0x30, PARITY);
    facts.assert("xadd-register", 0x10);
    assert_result(&facts, "cmpxchg", 0x99, ZF | PARITY);
    facts.assert("cmpxchg-eax", 0x10);
    assert_eq!(facts.words("cmpxchg-other")[0], 0x99, "{facts}");
    assert_eq!(facts.words("cmpxchg-other")[1] & (ZF | CF), CF, "{facts}");
    facts.assert("cmpxchg-other-eax", 0x99);
    assert_eq!(facts.words("cmpxchg8b")[0], 0x44_0000_0088, "{facts}");
}

#[test]
fn conditional_moves_and_sets_reach_a_device() {
    let facts = run("mmio-conditional");
    facts.assert("setz", 1);
    facts.assert("setc", 0);
    facts.assert("cmovz", VALUE);
    facts.assert("cmovc", PATTERN & 0xFFFF_FFFF);
}
