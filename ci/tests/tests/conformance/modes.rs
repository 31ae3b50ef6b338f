//! Operating modes and the control registers that switch them: long, compatibility, protected, real, virtual-8086, PAE.
//!
//! Intel SDM vol. 3, 2.5 (control registers), 10.8.5 (into long mode), 10.9 (into protected and real mode), 21 (8086 emulation), 5.4
//! (PAE paging); AMD APM vol. 2, 14.6-14.8.

use crate::exceptions::assert_goes_on_until_cancelled;
use crate::{is_emulated_by_qemu, run};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling_machine::layout::{BOOT_PAGE_TABLES, IOAPIC_BASE};
use nestling_tests::bare::{Asm, Guest, Program, gdt, layout, msr};

/// This file's guests.
pub(crate) const GUESTS: &[(&str, Program)] = &[("all-modes", all_modes), ("alignment-loop", alignment_loop)];

const CR0_PE: u32 = 1 << 0;
const CR0_AM: u32 = 1 << 18;
const CR0_PG: u32 = 1 << 31;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFLAGS_AC: u32 = 1 << 18;
const EFLAGS_VM: u32 = 1 << 17;

/// Where the parts of the journey are, below 1 MiB, those in 16-bit code below 64 KiB. Each part is at an address of its own, so that
/// the far jumps between them are constants.
mod place {
    pub(super) const PAE_POINTERS: u64 = 0x2000;
    /// What the parts report, a 32-bit word each.
    pub(super) const FACTS: u32 = 0x3000;
    /// Where to go on in 64-bit mode.
    pub(super) const RETURN: u32 = 0x3100;
    /// IDTR of real mode, and of protected mode.
    pub(super) const REAL_IDTR: u32 = 0x3110;
    pub(super) const PROTECTED_IDTR: u32 = 0x3120;
    pub(super) const REAL_STACK: u32 = 0x4000;
    pub(super) const PROTECTED_16: u64 = 0x4000;
    pub(super) const REAL: u64 = 0x4100;
    pub(super) const REAL_INT: u64 = 0x4400;
    pub(super) const REAL_UNDEFINED: u64 = 0x4420;
    pub(super) const REAL_PROTECTION: u64 = 0x4440;
    pub(super) const REAL_TIMER: u64 = 0x4460;
    pub(super) const VIRTUAL_8086: u64 = 0x5000;
    pub(super) const COMPATIBILITY: u64 = 0x3_0000;
    pub(super) const PROTECTED: u64 = 0x3_0400;
    pub(super) const FROM_VIRTUAL_8086: u64 = 0x3_0800;
    pub(super) const PAE: u64 = 0x3_0C00;
    pub(super) const USER: u64 = 0x3_1000;
    pub(super) const PROTECTED_STACK: u32 = 0x3_3000;
    pub(super) const PROTECTED_IDT: u32 = 0x3_4000;
    /// A 32-bit TSS with a map that permits all ports.
    pub(super) const TSS: u32 = 0x3_8000;
    pub(super) const TSS_LIMIT: u32 = 0x68 + 0x2000;
}

/// The facts' places.
#[derive(Clone, Copy)]
enum Fact {
    CompatibilityEfer,
    UnpagedEfer,
    UnpagedCr0,
    RealEfer,
    RealCpuid,
    RealIn,
    RealInt,
    RealUndefined,
    RealProtection,
    RealTimer,
    RealBig,
    ProtectedEfer,
    VirtualFlags,
    VirtualCpuid,
    VirtualIn,
    PaeEfer,
    PaeDevice,
    PaeCpuid,
    LongEfer,
}

const fn fact(fact: Fact) -> u32 {
    place::FACTS + 4 * fact as u32
}

/// A piece of code for another mode, to be copied to `at`.
fn part(bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("16 and 32 bits are modes");
    write(&mut assembler).expect("the part assembles");
    assembler.assemble(at).expect("the part can be placed")
}

fn put(guest: &mut Guest, bits: u32, at: u64, write: impl FnOnce(&mut CodeAssembler) -> Asm) -> Asm {
    let code = part(bits, at, write);
    guest.copy_to(at, &code)
}

/// EFER as RDMSR has it here.
fn note_efer(a: &mut CodeAssembler, to: Fact) -> Asm {
    a.mov(ecx, msr::EFER)?;
    a.rdmsr()?;
    a.mov(dword_ptr(fact(to)), eax)
}

/// EBX of CPUID leaf 0: the beginning of the vendor's name.
fn note_cpuid(a: &mut CodeAssembler, to: Fact) -> Asm {
    a.xor(eax, eax)?;
    a.cpuid()?;
    a.mov(dword_ptr(fact(to)), ebx)
}

/// A far jump; 32-bit offset in 32-bit code and, with an operand-size prefix, from 16-bit code.
fn far_jump(a: &mut CodeAssembler, prefix: bool, selector: u16, offset: u64) -> Asm {
    let mut bytes = if prefix { vec![0x66, 0xEA] } else { vec![0xEA] };
    bytes.extend_from_slice(&(offset as u32).to_le_bytes());
    bytes.extend_from_slice(&selector.to_le_bytes());
    a.db(&bytes)
}

fn load_data_segments(a: &mut CodeAssembler, selector: u32) -> Asm {
    a.mov(eax, selector)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)
}

/// From long mode down to real mode, through virtual-8086 mode and PAE paging up again. Every mode exits and notes EFER.
fn all_modes(guest: &mut Guest) -> Asm {
    let mut back = guest.create_label();
    compatibility(guest)?;
    protected_16(guest)?;
    real(guest)?;
    protected(guest)?;
    virtual_8086(guest)?;
    pae(guest)?;
    tables(guest)?;

    guest.mov(r15, rsp)?;
    guest.mov(qword_ptr(layout::SCRATCH), rsp)?;
    guest.lea(rax, ptr(back))?;
    guest.mov(dword_ptr(place::RETURN), eax)?;
    guest.push(i32::from(gdt::CODE32))?;
    guest.push(place::COMPATIBILITY as i32)?;
    guest.db(&[0x48, 0xCB])?; // far return with 64-bit operands
    guest.set_label(&mut back)?;
    guest.mov(rsp, qword_ptr(layout::SCRATCH))?;
    load_idt(guest, layout::IDT, 0xFFF)?;
    for (name, which) in [
        ("compatibility-efer", Fact::CompatibilityEfer),
        ("unpaged-efer", Fact::UnpagedEfer),
        ("unpaged-cr0", Fact::UnpagedCr0),
        ("real-efer", Fact::RealEfer),
        ("real-cpuid", Fact::RealCpuid),
        ("real-in", Fact::RealIn),
        ("real-int", Fact::RealInt),
        ("real-undefined", Fact::RealUndefined),
        ("real-protection", Fact::RealProtection),
        ("real-timer", Fact::RealTimer),
        ("real-big", Fact::RealBig),
        ("protected-efer", Fact::ProtectedEfer),
        ("virtual-flags", Fact::VirtualFlags),
        ("virtual-cpuid", Fact::VirtualCpuid),
        ("virtual-in", Fact::VirtualIn),
        ("pae-efer", Fact::PaeEfer),
        ("pae-device", Fact::PaeDevice),
        ("pae-cpuid", Fact::PaeCpuid),
        ("long-efer", Fact::LongEfer),
    ] {
        guest.mov(eax, dword_ptr(fact(which)))?;
        guest.fact(name, rax)?;
    }
    guest.cpuid_leaf(0, 0)?;
    guest.fact("cpuid", rbx)?;
    guest.rdmsr_value(msr::EFER)?;
    guest.fact("efer", rax)
}

fn load_idt(guest: &mut Guest, base: u64, limit: u32) -> Asm {
    guest.sub(rsp, 16)?;
    guest.mov(word_ptr(rsp), limit)?;
    guest.mov(rax, base)?;
    guest.mov(qword_ptr(rsp + 2), rax)?;
    guest.lidt(ptr(rsp))?;
    guest.add(rsp, 16)
}

fn compatibility(guest: &mut Guest) -> Asm {
    put(guest, 32, place::COMPATIBILITY, |a| {
        load_data_segments(a, gdt::DATA.into())?;
        a.mov(esp, place::PROTECTED_STACK)?;
        note_efer(a, Fact::CompatibilityEfer)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(eax, cr0)?;
        a.and(eax, !CR0_PG as i32)?;
        a.mov(cr0, eax)?;
        note_efer(a, Fact::UnpagedEfer)?;
        a.mov(eax, cr0)?;
        a.mov(dword_ptr(fact(Fact::UnpagedCr0)), eax)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        far_jump(a, false, gdt::CODE16, place::PROTECTED_16)
    })
}

/// FS keeps its limit of 4 GiB in real mode.
fn protected_16(guest: &mut Guest) -> Asm {
    put(guest, 16, place::PROTECTED_16, |a| {
        load_data_segments(a, gdt::DATA16.into())?;
        a.mov(eax, u32::from(gdt::DATA))?;
        a.mov(fs, eax)?;
        a.xor(eax, eax)?;
        a.cpuid()?;
        a.mov(eax, cr0)?;
        a.and(eax, !CR0_PE as i32)?;
        a.mov(cr0, eax)?;
        // 16-bit far jump: CS 0.
        a.db(&[0xEA])?;
        a.db(&(place::REAL as u16).to_le_bytes())?;
        a.db(&[0, 0])
    })
}

fn real(guest: &mut Guest) -> Asm {
    put(guest, 16, place::REAL, |a| {
        let mut waiting = a.create_label();
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        a.mov(esp, place::REAL_STACK)?;
        a.lidt(ptr(place::REAL_IDTR))?;
        note_efer(a, Fact::RealEfer)?;
        note_cpuid(a, Fact::RealCpuid)?;
        a.xor(eax, eax)?;
        a.out(0x80, al)?;
        a.in_(al, 0x80)?;
        a.mov(dword_ptr(fact(Fact::RealIn)), eax)?;
        a.int(0x21)?;
        a.ud2()?;
        // #GP has no error code here.
        a.mov(ecx, 0x1234)?;
        a.rdmsr()?;
        // Beyond 64 KiB by FS: the guest's own memory.
        a.mov(ebx, layout::SCRATCH as u32 + 0x40)?;
        a.mov(eax, dword_ptr(ebx).fs())?;
        a.mov(dword_ptr(fact(Fact::RealBig)), eax)?;
        for (register, value) in [(msr::SPURIOUS, 0x1FF), (msr::DIVIDE, 0xB), (msr::LVT_TIMER, 0x60)] {
            a.mov(ecx, register)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.mov(ecx, msr::INITIAL_COUNT)?;
        a.mov(eax, 1_000_000)?;
        a.wrmsr()?;
        a.set_label(&mut waiting)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.mov(eax, cr0)?;
        a.or(eax, CR0_PE as i32)?;
        a.mov(cr0, eax)?;
        far_jump(a, true, gdt::CODE32, place::PROTECTED)
    })?;
    put(guest, 16, place::REAL_INT, |a| {
        a.inc(word_ptr(fact(Fact::RealInt)))?;
        a.iret()
    })?;
    // Those that fault go on behind the two bytes of UD2 and RDMSR.
    for (at, which) in
        [(place::REAL_UNDEFINED, Fact::RealUndefined), (place::REAL_PROTECTION, Fact::RealProtection)]
    {
        put(guest, 16, at, |a| {
            a.inc(word_ptr(fact(which)))?;
            a.push(bp)?;
            a.mov(bp, sp)?;
            a.add(word_ptr(bp + 2), 2)?;
            a.pop(bp)?;
            a.iret()
        })?;
    }
    put(guest, 16, place::REAL_TIMER, |a| {
        a.inc(word_ptr(fact(Fact::RealTimer)))?;
        a.mov(ecx, msr::EOI)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.iret()
    })
}

/// Into virtual-8086 mode, by IRET to a lower privilege.
fn protected(guest: &mut Guest) -> Asm {
    put(guest, 32, place::PROTECTED, |a| {
        load_data_segments(a, gdt::DATA.into())?;
        a.mov(esp, place::PROTECTED_STACK)?;
        note_efer(a, Fact::ProtectedEfer)?;
        a.lidt(ptr(place::PROTECTED_IDTR))?;
        a.mov(eax, u32::from(gdt::TSS))?;
        a.ltr(ax)?;
        // GS, FS, DS, ES, SS, ESP, EFLAGS (IOPL 3), CS, EIP.
        for _ in 0..5 {
            a.push(0)?;
        }
        a.push(place::REAL_STACK as i32)?;
        a.push((EFLAGS_VM | 3 << 12 | 2) as i32)?;
        a.push(0)?;
        a.push(place::VIRTUAL_8086 as i32)?;
        a.iretd()
    })
}

/// INT 0x30 leads back to protected mode by a gate.
fn virtual_8086(guest: &mut Guest) -> Asm {
    put(guest, 16, place::VIRTUAL_8086, |a| {
        note_cpuid(a, Fact::VirtualCpuid)?;
        a.xor(eax, eax)?;
        a.out(0x80, al)?;
        a.in_(al, 0x80)?;
        a.mov(dword_ptr(fact(Fact::VirtualIn)), eax)?;
        a.int(0x30)
    })?;
    put(guest, 32, place::FROM_VIRTUAL_8086, |a| {
        a.mov(eax, dword_ptr(esp + 8))?;
        a.mov(ebx, u32::from(gdt::DATA))?;
        a.mov(ds, ebx)?;
        a.mov(es, ebx)?;
        a.mov(dword_ptr(fact(Fact::VirtualFlags)), eax)?;
        far_jump(a, false, gdt::CODE32, place::PAE)
    })
}

/// A guest in legacy PAE paging finds its page tables broken in QEMU once it has exited.
fn has_pae() -> bool {
    !is_emulated_by_qemu()
}

/// Legacy PAE paging, off again, and back into long mode.
fn pae(guest: &mut Guest) -> Asm {
    let efer = |a: &mut CodeAssembler, value: u64| -> Asm {
        a.mov(ecx, msr::EFER)?;
        a.mov(eax, value as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()
    };
    let paging = |a: &mut CodeAssembler, table: u64| -> Asm {
        a.mov(eax, table as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, CR0_PG as i32)?;
        a.mov(cr0, eax)
    };
    put(guest, 32, place::PAE, |a| {
        efer(a, 0)?;
        if has_pae() {
            paging(a, place::PAE_POINTERS)?;
            note_efer(a, Fact::PaeEfer)?;
            note_cpuid(a, Fact::PaeCpuid)?;
            // The I/O APIC's version, by instructions that are emulated.
            a.mov(ebx, IOAPIC_BASE as u32)?;
            a.mov(dword_ptr(ebx), 1)?;
            a.mov(eax, dword_ptr(ebx + 0x10))?;
            a.mov(dword_ptr(fact(Fact::PaeDevice)), eax)?;
            a.mov(eax, cr0)?;
            a.and(eax, !CR0_PG as i32)?;
            a.mov(cr0, eax)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
        }
        efer(a, EFER_LME)?;
        paging(a, BOOT_PAGE_TABLES)?;
        note_efer(a, Fact::LongEfer)?;
        a.push(i32::from(gdt::CODE64))?;
        a.push(dword_ptr(place::RETURN))?;
        a.retf()
    })
}

/// Everything that the parts find in memory.
fn tables(guest: &mut Guest) -> Asm {
    // Vectors of real mode: offset and segment 0.
    for (vector, handler) in [
        (0x21, place::REAL_INT),
        (6, place::REAL_UNDEFINED),
        (13, place::REAL_PROTECTION),
        (0x60, place::REAL_TIMER),
    ] {
        guest.mov(dword_ptr(vector * 4), handler as i32)?;
    }
    guest.mov(word_ptr(place::REAL_IDTR), 0x3FF)?;
    guest.mov(dword_ptr(place::REAL_IDTR + 2), 0)?;
    guest.mov(word_ptr(place::PROTECTED_IDTR), 0x30 * 8 + 7)?;
    guest.mov(dword_ptr(place::PROTECTED_IDTR + 2), place::PROTECTED_IDT as i32)?;
    // A 32-bit interrupt gate that all privileges may use.
    let gate = u64::from(gdt::CODE32) << 16
        | place::FROM_VIRTUAL_8086 & 0xFFFF
        | 0xEE00 << 32
        | (place::FROM_VIRTUAL_8086 >> 16) << 48;
    guest.mov(rax, gate)?;
    guest.mov(qword_ptr(place::PROTECTED_IDT + 0x30 * 8), rax)?;
    guest.mov(dword_ptr(place::TSS + 4), place::PROTECTED_STACK as i32)?;
    guest.mov(dword_ptr(place::TSS + 8), i32::from(gdt::DATA))?;
    guest.mov(word_ptr(place::TSS + 0x66), 0x68)?;
    guest.mov(byte_ptr(place::TSS + place::TSS_LIMIT), 0xFF_u32)?;
    guest.sub(rsp, 16)?;
    guest.sgdt(ptr(rsp))?;
    guest.mov(rbx, qword_ptr(rsp + 2))?;
    guest.add(rsp, 16)?;
    let tss = u64::from(place::TSS_LIMIT) & 0xFFFF
        | (u64::from(place::TSS) & 0xFF_FFFF) << 16
        | 0x89 << 40
        | (u64::from(place::TSS) >> 24) << 56;
    guest.mov(rax, tss)?;
    guest.mov(qword_ptr(rbx + i32::from(gdt::TSS)), rax)?;
    // The directories that the boot tables have for the first 4 GiB, but pointers have no rights in PAE paging.
    for index in 0..4 {
        guest.mov(rax, qword_ptr(BOOT_PAGE_TABLES + 0x1000 + index * 8))?;
        guest.and(rax, !0xFFF)?;
        guest.or(rax, 1)?;
        guest.mov(qword_ptr(place::PAE_POINTERS + index * 8), rax)?;
    }
    guest.mov(eax, 0x1234_5678)?;
    guest.mov(dword_ptr(layout::SCRATCH + 0x40), eax)
}

/// EFER.LMA is LME and CR0.PG.
#[test]
fn efer_follows_the_way_from_long_mode_to_real_mode_and_back() {
    let facts = run("all-modes");
    facts.assert("compatibility-efer", EFER_LME | EFER_LMA);
    facts.assert("unpaged-efer", EFER_LME);
    facts.assert_that("unpaged-cr0", "PE without PG", |value| value & u64::from(CR0_PE | CR0_PG) == 1);
    facts.assert("real-efer", EFER_LME);
    facts.assert("protected-efer", EFER_LME);
    facts.assert("pae-efer", 0);
    facts.assert("long-efer", EFER_LME | EFER_LMA);
    facts.assert("efer", EFER_LME | EFER_LMA);
}

#[test]
fn instructions_exit_in_every_mode() {
    let facts = run("all-modes");
    let vendor = facts.value("cpuid");
    for name in ["real-cpuid", "virtual-cpuid"] {
        facts.assert(name, vendor);
    }
    // No device answers at port 0x80.
    facts.assert("real-in", 0xFF);
    facts.assert("virtual-in", 0xFF);
    if has_pae() {
        facts.assert("pae-cpuid", vendor);
        let version = |word| word & 0xFF != 0 && word != 0xFFFF_FFFF;
        facts.assert_that("pae-device", "the I/O APIC's version", version);
    }
}

#[test]
fn real_mode_takes_interrupts_and_exceptions_by_its_vector_table() {
    let facts = run("all-modes");
    for name in ["real-int", "real-undefined", "real-protection", "real-timer"] {
        facts.assert(name, 1);
    }
}

#[test]
fn a_segment_keeps_its_limit_in_real_mode() {
    run("all-modes").assert("real-big", 0x1234_5678);
}

#[test]
fn virtual_8086_mode_is_left_by_a_gate() {
    run("all-modes").assert_that("virtual-flags", "EFLAGS.VM", |flags| flags & u64::from(EFLAGS_VM) != 0);
}

/// In protected mode, #AC has a handler at the privilege it happens at, and the stack is misaligned: its delivery raises the next
/// (CVE-2015-5307).
fn alignment_loop(guest: &mut Guest) -> Asm {
    tables(guest)?;
    // A 32-bit interrupt gate to code of CPL 3.
    let gate =
        u64::from(gdt::USER_CODE32) << 16 | place::USER & 0xFFFF | 0xEE00 << 32 | (place::USER >> 16) << 48;
    guest.mov(rax, gate)?;
    guest.mov(qword_ptr(place::PROTECTED_IDT + 17 * 8), rax)?;
    put(guest, 32, place::COMPATIBILITY, |a| {
        load_data_segments(a, gdt::DATA.into())?;
        a.mov(esp, place::PROTECTED_STACK)?;
        a.mov(eax, cr0)?;
        a.and(eax, !CR0_PG as i32)?;
        a.or(eax, CR0_AM as i32)?;
        a.mov(cr0, eax)?;
        a.lidt(ptr(place::PROTECTED_IDTR))?;
        a.mov(eax, u32::from(gdt::TSS))?;
        a.ltr(ax)?;
        // SS, ESP, EFLAGS, CS, EIP.
        a.push(i32::from(gdt::USER_DATA))?;
        a.push(place::PROTECTED_STACK as i32 - 0x7FF)?;
        a.push((EFLAGS_AC | 2) as i32)?;
        a.push(i32::from(gdt::USER_CODE32))?;
        a.push(place::USER as i32)?;
        a.iretd()
    })?;
    put(guest, 32, place::USER, |a| a.push(eax))?;
    guest.push(i32::from(gdt::CODE32))?;
    guest.push(place::COMPATIBILITY as i32)?;
    guest.db(&[0x48, 0xCB])
}

#[test]
fn a_loop_of_alignment_checks_harms_nobody_else() {
    if is_emulated_by_qemu() {
        // QEMU does not check alignment.
        return;
    }
    assert_goes_on_until_cancelled("alignment-loop", "exception");
}
