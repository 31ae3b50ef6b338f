//! L1's page tables: everything identity-mapped, nothing both writable and executable, no page at address zero.
//!
//! Intel SDM vol. 3, 4.5 "4-Level Paging"; AMD APM vol. 2, 5.3.

use crate::boot::{BootInfo, MemoryKind};
use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::ptr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::mapper::{MapToError, MappedFrame, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

const PAGE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const READ_ONLY: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::NO_EXECUTE);
const READ_WRITE: PageTableFlags = READ_ONLY.union(PageTableFlags::WRITABLE);
const EXECUTE: PageTableFlags = PageTableFlags::PRESENT;
const DEVICE: PageTableFlags =
    READ_WRITE.union(PageTableFlags::NO_CACHE).union(PageTableFlags::WRITE_THROUGH);

unsafe extern "C" {
    static __kernel_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __stack_guard: u8;
    static __stack_bottom: u8;
    static __kernel_end: u8;
}

/// Page tables come from the heap, which is identity-mapped.
struct HeapFrames;

// SAFETY: each frame is a fresh page-aligned allocation that is never freed.
unsafe impl FrameAllocator<Size4KiB> for HeapFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let layout = Layout::new::<PageTable>();
        // SAFETY: the layout is not empty.
        let page = unsafe { alloc_zeroed(layout) };
        if page.is_null() {
            handle_alloc_error(layout);
        }
        PhysFrame::from_start_address(PhysAddr::new(page as u64)).ok()
    }
}

/// Builds the tables and switches to them.
pub fn init(boot: &BootInfo) {
    let Some(root) = HeapFrames.allocate_frame() else { unreachable!("heap pages are page-aligned") };
    // SAFETY: a fresh zeroed page, which is an empty page table, identity-mapped.
    let table = unsafe { &mut *(root.start_address().as_u64() as *mut PageTable) };
    // SAFETY: physical addresses are virtual ones, so the offset is zero.
    let mut mapper = unsafe { OffsetPageTable::new(table, VirtAddr::zero()) };

    let kernel = &raw const __kernel_start as u64;
    let text_end = &raw const __text_end as u64;
    let rodata_end = &raw const __rodata_end as u64;
    let stack_guard = &raw const __stack_guard as u64;
    let stack_bottom = &raw const __stack_bottom as u64;
    let kernel_end = &raw const __kernel_end as u64;
    identity(&mut mapper, kernel, text_end, EXECUTE);
    identity(&mut mapper, text_end, rodata_end, READ_ONLY);
    identity(&mut mapper, rodata_end, stack_guard, READ_WRITE);
    identity(&mut mapper, stack_bottom, kernel_end, READ_WRITE);
    // Firmware ranges are mapped when a driver asks: some hold device registers, some are terabytes of nothing.
    for range in boot.memory.iter().filter(|range| range.kind == MemoryKind::Usable) {
        // The null page stays unmapped; the kernel's own pages are mapped above.
        let start = range.start.max(Size4KiB::SIZE).next_multiple_of(Size4KiB::SIZE);
        let end = range.end & !(Size4KiB::SIZE - 1);
        identity(&mut mapper, start, end.min(kernel).max(start), READ_WRITE);
        identity(&mut mapper, start.max(kernel_end), end.max(kernel_end), READ_WRITE);
    }
    // SAFETY: the new tables map this code, the stack and the heap exactly where they are.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
}

fn identity(mapper: &mut OffsetPageTable<'_>, mut start: u64, end: u64, flags: PageTableFlags) {
    while start < end {
        let large = start.is_multiple_of(Size2MiB::SIZE) && end - start >= Size2MiB::SIZE;
        let physical = PhysAddr::new(start);
        // SAFETY: an identity mapping of memory whose only users agree with these flags.
        let mapped = unsafe {
            if large {
                let frame = PhysFrame::<Size2MiB>::containing_address(physical);
                mapper
                    .identity_map(frame, flags | PageTableFlags::HUGE_PAGE, &mut HeapFrames)
                    .map(|flush| flush.ignore())
                    .map_err(already)
            } else {
                let frame = PhysFrame::<Size4KiB>::containing_address(physical);
                mapper
                    .identity_map(frame, flags, &mut HeapFrames)
                    .map(|flush| flush.ignore())
                    .map_err(already)
            }
        };
        // Loaders' maps overlap at times: the first mapping of a page stands.
        if let Err(error) = mapped {
            log::debug!("page {start:#x} keeps its first mapping: {error}");
        }
        start += if large { Size2MiB::SIZE } else { Size4KiB::SIZE };
    }
}

fn already<S: PageSize>(error: MapToError<S>) -> &'static str {
    match error {
        MapToError::FrameAllocationFailed => "no page for a table",
        MapToError::ParentEntryHugePage => "part of a large page",
        MapToError::PageAlreadyMapped(_) => "already mapped",
    }
}

/// Maps device registers, uncached, at their physical address; pages already mapped keep their mapping.
///
/// Returns a pointer to the first byte.
pub fn map_mmio(physical: u64, bytes: usize) -> *mut u8 {
    let (root, _) = Cr3::read();
    // SAFETY: the current root is one of `init`'s tables, and after the boot order only the core that booted maps anything.
    let table = unsafe { &mut *(root.start_address().as_u64() as *mut PageTable) };
    // SAFETY: physical addresses are virtual ones.
    let mut mapper = unsafe { OffsetPageTable::new(table, VirtAddr::zero()) };
    let start = physical & !(Size4KiB::SIZE - 1);
    let end = (physical + bytes as u64).next_multiple_of(Size4KiB::SIZE);
    identity(&mut mapper, start, end, DEVICE);
    physical as *mut u8
}

/// Physical address of the tables, for another core's CR3.
pub fn root() -> u64 {
    Cr3::read().0.start_address().as_u64()
}

/// Takes the 4 KiB page at `address` away, which other cores have not used yet. A large page around it is split first.
pub fn unmap(address: u64) {
    const ENTRIES: u64 = 512;
    let (root, _) = Cr3::read();
    let mut table = root.start_address().as_u64();
    for shift in [39, 30, 21, 12] {
        let slot = (table + (address >> shift & (ENTRIES - 1)) * 8) as *mut u64;
        // SAFETY: a slot of L1's own tables, which are identity-mapped, and nobody else changes them meanwhile.
        let entry = unsafe { ptr::read(slot) };
        assert!(entry & PageTableFlags::PRESENT.bits() != 0, "the page at {address:#x} is not mapped");
        if shift == 12 {
            // SAFETY: as above.
            unsafe { ptr::write_volatile(slot, 0) };
            break;
        }
        let large = PageTableFlags::HUGE_PAGE.bits();
        table = if entry & large == 0 {
            entry & PAGE_ADDRESS
        } else {
            let Some(split) = HeapFrames.allocate_frame() else {
                unreachable!("heap pages are page-aligned")
            };
            let split = split.start_address().as_u64();
            for index in 0..ENTRIES {
                // SAFETY: a fresh page table.
                unsafe {
                    ptr::write(
                        (split as *mut u64).add(index as usize),
                        (entry & !large) + index * Size4KiB::SIZE,
                    )
                };
            }
            let flags = PageTableFlags::PRESENT.union(PageTableFlags::WRITABLE).bits();
            // SAFETY: as above; the new table maps the same.
            unsafe { ptr::write_volatile(slot, split | flags) };
            split
        };
    }
    x86_64::instructions::tlb::flush_all();
}

/// Whether a range of virtual memory is mapped: for dumps that follow doubtful pointers.
pub fn is_mapped(address: u64) -> bool {
    let Ok(address) = VirtAddr::try_new(address) else { return false };
    let (root, _) = Cr3::read();
    // SAFETY: as in `map_mmio`.
    let table = unsafe { &mut *(root.start_address().as_u64() as *mut PageTable) };
    // SAFETY: physical addresses are virtual ones.
    let mapper = unsafe { OffsetPageTable::new(table, VirtAddr::zero()) };
    matches!(
        mapper.translate(address),
        TranslateResult::Mapped { frame: MappedFrame::Size4KiB(_) | MappedFrame::Size2MiB(_), .. }
    )
}
