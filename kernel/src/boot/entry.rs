//! The kernel's first instructions: from the 32-bit protected mode without paging that both boot protocols
//! hand over in, to Rust in 64-bit mode.
//!
//! Intel SDM vol. 3, 10.8.5 "Initializing IA-32e Mode"; Multiboot2 Specification 2.0, "OS image format" and "I386 machine
//! state"; Xen "x86/HVM direct boot ABI".

use super::{multiboot2, pvh};
use core::arch::global_asm;

::pvh::xen_elfnote_phys32_entry!(pvh_start32);

unsafe extern "C" {
    fn pvh_start32() -> !;
}

// What Multiboot2 loaders look for in the first 32 KiB of the file. Without the memory map (required) they do not
// start the kernel; modules come on pages of their own.
global_asm!(
    r#"
    .section .multiboot2, "a"
    .balign 8
multiboot2_header:
    .long {magic}
    .long 0
    .long multiboot2_header_end - multiboot2_header
    .long -({magic} + (multiboot2_header_end - multiboot2_header))
    # Information request: command line, modules, memory map.
    .short 1, 0
    .long 20
    .long 1, 3, 6
    .balign 8
    # The entry point, in 32-bit mode whatever the loader runs in.
    .short 3, 0
    .long 12
    .long multiboot2_start32
    .balign 8
    # Modules are page-aligned.
    .short 6, 0
    .long 8
    # The end.
    .short 0, 0
    .long 8
multiboot2_header_end:
    .text
    "#,
    magic = const 0xE852_50D6u32,
    options(att_syntax)
);

// Each entry point puts the function to call into EBP; the loader left the address of its information in EBX and a magic
// number in EAX. Identity-maps the first 4 GiB with 2 MiB pages, writable and executable: only `memory::paging` runs on
// these tables.
global_asm!(
    r#"
    .section .boot.text, "ax"
    .code32
    .global pvh_start32
pvh_start32:
    movl $pvh_main, %ebp
    jmp enter_long_mode
    .global multiboot2_start32
multiboot2_start32:
    movl $multiboot2_main, %ebp
enter_long_mode:
    cld
    cli
    movl $__stack_top, %esp
    movl %ebx, %edi
    movl %eax, %esi
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xC0000080, %ecx
    rdmsr
    orl $0x900, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80010001, %eax
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $0x08, $2f
    .code64
2:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %ebp, %ebx
    xorl %ebp, %ebp
    movl %edi, %edi
    movl %esi, %esi
    rdtsc
    shlq $32, %rdx
    orq %rax, %rdx
    call *%rbx
    ud2

    .section .boot.data, "aw"
    .balign 4096
    .global boot_pml4
boot_pml4:
    .quad boot_pdpt + 0x3
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_pd + 0x3
    .quad boot_pd + 0x1003
    .quad boot_pd + 0x2003
    .quad boot_pd + 0x3003
    .fill 508, 8, 0
boot_pd:
    .set page, 0
    .rept 2048
    .quad (page << 21) + 0x83
    .set page, page + 1
    .endr
    .global boot_gdt
boot_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF93000000FFFF
boot_gdt_pointer:
    .word 23
    .long boot_gdt
    .text
    "#,
    options(att_syntax)
);

/// First Rust code after a PVH loader: identity-mapped, interrupts off, on the boot stack. `entry_tsc` is the
/// time-stamp counter at entry.
#[unsafe(no_mangle)]
extern "C" fn pvh_main(start_info: u32, _magic: u32, entry_tsc: u64) -> ! {
    crate::drivers::serial::init();
    // SAFETY: this is the address the loader passed; the boot page tables map the first 4 GiB one to one.
    match unsafe { pvh::read(start_info) } {
        Some(info) => crate::run(&info, entry_tsc),
        None => panic!(
            "the PVH start info at {start_info:#x} has no memory map; boot with a loader that speaks PVH version 1"
        ),
    }
}

/// First Rust code after a Multiboot2 loader, in the same state. `magic` is what the loader left in EAX.
#[unsafe(no_mangle)]
extern "C" fn multiboot2_main(information: u32, magic: u32, entry_tsc: u64) -> ! {
    crate::drivers::serial::init();
    // SAFETY: this is the address the loader passed; the boot page tables map the first 4 GiB one to one.
    match unsafe { multiboot2::read(magic, information as usize) } {
        Ok(info) => crate::run(&info, entry_tsc),
        Err(error) => panic!("{error}; boot with GRUB's command multiboot2"),
    }
}
