//! Guests that use what is not there or what nobody uses that way: code, tables and stacks in devices' memory, the end of the canonical
//! addresses, endless repetitions, code that changes under its own feet. Each machine goes on as a processor would, or ends with a
//! reason; the node goes on.
//!
//! Intel SDM vol. 3, 5.5 (paging), 6.14 (stack and tables of interrupts), 3.3.7.1 (canonical addresses), 9.1.3 (self-modifying code).

use crate::exceptions::assert_goes_on_until_cancelled;
use crate::{run, run_to_any_end};
use iced_x86::code_asm::*;
use nestling::client::types::Conclusion;
use nestling_machine::layout::{BOOT_PAGE_TABLES, ECAM_BASE, IOAPIC_BASE, PCI_MMIO_BASE};
use nestling_tests::bare::{Asm, Facts, Guest, Program, layout};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("jump-to-device", jump_to_device),
    ("jump-to-nothing", jump_to_nothing),
    ("tables-in-device", tables_in_device),
    ("directory-in-device", directory_in_device),
    ("stack-in-device", stack_in_device),
    ("stack-in-configuration", stack_in_configuration),
    ("call-in-device", call_in_device),
    ("idt-in-device", idt_in_device),
    ("gdt-in-device", gdt_in_device),
    ("tss-in-device", tss_in_device),
    ("canonical-end", canonical_end),
    ("huge-output", huge_output),
    ("huge-copy", huge_copy),
    ("self-modifying", self_modifying),
    ("no-idt", no_idt),
    ("odd-instruction-on-device", odd_instruction_on_device),
];

const GP: u64 = 13;
const PF: u64 = 14;

/// The machine did not get to its end and was not left running either.
#[track_caller]
fn assert_ended_with_a_reason(facts: &Facts) {
    println!("{facts}");
    let reason = facts.job.failure_reason.as_deref().unwrap_or_default();
    let ended = facts.job.conclusion == Some(Conclusion::SystemFailure) && !reason.is_empty();
    assert!(ended && !facts.has("end"), "expected an end with a reason\n{facts}");
    assert!(!reason.contains("powered itself off"), "expected another reason\n{facts}");
}

fn jump_to_device(guest: &mut Guest) -> Asm {
    guest.mov(rax, IOAPIC_BASE)?;
    guest.jmp(rax)
}

#[test]
fn code_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("jump-to-device"));
}

/// Device memory that no device answers.
fn jump_to_nothing(guest: &mut Guest) -> Asm {
    guest.mov(rax, PCI_MMIO_BASE + 0xF0_0000)?;
    guest.jmp(rax)
}

#[test]
fn code_where_no_memory_is_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("jump-to-nothing"));
}

fn tables_in_device(guest: &mut Guest) -> Asm {
    guest.mov(rax, IOAPIC_BASE)?;
    guest.mov(cr3, rax)?;
    guest.nop()
}

#[test]
fn page_tables_in_a_devices_memory_end_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("tables-in-device"));
}

/// Only the page table of the window is. What nobody answers reads as all ones, which is a page fault for its reserved bits; or the
/// machine ends.
fn directory_in_device(guest: &mut Guest) -> Asm {
    guest.mov(rax, (PCI_MMIO_BASE + 0xF0_0000) | 7)?;
    guest.mov(qword_ptr(layout::WINDOW_TABLE - 0x1000), rax)?;
    guest.mov(rax, cr3)?;
    guest.mov(cr3, rax)?;
    guest.mov(rbx, layout::WINDOW)?;
    guest.mov(eax, dword_ptr(rbx))
}

#[test]
fn a_page_table_where_no_memory_is_has_reserved_bits_set_or_ends_the_machine() {
    let facts = run_to_any_end("directory-in-device");
    if facts.has("unexpected") {
        assert_eq!(facts.words("unexpected")[..2], [PF, 1 << 3 | 1], "{facts}");
    } else {
        assert_ended_with_a_reason(&facts);
    }
}

/// An exception has to be pushed there: not the exception's instruction is to be emulated.
fn stack_in_device(guest: &mut Guest) -> Asm {
    guest.mov(rsp, IOAPIC_BASE + 0x800)?;
    guest.ud2()
}

#[test]
fn an_exceptions_stack_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("stack-in-device"));
}

/// Configuration space can be read without an exit, but not written.
fn stack_in_configuration(guest: &mut Guest) -> Asm {
    guest.mov(rsp, ECAM_BASE + 0x800)?;
    guest.ud2()
}

#[test]
fn an_exceptions_stack_in_configuration_space_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("stack-in-configuration"));
}

/// A push to device memory is an instruction that is not emulated.
fn call_in_device(guest: &mut Guest) -> Asm {
    let mut target = guest.create_label();
    guest.mov(rsp, IOAPIC_BASE + 0x800)?;
    guest.call(target)?;
    guest.set_label(&mut target)?;
    guest.nop()
}

#[test]
fn a_call_with_its_stack_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("call-in-device"));
}

/// LIDT or LGDT of a table at RAX.
fn load_table(guest: &mut Guest, limit: u32, load: fn(&mut Guest) -> Asm) -> Asm {
    guest.sub(rsp, 16)?;
    guest.mov(word_ptr(rsp), limit)?;
    guest.mov(qword_ptr(rsp + 2), rax)?;
    load(guest)?;
    guest.add(rsp, 16)
}

fn idt_in_device(guest: &mut Guest) -> Asm {
    guest.mov(rax, IOAPIC_BASE)?;
    load_table(guest, 0xFFF, |guest| guest.lidt(ptr(rsp)))?;
    guest.ud2()
}

#[test]
fn an_idt_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("idt-in-device"));
}

fn gdt_in_device(guest: &mut Guest) -> Asm {
    guest.mov(rax, IOAPIC_BASE)?;
    load_table(guest, 0xFFF, |guest| guest.lgdt(ptr(rsp)))?;
    guest.ud2()
}

#[test]
fn a_gdt_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("gdt-in-device"));
}

fn tss_in_device(guest: &mut Guest) -> Asm {
    guest.sub(rsp, 16)?;
    guest.sgdt(ptr(rsp))?;
    guest.mov(rbx, qword_ptr(rsp + 2))?;
    guest.add(rsp, 16)?;
    let base = IOAPIC_BASE;
    guest.mov(rax, 0x0000_8900_0000_0067 | (base & 0xFF_FFFF) << 16 | (base >> 24 & 0xFF) << 56)?;
    guest.mov(qword_ptr(rbx + i32::from(nestling_tests::bare::gdt::TSS)), rax)?;
    guest.mov(eax, u32::from(nestling_tests::bare::gdt::TSS))?;
    guest.ltr(ax)?;
    // Its stack comes from the interrupt stack table.
    guest.mov(byte_ptr(layout::IDT + 6 * 16 + 4), 1)?;
    guest.ud2()
}

#[test]
fn a_tss_in_a_devices_memory_ends_the_machine() {
    assert_ended_with_a_reason(&run_to_any_end("tss-in-device"));
}

/// CPUID in the last two bytes of the lower canonical half: after it, RIP is not canonical, and fetching from there is a protection fault
/// (SDM vol. 3, 28.3.3 and vol. 1, 3.3.7.1).
fn canonical_end(guest: &mut Guest) -> Asm {
    const TOP: u64 = 0x7FFF_FFFF_F000;
    let frame = layout::SCRATCH + 0x4000;
    let mut end = guest.create_label();
    // The uppermost entry of each table on the way, in pages of the guest's own.
    let tables = [frame, frame + 0x1000, frame + 0x2000, frame + 0x3000];
    guest.mov(rax, tables[0] | 3)?;
    guest.mov(qword_ptr(BOOT_PAGE_TABLES + 255 * 8), rax)?;
    for pair in tables.windows(2) {
        guest.mov(rax, pair[1] | 3)?;
        guest.mov(qword_ptr(pair[0] + 511 * 8), rax)?;
    }
    guest.mov(word_ptr(tables[3] + 0xFFE), 0xA20F)?;
    guest.clear_records()?;
    guest.resume_at(end)?;
    guest.mov(rbx, TOP + 0xFFE)?;
    guest.xor(eax, eax)?;
    guest.jmp(rbx)?;
    guest.set_label(&mut end)?;
    guest.nop()?;
    guest.record("fault", 0)
}

#[test]
fn an_exit_at_the_end_of_the_canonical_addresses_is_a_protection_fault() {
    let facts = run("canonical-end");
    assert_eq!(facts.words("fault")[..3], [GP, 0, 0x8000_0000_0000], "{facts}");
}

/// The largest count there is.
fn huge_output(guest: &mut Guest) -> Asm {
    guest.mov(rcx, -1_i64 as u64)?;
    guest.mov(esi, layout::SCRATCH as u32)?;
    guest.mov(edx, 0x80)?;
    // Backwards and forwards, so that it stays in memory for long enough.
    guest.rep().outsb()?;
    guest.nop()
}

#[test]
fn an_endless_string_output_does_not_hold_the_node() {
    // It ends where memory ends, after some ten million bytes, or by its time.
    assert_goes_on_until_cancelled("huge-output", "string_pio");
}

/// From one device to another, neither of which moves on.
fn huge_copy(guest: &mut Guest) -> Asm {
    let mut again = guest.create_label();
    guest.set_label(&mut again)?;
    guest.mov(rcx, -1_i64 as u64)?;
    guest.mov(rdi, IOAPIC_BASE)?;
    guest.mov(rsi, layout::SCRATCH)?;
    guest.mov(r8, 1_000_000_u64)?;
    guest.mov(rcx, r8)?;
    guest.rep().movsb()?;
    guest.jmp(again)
}

#[test]
fn an_endless_copy_to_a_device_does_not_hold_the_node() {
    assert_goes_on_until_cancelled("huge-copy", "mmio");
}

/// String input, which is emulated, changes the operand of an instruction that has just run; it runs again, changed.
fn self_modifying(guest: &mut Guest) -> Asm {
    let mut labels = [(); 2].map(|()| guest.create_label());
    let [again, first] = &mut labels;
    guest.xor(r12d, r12d)?;
    guest.set_label(again)?;
    // MOV EAX, imm32: the operand is at its second byte.
    guest.db(&[0xB8, 0x11, 0, 0, 0])?;
    guest.test(r12d, r12d)?;
    guest.jz(*first)?;
    guest.fact("second", rax)?;
    guest.finish()?;
    guest.set_label(first)?;
    guest.fact("first", rax)?;
    guest.inc(r12d)?;
    guest.lea(rdi, ptr(*again))?;
    guest.inc(rdi)?;
    guest.mov(edx, 0x3FF)?;
    guest.mov(al, 0x22)?;
    guest.out(dx, al)?;
    guest.insb()?;
    guest.jmp(*again)
}

#[test]
fn code_that_an_emulated_instruction_changes_runs_changed() {
    let facts = run("self-modifying");
    facts.assert("first", 0x11);
    facts.assert("second", 0x22);
}

/// Memory that nothing has touched is zero, and a gate of zeros is not present: three times.
fn no_idt(guest: &mut Guest) -> Asm {
    guest.mov(rax, layout::FRESH[0])?;
    load_table(guest, 0xFFF, |guest| guest.lidt(ptr(rsp)))?;
    guest.ud2()
}

#[test]
fn an_empty_idt_ends_the_machine_by_a_triple_fault() {
    run_to_any_end("no-idt").assert_ended("triple fault");
}

/// FXSAVE to a device.
fn odd_instruction_on_device(guest: &mut Guest) -> Asm {
    guest.mov(rbx, IOAPIC_BASE)?;
    guest.fxsave(ptr(rbx))
}

#[test]
fn an_instruction_that_is_not_emulated_ends_the_machine() {
    run_to_any_end("odd-instruction-on-device").assert_ended("nestling does not support");
}
