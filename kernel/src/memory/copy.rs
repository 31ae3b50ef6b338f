//! `memcpy` and `memset`, which the compiler calls for every copy and every fill of some length.
//!
//! The kernel's code has no vector registers, and string instructions begin slowly: of 64 to 1,504 bytes that are not in the cache, as frames and
//! sectors are, these loops move as many or more a nanosecond than `rep movsq`, the default; of what is, half. An emulated processor executes string
//! instructions one element at a time, which takes it several times as long.

use core::arch::naked_asm;

/// Copies `length` bytes (RDX) from `from` (RSI) to `to` (RDI); returns `to`.
///
/// # Safety
/// As C has it: both ranges are valid and do not overlap.
// SAFETY: nothing else in the kernel has this name but a weak symbol that it replaces, with the same contract.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "sub rdx, 64",
        "jb 3f",
        "2:",
        "mov rcx, [rsi]",
        "mov r8, [rsi + 8]",
        "mov r9, [rsi + 16]",
        "mov r10, [rsi + 24]",
        "mov [rdi], rcx",
        "mov [rdi + 8], r8",
        "mov [rdi + 16], r9",
        "mov [rdi + 24], r10",
        "mov rcx, [rsi + 32]",
        "mov r8, [rsi + 40]",
        "mov r9, [rsi + 48]",
        "mov r10, [rsi + 56]",
        "mov [rdi + 32], rcx",
        "mov [rdi + 40], r8",
        "mov [rdi + 48], r9",
        "mov [rdi + 56], r10",
        "add rsi, 64",
        "add rdi, 64",
        "sub rdx, 64",
        "jae 2b",
        "3:",
        // What is left of less than 64 bytes: words, then bytes.
        "add edx, 56",
        "js 5f",
        "4:",
        "mov rcx, [rsi]",
        "mov [rdi], rcx",
        "add rsi, 8",
        "add rdi, 8",
        "sub edx, 8",
        "jns 4b",
        "5:",
        "add edx, 8",
        "jz 7f",
        "6:",
        "mov cl, [rsi]",
        "mov [rdi], cl",
        "inc rsi",
        "inc rdi",
        "dec edx",
        "jnz 6b",
        "7:",
        "ret",
    )
}

/// Fills `length` bytes (RDX) from `to` (RDI) on with the low byte of `value` (ESI); returns `to`.
///
/// # Safety
/// As C has it: the range is valid.
// SAFETY: as for `memcpy`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "movzx ecx, sil",
        "movabs rsi, 0x0101010101010101",
        "imul rcx, rsi",
        "sub rdx, 64",
        "jb 3f",
        "2:",
        "mov [rdi], rcx",
        "mov [rdi + 8], rcx",
        "mov [rdi + 16], rcx",
        "mov [rdi + 24], rcx",
        "mov [rdi + 32], rcx",
        "mov [rdi + 40], rcx",
        "mov [rdi + 48], rcx",
        "mov [rdi + 56], rcx",
        "add rdi, 64",
        "sub rdx, 64",
        "jae 2b",
        "3:",
        "add edx, 56",
        "js 5f",
        "4:",
        "mov [rdi], rcx",
        "add rdi, 8",
        "sub edx, 8",
        "jns 4b",
        "5:",
        "add edx, 8",
        "jz 7f",
        "6:",
        "mov [rdi], cl",
        "inc rdi",
        "dec edx",
        "jnz 6b",
        "7:",
        "ret",
    )
}
