//! Interrupts and exceptions whose delivery stops half-way: a table, a stack or a page table that they need is in memory that has to be mapped
//! first. They come once, exactly, all the same.
//!
//! Intel SDM vol. 3, 6.12-6.14 (delivery), 26.2.4 (information about it in a VM exit); AMD APM vol. 2, 15.7.2 (EXITINTINFO), 15.20.

use crate::{is_emulated_by_qemu, is_svm_in_bochs, run};
use iced_x86::code_asm::*;
use nestling_tests::bare::{Asm, Facts, Guest, Program, gdt, layout, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("fresh-idt", fresh_idt),
    ("fresh-gdt", fresh_gdt),
    ("fresh-tss", fresh_tss),
    ("fresh-stack", fresh_stack),
    ("fresh-tables", fresh_tables),
];

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
        guest.mov(rax, (layout::SCRATCH + 0x1000) | 3)?;
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
