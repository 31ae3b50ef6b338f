//! Memory shared with devices. The heap is identity-mapped and devices see physical memory as it is, so
//! sharing is free.

use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// DMA by identity mapping, without an IOMMU.
#[derive(Debug)]
pub struct IdentityDma;

/// Zeroed memory that a device reads or writes whenever it likes. All access is by copy and within its bounds. It is
/// never given back: nothing proves that the device has stopped using it.
#[derive(Debug)]
pub struct SharedMemory {
    start: NonNull<u8>,
    bytes: usize,
}

impl SharedMemory {
    /// `pages` pages of 4 KiB, contiguous; `None` if there is no memory.
    #[must_use]
    pub fn new(pages: usize) -> Option<Self> {
        let layout = layout(pages)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, bytes: layout.size() })
    }

    /// Physical address of the first byte.
    #[must_use]
    pub fn physical(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Address of `bytes` bytes at `offset`, if they lie within.
    fn part(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let inside = offset.checked_add(bytes)? <= self.bytes;
        inside.then(|| self.start.as_ptr().wrapping_add(offset))
    }

    /// The aligned 64-bit word at `offset`; zero outside.
    #[must_use]
    pub fn word(&self, offset: usize) -> u64 {
        match self.part(offset, 8).map(<*mut u8>::cast::<u64>) {
            // SAFETY: within the allocation, which is never freed, and aligned.
            Some(word) if word.is_aligned() => u64::from_le(unsafe { word.read_volatile() }),
            _ => 0,
        }
    }

    /// Sets the aligned 64-bit word at `offset`; nothing outside.
    pub fn set_word(&mut self, offset: usize, value: u64) {
        if let Some(word) = self.part(offset, 8).map(<*mut u8>::cast::<u64>)
            && word.is_aligned()
        {
            // SAFETY: as in `word`.
            unsafe { word.write_volatile(value.to_le()) };
        }
    }

    /// Copies bytes out; false if they do not lie within.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        let Some(from) = self.part(offset, into.len()) else { return false };
        // SAFETY: within the allocation; a device that writes meanwhile changes what is copied, and bytes have no
        // invalid values.
        unsafe { core::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copies bytes in; false if they do not lie within.
    pub fn write(&mut self, offset: usize, from: &[u8]) -> bool {
        let Some(into) = self.part(offset, from.len()) else { return false };
        // SAFETY: within the allocation, of which no reference exists.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), into, from.len()) };
        true
    }
}

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
