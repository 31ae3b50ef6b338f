//! GDT, TSS and IDT of a core.
//!
//! Intel SDM vol. 3, 3.5 and 6.10-6.14; AMD APM vol. 2, 4.6-4.8 and 8.9.

use super::exceptions;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::load_tss;
use x86_64::registers::control::{Cr4, Cr4Flags};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::idt::InterruptDescriptorTable;
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

const DOUBLE_FAULT_STACK: usize = 0;
const NMI_STACK: usize = 1;
const STACK_BYTES: usize = 16 << 10;

/// The core's tables; they live for ever because the processor refers to them.
struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
    idt: InterruptDescriptorTable,
}

/// Builds and loads this core's tables.
pub fn init() {
    let tables = alloc::boxed::Box::leak(alloc::boxed::Box::new(Tables {
        gdt: GlobalDescriptorTable::new(),
        tss: TaskStateSegment::new(),
        idt: InterruptDescriptorTable::new(),
    }));
    for index in [DOUBLE_FAULT_STACK, NMI_STACK] {
        let stack = alloc::vec![0u128; STACK_BYTES / 16].leak();
        tables.tss.interrupt_stack_table[index] = VirtAddr::from_ptr(stack.as_ptr_range().end);
    }
    let code = tables.gdt.append(Descriptor::kernel_code_segment());
    let data = tables.gdt.append(Descriptor::kernel_data_segment());
    let tss = tables.gdt.append(Descriptor::tss_segment(&tables.tss));
    fill_idt(&mut tables.idt, code);
    tables.gdt.load();
    // SAFETY: the selectors come from the table just loaded, and the TSS and both stacks are never freed.
    unsafe {
        CS::set_reg(code);
        for set in [SS::set_reg, DS::set_reg, ES::set_reg] {
            set(data);
        }
        load_tss(tss);
    }
    tables.idt.load();
    // A machine check that finds MCE off shuts the processor down without a word.
    // SAFETY: the handler for #MC is in place.
    unsafe { Cr4::update(|cr4| cr4.insert(Cr4Flags::MACHINE_CHECK_EXCEPTION)) };
}

fn fill_idt(idt: &mut InterruptDescriptorTable, code: SegmentSelector) {
    debug_assert_eq!(code.rpl(), PrivilegeLevel::Ring0);
    let stub = |vector: u8| VirtAddr::new(exceptions::stub_address(vector));
    // SAFETY: every stub keeps the interrupted registers and ends in IRETQ with the error code popped; the stacks exist.
    unsafe {
        idt.divide_error.set_handler_addr(stub(0));
        idt.debug.set_handler_addr(stub(1));
        idt.non_maskable_interrupt.set_handler_addr(stub(2)).set_stack_index(NMI_STACK as u16);
        idt.breakpoint.set_handler_addr(stub(3));
        idt.overflow.set_handler_addr(stub(4));
        idt.bound_range_exceeded.set_handler_addr(stub(5));
        idt.invalid_opcode.set_handler_addr(stub(6));
        idt.device_not_available.set_handler_addr(stub(7));
        idt.double_fault.set_handler_addr(stub(8)).set_stack_index(DOUBLE_FAULT_STACK as u16);
        idt.invalid_tss.set_handler_addr(stub(10));
        idt.segment_not_present.set_handler_addr(stub(11));
        idt.stack_segment_fault.set_handler_addr(stub(12));
        idt.general_protection_fault.set_handler_addr(stub(13));
        idt.page_fault.set_handler_addr(stub(14));
        idt.x87_floating_point.set_handler_addr(stub(16));
        idt.alignment_check.set_handler_addr(stub(17));
        idt.machine_check.set_handler_addr(stub(18));
        idt.simd_floating_point.set_handler_addr(stub(19));
        idt.virtualization.set_handler_addr(stub(20));
        idt.cp_protection_exception.set_handler_addr(stub(21));
        for vector in 32..=255u8 {
            idt[vector].set_handler_addr(stub(vector));
        }
    }
}
