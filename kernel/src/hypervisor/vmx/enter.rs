//! The way into the guest and back.
//!
//! Intel SDM vol. 3, 27 (VM entries), 28.5 (what an exit loads), 31 (VMLAUNCH, VMRESUME, VMWRITE).

use super::fields::Field;
use crate::cpu::barriers::overwrite_return_predictions;
use core::arch::naked_asm;
use nestling_machine::state::Registers;

/// How an attempt to enter ended.
pub const EXITED: u64 = 0;

unsafe extern "C" {
    /// Where an exit continues: a label within [`enter`].
    fn vmx_exit_point();
}

/// The value of the field HostRip.
pub fn exit_point() -> u64 {
    vmx_exit_point as *const () as u64
}

/// Runs the guest of the current VMCS until it exits, and returns [`EXITED`]; 1 when the entry failed with an error number in the VMCS, 2
/// when there was no current VMCS. RSP, RIP and RFLAGS travel in the VMCS, the other registers in `registers`.
///
/// `host_rsp` is the value that the field HostRsp has: it is written only when it differs. Interrupts stay off: one that ends the guest's
/// run is still pending afterwards.
///
/// # Safety
/// The current VMCS was launched if and only if `launched`, its host state is this core's, its HostRip is [`exit_point`], and what it
/// refers to (nested page table, MSR bitmap) is valid and confines the guest to its own frames.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(registers: *mut Registers, host_rsp: *mut u64, launched: bool) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "cmp rsp, [rsi]",
        "je 2f",
        "mov [rsi], rsp",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "2:",
        // The flag decides below: nothing in between changes it.
        "test dl, dl",
        "mov rax, [rdi + 0*8]",
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
        "jnz 3f",
        "vmlaunch",
        "jmp 4f",
        "3:",
        "vmresume",
        "4:",
        // The entry failed; registers and stack are as they were. Carry: no current VMCS.
        "mov eax, 1",
        "adc eax, 0",
        "pop rdi",
        "jmp 5f",
        ".global vmx_exit_point",
        "vmx_exit_point:",
        "push rax",
        "mov rax, [rsp + 8]",
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
        "pop rcx",
        "mov [rax + 0*8], rcx",
        "pop rdi",
        // Before the first return: the guest may have filled the stack of predicted returns.
        "call {forget}",
        "xor eax, eax",
        "5:",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        forget = sym overwrite_return_predictions,
        host_rsp = const Field::HostRsp as u32,
    )
}
