//! Exceptions and interrupts of L1 itself: entry stubs, the dump, the backtrace.
//!
//! Intel SDM vol. 3, 6.13-6.15. An exception in L1 is a bug of L1: it is dumped and the node powers off, because no job can be
//! trusted to it any more.

use super::interrupts;
use crate::drivers::serial::write_raw;
use crate::memory::paging::is_mapped;
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

// One 16-byte stub a vector: push a zero where the processor pushes no error code, push the vector, go on together.
global_asm!(
    r#"
    .section .text
    .balign 16
    .global trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    push 0
    .endif
    push vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push r15
    push r14
    push r13
    push r12
    push r11
    push r10
    push r9
    push r8
    push rdi
    push rsi
    push rbp
    push rbx
    push rdx
    push rcx
    push rax
    cld
    mov rdi, rsp
    mov rbx, rsp
    and rsp, -16
    call {trap}
    mov rsp, rbx
    pop rax
    pop rcx
    pop rdx
    pop rbx
    pop rbp
    pop rsi
    pop rdi
    pop r8
    pop r9
    pop r10
    pop r11
    pop r12
    pop r13
    pop r14
    pop r15
    add rsp, 16
    iretq
    "#,
    trap = sym trap,
);

unsafe extern "C" {
    static trap_stubs: u8;
}

/// Address of a vector's entry stub.
pub fn stub_address(vector: u8) -> u64 {
    &raw const trap_stubs as u64 + u64::from(vector) * 16
}

/// What the stubs leave on the stack.
#[repr(C)]
struct TrapFrame {
    rax: u64,
    rcx: u64,
    rdx: u64,
    rbx: u64,
    rbp: u64,
    rsi: u64,
    rdi: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const NAMES: [&str; 22] = [
    "#DE divide error",
    "#DB debug",
    "NMI",
    "#BP breakpoint",
    "#OF overflow",
    "#BR bound range",
    "#UD invalid opcode",
    "#NM device not available",
    "#DF double fault",
    "9",
    "#TS invalid TSS",
    "#NP segment not present",
    "#SS stack fault",
    "#GP general protection",
    "#PF page fault",
    "15",
    "#MF x87",
    "#AC alignment",
    "#MC machine check",
    "#XM SIMD",
    "#VE",
    "#CP",
];

const DEBUG: u64 = 1;
const NMI: u64 = 2;

extern "C" fn trap(frame: &TrapFrame) {
    match frame.vector {
        // A guest's: L1 arms no breakpoint and does not step. Bochs' SVM leaves a trap that was pending at an exit to L1.
        DEBUG => {}
        NMI => log::warn!("non-maskable interrupt at {:#x}; going on", frame.rip),
        32.. => interrupts::arrived(frame.vector as u8),
        _ => {
            dump(frame);
            crate::power_off();
        }
    }
}

fn dump(f: &TrapFrame) {
    let name = NAMES.get(f.vector as usize).copied().unwrap_or("reserved exception");
    let cr2 = x86_64::registers::control::Cr2::read_raw();
    write_raw(format_args!(
        "\r\nL1 exception: {name}, error code {:#x}, at {:#x} (CR2 {cr2:#x}); nestling {}\r\n",
        f.error_code,
        f.rip,
        env!("CARGO_PKG_VERSION")
    ));
    write_raw(format_args!(
        "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\r\n",
        f.rax, f.rbx, f.rcx, f.rdx
    ));
    write_raw(format_args!(
        "rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}\r\n",
        f.rsi, f.rdi, f.rbp, f.rsp
    ));
    write_raw(format_args!("r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}\r\n", f.r8, f.r9, f.r10, f.r11));
    write_raw(format_args!(
        "r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}\r\n",
        f.r12, f.r13, f.r14, f.r15
    ));
    write_raw(format_args!("cs {:x} ss {:x} rflags {:x}\r\n", f.cs, f.ss, f.rflags));
    backtrace(f.rip, f.rbp);
}

/// Prints return addresses by frame pointers, for `addr2line -e nestling-kernel`.
pub fn backtrace(rip: u64, mut rbp: u64) {
    write_raw(format_args!("backtrace (addr2line -fe nestling-kernel ADDRESS...):\r\n  {rip:#x}\r\n"));
    for _ in 0..32 {
        if rbp == 0 || !rbp.is_multiple_of(8) || !is_mapped(rbp) || !is_mapped(rbp + 15) {
            break;
        }
        // SAFETY: aligned and mapped, just checked; a wrong frame pointer reads some number, no more.
        let (next, address) = unsafe { (*(rbp as *const u64), *((rbp + 8) as *const u64)) };
        if address == 0 {
            break;
        }
        write_raw(format_args!("  {address:#x}\r\n"));
        if next <= rbp {
            break;
        }
        rbp = next;
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    if PANICKING.swap(true, Ordering::Relaxed) {
        super::halt_forever();
    }
    write_raw(format_args!("\r\nL1 panic: {info}; nestling {}\r\n", env!("CARGO_PKG_VERSION")));
    let rbp: u64;
    // SAFETY: copies a register.
    unsafe { core::arch::asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    backtrace(panic as *const () as u64, rbp);
    crate::power_off()
}
