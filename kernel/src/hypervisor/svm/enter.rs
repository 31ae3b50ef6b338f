//! The way into the guest and back.
//!
//! AMD APM vol. 2, 15.5 (VMRUN), 15.5.1 (VMLOAD and VMSAVE), 15.17 (global interrupt flag).

use crate::cpu::barriers::overwrite_return_predictions;
use core::arch::naked_asm;
use nestling_machine::state::Registers;

/// Runs the guest until it exits. RAX, RSP, RIP and RFLAGS travel in the VMCB, the other registers in `registers`.
///
/// A physical interrupt ends the run and is still pending afterwards: IF is set only while GIF is clear, so L1 takes nothing here.
///
/// # Safety
/// `vmcb` and `host` are physical addresses of VMCBs, `host` holds this core's own VMSAVE state, and what `vmcb` refers to
/// (nested page table, permission maps) is valid and confines the guest to its own frames.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(registers: *mut Registers, vmcb: u64, host: u64) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdx",
        "push rdi",
        "mov rax, rsi",
        "clgi",
        "sti",
        "mov rcx, [rdi + 1*8]",
        "mov rdx, [rdi + 2*8]",
        "mov rbx, [rdi + 3*8]",
        "mov rbp, [rdi + 5*8]",
        "mov rsi, [rdi + 6*8]",
        "mov r8,  [rdi + 8*8]",
        "mov r9,  [rdi + 9*8]",
        "mov r10, [rdi + 10*8]",
        "mov r11, [rdi + 11*8]",
        "mov r12, [rdi + 12*8]",
        "mov r13, [rdi + 13*8]",
        "mov r14, [rdi + 14*8]",
        "mov r15, [rdi + 15*8]",
        "mov rdi, [rdi + 7*8]",
        "vmload rax",
        "vmrun rax",
        "vmsave rax",
        // The exit restored RSP, and RAX to the VMCB's address.
        "mov rax, [rsp]",
        "mov [rax + 1*8], rcx",
        "mov [rax + 2*8], rdx",
        "mov [rax + 3*8], rbx",
        "mov [rax + 5*8], rbp",
        "mov [rax + 6*8], rsi",
        "mov [rax + 7*8], rdi",
        "mov [rax + 8*8], r8",
        "mov [rax + 9*8], r9",
        "mov [rax + 10*8], r10",
        "mov [rax + 11*8], r11",
        "mov [rax + 12*8], r12",
        "mov [rax + 13*8], r13",
        "mov [rax + 14*8], r14",
        "mov [rax + 15*8], r15",
        // L1's own TR, FS, GS and SYSCALL state, before anything can interrupt it.
        "mov rax, [rsp + 8]",
        "vmload rax",
        "cli",
        "stgi",
        // Before the first return: the guest may have filled the stack of predicted returns.
        "call {forget}",
        "pop rdi",
        "pop rdx",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        forget = sym overwrite_return_predictions,
    )
}
