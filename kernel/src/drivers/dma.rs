//! Memory shared with devices. The heap is identity-mapped and devices see physical memory as it is, so
//! sharing is free.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// DMA by identity mapping, without an IOMMU.
#[derive(Debug)]
pub struct IdentityDma;

fn layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE).ok().filter(|layout| layout.size() > 0)
}

// SAFETY: dma_alloc returns zeroed, page-aligned heap memory that is nobody else's until dma_dealloc; MMIO is
// mapped by the kernel at its physical address; sharing needs no copy because virtual and physical addresses
// are the same.
unsafe impl Hal for IdentityDma {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout's size is not zero.
        let memory = layout(pages).and_then(|layout| NonNull::new(unsafe { alloc_zeroed(layout) }));
        // Address 0 tells the caller that there was no memory.
        memory.map_or((0, NonNull::dangling()), |memory| (memory.as_ptr() as PhysAddr, memory))
    }

    unsafe fn dma_dealloc(_physical: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = layout(pages) {
            // SAFETY: the caller passes what dma_alloc returned for the same number of pages, once.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(physical: PhysAddr, bytes: usize) -> NonNull<u8> {
        let address = crate::memory::map_mmio(physical, bytes);
        NonNull::new(address).unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    unsafe fn unshare(_physical: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
