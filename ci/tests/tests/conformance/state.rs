//! State that no exit may change and no other machine may see: system call registers, vector and debug registers.
//!
//! Intel SDM vol. 3, 5.8.7-5.8.8 (SYSENTER, SYSCALL), 17.2 (debug registers); vol. 1, 10.5 (FXSAVE), 13.4 (XSAVE area).

use crate::cpuid::with_xsave;
use crate::{image, node, run};
use iced_x86::code_asm::*;
use nestling_tests::bare::layout::{FRESH, SCRATCH, STACK};
use nestling_tests::bare::{self, Asm, Facts, Guest, Program, gdt, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[
    ("state-syscall", syscall),
    ("state-sysenter", sysenter),
    ("state-bases", bases),
    ("state-vectors", vectors),
    ("state-avx", avx),
    ("state-debug", debug_registers),
    ("state-general", general_registers),
    ("state-fill", fill),
    ("state-read", read),
];

const UD: u64 = 6;
const CR4_OSFXSR_OSXMMEXCPT: i32 = 3 << 9;
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xC000_0103;
const TSC_ADJUST: u32 = 0x3B;
const IOAPIC: u32 = 0xFEC0_0000;

type Exit = (&'static str, fn(&mut Guest) -> Asm);

/// One exit of each kind that the guest goes on from. They change RAX, RBX, RCX, RDX, RSI, RDI and flags.
const EXITS: &[Exit] = &[
    ("cpuid", |guest| guest.cpuid_leaf(0, 0)),
    ("in", |guest| guest.in_(al, 0x80)),
    ("out", |guest| guest.out(0x80, al)),
    ("outs", |guest| {
        guest.mov(esi, SCRATCH as u32)?;
        guest.mov(edx, 0x1234)?;
        guest.outsb()
    }),
    ("rdmsr", |guest| guest.rdmsr_value(msr::APIC_BASE)),
    ("wrmsr", |guest| guest.wrmsr_value(msr::TPR, 0)),
    ("mmio", |guest| {
        guest.mov(esi, IOAPIC)?;
        guest.mov(eax, dword_ptr(rsi))
    }),
    ("wbinvd", |guest| guest.wbinvd()),
    ("exception", |guest| {
        guest.skip_on_exception(3)?;
        guest.vmcall()?;
        guest.skip_on_exception(0)
    }),
    ("self-ipi", |guest| {
        guest.enable_apic()?;
        guest.sti()?;
        guest.self_ipi(0x60)?;
        guest.cli()
    }),
    ("timer-hlt", |guest| {
        guest.timer(0x61, 0, 1000)?;
        guest.sti()?;
        guest.hlt()?;
        guest.cli()
    }),
    ("nested-fault", |guest| {
        // The next of the regions nothing has touched.
        guest.mov(rsi, qword_ptr(SCRATCH + 0x7_0000))?;
        guest.add(qword_ptr(SCRATCH + 0x7_0000), 0x20_0000)?;
        guest.add(rsi, FRESH[0] as i32)?;
        guest.mov(eax, dword_ptr(rsi))
    }),
    ("vector-of-time", |guest| {
        // Long enough for a timer interrupt of the node itself, on any bed.
        let mut again = guest.create_label();
        guest.mov(ecx, 20_000)?;
        guest.set_label(&mut again)?;
        guest.dec(ecx)?;
        guest.jne(again)
    }),
];

/// SYSCALL from CPL 3 and SYSRET back, with exits in between; R12 counts.
fn syscall(guest: &mut Guest) -> Asm {
    let mut handler = guest.create_label();
    let mut over = guest.create_label();
    guest.allow_user()?;
    guest.wrmsr_value(msr::EFER, 0x501)?;
    guest.wrmsr_value(msr::STAR, gdt::STAR)?;
    guest.wrmsr_value(msr::SFMASK, 0x4_0700)?;
    guest.lea(rax, ptr(handler))?;
    guest.mov(rdx, rax)?;
    guest.shr(rdx, 32)?;
    guest.mov(ecx, msr::LSTAR)?;
    guest.wrmsr()?;
    guest.jmp(over)?;

    guest.set_label(&mut handler)?;
    guest.mov(r13, rsp)?;
    guest.mov(rsp, STACK - 0x800)?;
    guest.pushfq()?;
    guest.pop(r14)?;
    guest.mov(eax, cs)?;
    guest.shl(eax, 16)?;
    guest.mov(edx, ss)?;
    guest.or(eax, edx)?;
    guest.mov(r15d, eax)?;
    guest.push(rcx)?;
    guest.push(r11)?;
    guest.cpuid_leaf(0, 0)?;
    guest.in_(al, 0x80)?;
    guest.mov(esi, IOAPIC)?;
    guest.mov(eax, dword_ptr(rsi))?;
    guest.rdmsr_value(msr::LSTAR)?;
    guest.mov(r10, rax)?;
    guest.pop(r11)?;
    guest.pop(rcx)?;
    guest.inc(r12d)?;
    guest.mov(rsp, r13)?;
    guest.sysretq()?;

    guest.set_label(&mut over)?;
    guest.xor(r12d, r12d)?;
    guest.user(|guest| {
        for call in 0..2 {
            let mut back = guest.create_label();
            guest.push(0x4_0647)?; // AC, DF, IF cannot be set by a program, ZF, PF, CF
            guest.popfq()?;
            guest.lea(r9, ptr(back))?;
            guest.syscall()?;
            guest.set_label(&mut back)?;
            guest.pushfq()?;
            guest.pop(rax)?;
            guest.mov(rbx, rcx)?;
            guest.sub(rbx, r9)?;
            guest.push(2)?;
            guest.popfq()?;
            guest.mov(edx, cs)?;
            guest.mov(esi, ss)?;
            guest.facts(&format!("call-{call}"), &[rbx, r11, r14, r15, rax, rdx, rsi])?;
        }
        guest.fact("rsp", rsp)
    })?;
    guest.facts("calls", &[r12])
}

/// SYSENTER from CPL 3 and SYSEXIT back: Intel's only, AMD's processors do not have it in long mode.
fn sysenter(guest: &mut Guest) -> Asm {
    let mut handler = guest.create_label();
    let mut over = guest.create_label();
    guest.allow_user()?;
    guest.wrmsr_value(msr::SYSENTER_CS, gdt::CODE64.into())?;
    guest.wrmsr_value(msr::SYSENTER_ESP, STACK - 0x800)?;
    guest.lea(rax, ptr(handler))?;
    guest.xor(edx, edx)?;
    guest.mov(ecx, msr::SYSENTER_EIP)?;
    guest.wrmsr()?;
    for (name, index) in [("cs", msr::SYSENTER_CS), ("esp", msr::SYSENTER_ESP), ("eip", msr::SYSENTER_EIP)] {
        guest.rdmsr_value(index)?;
        guest.fact(name, rax)?;
    }
    guest.lea(rax, ptr(handler))?;
    guest.fact("handler", rax)?;
    guest.jmp(over)?;

    guest.set_label(&mut handler)?;
    guest.mov(r13, rsp)?;
    guest.pushfq()?;
    guest.pop(r14)?;
    guest.mov(r15d, cs)?;
    guest.cpuid_leaf(0, 0)?;
    guest.in_(al, 0x80)?;
    guest.mov(rdx, r8)?;
    guest.mov(rcx, r9)?;
    guest.sysexitq()?;

    guest.set_label(&mut over)?;
    guest.user(|guest| {
        let mut back = guest.create_label();
        let mut end = guest.create_label();
        guest.lea(r8, ptr(back))?;
        guest.mov(r9, rsp)?;
        guest.attempt("sysenter", |guest| guest.sysenter())?;
        guest.jmp(end)?;
        guest.set_label(&mut back)?;
        guest.sub(r9, rsp)?;
        guest.mov(edx, cs)?;
        guest.mov(esi, ss)?;
        guest.facts("back", &[r9, r13, r14, r15, rdx, rsi])?;
        guest.set_label(&mut end)?;
        guest.nop()
    })
}

/// FS, GS and KERNEL_GS bases over every exit, with SWAPGS in between.
fn bases(guest: &mut Guest) -> Asm {
    const BASES: [(u32, u64); 3] = [
        (msr::FS_BASE, 0x1111_2222_3333),
        (msr::GS_BASE, 0xFFFF_8888_0000_1000),
        (msr::KERNEL_GS_BASE, 0x7777_0000),
    ];
    for (index, value) in BASES {
        guest.wrmsr_value(index, value)?;
    }
    for (name, exit) in EXITS {
        exit(guest)?;
        guest.swapgs()?;
        exit(guest)?;
        for (register, (index, _)) in [r8, r9, r10].into_iter().zip(BASES) {
            guest.rdmsr_value(index)?;
            guest.mov(register, rax)?;
        }
        guest.facts(name, &[r8, r9, r10])?;
        guest.swapgs()?;
    }
    // What they are the bases of.
    guest.wrmsr_value(msr::FS_BASE, SCRATCH)?;
    guest.wrmsr_value(msr::KERNEL_GS_BASE, SCRATCH + 8)?;
    guest.mov(qword_ptr(SCRATCH + 8), 0x1234)?;
    guest.mov(qword_ptr(SCRATCH + 16), 0x5678)?;
    guest.swapgs()?;
    guest.cpuid_leaf(0, 0)?;
    guest.mov(ecx, 8)?;
    guest.mov(rax, qword_ptr(rcx).fs())?;
    guest.mov(rdx, qword_ptr(rcx).gs())?;
    guest.facts("loads", &[rax, rdx])
}

/// Lets the guest use SSE.
fn enable_sse(guest: &mut Guest) -> Asm {
    guest.mov(rax, cr4)?;
    guest.or(eax, CR4_OSFXSR_OSXMMEXCPT)?;
    guest.mov(cr4, rax)?;
    guest.mov(rax, cr0)?;
    guest.and(eax, !0xE)?; // MP, EM, TS
    guest.mov(cr0, rax)
}

/// 16 bytes for each register, each other.
fn pattern(seed: u8) -> Vec<u8> {
    (0..16 * 16).map(|at| seed.wrapping_add(at as u8).wrapping_mul(167)).collect()
}

const XMM: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
/// Fills XMM0-15, the x87 stack and both control words.
fn fill_sse(guest: &mut Guest) -> Asm {
    let values = guest.data(&pattern(1));
    let mxcsr = guest.data(&0x5F80_u32.to_le_bytes()); // round up, all exceptions masked
    let control = guest.data(&0x0B7F_u16.to_le_bytes()); // round up, all exceptions masked
    for (offset, register) in (0..).step_by(16).zip(XMM) {
        guest.movups(register, xmmword_ptr(values + offset))?;
    }
    guest.ldmxcsr(dword_ptr(mxcsr))?;
    guest.fninit()?;
    guest.fldcw(word_ptr(control))?;
    guest.fldpi()?;
    guest.fldl2e()?;
    guest.fld1()
}

/// Saves by FXSAVE to `to` and reports how many of the 416 bytes (control, x87 and XMM registers) differ from those at `from`: RCX at the
/// first difference, which is 0 when there is none.
fn compare_fxsave(guest: &mut Guest, name: &str, from: u64, to: u64) -> Asm {
    guest.fxsave64(ptr(to))?;
    guest.mov(rsi, from)?;
    guest.mov(rdi, to)?;
    guest.mov(ecx, 416)?;
    guest.cld()?;
    guest.repe().cmpsb()?;
    guest.setne(al)?;
    guest.movzx(eax, al)?;
    guest.facts(name, &[rax, rcx])
}

fn vectors(guest: &mut Guest) -> Asm {
    enable_sse(guest)?;
    fill_sse(guest)?;
    guest.fxsave64(ptr(SCRATCH))?;
    for (name, exit) in EXITS {
        exit(guest)?;
        compare_fxsave(guest, name, SCRATCH, SCRATCH + 0x1000)?;
    }
    guest.facts_at("control", SCRATCH, 1)?;
    guest.facts_at("mxcsr", SCRATCH + 24, 1)?;
    guest.facts_at("xmm", SCRATCH + 160, 32)
}

/// Switches AVX on and runs `body`, where there is AVX.
fn with_avx(guest: &mut Guest, body: impl FnOnce(&mut Guest) -> Asm) -> Asm {
    with_xsave(guest, |guest| {
        let mut without = guest.create_label();
        guest.cpuid_leaf(0xD, 0)?;
        guest.and(eax, 7)?;
        guest.cmp(eax, 7)?;
        guest.jne(without)?;
        guest.xor(ecx, ecx)?;
        guest.xor(edx, edx)?;
        guest.xsetbv()?;
        body(guest)?;
        guest.set_label(&mut without)?;
        guest.nop()
    })
}

/// Loads or stores YMM0-15 behind each other at `address`. Changes RAX.
///
/// VMOVUPS in bytes: the assembler is built without VEX, since the hypervisor's decoder does without.
fn move_ymm(guest: &mut Guest, address: u64, store: bool) -> Asm {
    guest.mov(eax, address as u32)?;
    for register in 0..16_u8 {
        let inverted_r = if register < 8 { 0x80 } else { 0 };
        let opcode = if store { 0x11 } else { 0x10 };
        // VEX.256.0F.WIG, then [RAX + disp32].
        guest.db(&[0xC4, inverted_r | 0x61, 0x7C, opcode, 0x80 | (register & 7) << 3])?;
        guest.db(&(u32::from(register) * 32).to_le_bytes())?;
    }
    Ok(())
}

/// Fills YMM0-15: the lower halves with one pattern, the upper ones with another.
fn fill_avx(guest: &mut Guest) -> Asm {
    let (low, high) = (pattern(1), pattern(77));
    let both: Vec<u8> =
        low.chunks(16).zip(high.chunks(16)).flat_map(|(low, high)| [low, high].concat()).collect();
    let values = guest.data(&both);
    move_ymm(guest, values, false)
}

fn avx(guest: &mut Guest) -> Asm {
    enable_sse(guest)?;
    with_avx(guest, |guest| {
        fill_avx(guest)?;
        move_ymm(guest, SCRATCH, true)?;
        for (name, exit) in EXITS {
            exit(guest)?;
            move_ymm(guest, SCRATCH + 0x1000, true)?;
            guest.mov(rsi, SCRATCH)?;
            guest.mov(rdi, SCRATCH + 0x1000)?;
            guest.mov(ecx, 512)?;
            guest.cld()?;
            guest.repe().cmpsb()?;
            guest.setne(al)?;
            guest.movzx(eax, al)?;
            guest.facts(name, &[rax, rcx])?;
        }
        guest.facts_at("ymm0", SCRATCH, 4)
    })
}

fn read_debug(guest: &mut Guest, name: &str) -> Asm {
    guest.mov(r8, dr0)?;
    guest.mov(r9, dr1)?;
    guest.mov(r10, dr2)?;
    guest.mov(r11, dr3)?;
    guest.mov(r12, dr6)?;
    guest.mov(r13, dr7)?;
    guest.facts(name, &[r8, r9, r10, r11, r12, r13])
}

const DEBUG: [u64; 4] = [0x1234_5678, 0xFFFF_8000_0000_1000, 0x7FFF_FFFF_F000, 0x5_5555];
/// A data breakpoint of four bytes that nothing hits.
const DR7: u64 = 0x0000_0000_000F_0402;

fn fill_debug(guest: &mut Guest) -> Asm {
    for (register, value) in [dr0, dr1, dr2, dr3].into_iter().zip(DEBUG) {
        guest.mov(rax, value)?;
        guest.mov(register, rax)?;
    }
    guest.mov(eax, DR7 as u32)?;
    guest.mov(dr7, rax)
}

fn debug_registers(guest: &mut Guest) -> Asm {
    read_debug(guest, "reset")?;
    fill_debug(guest)?;
    for (name, exit) in EXITS {
        exit(guest)?;
        read_debug(guest, name)?;
    }
    guest.mov(eax, 0x400)?;
    guest.mov(dr7, rax)?;
    read_debug(guest, "off")
}

/// R8-R15, RBP and RSP over every exit, RBX to RDI over those that use none.
fn general_registers(guest: &mut Guest) -> Asm {
    let registers = [rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
    for (name, exit) in EXITS {
        for (value, register) in (1_u64..).zip(registers) {
            guest.mov(register, 0x0101_0101_0101_0101 * value)?;
        }
        exit(guest)?;
        guest.facts(name, &registers[5..])?;
    }
    for (value, register) in (1_u64..).zip(registers) {
        guest.mov(register, 0x0101_0101_0101_0101 * value)?;
    }
    guest.in_(al, 0x80)?;
    guest.wbinvd()?;
    guest.skip_on_exception(3)?;
    guest.vmcall()?;
    guest.facts("all", &registers)
}

/// Leaves something everywhere.
fn fill(guest: &mut Guest) -> Asm {
    enable_sse(guest)?;
    fill_sse(guest)?;
    with_avx(guest, fill_avx)?;
    fill_debug(guest)?;
    for (index, value) in [
        (msr::STAR, 0x1111_2222_3333_4444),
        (msr::LSTAR, 0x5555_0000_1111),
        (msr::CSTAR, 0x5555_0000_2222),
        (msr::SFMASK, 0x4_7700),
        (msr::FS_BASE, 0x5555_0000_3333),
        (msr::GS_BASE, 0x5555_0000_4444),
        (msr::KERNEL_GS_BASE, 0x5555_0000_5555),
        (msr::SYSENTER_CS, 0x18),
        (msr::SYSENTER_ESP, 0x1111_0000),
        (msr::SYSENTER_EIP, 0x2222_0000),
        (TSC_AUX, 0x77),
        (PAT, 0x0105_0406_0007_0106),
        (TSC_ADJUST, 0x1000),
        (msr::TPR, 0x50),
        (msr::EFER, 0xD01),
    ] {
        guest.wrmsr_value(index, value)?;
    }
    guest.mov(rax, 0x1234_5000_u64)?;
    guest.mov(cr2, rax)?;
    for register in [rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] {
        guest.mov(register, 0xA5A5_A5A5_A5A5_A5A5_u64)?;
    }
    guest.facts("filled", &[rbx])
}

const READ: &[(&str, u32, u64)] = &[
    ("star", msr::STAR, 0),
    ("lstar", msr::LSTAR, 0),
    ("cstar", msr::CSTAR, 0),
    ("sfmask", msr::SFMASK, 0),
    ("fs", msr::FS_BASE, 0),
    ("gs", msr::GS_BASE, 0),
    ("kernel-gs", msr::KERNEL_GS_BASE, 0),
    ("sysenter-cs", msr::SYSENTER_CS, 0),
    ("sysenter-esp", msr::SYSENTER_ESP, 0),
    ("sysenter-eip", msr::SYSENTER_EIP, 0),
    ("tsc-aux", TSC_AUX, 0),
    ("pat", PAT, 0x0007_0406_0007_0406),
    ("tsc-adjust", TSC_ADJUST, 0),
    ("tpr", msr::TPR, 0),
    ("efer", msr::EFER, 0x500),
];

/// Reads everything as the machine found it.
fn read(guest: &mut Guest) -> Asm {
    guest.facts_at("general", bare::layout::ENTRY, 16)?;
    read_debug(guest, "debug")?;
    guest.mov(rax, cr0)?;
    guest.mov(rcx, cr2)?;
    guest.mov(rdx, cr4)?;
    guest.mov(rbx, cr8)?;
    guest.facts("control", &[rax, rcx, rdx, rbx])?;
    for &(name, index, _) in READ {
        guest.rdmsr_value(index)?;
        guest.fact(name, rax)?;
    }
    enable_sse(guest)?;
    guest.fxsave64(ptr(SCRATCH))?;
    guest.facts_at("x87-and-sse", SCRATCH, 4)?;
    // The registers: how many of their words are not zero. The x87 stack's are 80 bits of 128.
    let count = |guest: &mut Guest, name: &str, from: u64, words: u32| {
        let mut again = guest.create_label();
        let mut zero = guest.create_label();
        guest.mov(rsi, from)?;
        guest.mov(ecx, words)?;
        guest.xor(edx, edx)?;
        guest.set_label(&mut again)?;
        guest.cmp(qword_ptr(rsi), 0)?;
        guest.je(zero)?;
        guest.inc(edx)?;
        guest.set_label(&mut zero)?;
        guest.add(rsi, 8)?;
        guest.dec(ecx)?;
        guest.jne(again)?;
        guest.fact(name, rdx)
    };
    count(guest, "x87-stack", SCRATCH + 32, 16)?;
    count(guest, "xmm", SCRATCH + 160, 32)?;
    with_xsave(guest, |guest| {
        guest.xor(ecx, ecx)?;
        guest.xgetbv()?;
        guest.facts("xcr0", &[rax, rdx])
    })?;
    with_avx(guest, |guest| {
        move_ymm(guest, SCRATCH + 0x1000, true)?;
        count(guest, "ymm", SCRATCH + 0x1000, 64)
    })
}

#[test]
fn syscall_and_sysret_keep_their_state_over_exits() {
    let facts = run("state-syscall");
    for call in ["call-0", "call-1"] {
        let [rcx_offset, r11_, handler_flags, selectors, flags, code, stack] = facts.words(call) else {
            panic!("{facts}")
        };
        assert_eq!(*rcx_offset, 0, "RCX is the next instruction\n{facts}");
        assert_eq!(*r11_, 0x4_0447, "R11 is RFLAGS; CPL 3 cannot set IF\n{facts}");
        assert_eq!(handler_flags & 0x4_0702, 2, "SFMASK clears AC, DF, IF and TF\n{facts}");
        assert_eq!(*selectors, 0x08_0010, "CS and SS of STAR\n{facts}");
        assert_eq!(*flags, 0x4_0447, "SYSRET restores RFLAGS\n{facts}");
        assert_eq!((*code as u16, *stack as u16), (gdt::USER_CODE64, gdt::USER_DATA), "{facts}");
    }
    facts.assert("rsp", bare::layout::USER_STACK);
    facts.assert("calls", 2);
}

#[test]
fn sysenter_and_sysexit_keep_their_state_over_exits() {
    let facts = run("state-sysenter");
    facts.assert("cs", 8);
    facts.assert("esp", STACK - 0x800);
    facts.assert("eip", facts.value("handler"));
    if !facts.has("back") {
        // AMD's processors have no SYSENTER in long mode (APM vol. 3, SYSENTER).
        return facts.assert_fault("sysenter", UD, 0);
    }
    let [rsp_offset, handler_rsp, handler_flags, handler_cs, code, stack] = facts.words("back") else {
        panic!("{facts}")
    };
    assert_eq!((*rsp_offset, *handler_rsp), (0, STACK - 0x800), "{facts}");
    assert_eq!(handler_flags & 0x2_0200, 0, "IF and VM are clear\n{facts}");
    assert_eq!(*handler_cs as u16, gdt::CODE64, "{facts}");
    assert_eq!((*code as u16, *stack as u16), (gdt::USER_CODE64, gdt::USER_DATA_SYSEXIT), "{facts}");
}

/// The fact of every kind of exit is these words.
fn assert_over_exits(facts: &Facts, expected: &[u64]) {
    EXITS.iter().for_each(|(name, _)| facts.assert_words(name, expected));
}

#[test]
fn segment_bases_and_swapgs_are_kept_over_every_exit() {
    let facts = run("state-bases");
    assert_over_exits(&facts, &[0x1111_2222_3333, 0x7777_0000, 0xFFFF_8888_0000_1000]);
    facts.assert_words("loads", &[0x1234, 0x5678]);
}

#[test]
fn x87_and_sse_state_is_kept_over_every_exit() {
    let facts = run("state-vectors");
    assert_over_exits(&facts, &[0, 0]);
    facts.assert_that("control", "the control word 0xB7F", |word| word & 0xFFFF == 0xB7F);
    facts.assert_that("mxcsr", "MXCSR 0x5F80", |word| word & 0xFFFF_FFFF == 0x5F80);
    let expected: Vec<u64> =
        pattern(1).chunks(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
    facts.assert_words("xmm", &expected);
}

#[test]
fn avx_state_is_kept_over_every_exit() {
    let facts = run("state-avx");
    if facts.has("ymm0") {
        assert_over_exits(&facts, &[0, 0]);
        assert!(facts.words("ymm0").iter().all(|word| *word != 0), "{facts}");
    }
}

#[test]
fn debug_registers_are_kept_over_every_exit() {
    let facts = run("state-debug");
    facts.assert_words("reset", &[0, 0, 0, 0, 0xFFFF_0FF0, 0x400]);
    let [a, b, c, d] = DEBUG;
    assert_over_exits(&facts, &[a, b, c, d, 0xFFFF_0FF0, DR7]);
    facts.assert_words("off", &[a, b, c, d, 0xFFFF_0FF0, 0x400]);
}

#[test]
fn general_registers_are_kept_over_every_exit() {
    let facts = run("state-general");
    let expected: Vec<u64> = (1..=14).map(|value| 0x0101_0101_0101_0101 * value).collect();
    assert_over_exits(&facts, &expected[5..]);
    facts.assert_words("all", &expected);
}

#[test]
fn no_machine_sees_what_another_has_left_in_registers() {
    let node = node();
    // The second is queued before the first has ended, so that nothing comes between them.
    let fill = bare::start(node, &image("state-fill"));
    let read = bare::start(node, &image("state-read"));
    let fill = bare::finish(node, &fill);
    fill.assert_finished();
    fill.assert("filled", 0xA5A5_A5A5_A5A5_A5A5);
    let facts = bare::finish(node, &read);
    facts.assert_finished();
    let mut general = [0; 16];
    general[4] = nestling_machine::layout::BOOT_PAGE_TABLES;
    general[6] = nestling_machine::layout::BOOT_PARAMS;
    facts.assert_words("general", &general);
    facts.assert_words("debug", &[0, 0, 0, 0, 0xFFFF_0FF0, 0x400]);
    facts.assert_words("control", &[0x8000_0011, 0, 0x20, 0]);
    for (name, _, expected) in READ {
        facts.assert(name, *expected);
    }
    // FCW 0x37F, FSW and FTW empty; no pointers; MXCSR 0x1F80.
    let [control, last_instruction, last_data, mxcsr] = facts.words("x87-and-sse") else { panic!("{facts}") };
    assert_eq!((*control, *last_instruction, *last_data), (0x37F, 0, 0), "{facts}");
    assert_eq!(*mxcsr as u32, 0x1F80, "{facts}");
    facts.assert("x87-stack", 0);
    facts.assert("xmm", 0);
    if facts.has("xcr0") {
        facts.assert_words("xcr0", &[1, 0]);
    }
    if facts.has("ymm") {
        facts.assert("ymm", 0);
    }
}
