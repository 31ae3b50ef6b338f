//! Machines of several vCPUs: how the others are started, and what vCPUs send each other. The nodes have one core as a rule, which the vCPUs share.
//!
//! Intel SDM vol. 3, 9.4 (multiple-processor initialization), 11.6 (interprocessor interrupts), 11.12 (x2APIC); AMD APM vol. 2, 14.1, 16.5.

use crate::{finish, start_with};
use iced_x86::code_asm::*;
use nestling::client::types::Conclusion;
use nestling_tests::bare::{Asm, Facts, Guest, Program, layout, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("vcpus-start", started),
    ("vcpus-ipi", interrupts_both_ways),
    ("vcpus-broadcast", broadcast),
    ("vcpus-init", init),
    ("vcpus-nmi", nmi),
    ("vcpus-halt", all_halted),
    ("vcpus-triple-fault", triple_fault),
    ("vcpus-fault-in", touches_memory),
];

/// Where the other vCPUs start, as a page number, in RAM that nothing else uses.
const PAGE: u64 = 0x30;
/// Another such page.
const OTHER_PAGE: u64 = 0x40;
/// Words that they share with the first, by their offset from the page, which DS points to.
const ALIVE: u64 = 0x800;
const COUNT: u64 = 0x808;
const SELECTOR: u64 = 0x810;
const CR0: u64 = 0x818;
const SIGNATURE: u64 = 0x820;
const TOPOLOGY: u64 = 0x828;

const INIT: u64 = 0x4500;
const START_UP: u64 = 0x4600;
const TO_OTHERS: u64 = 3 << 18;
const VECTOR: u8 = 0x40;
const ANSWER: u8 = 0x41;

/// Address of a shared word.
const fn word(offset: u64) -> u64 {
    PAGE << 12 | offset
}

/// Writes real-mode code for the other vCPUs to `page`: DS is set up, the word [`ALIVE`] is one more for each that comes.
fn real_mode(guest: &mut Guest, page: u64, body: impl FnOnce(&mut CodeAssembler) -> Asm) -> Asm {
    let mut code = CodeAssembler::new(16)?;
    code.cli()?;
    code.mov(ax, (PAGE << 8) as u32)?;
    code.mov(ds, ax)?;
    code.mov(ss, ax)?;
    code.mov(sp, 0x4000)?;
    code.lock().inc(dword_ptr(ALIVE))?;
    body(&mut code)?;
    let bytes = code.assemble(0)?;
    guest.copy_to(page << 12, &bytes)
}

/// The real-mode handler of `vector` for the other vCPUs, at offset `offset` of their page: counts, and runs `body`.
fn handler(guest: &mut Guest, vector: u8, offset: u64, body: impl FnOnce(&mut CodeAssembler) -> Asm) -> Asm {
    let mut code = CodeAssembler::new(16)?;
    code.lock().inc(dword_ptr(COUNT))?;
    body(&mut code)?;
    code.iret()?;
    let bytes = code.assemble(offset)?;
    guest.copy_to(word(offset), &bytes)?;
    // The real-mode interrupt vector table lies at address 0.
    guest.mov(dword_ptr(u64::from(vector) * 4), (PAGE << 24 | offset) as u32)
}

fn write_msr(code: &mut CodeAssembler, index: u32, value: u32, high: u32) -> Asm {
    code.mov(ecx, index)?;
    code.mov(eax, value)?;
    code.mov(edx, high)?;
    code.wrmsr()
}

/// Enables the APIC and waits with interrupts on, for ever.
fn wait_for_interrupts(code: &mut CodeAssembler) -> Asm {
    write_msr(code, msr::SPURIOUS, 0x1FF, 0)?;
    code.sti()?;
    let mut again = code.create_label();
    code.set_label(&mut again)?;
    code.hlt()?;
    code.jmp(again)
}

fn send(guest: &mut Guest, command: u64) -> Asm {
    guest.wrmsr_value(msr::ICR, command)
}

/// Starts all other vCPUs at `page`.
fn start_others(guest: &mut Guest, page: u64) -> Asm {
    send(guest, TO_OTHERS | INIT)?;
    send(guest, TO_OTHERS | START_UP | page)
}

/// Waits until the dword at `address` is at least `least`.
fn await_at_least(guest: &mut Guest, address: u64, least: u32) -> Asm {
    let (mut again, mut done) = (guest.create_label(), guest.create_label());
    guest.set_label(&mut again)?;
    guest.cmp(dword_ptr(address), least)?;
    guest.jae(done)?;
    guest.pause()?;
    guest.jmp(again)?;
    guest.set_label(&mut done)?;
    guest.nop()
}

fn run(name: &str, vcpus: u32) -> Facts {
    let facts = finish(&start_with(name, vcpus));
    facts.assert_finished();
    facts
}

fn started(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| {
        code.mov(dword_ptr(SIGNATURE), edx)?;
        code.mov(word_ptr(SELECTOR), cs)?;
        code.mov(eax, cr0)?;
        code.mov(dword_ptr(CR0), eax)?;
        code.mov(eax, 0xB)?;
        code.xor(ecx, ecx)?;
        code.cpuid()?;
        code.mov(dword_ptr(TOPOLOGY), edx)?;
        code.lock().inc(dword_ptr(COUNT))?;
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.hlt()?;
        code.jmp(again)
    })?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(COUNT), 1)?;
    guest.cpuid_leaf(1, 0)?;
    guest.fact("own-signature", rax)?;
    guest.shr(rbx, 16)?;
    guest.and(rbx, 0xFF)?;
    guest.fact("logical-processors", rbx)?;
    guest.fact_at("selector", word(SELECTOR))?;
    guest.fact_at("cr0", word(CR0))?;
    guest.fact_at("signature", word(SIGNATURE))?;
    guest.fact_at("id", word(TOPOLOGY))?;
    guest.fact_at("alive", word(ALIVE))
}

#[test]
fn another_vcpu_starts_in_real_mode_at_the_page_of_the_start_up_interrupt() {
    let facts = run("vcpus-start", 2);
    facts.assert("selector", PAGE << 8);
    assert_eq!(facts.value("cr0") & 1, 0, "{facts}");
    assert_eq!(
        facts.value("signature"),
        facts.value("own-signature"),
        "RDX has the processor's signature\n{facts}"
    );
    facts.assert("id", 1);
    facts.assert("logical-processors", 2);
    facts.assert("alive", 1);
}

fn interrupts_both_ways(guest: &mut Guest) -> Asm {
    const ROUNDS: u32 = 200;
    real_mode(guest, PAGE, wait_for_interrupts)?;
    handler(guest, VECTOR, 0x400, |code| {
        write_msr(code, msr::EOI, 0, 0)?;
        // An answer to APIC id 0.
        write_msr(code, msr::ICR, ANSWER.into(), 0)
    })?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(ALIVE), 1)?;
    guest.sti()?;
    guest.xor(ebx, ebx)?;
    let mut again = guest.create_label();
    guest.set_label(&mut again)?;
    // With the other one halted as a rule; in between it may not have enabled its APIC yet.
    send(guest, 1 << 32 | u64::from(VECTOR))?;
    guest.mov(r8d, 100_000)?;
    let (mut wait, mut came) = (guest.create_label(), guest.create_label());
    guest.set_label(&mut wait)?;
    guest.cmp(ebx, dword_ptr(layout::RECORD_COUNT))?;
    guest.jb(came)?;
    guest.pause()?;
    guest.dec(r8d)?;
    guest.jnz(wait)?;
    guest.jmp(again)?;
    guest.set_label(&mut came)?;
    guest.mov(ebx, dword_ptr(layout::RECORD_COUNT))?;
    guest.cmp(ebx, ROUNDS)?;
    guest.jb(again)?;
    guest.cli()?;
    guest.record("answer", 0)?;
    guest.record_count("answers")
}

#[test]
fn vcpus_interrupt_each_other_hundreds_of_times_without_losing_one() {
    let facts = run("vcpus-ipi", 2);
    assert_eq!(facts.words("answer")[0], u64::from(ANSWER), "{facts}");
    assert!(facts.value("answers") >= 200, "{facts}");
}

fn broadcast(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| {
        // Three vCPUs share the stack's segment: a stack for each, by its id.
        write_msr(code, msr::SPURIOUS, 0x1FF, 0)?;
        code.mov(ecx, 0x802)?;
        code.rdmsr()?;
        code.shl(eax, 8)?;
        code.sub(sp, ax)?;
        code.lock().inc(dword_ptr(SELECTOR))?;
        wait_for_interrupts(code)
    })?;
    handler(guest, VECTOR, 0x400, |code| write_msr(code, msr::EOI, 0, 0))?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(SELECTOR), 3)?;
    send(guest, TO_OTHERS | u64::from(VECTOR))?;
    await_at_least(guest, word(COUNT), 3)?;
    // Logical destination: cluster 0, ids 1 and 3.
    send(guest, 0b1010 << 32 | 1 << 11 | u64::from(VECTOR))?;
    await_at_least(guest, word(COUNT), 5)?;
    guest.record_count("own")?;
    guest.fact_at("count", word(COUNT))
}

#[test]
fn broadcasts_and_logical_destinations_reach_whom_they_name() {
    let facts = run("vcpus-broadcast", 4);
    facts.assert("count", 5);
    facts.assert("own", 0);
}

fn init(guest: &mut Guest) -> Asm {
    let spin = |code: &mut CodeAssembler, offset: u64| {
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.inc(dword_ptr(offset))?;
        code.jmp(again)
    };
    real_mode(guest, PAGE, |code| spin(code, COUNT))?;
    real_mode(guest, OTHER_PAGE, |code| {
        code.mov(word_ptr(SELECTOR), cs)?;
        spin(code, TOPOLOGY)
    })?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(COUNT), 1000)?;
    // To one that runs: a start-up interrupt means nothing.
    send(guest, 1 << 32 | START_UP | OTHER_PAGE)?;
    guest.mov(ebx, dword_ptr(word(COUNT)))?;
    guest.add(ebx, 1000)?;
    let mut more = guest.create_label();
    guest.set_label(&mut more)?;
    guest.pause()?;
    guest.cmp(dword_ptr(word(COUNT)), ebx)?;
    guest.jb(more)?;
    send(guest, 1 << 32 | INIT)?;
    // It stands still as soon as two looks, with time for it to run between them, find the same.
    let mut look = guest.create_label();
    guest.set_label(&mut look)?;
    guest.mov(r12d, dword_ptr(word(COUNT)))?;
    guest.mov(r13d, 2_000_000)?;
    let mut wait = guest.create_label();
    guest.set_label(&mut wait)?;
    guest.dec(r13d)?;
    guest.jnz(wait)?;
    guest.cmp(r12d, dword_ptr(word(COUNT)))?;
    guest.jne(look)?;
    guest.fact_at("alive", word(ALIVE))?;
    send(guest, 1 << 32 | START_UP | OTHER_PAGE)?;
    await_at_least(guest, word(TOPOLOGY), 1000)?;
    guest.fact_at("alive-again", word(ALIVE))?;
    guest.fact_at("selector", word(SELECTOR))
}

#[test]
fn an_init_stops_a_vcpu_that_runs_until_it_is_started_again() {
    let facts = run("vcpus-init", 2);
    facts.assert("alive", 1);
    facts.assert("alive-again", 2);
    facts.assert("selector", OTHER_PAGE << 8);
}

fn nmi(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| {
        let mut again = code.create_label();
        code.set_label(&mut again)?;
        code.hlt()?;
        code.jmp(again)
    })?;
    handler(guest, 2, 0x400, |_| Ok(()))?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(ALIVE), 1)?;
    send(guest, 1 << 32 | 4 << 8)?;
    await_at_least(guest, word(COUNT), 1)?;
    guest.fact_at("count", word(COUNT))
}

#[test]
fn an_nmi_wakes_a_vcpu_that_halted_with_interrupts_off() {
    run("vcpus-nmi", 2).assert("count", 1);
}

fn all_halted(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| code.hlt())?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(ALIVE), 1)?;
    guest.fact_at("alive", word(ALIVE))?;
    guest.cli()?;
    guest.hlt()
}

#[test]
fn a_machine_ends_when_all_its_vcpus_have_halted_with_interrupts_off() {
    let facts = finish(&start_with("vcpus-halt", 2));
    facts.assert("alive", 1);
    assert_eq!(facts.job.conclusion, Some(Conclusion::SystemFailure));
    let reason = facts.job.failure_reason.clone().unwrap_or_default();
    assert!(reason.contains("halted with interrupts off"), "{reason}");
}

fn triple_fault(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| {
        code.mov(dword_ptr(TOPOLOGY), 0)?;
        code.lidt(fword_ptr(TOPOLOGY))?;
        code.int3()
    })?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    // Meanwhile this one goes on and on.
    let mut again = guest.create_label();
    guest.set_label(&mut again)?;
    guest.jmp(again)
}

#[test]
fn a_triple_fault_of_any_vcpu_ends_the_machine() {
    let facts = finish(&start_with("vcpus-triple-fault", 2));
    let reason = facts.job.failure_reason.clone().unwrap_or_default();
    assert!(reason.contains("triple fault"), "{reason}");
}

/// Both vCPUs write to memory that nothing has touched, the other one by its 32-bit addresses in real mode below 1 MiB only; the first one looks at
/// what it wrote.
fn touches_memory(guest: &mut Guest) -> Asm {
    real_mode(guest, PAGE, |code| {
        let mut again = code.create_label();
        code.mov(dword_ptr(SELECTOR), 0x1234_5678)?;
        code.lock().inc(dword_ptr(COUNT))?;
        code.set_label(&mut again)?;
        // An exit each, while the other one has its own.
        code.xor(eax, eax)?;
        code.cpuid()?;
        code.lock().inc(dword_ptr(TOPOLOGY))?;
        code.jmp(again)
    })?;
    guest.enable_apic()?;
    start_others(guest, PAGE)?;
    await_at_least(guest, word(COUNT), 1)?;
    for region in layout::FRESH {
        guest.mov(dword_ptr(region), 7)?;
        guest.mov(eax, dword_ptr(region))?;
        guest.add(dword_ptr(layout::SCRATCH), eax)?;
    }
    await_at_least(guest, word(TOPOLOGY), 100)?;
    guest.fact_at("sum", layout::SCRATCH)?;
    guest.fact_at("other", word(SELECTOR))
}

#[test]
fn vcpus_touch_fresh_memory_and_exit_at_the_same_time() {
    let facts = run("vcpus-fault-in", 2);
    facts.assert("sum", 7 * layout::FRESH.len() as u64);
    facts.assert("other", 0x1234_5678);
}
