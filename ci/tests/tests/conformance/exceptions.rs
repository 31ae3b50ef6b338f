//! Exceptions: single steps, breakpoints, the flags that faults push, double faults, and loops of #DB and #AC.
//!
//! Intel SDM vol. 3, 6.15 (exceptions), 6.5 and table 6-5 (double faults), 18.2-18.3 (debug registers and exceptions).

use crate::{image, is_emulated_by_qemu, is_svm_in_bochs, node, run};
use iced_x86::code_asm::*;
use nestling::client::types::{Conclusion, Job};
use nestling_machine::layout::IOAPIC_BASE;
use nestling_tests::bare::{self, Asm, Facts, Guest, Program, gdt, layout, msr};
use nestling_tests::job::{wait, wait_until};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("single-step", single_step),
    ("single-step-string", single_step_string),
    ("single-step-shadow", single_step_shadow),
    ("code-breakpoints", code_breakpoints),
    ("data-breakpoints", data_breakpoints),
    ("general-detect", general_detect),
    ("int1", int1),
    ("fault-flags", fault_flags),
    ("double-fault", double_fault),
    ("serial-faults", serial_faults),
    ("alignment-check", alignment_check),
    ("debug-loop", debug_loop),
    ("debug-stack-loop", debug_stack_loop),
    ("exit-storm", exit_storm),
];

const DB: u64 = 1;
const UD: u64 = 6;
const DF: u64 = 8;
const NP: u64 = 11;
const GP: u64 = 13;
const PF: u64 = 14;
const AC: u64 = 17;

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_AC: i32 = 1 << 18;
const CR0_AM: i32 = 1 << 18;
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR6_BD: u64 = 1 << 13;
const DR6_BS: u64 = 1 << 14;
const DR7_GD: u32 = 1 << 13;

/// How many traps [`trap_handler`] saw.
const TRAPS: u64 = layout::SCRATCH;
/// RIP, DR6 and RFLAGS of each of them.
const TRAP: u64 = layout::SCRATCH + 0x40;
const TRAP_BYTES: u64 = 32;
/// A word that breakpoints watch.
const WATCHED: u64 = layout::SCRATCH + 0x800;

/// What [`trap_handler`] makes of the flags it returns with.
#[derive(Clone, Copy)]
enum Then {
    /// No further single step.
    EndStepping,
    /// Go on as it was.
    GoOn,
    /// The instruction runs past its breakpoint.
    Resume,
}

/// Makes a handler of #DB that keeps RIP, DR6 and RFLAGS in [`TRAP`] and sets DR6 back.
fn trap_handler(guest: &mut Guest, then: Then) -> Asm {
    let (mut handler, mut begin) = (guest.create_label(), guest.create_label());
    guest.jmp(begin)?;
    guest.set_label(&mut handler)?;
    guest.push(rax)?;
    guest.push(rcx)?;
    guest.mov(rcx, qword_ptr(TRAPS))?;
    guest.inc(qword_ptr(TRAPS))?;
    guest.and(ecx, 0x1F)?;
    guest.shl(ecx, TRAP_BYTES.ilog2())?;
    guest.mov(rax, qword_ptr(rsp + 16))?;
    guest.mov(qword_ptr(rcx + TRAP as i32), rax)?;
    guest.mov(rax, dr6)?;
    guest.mov(qword_ptr(rcx + TRAP as i32 + 8), rax)?;
    guest.mov(rax, qword_ptr(rsp + 32))?;
    guest.mov(qword_ptr(rcx + TRAP as i32 + 16), rax)?;
    guest.mov(rax, dr7)?;
    guest.mov(qword_ptr(rcx + TRAP as i32 + 24), rax)?;
    guest.mov(eax, DR6_RESET as u32)?;
    guest.mov(dr6, rax)?;
    match then {
        Then::EndStepping => guest.and(dword_ptr(rsp + 32), !(RFLAGS_TF as i32))?,
        Then::Resume => guest.or(dword_ptr(rsp + 32), RFLAGS_RF as i32)?,
        Then::GoOn => {}
    }
    guest.pop(rcx)?;
    guest.pop(rax)?;
    guest.iretq()?;
    guest.set_label(&mut begin)?;
    guest.gate(DB as u8, handler, 0)
}

/// The trap flag is set by the instruction before, so that the next one is the first to trap.
fn set_trap_flag(guest: &mut Guest) -> Asm {
    guest.pushfq()?;
    guest.or(qword_ptr(rsp), RFLAGS_TF as i32)?;
    guest.popfq()
}

/// An instruction and what it needs: its name, the preparation, itself.
type Step = (&'static str, fn(&mut Guest) -> Asm, fn(&mut Guest) -> Asm);

const NOTHING: fn(&mut Guest) -> Asm = |_| Ok(());

/// All but the first and the last exit.
const STEPS: &[Step] = &[
    ("nop", NOTHING, |guest| guest.nop()),
    ("cpuid", |guest| guest.xor(eax, eax), |guest| guest.cpuid()),
    ("in", NOTHING, |guest| guest.in_(al, 0x80)),
    ("out", NOTHING, |guest| guest.out(0x80, al)),
    ("rdmsr", |guest| guest.mov(ecx, msr::APIC_BASE), |guest| guest.rdmsr()),
    (
        "wrmsr",
        |guest| {
            guest.mov(ecx, msr::TPR)?;
            guest.xor(eax, eax)?;
            guest.xor(edx, edx)
        },
        |guest| guest.wrmsr(),
    ),
    ("mmio-read", |guest| guest.mov(ebx, IOAPIC_BASE as u32), |guest| guest.mov(eax, dword_ptr(rbx))),
    ("mmio-write", |guest| guest.mov(ebx, IOAPIC_BASE as u32), |guest| guest.mov(dword_ptr(rbx), 0)),
    ("outs", |guest| guest.mov(esi, layout::SCRATCH as u32), |guest| guest.outsb()),
    ("wbinvd", NOTHING, |guest| guest.wbinvd()),
    ("hlt", NOTHING, |guest| guest.hlt()),
    ("mov-cr8", |guest| guest.xor(eax, eax), |guest| guest.mov(cr8, rax)),
    ("touch", |guest| guest.mov(ebx, layout::FRESH[0] as u32), |guest| guest.mov(eax, dword_ptr(rbx))),
];

fn single_step(guest: &mut Guest) -> Asm {
    trap_handler(guest, Then::EndStepping)?;
    for (name, prepare, step) in STEPS {
        let mut after = guest.create_label();
        guest.mov(qword_ptr(TRAPS), 0)?;
        guest.mov(edx, 0x80)?;
        prepare(guest)?;
        set_trap_flag(guest)?;
        step(guest)?;
        guest.set_label(&mut after)?;
        guest.nop()?;
        report_trap(guest, name, 0, after)?;
    }
    Ok(())
}

/// Reports: how many traps there were; of trap `index`, RIP's distance from `at`, DR6, RFLAGS' trap and resume flags. Changes registers.
fn report_trap(guest: &mut Guest, name: &str, index: u64, at: CodeLabel) -> Asm {
    let trap = TRAP + index * TRAP_BYTES;
    guest.mov(rax, qword_ptr(TRAPS))?;
    guest.mov(rcx, qword_ptr(trap))?;
    guest.lea(rdx, ptr(at))?;
    guest.sub(rcx, rdx)?;
    guest.mov(rdx, qword_ptr(trap + 8))?;
    guest.mov(rbx, qword_ptr(trap + 16))?;
    guest.and(ebx, (RFLAGS_TF | RFLAGS_RF) as i32)?;
    guest.facts(name, &[rax, rcx, rdx, rbx])
}

/// DR6 and the other words of a trap as the bed can have them: Bochs' SVM does not write the causes of #DB to DR6 when #DB exits.
#[track_caller]
fn assert_trap(facts: &Facts, name: &str, count: u64, causes: u64, rflags: u64) {
    let words = facts.words(name);
    let status = if is_svm_in_bochs() { words[2] } else { DR6_RESET | causes };
    facts.assert_words(name, &[count, 0, status, rflags]);
}

/// Each step is one trap, after the instruction, with DR6.BS alone.
#[test]
fn a_single_step_over_an_instruction_that_exits_is_one_trap_after_it() {
    let facts = run("single-step");
    for (name, ..) in STEPS {
        assert_trap(&facts, name, 1, DR6_BS, RFLAGS_TF);
    }
}

/// Three iterations, one trap after each: RIP stays until the last (SDM vol. 3, 18.3.1.4).
fn single_step_string(guest: &mut Guest) -> Asm {
    let (mut at, mut after) = (guest.create_label(), guest.create_label());
    trap_handler(guest, Then::GoOn)?;
    guest.mov(edx, 0x80)?;
    guest.mov(esi, layout::SCRATCH as u32)?;
    guest.mov(ecx, 3)?;
    set_trap_flag(guest)?;
    guest.set_label(&mut at)?;
    guest.rep().outsb()?;
    guest.set_label(&mut after)?;
    guest.pushfq()?;
    guest.and(qword_ptr(rsp), !(RFLAGS_TF as i32))?;
    guest.popfq()?;
    guest.fact("left", rcx)?;
    report_trap(guest, "first", 0, at)?;
    report_trap(guest, "second", 1, at)?;
    report_trap(guest, "third", 2, after)
}

#[test]
fn a_single_step_over_a_repeated_instruction_traps_after_each_iteration() {
    let facts = run("single-step-string");
    facts.assert("left", 0);
    for name in ["first", "second", "third"] {
        // Six traps in all: three more until the flag is cleared.
        assert_trap(&facts, name, 6, DR6_BS, RFLAGS_TF);
    }
}

/// MOV SS holds the trap back until after the next instruction (SDM vol. 3, 6.8.3).
fn single_step_shadow(guest: &mut Guest) -> Asm {
    trap_handler(guest, Then::EndStepping)?;
    for (name, step) in [
        ("mov-ss-nop", (|guest| guest.nop()) as fn(&mut Guest) -> Asm),
        ("mov-ss-cpuid", |guest| guest.cpuid()),
        ("mov-ss-out", |guest| guest.out(0x80, al)),
        ("mov-ss-mmio", |guest| guest.mov(r8d, dword_ptr(r9))),
        ("mov-ss-fresh-ram", |guest| guest.mov(r8d, dword_ptr(r10))),
    ] {
        let mut after = guest.create_label();
        guest.mov(qword_ptr(TRAPS), 0)?;
        guest.xor(eax, eax)?;
        guest.mov(ebx, u32::from(gdt::DATA))?;
        guest.mov(r9, IOAPIC_BASE)?;
        guest.mov(r10, layout::FRESH[0])?;
        set_trap_flag(guest)?;
        guest.mov(ss, ebx)?;
        step(guest)?;
        guest.set_label(&mut after)?;
        guest.nop()?;
        report_trap(guest, name, 0, after)?;
    }
    Ok(())
}

#[test]
fn mov_ss_holds_a_single_step_back_for_one_instruction() {
    let facts = run("single-step-shadow");
    for name in ["mov-ss-nop", "mov-ss-cpuid", "mov-ss-out", "mov-ss-mmio", "mov-ss-fresh-ram"] {
        assert_trap(&facts, name, 1, DR6_BS, RFLAGS_TF);
    }
}

/// A node in QEMU does not survive guests with breakpoints: its SVM switches DR7 but not the breakpoints behind it, which then strike
/// in L1 and in other guests.
fn has_breakpoints() -> bool {
    !is_emulated_by_qemu()
}

/// On an instruction that exits, the one after it, and one after that: each stops once, before it runs.
fn code_breakpoints(guest: &mut Guest) -> Asm {
    let mut labels = [(); 3].map(|()| guest.create_label());
    let [on_cpuid, next, on_out] = &mut labels;
    trap_handler(guest, Then::Resume)?;
    guest.lea(rax, ptr(*on_cpuid))?;
    guest.mov(dr0, rax)?;
    guest.lea(rax, ptr(*next))?;
    guest.mov(dr1, rax)?;
    guest.lea(rax, ptr(*on_out))?;
    guest.mov(dr2, rax)?;
    guest.mov(eax, 0b1_0101)?;
    guest.mov(dr7, rax)?;
    guest.xor(eax, eax)?;
    guest.set_label(on_cpuid)?;
    guest.cpuid()?;
    guest.set_label(next)?;
    guest.xor(eax, eax)?;
    guest.set_label(on_out)?;
    guest.out(0x80, al)?;
    guest.xor(eax, eax)?;
    guest.mov(dr7, rax)?;
    report_trap(guest, "cpuid", 0, *on_cpuid)?;
    report_trap(guest, "next", 1, *next)?;
    report_trap(guest, "out", 2, *on_out)
}

#[test]
fn a_breakpoint_on_an_instruction_that_exits_stops_it_once() {
    if !has_breakpoints() {
        return;
    }
    let facts = run("code-breakpoints");
    for (name, bit) in [("cpuid", 0), ("next", 1), ("out", 2)] {
        assert_trap(&facts, name, 3, 1 << bit, 0);
    }
}

/// Written, read, and not touched; DR7 holds them across exits.
fn data_breakpoints(guest: &mut Guest) -> Asm {
    let mut labels = [(); 2].map(|()| guest.create_label());
    let [written, read] = &mut labels;
    trap_handler(guest, Then::GoOn)?;
    guest.mov(ebx, WATCHED as u32)?;
    guest.mov(dr0, rbx)?;
    guest.lea(rax, ptr(rbx + 8))?;
    guest.mov(dr1, rax)?;
    guest.lea(rax, ptr(rbx + 16))?;
    guest.mov(dr2, rax)?;
    // Writes of four bytes; reads and writes of four bytes; reads and writes of one byte.
    guest.mov(eax, 0b0011_1111_1101 << 16 | 0b1_0101)?;
    guest.mov(dr7, rax)?;
    guest.cpuid_leaf(0, 0)?;
    guest.mov(ebx, WATCHED as u32)?;
    guest.mov(eax, dword_ptr(rbx))?;
    guest.mov(dword_ptr(rbx), eax)?;
    guest.set_label(written)?;
    guest.out(0x80, al)?;
    guest.mov(eax, dword_ptr(rbx + 8))?;
    guest.set_label(read)?;
    guest.mov(byte_ptr(rbx + 17), al)?;
    guest.mov(rax, dr7)?;
    guest.fact("dr7", rax)?;
    guest.xor(eax, eax)?;
    guest.mov(dr7, rax)?;
    report_trap(guest, "written", 0, *written)?;
    report_trap(guest, "read", 1, *read)
}

#[test]
fn a_watched_access_traps_after_the_instruction() {
    if !has_breakpoints() {
        return;
    }
    let facts = run("data-breakpoints");
    assert_trap(&facts, "written", 2, 1, 0);
    assert_trap(&facts, "read", 2, 2, 0);
    facts.assert("dr7", 0x03FD_0415);
}

/// DR7.GD: the access to a debug register faults, and the handler finds GD clear (SDM vol. 3, 18.2.4).
fn general_detect(guest: &mut Guest) -> Asm {
    let mut at = guest.create_label();
    trap_handler(guest, Then::GoOn)?;
    guest.mov(eax, DR7_GD)?;
    guest.mov(dr7, rax)?;
    guest.set_label(&mut at)?;
    // It runs after the handler has returned.
    guest.mov(rax, dr7)?;
    guest.fact("dr7-after", rax)?;
    report_trap(guest, "trap", 0, at)?;
    guest.fact_at("dr7-in-handler", TRAP + 24)
}

#[test]
fn general_detect_faults_once_and_is_clear_in_the_handler() {
    if !has_breakpoints() || is_svm_in_bochs() {
        // Bochs' SVM leaves the guest's DR7 to L1.
        return;
    }
    let facts = run("general-detect");
    assert_eq!(facts.words("trap")[..3], [1, 0, DR6_RESET | DR6_BD], "{facts}");
    facts.assert("dr7-in-handler", 0x400);
    facts.assert("dr7-after", 0x400);
}

fn int1(guest: &mut Guest) -> Asm {
    let mut after = guest.create_label();
    trap_handler(guest, Then::GoOn)?;
    guest.int1()?;
    guest.set_label(&mut after)?;
    guest.nop()?;
    report_trap(guest, "trap", 0, after)
}

/// INT1 is #DB without a cause in DR6, as a trap (SDM vol. 2, INT).
#[test]
fn int1_is_a_debug_exception_without_a_cause() {
    if is_emulated_by_qemu() {
        // It has no INT1.
        return;
    }
    assert_trap(&run("int1"), "trap", 1, 0, 0);
}

/// Faults push RFLAGS with RF set, interrupts and traps without (SDM vol. 3, 18.3.1.1): those that the hypervisor raises like the
/// processor's own.
fn fault_flags(guest: &mut Guest) -> Asm {
    guest.mov(ecx, 0x1234)?;
    for (name, instruction) in [
        ("ud2", (|guest| guest.ud2()) as fn(&mut Guest) -> Asm),
        ("vmcall", |guest| guest.vmcall()),
        ("rdmsr", |guest| guest.rdmsr()),
    ] {
        let mut end = guest.create_label();
        guest.clear_records()?;
        guest.resume_at(end)?;
        instruction(guest)?;
        guest.set_label(&mut end)?;
        guest.nop()?;
        guest.mov(rax, qword_ptr(layout::RECORDS + 32))?;
        guest.and(eax, RFLAGS_RF as i32)?;
        guest.fact(name, rax)?;
    }
    guest.clear_records()?;
    guest.int3()?;
    guest.mov(rax, qword_ptr(layout::RECORDS + 32))?;
    guest.and(eax, RFLAGS_RF as i32)?;
    guest.fact("int3", rax)
}

#[test]
fn a_fault_that_the_hypervisor_raises_pushes_the_resume_flag() {
    let facts = run("fault-flags");
    facts.assert("rdmsr", RFLAGS_RF);
    // QEMU raises the others itself, and never pushes it.
    let pushed = if is_emulated_by_qemu() { 0 } else { RFLAGS_RF };
    for name in ["ud2", "vmcall"] {
        facts.assert(name, pushed);
    }
    facts.assert("int3", 0);
}

/// The attribute byte of a vector's gate.
fn gate_type(vector: u64) -> u64 {
    layout::IDT + vector * 16 + 5
}

/// The stack of a vector's gate.
fn gate_stack(vector: u64) -> u64 {
    layout::IDT + vector * 16 + 4
}

/// IST2 of the TSS.
const IST2: u64 = layout::TSS + 0x2C;

/// An MSR that does not exist, in ECX.
fn refused_msr(guest: &mut Guest) -> Asm {
    guest.mov(ecx, 0x1234)?;
    guest.rdmsr()
}

fn double_fault(guest: &mut Guest) -> Asm {
    // Contributory, then contributory.
    guest.mov(byte_ptr(gate_type(GP)), 0x0E)?;
    guest.mov(ebx, 0x5F0)?;
    guest.attempt("gp-np", |guest| guest.mov(ds, ebx))?;
    guest.attempt("injected-gp-np", refused_msr)?;
    guest.mov(byte_ptr(gate_type(GP)), 0x8E_u32)?;
    // Page fault, then page fault: its stack is not mapped.
    guest.mov(rax, layout::WINDOW + 0x1000)?;
    guest.mov(qword_ptr(IST2), rax)?;
    guest.mov(byte_ptr(gate_stack(PF)), 2)?;
    guest.mov(byte_ptr(gate_stack(DF)), 3)?;
    guest.mov(rbx, layout::WINDOW + 0x10_0000)?;
    guest.attempt("pf-pf", |guest| guest.mov(al, byte_ptr(rbx)))?;
    guest.mov(byte_ptr(gate_stack(PF)), 0)?;
    // Page fault, then contributory.
    guest.mov(byte_ptr(gate_type(PF)), 0x0E)?;
    guest.attempt("pf-np", |guest| guest.mov(al, byte_ptr(rbx)))
}

#[test]
fn an_exception_that_prevents_an_exceptions_delivery_is_a_double_fault() {
    let facts = run("double-fault");
    facts.assert_fault("gp-np", DF, 0);
    // QEMU takes what happens while an injected exception is delivered for the first one.
    if !is_emulated_by_qemu() {
        facts.assert_outcome("injected-gp-np", bare::Outcome::Fault { vector: DF, error_code: 0, offset: 5 });
    }
    facts.assert_fault("pf-pf", DF, 0);
    facts.assert_fault("pf-np", DF, 0);
}

/// A contributory exception and then a page fault, or a benign one and then anything, are handled one after the other.
fn serial_faults(guest: &mut Guest) -> Asm {
    guest.mov(rax, layout::WINDOW + 0x1000)?;
    guest.mov(qword_ptr(IST2), rax)?;
    guest.mov(byte_ptr(gate_stack(GP)), 2)?;
    guest.mov(ebx, 0x5F0)?;
    guest.attempt("gp-pf", |guest| guest.mov(ds, ebx))?;
    guest.mov(rax, cr2)?;
    guest.fact("address", rax)?;
    guest.attempt("injected-gp-pf", refused_msr)?;
    guest.mov(byte_ptr(gate_type(UD)), 0x0E)?;
    guest.attempt("ud-np", |guest| guest.ud2())?;
    guest.attempt("injected-ud-np", |guest| guest.vmcall())
}

#[test]
fn a_page_fault_after_another_exception_is_delivered_as_such() {
    let facts = run("serial-faults");
    facts.assert_fault("gp-pf", PF, 2);
    facts.assert("address", layout::WINDOW + 0xFF8);
    facts.assert_outcome("injected-gp-pf", bare::Outcome::Fault { vector: PF, error_code: 2, offset: 5 });
    // Which gate of the IDT, bit 1; bit 0 would be for an external event. QEMU counts gates by 8 bytes.
    let gate = if is_emulated_by_qemu() { UD * 16 } else { UD * 8 };
    for name in ["ud-np", "injected-ud-np"] {
        let words = facts.words(name);
        assert_eq!((words[0], words[1] & !1, words[2]), (NP, gate | 2, 0), "{name}\n{facts}");
    }
}

fn alignment_check(guest: &mut Guest) -> Asm {
    guest.mov(rax, cr0)?;
    guest.or(eax, CR0_AM)?;
    guest.mov(cr0, rax)?;
    guest.allow_user()?;
    guest.mov(ebx, layout::SCRATCH as u32)?;
    guest.user(|guest| {
        guest.attempt("off", |guest| guest.mov(eax, dword_ptr(rbx + 1)))?;
        guest.pushfq()?;
        guest.or(qword_ptr(rsp), RFLAGS_AC)?;
        guest.popfq()?;
        guest.attempt("aligned", |guest| guest.mov(eax, dword_ptr(rbx)))?;
        guest.attempt("on", |guest| guest.mov(eax, dword_ptr(rbx + 1)))
    })
}

#[test]
fn an_alignment_check_is_delivered_with_its_error_code() {
    let facts = run("alignment-check");
    facts.assert_completed("off");
    facts.assert_completed("aligned");
    if is_emulated_by_qemu() {
        // QEMU does not check alignment.
        return facts.assert_completed("on");
    }
    facts.assert_fault("on", AC, 0);
}

/// A breakpoint on the first instruction of #DB's own handler: every delivery raises the next (CVE-2015-8104).
fn debug_loop(guest: &mut Guest) -> Asm {
    let (mut handler, mut begin) = (guest.create_label(), guest.create_label());
    guest.jmp(begin)?;
    guest.set_label(&mut handler)?;
    guest.iretq()?;
    guest.set_label(&mut begin)?;
    guest.gate(DB as u8, handler, 1)?;
    guest.lea(rax, ptr(handler))?;
    guest.mov(dr0, rax)?;
    guest.mov(eax, 1)?;
    guest.mov(dr7, rax)?;
    guest.jmp(handler)
}

#[test]
fn a_loop_of_debug_exceptions_harms_nobody_else() {
    if has_breakpoints() {
        assert_goes_on_until_cancelled("debug-loop", "exception");
    }
}

/// A breakpoint on the stack of #DB's own handler: every delivery writes there and raises the next before the handler's first
/// instruction, so that no run ends for another reason.
fn debug_stack_loop(guest: &mut Guest) -> Asm {
    let (mut handler, mut begin) = (guest.create_label(), guest.create_label());
    guest.jmp(begin)?;
    guest.set_label(&mut handler)?;
    guest.iretq()?;
    guest.set_label(&mut begin)?;
    guest.gate(DB as u8, handler, 1)?;
    guest.mov(rax, layout::IST[0] - 8)?;
    guest.mov(dr0, rax)?;
    // Enabled; writes; eight bytes.
    guest.mov(eax, 1 | 0b1001 << 16)?;
    guest.mov(dr7, rax)?;
    set_trap_flag(guest)?;
    guest.nop()?;
    guest.hlt()
}

#[test]
fn a_loop_of_debug_exceptions_between_instructions_harms_nobody_else() {
    if has_breakpoints() {
        assert_goes_on_until_cancelled("debug-stack-loop", "exception");
    }
}

/// An exit every other instruction, interrupts off, for ever.
fn exit_storm(guest: &mut Guest) -> Asm {
    let mut again = guest.create_label();
    guest.set_label(&mut again)?;
    guest.xor(eax, eax)?;
    guest.cpuid()?;
    guest.jmp(again)
}

#[test]
fn a_storm_of_exits_harms_nobody_else() {
    assert_goes_on_until_cancelled("exit-storm", "cpuid");
}

/// The guest makes exits of this kind for ever; meanwhile the node answers, and a cancellation ends it. Then others run.
#[track_caller]
pub(crate) fn assert_goes_on_until_cancelled(guest: &str, kind: &str) {
    const MANY: u64 = 50;
    let exits = |job: &Job| job.exits.get(kind).copied().unwrap_or_default();
    let looping = bare::start(node(), &image(guest));
    let first = exits(&wait_until(node(), &looping.id, |job| exits(job) > MANY));
    wait_until(node(), &looping.id, |job| exits(job) > first);
    node().client().cancel(&looping.id).unwrap_or_else(|error| panic!("{error}"));
    let ended = wait(node(), &looping.id);
    assert_eq!(ended.conclusion, Some(Conclusion::Cancelled), "{ended:?}");
    run("fault-flags");
}
