//! The PVH boot protocol, as QEMU's `-kernel` and Firecracker speak it.
//!
//! Xen "x86/HVM direct boot ABI": entry in 32-bit protected mode without paging, EBX = `hvm_start_info`.
//! Intel SDM vol. 3, 10.8.5 "Initializing IA-32e Mode".

use super::{BootInfo, CommandLine, MemoryKind, MemoryRange};
use alloc::string::String;
use alloc::vec::Vec;
use core::arch::global_asm;
use pvh::start_info::reader::StartInfoReader;
use pvh::start_info::{MemmapTableEntry, MemmapType};

pvh::xen_elfnote_phys32_entry!(pvh_start32);

unsafe extern "C" {
    fn pvh_start32() -> !;
}

// Identity-maps the first 4 GiB with 2 MiB pages, writable and executable: only `memory::paging` runs on these tables.
global_asm!(
    r#"
    .section .boot.text, "ax"
    .code32
    .global pvh_start32
pvh_start32:
    cld
    movl $__stack_top, %esp
    movl %ebx, %edi
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
    xorl %ebp, %ebp
    movl %edi, %edi
    rdtsc
    shlq $32, %rdx
    leaq (%rdx, %rax), %rsi
    call pvh_main
    .global _start
_start:
    ud2

    .section .boot.data, "aw"
    .balign 4096
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

/// First Rust code: identity-mapped, interrupts off, on the boot stack. `entry_tsc` is the time-stamp counter at entry.
#[unsafe(no_mangle)]
extern "C" fn pvh_main(start_info: u32, entry_tsc: u64) -> ! {
    crate::drivers::serial::init();
    // SAFETY: this is the address the loader passed; the boot page tables map the first 4 GiB one to one.
    match unsafe { read(start_info) } {
        Some(info) => crate::run(&info, entry_tsc),
        None => panic!(
            "the PVH start info at {start_info:#x} has no memory map; boot with a loader that speaks PVH version 1"
        ),
    }
}

/// Copies what the loader says. `None` when the structure is not there or lacks a memory map (version 0).
///
/// # Safety
/// `address` must be what the loader passed, and the first 4 GiB identity-mapped.
unsafe fn read(address: u32) -> Option<BootInfo> {
    // SAFETY: the loader's structures are valid by the protocol and identity-mapped, as the caller promises.
    let reader = unsafe { StartInfoReader::from_paddr_identity(address) }?;
    let memory: Vec<MemoryRange> = reader.memmap().iter().filter_map(range).collect();
    if memory.is_empty() {
        return None;
    }
    let text = reader.cmdline().and_then(|text| text.to_str().ok()).unwrap_or("");
    // The loader's copy lies in memory that will be reused.
    let command_line = CommandLine::new(String::from(text).leak());
    let modules = reader
        .modlist()
        .filter_map(|module| {
            let (start, size) = (module.raw().paddr, module.raw().size);
            start.checked_add(size)?;
            // SAFETY: the loader put the module there; `memory::init` keeps its pages out of every pool.
            Some(unsafe { core::slice::from_raw_parts(start as *const u8, usize::try_from(size).ok()?) })
        })
        .collect();
    let rsdp = reader.raw().rsdp_paddr;
    Some(BootInfo { command_line, modules, memory, rsdp: (rsdp != 0).then_some(rsdp) })
}

fn range(entry: &MemmapTableEntry) -> Option<MemoryRange> {
    let kind = match entry.ty() {
        MemmapType::Ram => MemoryKind::Usable,
        MemmapType::Reserved | MemmapType::Acpi | MemmapType::Nvs => MemoryKind::Firmware,
        _ => return None,
    };
    let end = entry.addr.checked_add(entry.size)?;
    (entry.size > 0).then_some(MemoryRange { start: entry.addr, end, kind })
}
