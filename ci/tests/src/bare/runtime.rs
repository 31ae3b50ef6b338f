//! What every bare guest brings along: descriptor tables, handlers of all vectors, reporting.
//!
//! Intel SDM vol. 3, 3.4-3.5 (descriptors), 6.14 (64-bit interrupt gates and stack frames), 8.7 (64-bit TSS).

use super::layout::{
    CODE, CONTROL, ENTRY, IDT, IST, LINE, RECORD_COUNT, RECORDS, RECORDS_MAX, RSP0, STACK, TSS, USER_STACK,
    WINDOW_DIRECTORIES, WINDOW_TABLE,
};
use super::{Asm, gdt, msr};
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};
use nestling_machine::layout::{ACPI_SLEEP_CONTROL_PORT, BOOT_PAGE_TABLES, UART_PORT};

/// Where the next exception goes on, or 0.
pub(super) const RESUME: u64 = CONTROL + 0x08;
/// How many bytes further exceptions go on, or 0.
pub(super) const SKIP: u64 = CONTROL + 0x10;
/// Start of the running attempt.
pub(super) const START: u64 = CONTROL + 0x18;
/// The running attempt's exception: vector (all ones: none), error code, RIP.
pub(super) const LAST: u64 = CONTROL + 0x20;
const KERNEL_RSP: u64 = CONTROL + 0x40;
const KERNEL_RIP: u64 = CONTROL + 0x48;

/// INT of this ends CPL 3.
pub(super) const LEAVE_USER_VECTOR: u8 = 0xF0;
/// INT of this reports for CPL 3: RDI points at name, count and pointer.
const SAY_VECTOR: u8 = 0xF1;

const SLEEP_S5: u32 = 1 << 5 | 5 << 2;
/// The vectors that push an error code: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX.
const HAS_ERROR_CODE: u32 = 1 << 8 | 0b1_1111 << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;
/// #DB, NMI, #BP, #OF: returned from when nobody has said anything else.
const RETURNED_FROM: u32 = 0b1_1110;
/// Bytes of a vector's code, a call of the common handler.
const VECTOR_BYTES: i32 = 5;

/// The GDT, see [`gdt`].
const DESCRIPTORS: [u64; 12] = [
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x0000_8900_0000_0067 | (TSS & 0xFF_FFFF) << 16 | (TSS >> 24 & 0xFF) << 56,
    0,
    0x00CF_9B00_0000_FFFF,
    0x0000_9B00_0000_FFFF,
    0x0000_9300_0000_FFFF,
];

const REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// The runtime's code and its entry points.
pub(super) struct Runtime {
    pub(super) code: Vec<u8>,
    /// Reports: name, count and pointer to the words are on the stack, and taken off it.
    pub(super) say: u64,
    /// Reports an attempt's outcome: its name is on the stack, and taken off it.
    pub(super) outcome: u64,
    /// Ends the guest.
    pub(super) finish: u64,
    /// Sets the user bit in all page tables.
    pub(super) allow_user: u64,
    /// Goes on at RAX at CPL 3; returns on [`LEAVE_USER_VECTOR`].
    pub(super) enter_user: u64,
}

/// Labels that code refers to before or after its own part.
struct Labels {
    tables: CodeLabel,
    vectors: CodeLabel,
    common: CodeLabel,
    leave_user: CodeLabel,
    say: CodeLabel,
    say_for_user: CodeLabel,
    print: CodeLabel,
    outcome: CodeLabel,
    finish: CodeLabel,
    off: CodeLabel,
    allow_user: CodeLabel,
    enter_user: CodeLabel,
    begin: CodeLabel,
    end: CodeLabel,
    unexpected: CodeLabel,
}

impl Runtime {
    /// The runtime whose first instruction, the guest's first, is at `entry`.
    pub(super) fn assemble(entry: u64) -> Result<Self, IcedError> {
        let mut assembler = CodeAssembler::new(64)?;
        let a = &mut assembler;
        let mut labels = Labels {
            tables: a.create_label(),
            vectors: a.create_label(),
            common: a.create_label(),
            leave_user: a.create_label(),
            say: a.create_label(),
            say_for_user: a.create_label(),
            print: a.create_label(),
            outcome: a.create_label(),
            finish: a.create_label(),
            off: a.create_label(),
            allow_user: a.create_label(),
            enter_user: a.create_label(),
            begin: a.create_label(),
            end: a.create_label(),
            unexpected: a.create_label(),
        };
        prologue(a, &labels)?;
        data(a, &mut labels)?;
        vectors(a, &mut labels)?;
        common_handler(a, &mut labels)?;
        say(a, &mut labels)?;
        print(a, &mut labels)?;
        outcome(a, &mut labels)?;
        user(a, &mut labels)?;
        finish(a, &mut labels)?;
        let result = a.assemble_options(entry, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        Ok(Self {
            say: result.label_ip(&labels.say)?,
            outcome: result.label_ip(&labels.outcome)?,
            finish: result.label_ip(&labels.finish)?,
            allow_user: result.label_ip(&labels.allow_user)?,
            enter_user: result.label_ip(&labels.enter_user)?,
            code: result.inner.code_buffer,
        })
    }
}

/// Keeps the registers as they are, then sets everything up.
fn prologue(a: &mut CodeAssembler, labels: &Labels) -> Asm {
    for (at, register) in (ENTRY..).step_by(8).zip(REGISTERS) {
        a.mov(qword_ptr(at), register)?;
    }
    a.mov(rsp, STACK)?;
    a.pushfq()?;
    a.pop(qword_ptr(ENTRY + 16 * 8))?;

    a.lea(rax, ptr(labels.tables))?;
    load_table(a, size_of_val(&DESCRIPTORS), |a| a.lgdt(ptr(rsp)))?;
    a.mov(eax, u32::from(gdt::DATA))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    let mut reloaded = a.create_label();
    a.push(i32::from(gdt::CODE64))?;
    a.lea(rax, ptr(reloaded))?;
    a.push(rax)?;
    a.db(&[0x48, 0xCB])?; // far return with 64-bit operands
    a.set_label(&mut reloaded)?;
    for (offset, stack) in [(4, RSP0), (0x24, IST[0]), (0x2C, IST[1]), (0x34, IST[2])] {
        a.mov(qword_ptr(TSS + offset), stack as i32)?;
    }
    a.mov(word_ptr(TSS + 0x66), 0x68)?; // no I/O permissions
    a.mov(eax, u32::from(gdt::TSS))?;
    a.ltr(ax)?;

    // Every vector's gate: 64-bit, present, DPL 0.
    let mut next = a.create_label();
    a.lea(rax, ptr(labels.vectors))?;
    a.mov(edi, IDT as u32)?;
    a.set_label(&mut next)?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(dword_ptr(rdi + 2), i32::from(gdt::CODE64))?;
    a.mov(byte_ptr(rdi + 5), 0x8E)?;
    a.mov(ecx, eax)?;
    a.shr(ecx, 16)?;
    a.mov(word_ptr(rdi + 6), cx)?;
    a.add(rax, VECTOR_BYTES)?;
    a.add(edi, 16)?;
    a.cmp(edi, (IDT + 256 * 16) as i32)?;
    a.jb(next)?;
    for (vector, handler) in [(LEAVE_USER_VECTOR, labels.leave_user), (SAY_VECTOR, labels.say_for_user)] {
        let gate = IDT + u64::from(vector) * 16;
        a.lea(rax, ptr(handler))?;
        a.mov(word_ptr(gate), ax)?;
        a.shr(eax, 16)?;
        a.mov(word_ptr(gate + 6), ax)?;
    }
    // CPL 3 may use these two, INT3 and INTO.
    for vector in [3, 4, LEAVE_USER_VECTOR, SAY_VECTOR] {
        a.mov(byte_ptr(IDT + u64::from(vector) * 16 + 5), 0xEE)?;
    }
    a.mov(eax, IDT as u32)?;
    load_table(a, 256 * 16, |a| a.lidt(ptr(rsp)))?;

    // The window's directories; its pages are not mapped yet.
    for (at, to) in [
        (BOOT_PAGE_TABLES + 8, WINDOW_DIRECTORIES),
        (WINDOW_DIRECTORIES, WINDOW_DIRECTORIES + 0x1000),
        (WINDOW_DIRECTORIES + 0x1000, WINDOW_TABLE),
    ] {
        a.mov(qword_ptr(at), to as i32 | 7)?;
    }

    a.push(0)?;
    a.push(0)?;
    a.lea(rax, ptr(labels.begin))?;
    a.push(rax)?;
    a.call(labels.say)?;
    a.jmp(CODE)
}

/// Loads a table register with the table of `bytes` bytes at RAX.
fn load_table(a: &mut CodeAssembler, bytes: usize, load: impl FnOnce(&mut CodeAssembler) -> Asm) -> Asm {
    a.sub(rsp, 16)?;
    a.mov(word_ptr(rsp), bytes as u32 - 1)?;
    a.mov(qword_ptr(rsp + 2), rax)?;
    load(a)?;
    a.add(rsp, 16)
}

/// Descriptors and texts.
fn data(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    a.set_label(&mut labels.tables)?;
    a.dq(&DESCRIPTORS)?;
    a.set_label(&mut labels.begin)?;
    a.db(b"begin\0")?;
    a.set_label(&mut labels.end)?;
    a.db(b"end\0")?;
    a.set_label(&mut labels.unexpected)?;
    a.db(b"unexpected\0")
}

/// A call of the common handler for each vector, which the return address tells apart.
fn vectors(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    a.set_label(&mut labels.vectors)?;
    for _ in 0..256 {
        a.call(labels.common)?;
    }
    Ok(())
}

/// Records the exception or interrupt and goes on as the guest has asked.
fn common_handler(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    let mut framed = a.create_label();
    let mut recorded = a.create_label();
    let mut exception = a.create_label();
    let mut no_resume = a.create_label();
    let mut no_skip = a.create_label();
    let mut done = a.create_label();
    let saved: Vec<AsmRegister64> = REGISTERS.into_iter().filter(|register| *register != rsp).collect();
    let above = 8 * saved.len() as i32;

    a.set_label(&mut labels.common)?;
    for register in &saved {
        a.push(*register)?;
    }
    a.cld()?;
    // The vector, by the return address of its call.
    a.mov(rax, qword_ptr(rsp + above))?;
    a.lea(rcx, ptr(labels.vectors))?;
    a.sub(rax, rcx)?;
    a.sub(rax, VECTOR_BYTES)?;
    a.xor(edx, edx)?;
    a.mov(ecx, VECTOR_BYTES)?;
    a.div(rcx)?;
    // RSI: the frame; RDI: the error code.
    a.lea(rsi, ptr(rsp + above + 8))?;
    a.xor(edi, edi)?;
    a.cmp(eax, 32)?;
    a.jae(framed)?;
    a.mov(ecx, HAS_ERROR_CODE)?;
    a.bt(ecx, eax)?;
    a.jnc(framed)?;
    a.mov(rdi, qword_ptr(rsi))?;
    a.add(rsi, 8)?;
    a.set_label(&mut framed)?;

    a.mov(rbx, qword_ptr(RECORD_COUNT))?;
    a.inc(qword_ptr(RECORD_COUNT))?;
    a.cmp(rbx, RECORDS_MAX as i32)?;
    a.jae(recorded)?;
    a.shl(rbx, 6)?;
    a.mov(qword_ptr(rbx + RECORDS as i32), rax)?;
    a.mov(qword_ptr(rbx + RECORDS as i32 + 8), rdi)?;
    // RIP, CS, RFLAGS, RSP; SS last.
    for (from, to) in [(0, 16), (8, 24), (16, 32), (24, 40), (32, 56)] {
        a.mov(rcx, qword_ptr(rsi + from))?;
        a.mov(qword_ptr(rbx + RECORDS as i32 + to), rcx)?;
    }
    a.mov(rcx, cr2)?;
    a.mov(qword_ptr(rbx + RECORDS as i32 + 48), rcx)?;
    a.set_label(&mut recorded)?;

    a.cmp(eax, 32)?;
    a.jb(exception)?;
    a.mov(ecx, msr::EOI)?;
    a.xor(eax, eax)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.jmp(done)?;

    a.set_label(&mut exception)?;
    a.mov(qword_ptr(LAST), rax)?;
    a.mov(qword_ptr(LAST + 8), rdi)?;
    a.mov(rcx, qword_ptr(rsi))?;
    a.mov(qword_ptr(LAST + 16), rcx)?;
    a.xor(ecx, ecx)?;
    a.xchg(qword_ptr(RESUME), rcx)?;
    a.test(rcx, rcx)?;
    a.jz(no_resume)?;
    a.mov(qword_ptr(rsi), rcx)?;
    a.jmp(done)?;
    a.set_label(&mut no_resume)?;
    a.mov(rcx, qword_ptr(SKIP))?;
    a.test(rcx, rcx)?;
    a.jz(no_skip)?;
    a.add(qword_ptr(rsi), rcx)?;
    a.jmp(done)?;
    a.set_label(&mut no_skip)?;
    a.mov(ecx, RETURNED_FROM)?;
    a.bt(ecx, eax)?;
    a.jc(done)?;
    // Vector, error code, RIP, CR2.
    a.mov(rcx, cr2)?;
    a.mov(qword_ptr(LAST + 24), rcx)?;
    a.push(LAST as i32)?;
    a.push(4)?;
    a.lea(rax, ptr(labels.unexpected))?;
    a.push(rax)?;
    a.call(labels.say)?;
    a.jmp(labels.off)?;

    a.set_label(&mut done)?;
    a.mov(qword_ptr(rsp + above), rsi)?;
    for register in saved.iter().rev() {
        a.pop(*register)?;
    }
    a.mov(rsp, qword_ptr(rsp))?;
    a.iretq()
}

/// Reports by itself or, at CPL 3, by an interrupt.
fn say(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    let mut user = a.create_label();
    let mut done = a.create_label();
    a.set_label(&mut labels.say)?;
    a.pushfq()?;
    a.push(rdi)?;
    a.push(rax)?;
    a.lea(rdi, ptr(rsp + 32))?;
    a.mov(eax, cs)?;
    a.test(al, 3)?;
    a.jnz(user)?;
    a.call(labels.print)?;
    a.jmp(done)?;
    a.set_label(&mut user)?;
    a.int(i32::from(SAY_VECTOR))?;
    a.set_label(&mut done)?;
    a.pop(rax)?;
    a.pop(rdi)?;
    a.popfq()?;
    a.ret_1(24)?;

    a.set_label(&mut labels.say_for_user)?;
    a.call(labels.print)?;
    a.iretq()
}

/// Prints name, `=` and the words in hexadecimal, by one string output; RDI points at name, count and pointer.
fn print(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    let mut name = a.create_label();
    let mut named = a.create_label();
    let mut word = a.create_label();
    let mut digit = a.create_label();
    let mut leading = a.create_label();
    let mut put = a.create_label();
    let mut letters = a.create_label();
    let mut end = a.create_label();
    let kept = [rax, rbx, rcx, rdx, rsi, rdi, r8, r9];

    a.set_label(&mut labels.print)?;
    for register in kept {
        a.push(register)?;
    }
    a.cld()?;
    a.mov(rsi, qword_ptr(rdi))?;
    a.mov(r8, qword_ptr(rdi + 8))?;
    a.mov(rbx, qword_ptr(rdi + 16))?;
    a.mov(edi, LINE as u32)?;
    a.set_label(&mut name)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(named)?;
    a.stosb()?;
    a.jmp(name)?;
    a.set_label(&mut named)?;
    a.mov(al, u32::from(b'='))?;
    a.stosb()?;

    a.set_label(&mut word)?;
    a.sub(r8, 1)?;
    a.jc(end)?;
    a.mov(rdx, qword_ptr(rbx))?;
    a.add(rbx, 8)?;
    a.mov(ecx, 16)?;
    // R9: a digit other than a leading zero was printed.
    a.xor(r9d, r9d)?;
    a.set_label(&mut digit)?;
    a.rol(rdx, 4)?;
    a.mov(eax, edx)?;
    a.and(eax, 15)?;
    a.or(r9d, eax)?;
    a.jnz(put)?;
    a.cmp(ecx, 1)?;
    a.jne(leading)?;
    a.set_label(&mut put)?;
    a.add(al, i32::from(b'0'))?;
    a.cmp(al, i32::from(b'9'))?;
    a.jbe(letters)?;
    a.add(al, i32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut letters)?;
    a.stosb()?;
    a.or(r9d, 1)?;
    a.set_label(&mut leading)?;
    a.dec(ecx)?;
    a.jnz(digit)?;
    a.mov(al, u32::from(b' '))?;
    a.stosb()?;
    a.jmp(word)?;

    a.set_label(&mut end)?;
    a.mov(al, u32::from(b'\n'))?;
    a.stosb()?;
    a.mov(esi, LINE as u32)?;
    a.mov(ecx, edi)?;
    a.sub(ecx, esi)?;
    a.mov(edx, u32::from(UART_PORT))?;
    a.rep().outsb()?;
    for register in kept.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()
}

/// Reports what became of an attempt.
fn outcome(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    let mut none = a.create_label();
    a.set_label(&mut labels.outcome)?;
    a.pushfq()?;
    a.push(rax)?;
    a.mov(rax, qword_ptr(START))?;
    a.sub(qword_ptr(LAST + 16), rax)?;
    a.xor(eax, eax)?;
    a.cmp(qword_ptr(LAST), -1)?;
    a.je(none)?;
    a.mov(eax, 3)?;
    a.set_label(&mut none)?;
    a.push(LAST as i32)?;
    a.push(rax)?;
    a.push(qword_ptr(rsp + 40))?;
    a.call(labels.say)?;
    a.pop(rax)?;
    a.popfq()?;
    a.ret_1(8)
}

/// The way to CPL 3 and back.
fn user(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    let mut next = a.create_label();
    a.set_label(&mut labels.enter_user)?;
    a.pop(qword_ptr(KERNEL_RIP))?;
    a.mov(qword_ptr(KERNEL_RSP), rsp)?;
    a.push(i32::from(gdt::USER_DATA))?;
    a.push(USER_STACK as i32)?;
    a.push(2)?;
    a.push(i32::from(gdt::USER_CODE64))?;
    a.push(rax)?;
    a.iretq()?;
    a.set_label(&mut labels.leave_user)?;
    a.mov(rsp, qword_ptr(KERNEL_RSP))?;
    a.jmp(qword_ptr(KERNEL_RIP))?;

    // The root, the directory pointers and the four directories stand behind each other.
    a.set_label(&mut labels.allow_user)?;
    a.mov(eax, BOOT_PAGE_TABLES as u32)?;
    a.set_label(&mut next)?;
    a.or(byte_ptr(rax), 4)?;
    a.add(eax, 8)?;
    a.cmp(eax, (BOOT_PAGE_TABLES + 6 * 0x1000) as i32)?;
    a.jb(next)?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.ret()
}

/// The end of every guest.
fn finish(a: &mut CodeAssembler, labels: &mut Labels) -> Asm {
    a.set_label(&mut labels.finish)?;
    a.push(0)?;
    a.push(0)?;
    a.lea(rax, ptr(labels.end))?;
    a.push(rax)?;
    a.call(labels.say)?;
    a.set_label(&mut labels.off)?;
    a.mov(edx, u32::from(ACPI_SLEEP_CONTROL_PORT))?;
    a.mov(eax, SLEEP_S5)?;
    a.out(dx, al)?;
    a.cli()?;
    a.hlt()
}
