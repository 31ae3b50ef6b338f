//! Instructions whose operand is a device's memory, which the hypervisor carries out.
//!
//! Intel SDM vol. 2; vol. 1, 3.7 (addressing). What is read and written:
//! - the entropy device's MSI-X table: `address`, `data`, doublewords and quadwords that hold any value;
//! - its configuration space, of which only writes exit: the interrupt line (any byte), BAR 0's upper half (any word);
//! - the I/O APIC's index register, at the start of a page, and its data register, of which every byte can be read;
//! - addresses that nobody has, which read all ones and forget what is written.

use crate::mmio_modify::ZF;
use crate::run;
use iced_x86::code_asm::*;
use nestling_tests::bare::layout::{SCRATCH, WINDOW};
use nestling_tests::bare::{Asm, Guest, Program, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("mmio-mov", moves),
    ("mmio-extend", extensions),
    ("mmio-addressing", addressing),
    ("mmio-high-registers", high_registers),
    ("mmio-strings", strings),
    ("mmio-string-compare", string_comparison),
    ("mmio-page-crossing", page_crossing),
    ("mmio-unaligned", unaligned),
    ("mmio-faults", faults),
    ("mmio-user", at_user_privilege),
    ("mmio-read-only", read_only),
];

/// Configuration space of the entropy device.
pub(crate) const RNG: u64 = 0xE000_0000 + (2 << 15);
/// An address that nobody has.
pub(crate) const NOBODY: u64 = 0xE800_0000;
pub(crate) const IOAPIC: u64 = 0xFEC0_0000;
/// The I/O APIC's data register.
pub(crate) const DATA: u64 = IOAPIC + 0x10;
/// Of the I/O APIC's first pin, the lower half.
pub(crate) const INDEX: u64 = 0x10;
/// What it is set to: masked, and two bytes of which one is negative.
pub(crate) const VALUE: u64 = 0x0001_0AF4;
pub(crate) const PATTERN: u64 = 0x1122_3344_5566_7788;
const CR0_WP: u32 = 1 << 16;
const GP: u64 = 13;
const PF: u64 = 14;

/// RBX: the MSI-X table's page, decoded; RBP: the configuration space. [`DATA`] reads as [`VALUE`]. Changes RAX.
pub(crate) fn device(guest: &mut Guest) -> Asm {
    guest.mov(eax, IOAPIC as u32)?;
    guest.mov(dword_ptr(rax), INDEX as i32)?;
    guest.mov(dword_ptr(rax + 0x10), VALUE as i32)?;
    guest.mov(ebp, RNG as u32)?;
    guest.mov(word_ptr(rbp + 4), 2)?;
    guest.mov(ebx, dword_ptr(rbp + 0x14))?;
    guest.and(ebx, -16)
}

/// Reports the table's first entry: address and data with its mask bit.
pub(crate) fn table(guest: &mut Guest, name: &str) -> Asm {
    guest.mov(r14, qword_ptr(rbx))?;
    guest.mov(r15, qword_ptr(rbx + 8))?;
    guest.facts(name, &[r14, r15])
}

fn moves(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(qword_ptr(rbx), rax)?;
    table(guest, "qword")?;
    guest.mov(dword_ptr(rbx + 8), eax)?;
    table(guest, "dword")?;
    guest.mov(dword_ptr(rbx + 4), 0x1357_9BDF)?;
    table(guest, "imm32")?;
    guest.mov(qword_ptr(rbx), -8)?;
    table(guest, "imm64")?;
    // Reads: a doubleword clears the upper half, a word and a byte keep the rest.
    guest.mov(esi, DATA as u32)?;
    guest.mov(rcx, PATTERN)?;
    guest.mov(ecx, dword_ptr(rsi))?;
    guest.fact("read-dword", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.mov(cx, word_ptr(rsi))?;
    guest.fact("read-word", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.mov(cl, byte_ptr(rsi + 1))?;
    guest.fact("read-low-byte", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.mov(ch, byte_ptr(rsi + 1))?;
    guest.fact("read-high-byte", rcx)?;
    guest.mov(byte_ptr(rbp + 0x3C), ah)?;
    guest.movzx(ecx, byte_ptr(rbp + 0x3C))?;
    guest.fact("write-high-byte", rcx)?;
    guest.mov(word_ptr(rbp + 0x12), ax)?;
    guest.mov(ecx, dword_ptr(rbp + 0x10))?;
    guest.fact("write-word", rcx)?;
    // The accumulator's forms with a 64-bit address.
    guest.mov(rax, PATTERN)?;
    guest.db(&[0x48, 0xA1])?;
    guest.db(&NOBODY.to_le_bytes())?;
    guest.fact("moffs-rax", rax)?;
    guest.mov(rax, PATTERN)?;
    guest.db(&[0xA0])?;
    guest.db(&(DATA + 1).to_le_bytes())?;
    guest.fact("moffs-al", rax)?;
    guest.mov(al, 0x42)?;
    guest.db(&[0xA2])?;
    guest.db(&(RNG + 0x3C).to_le_bytes())?;
    guest.movzx(ecx, byte_ptr(rbp + 0x3C))?;
    guest.fact("moffs-store", rcx)?;
    guest.movnti(dword_ptr(rbx + 8), eax)?;
    table(guest, "movnti")
}

fn extensions(guest: &mut Guest) -> Asm {
    device(guest)?;
    // The lower byte is negative, as is all of what nobody has.
    guest.mov(esi, DATA as u32)?;
    guest.mov(rcx, PATTERN)?;
    guest.movzx(ecx, byte_ptr(rsi))?;
    guest.fact("zx-32-8", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.movzx(cx, byte_ptr(rsi))?;
    guest.fact("zx-16-8", rcx)?;
    guest.movzx(rcx, byte_ptr(rsi))?;
    guest.fact("zx-64-8", rcx)?;
    guest.movzx(ecx, word_ptr(rsi))?;
    guest.fact("zx-32-16", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.movsx(ecx, byte_ptr(rsi))?;
    guest.fact("sx-32-8", rcx)?;
    guest.mov(rcx, PATTERN)?;
    guest.movsx(cx, byte_ptr(rsi))?;
    guest.fact("sx-16-8", rcx)?;
    guest.movsx(rcx, byte_ptr(rsi))?;
    guest.fact("sx-64-8", rcx)?;
    guest.movsx(rcx, word_ptr(rsi))?;
    guest.fact("sx-64-16", rcx)?;
    guest.mov(edx, NOBODY as u32)?;
    guest.movsx(rcx, word_ptr(rdx))?;
    guest.fact("sx-64-16-negative", rcx)?;
    guest.movsxd(rcx, dword_ptr(rdx))?;
    guest.fact("sxd", rcx)
}

/// The same byte through every way to name it.
fn addressing(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.mov(ebp, IOAPIC as u32)?;
    guest.mov(dword_ptr(rbp + 0x10), 0x1_005C)?;
    guest.xor(eax, eax)?;
    let report = |guest: &mut Guest, name: &str| {
        guest.fact(name, rax)?;
        guest.xor(eax, eax)
    };
    guest.lea(rsi, ptr(rbp + 0x10))?;
    guest.mov(al, byte_ptr(rsi))?;
    report(guest, "base")?;
    guest.lea(rdi, ptr(rsi + 0x1000))?;
    guest.mov(al, byte_ptr(rdi - 0x1000))?;
    report(guest, "displacement")?;
    guest.mov(ecx, 4)?;
    guest.mov(al, byte_ptr(rbp + rcx * 4))?;
    report(guest, "scaled")?;
    guest.mov(rcx, -4_i64 as u64)?;
    guest.mov(al, byte_ptr(rsi + rcx * 8 + 0x20))?;
    report(guest, "negative-index")?;
    guest.mov(r12, rsi)?;
    guest.mov(al, byte_ptr(r12))?;
    report(guest, "r12")?;
    guest.mov(r13, rsi)?;
    guest.mov(al, byte_ptr(r13))?;
    report(guest, "r13")?;
    guest.wrmsr_value(msr::FS_BASE, IOAPIC)?;
    guest.xor(eax, eax)?;
    guest.mov(ecx, 0x10)?;
    guest.mov(al, byte_ptr(rcx).fs())?;
    report(guest, "fs")?;
    guest.wrmsr_value(msr::GS_BASE, IOAPIC - 0x1000)?;
    guest.xor(eax, eax)?;
    guest.mov(ecx, 0x1010)?;
    guest.mov(al, byte_ptr(rcx).gs())?;
    report(guest, "gs")?;
    // Other segments have no base in 64-bit mode.
    guest.db(&[0x2E, 0x8A, 0x06])?; // mov al, cs:[rsi]
    report(guest, "cs")?;
    // 32-bit addresses: the sum is cut.
    guest.mov(rcx, 0xFFFF_FFFF_0000_0000_u64)?;
    guest.or(rcx, rsi)?;
    guest.mov(al, byte_ptr(ecx))?;
    report(guest, "address-32")?;
    // Through the guest's own tables, at another linear address.
    guest.map(3, IOAPIC | 3)?;
    guest.mov(rcx, WINDOW + 0x3010)?;
    guest.mov(al, byte_ptr(rcx))?;
    report(guest, "mapped")?;
    // RIP-relative, from code in the page before: mov al, [rip + 0x100A]; ret
    guest.copy_to(SCRATCH + 0x5000, &[0x8A, 0x05, 0x0A, 0x10, 0x00, 0x00, 0xC3])?;
    guest.map(2, (SCRATCH + 0x5000) | 3)?;
    guest.mov(rcx, WINDOW + 0x2000)?;
    guest.call(rcx)?;
    report(guest, "rip-relative")
}

fn high_registers(guest: &mut Guest) -> Asm {
    device(guest)?;
    let registers = [r8, r9, r10, r11, r12, r13, r14, r15];
    let dwords = [r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d];
    let bytes = [r8b, r9b, r10b, r11b, r12b, r13b, r14b, r15b];
    guest.mov(esi, DATA as u32)?;
    for (index, register) in (0_u64..).zip(registers) {
        guest.mov(register, PATTERN + index)?;
    }
    for ((register, dword), byte) in registers.into_iter().zip(dwords).zip(bytes) {
        guest.mov(dword_ptr(rbx + 8), dword)?;
        guest.mov(byte_ptr(rbp + 0x3C), byte)?;
        guest.mov(register, PATTERN)?;
        guest.mov(dword, dword_ptr(rbx + 8))?;
        guest.mov(byte, byte_ptr(rsi + 1))?;
        guest.movzx(eax, byte_ptr(rbp + 0x3C))?;
        guest.fact("line", rax)?;
    }
    guest.facts("registers", &registers)?;
    // SPL, BPL, SIL, DIL need a REX prefix.
    guest.mov(esi, 0x1234)?;
    guest.mov(edi, 0x5678)?;
    guest.mov(byte_ptr(rbp + 0x3C), sil)?;
    guest.movzx(eax, byte_ptr(rbp + 0x3C))?;
    guest.fact("sil", rax)?;
    guest.mov(esi, DATA as u32)?;
    guest.mov(dil, byte_ptr(rsi))?;
    guest.fact("dil", rdi)
}

fn strings(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.cld()?;
    let source = guest.data(&[0x40, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
    // RAM to device.
    guest.mov(rsi, source)?;
    guest.mov(rdi, rbx)?;
    guest.mov(ecx, 3)?;
    guest.rep().movsd()?;
    guest.sub(rdi, rbx)?;
    guest.facts("to-device", &[rcx, rsi, rdi])?;
    table(guest, "table")?;
    // Device to RAM, device to device.
    guest.mov(rsi, rbx)?;
    guest.mov(rdi, SCRATCH + 8)?;
    guest.mov(ecx, 2)?;
    guest.rep().movsq()?;
    guest.facts_at("from-device", SCRATCH, 4)?;
    guest.mov(rsi, rbx)?;
    guest.lea(rdi, ptr(rbx + 8))?;
    guest.movsd()?;
    table(guest, "in-device")?;
    // Bytes.
    guest.mov(esi, DATA as u32)?;
    guest.mov(rdi, SCRATCH + 0x40)?;
    guest.mov(ecx, 4)?;
    guest.rep().movsb()?;
    guest.fact_at("bytes", SCRATCH + 0x40)?;
    // STOS and LODS.
    guest.mov(eax, 0x0A0B_0C0C)?;
    guest.lea(rdi, ptr(rbx + 8))?;
    guest.stosd()?;
    table(guest, "stos")?;
    guest.mov(rdi, rbx)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(ecx, 1)?;
    guest.rep().stosq()?;
    table(guest, "rep-stos")?;
    guest.mov(esi, DATA as u32)?;
    guest.mov(rax, PATTERN)?;
    guest.lodsw()?;
    guest.fact("lods", rax)?;
    // Backwards.
    guest.std()?;
    guest.mov(rsi, source + 8)?;
    guest.lea(rdi, ptr(rbx + 8))?;
    guest.mov(ecx, 3)?;
    guest.rep().movsd()?;
    guest.cld()?;
    table(guest, "backwards")?;
    guest.sub(rdi, rbx)?;
    guest.fact("backwards-rdi", rdi)?;
    // A long one into what nobody has.
    guest.mov(edi, NOBODY as u32)?;
    guest.mov(ecx, 5000)?;
    guest.rep().stosb()?;
    guest.facts("long", &[rcx, rdi])
}

fn string_comparison(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.cld()?;
    guest.mov(edi, NOBODY as u32)?;
    guest.mov(al, 0xFF)?;
    guest.mov(ecx, 10)?;
    guest.repe().scasb()?;
    guest.facts("scas-equal", &[rcx, rdi])?;
    guest.mov(edi, NOBODY as u32)?;
    guest.mov(ecx, 10)?;
    guest.repne().scasb()?;
    guest.facts("scas-found", &[rcx, rdi])?;
    // The I/O APIC's data against a copy of it that differs in the third byte.
    guest.mov(esi, DATA as u32)?;
    guest.mov(eax, dword_ptr(rsi))?;
    guest.xor(eax, 0x0002_0000)?;
    guest.mov(dword_ptr(SCRATCH), eax)?;
    guest.mov(rdi, SCRATCH)?;
    guest.mov(ecx, 4)?;
    guest.repe().cmpsb()?;
    guest.pushfq()?;
    guest.pop(rax)?;
    guest.and(eax, ZF as i32)?;
    guest.sub(esi, DATA as i32)?;
    guest.facts("cmps", &[rcx, rsi, rdi, rax])
}

fn page_crossing(guest: &mut Guest) -> Asm {
    device(guest)?;
    let ram = SCRATCH + 0x2000;
    // RAM, then the I/O APIC, then RAM, then the I/O APIC; RAM, then the MSI-X table.
    guest.map(0, ram | 3)?;
    guest.map(1, IOAPIC | 3)?;
    guest.map(2, (ram + 0x1000) | 3)?;
    guest.map(3, IOAPIC | 3)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(qword_ptr(ram + 0xFF8), rax)?;
    guest.mov(rsi, WINDOW + 0xFFE)?;
    guest.mov(eax, dword_ptr(rsi))?;
    guest.fact("read", rax)?;
    guest.mov(rsi, WINDOW + 0xFFB)?;
    guest.mov(rax, qword_ptr(rsi))?;
    guest.fact("read-qword", rax)?;
    guest.mov(rsi, WINDOW + 0xFFF)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(ax, word_ptr(rsi))?;
    guest.fact("read-word", rax)?;
    // Device, then RAM.
    guest.mov(rsi, WINDOW + 0x1FFD)?;
    guest.mov(byte_ptr(ram + 0x1000), 0x99)?;
    guest.mov(eax, dword_ptr(rsi))?;
    guest.fact("read-back", rax)?;
    // A write: two bytes to RAM, two to the I/O APIC's index.
    guest.mov(rdi, WINDOW + 0x2FFE)?;
    guest.mov(dword_ptr(rdi), 0x0012_BEEF)?;
    guest.fact_at("write-ram", ram + 0x1FF8)?;
    guest.mov(edx, IOAPIC as u32)?;
    guest.mov(eax, dword_ptr(rdx))?;
    guest.fact("write-device", rax)?;
    guest.or(dword_ptr(rdi), 0x0001_0010)?;
    guest.fact_at("or-ram", ram + 0x1FF8)?;
    guest.mov(eax, dword_ptr(rdx))?;
    guest.fact("or-device", rax)?;
    // A quadword: half of it to RAM, half to the table.
    guest.lea(rax, ptr(rbx + 3))?;
    guest.mov(qword_ptr(nestling_tests::bare::layout::WINDOW_TABLE + 3 * 8), rax)?;
    guest.mov(rax, WINDOW + 0x3000)?;
    guest.invlpg(ptr(rax))?;
    guest.mov(rax, PATTERN)?;
    guest.mov(rdi, WINDOW + 0x2FFC)?;
    guest.mov(qword_ptr(rdi), rax)?;
    guest.fact_at("quadword-ram", ram + 0x1FF8)?;
    guest.mov(eax, dword_ptr(rbx))?;
    guest.fact("quadword-device", rax)?;
    // Half of it in a page that is not there: no byte is written.
    guest.map(3, (ram + 0x1000) | 3)?;
    guest.map(4, 0)?;
    guest.mov(rdi, WINDOW + 0x3FFE)?;
    guest.attempt("missing", |guest| guest.mov(dword_ptr(rdi), 0))?;
    guest.mov(rax, cr2)?;
    guest.fact("missing-cr2", rax)?;
    guest.fact_at("missing-ram", ram + 0x1FF8)?;
    guest.map(3, 0)?;
    guest.mov(rdi, WINDOW + 0x2FFE)?;
    guest.attempt("missing-device", |guest| guest.mov(dword_ptr(rdi), 0))
}

fn unaligned(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.mov(esi, DATA as u32)?;
    guest.mov(eax, dword_ptr(rsi + 1))?;
    guest.fact("dword", rax)?;
    guest.mov(rax, PATTERN)?;
    guest.mov(ax, word_ptr(rsi + 1))?;
    guest.fact("word", rax)?;
    guest.mov(edx, NOBODY as u32)?;
    guest.mov(rax, qword_ptr(rdx + 5))?;
    guest.fact("nobody", rax)
}

fn faults(guest: &mut Guest) -> Asm {
    device(guest)?;
    // One operand of MOVS is in a device, the other in a page that is not there.
    guest.mov(esi, DATA as u32)?;
    guest.mov(rdi, WINDOW)?;
    guest.mov(ecx, 3)?;
    guest.attempt("movs-to", |guest| guest.rep().movsb())?;
    guest.facts("movs-to-registers", &[rcx, rdi])?;
    guest.mov(rsi, WINDOW)?;
    guest.lea(rdi, ptr(rbx + 8))?;
    guest.attempt("movs-from", |guest| guest.movsd())?;
    guest.mov(rax, cr2)?;
    guest.fact("cr2", rax)?;
    guest.mov(rax, 0x8000_0000_0000_u64)?;
    guest.mov(rsi, rax)?;
    guest.attempt("non-canonical", |guest| guest.movsd())?;
    table(guest, "table")
}

fn at_user_privilege(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.map(0, IOAPIC | 3)?; // the supervisor's
    guest.allow_user()?;
    guest.user(|guest| {
        guest.mov(esi, DATA as u32)?;
        guest.mov(eax, dword_ptr(rsi))?;
        guest.fact("read", rax)?;
        guest.mov(dword_ptr(rbx + 8), eax)?;
        guest.mov(ecx, dword_ptr(rbx + 8))?;
        guest.fact("written", rcx)?;
        guest.mov(rsi, WINDOW)?;
        guest.attempt("supervisor", |guest| guest.mov(eax, dword_ptr(rsi)))?;
        // One operand may be reached, the other not.
        guest.mov(rdi, rsi)?;
        guest.mov(esi, DATA as u32)?;
        guest.attempt("movs", |guest| guest.movsd())
    })
}

fn read_only(guest: &mut Guest) -> Asm {
    device(guest)?;
    guest.mov(rax, cr0)?;
    guest.or(eax, CR0_WP)?;
    guest.mov(cr0, rax)?;
    guest.map(0, IOAPIC | 1)?;
    guest.mov(rsi, WINDOW + 0x10)?;
    guest.attempt("write", |guest| guest.mov(byte_ptr(rsi), 0x34))?;
    guest.attempt("modify", |guest| guest.or(byte_ptr(rsi), 0x34))?;
    guest.movzx(eax, byte_ptr(rsi))?;
    guest.fact("value", rax)?;
    // MOVS from a device into a read-only page of RAM, as a whole and with the accessed and dirty flags it sets.
    guest.map(1, (SCRATCH + 0x1000) | 1)?;
    guest.mov(rdi, WINDOW + 0x1000)?;
    guest.attempt("movs", |guest| guest.movsb())?;
    guest.map(1, (SCRATCH + 0x1000) | 3)?;
    guest.attempt("movs-again", |guest| guest.movsb())?;
    guest.fact_at("entry", nestling_tests::bare::layout::WINDOW_TABLE + 8)?;
    guest.fact_at("entry-of-device", nestling_tests::bare::layout::WINDOW_TABLE)
}

#[test]
fn moves_to_and_from_a_device_have_every_width() {
    let facts = run("mmio-mov");
    // The table's entries start masked; bits 0 and 1 of the address are zero, as is all of the control word but its mask bit.
    facts.assert_words("qword", &[PATTERN, 1 << 32]);
    facts.assert_words("dword", &[PATTERN, 0x1_5566_7788]);
    facts.assert_words("imm32", &[0x1357_9BDF_5566_7788, 0x1_5566_7788]);
    facts.assert_words("imm64", &[-8_i64 as u64, 0x1_5566_7788]);
    facts.assert("read-dword", VALUE);
    facts.assert("read-word", PATTERN & !0xFFFF | 0x0AF4);
    facts.assert("read-low-byte", PATTERN & !0xFF | 0x0A);
    facts.assert("read-high-byte", PATTERN & !0xFF00 | 0x0A00);
    facts.assert("write-high-byte", 0x77);
    facts.assert_that("write-word", "0x7788 in the upper half", |bar| bar >> 16 == 0x7788);
    facts.assert("moffs-rax", u64::MAX);
    facts.assert("moffs-al", PATTERN & !0xFF | 0x0A);
    facts.assert("moffs-store", 0x42);
    facts.assert_words("movnti", &[-8_i64 as u64, 0x1_5566_7742]);
}

#[test]
fn loads_from_a_device_are_extended() {
    let facts = run("mmio-extend");
    facts.assert("zx-32-8", 0xF4);
    facts.assert("zx-16-8", PATTERN & !0xFFFF | 0xF4);
    facts.assert("zx-64-8", 0xF4);
    facts.assert("zx-32-16", 0x0AF4);
    facts.assert("sx-32-8", 0xFFFF_FFF4);
    facts.assert("sx-16-8", PATTERN & !0xFFFF | 0xFFF4);
    facts.assert("sx-64-8", -12_i64 as u64);
    facts.assert("sx-64-16", 0x0AF4);
    facts.assert("sx-64-16-negative", u64::MAX);
    facts.assert("sxd", u64::MAX);
}

#[test]
fn a_device_is_reached_by_every_way_of_addressing() {
    let facts = run("mmio-addressing");
    for name in [
        "base",
        "displacement",
        "scaled",
        "negative-index",
        "r12",
        "r13",
        "fs",
        "gs",
        "cs",
        "address-32",
        "mapped",
        "rip-relative",
    ] {
        facts.assert(name, 0x5C);
    }
}

#[test]
fn a_device_is_reached_with_every_register() {
    let facts = run("mmio-high-registers");
    let lines: Vec<u64> = facts.all("line").into_iter().flatten().copied().collect();
    let expected: Vec<u64> = (0..8).map(|index| (PATTERN + index) & 0xFF).collect();
    assert_eq!(lines, expected, "{facts}");
    let expected: Vec<u64> = (0..8).map(|index| (PATTERN + index) & 0xFFFF_FF00 | 0x0A).collect();
    facts.assert_words("registers", &expected);
    facts.assert("sil", 0x34);
    facts.assert("dil", 0x56F4);
}

#[test]
fn string_instructions_reach_a_device_from_both_sides() {
    let facts = run("mmio-strings");
    let words = facts.words("to-device");
    assert_eq!((words[0], words[2]), (0, 12), "{facts}");
    facts.assert_words("table", &[0x0101_0101_0000_0040, 0x1_0202_0202]);
    facts.assert_words("from-device", &[0, 0x0101_0101_0000_0040, 0x1_0202_0202, 0]);
    facts.assert_words("in-device", &[0x0101_0101_0000_0040, 0x1_0000_0040]);
    facts.assert("bytes", VALUE);
    facts.assert_words("stos", &[0x0101_0101_0000_0040, 0x1_0A0B_0C0C]);
    facts.assert_words("rep-stos", &[PATTERN, 0x1_0A0B_0C0C]);
    facts.assert("lods", PATTERN & !0xFFFF | 0x0AF4);
    facts.assert_words("backwards", &[0x0101_0101_0000_0040, 0x1_0202_0202]);
    facts.assert("backwards-rdi", -4_i64 as u64);
    facts.assert_words("long", &[0, NOBODY + 5000]);
}

#[test]
fn string_comparisons_with_a_device_stop_where_they_should() {
    let facts = run("mmio-string-compare");
    facts.assert_words("scas-equal", &[0, NOBODY + 10]);
    facts.assert_words("scas-found", &[9, NOBODY + 1]);
    facts.assert_words("cmps", &[1, 3, SCRATCH + 3, 0]);
}

#[test]
fn an_access_across_a_page_boundary_reaches_ram_and_device() {
    let facts = run("mmio-page-crossing");
    facts.assert("read", INDEX << 16 | 0x1122);
    facts.assert("read-qword", INDEX << 40 | 0x11_2233_4455);
    facts.assert("read-word", PATTERN & !0xFFFF | INDEX << 8 | 0x11);
    facts.assert("read-back", 0x9900_0000);
    facts.assert("write-ram", 0xBEEF_0000_0000_0000);
    facts.assert("write-device", 0x12);
    facts.assert("or-ram", 0xBEFF_0000_0000_0000);
    facts.assert("or-device", 0x13);
    facts.assert("quadword-ram", 0x5566_7788_0000_0000);
    facts.assert("quadword-device", 0x1122_3344);
    facts.assert_fault("missing", PF, 2);
    facts.assert("missing-cr2", WINDOW + 0x4000);
    facts.assert("missing-ram", 0x5566_7788_0000_0000);
    facts.assert_fault("missing-device", PF, 2);
}

#[test]
fn unaligned_accesses_read_the_bytes_that_are_there() {
    let facts = run("mmio-unaligned");
    facts.assert("dword", VALUE >> 8);
    facts.assert("word", PATTERN & !0xFFFF | VALUE >> 8 & 0xFFFF);
    facts.assert("nobody", u64::MAX);
}

#[test]
fn a_fault_of_the_other_operand_comes_before_the_device_is_touched() {
    let facts = run("mmio-faults");
    facts.assert_fault("movs-to", PF, 2);
    facts.assert_words("movs-to-registers", &[3, WINDOW]);
    facts.assert_fault("movs-from", PF, 0);
    facts.assert("cr2", WINDOW);
    facts.assert_fault("non-canonical", GP, 0);
    facts.assert_words("table", &[0, 1 << 32]);
}

#[test]
fn programs_reach_devices_only_through_pages_of_theirs() {
    let facts = run("mmio-user");
    facts.assert("read", VALUE);
    facts.assert("written", VALUE);
    facts.assert_fault("supervisor", PF, 5);
    facts.assert_fault("movs", PF, 7);
}

#[test]
fn a_read_only_page_of_a_device_is_read_only() {
    let facts = run("mmio-read-only");
    facts.assert_fault("write", PF, 3);
    facts.assert_fault("modify", PF, 3);
    facts.assert("value", VALUE & 0xFF);
    facts.assert_fault("movs", PF, 3);
    facts.assert_completed("movs-again");
    // Accessed and dirty; the device's page was only read.
    facts.assert("entry", (SCRATCH + 0x1000) | 0x63);
    facts.assert("entry-of-device", IOAPIC | 0x21);
}
