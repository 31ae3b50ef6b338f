//! Loads a Linux kernel and prepares its 64-bit entry.
//!
//! Linux, Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot Protocol") and zero-page.rst. The kernel is a
//! bzImage as distributions ship it; its real-mode part is not used.

use super::acpi;
use crate::address::GuestPhysAddr;
use crate::layout;
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{EFER_LMA, EFER_LME, Gpr, Segment, TableRegister, VcpuState};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

/// Command-line arguments that every machine gets in front of the image's own, and why.
///
/// - `console=ttyS0`: the serial port is the only console.
/// - `panic=-1`: a panic resets the machine at once, which ends it.
/// - `reboot=acpi`: reset by the ACPI register. On hardware-reduced ACPI Linux' default is EFI, and what comes after it is the
///   firmware's real-mode entry.
/// - `8250.nr_uarts=1`: do not probe for three serial ports that are not there.
/// - `pci=noearly`: do not scan for PCI quirks through ports 0xCF8/0xCFC, which are not there.
pub const PLATFORM_ARGUMENTS: &str = "console=ttyS0 panic=-1 reboot=acpi 8250.nr_uarts=1 pci=noearly";

/// What a machine boots.
#[derive(Clone, Copy, Debug)]
pub struct LinuxImage<'a> {
    /// A bzImage.
    pub kernel: &'a [u8],
    /// The initramfs, a cpio archive, compressed or not; may be empty.
    pub initramfs: &'a [u8],
    /// The command line, without [`PLATFORM_ARGUMENTS`].
    pub command_line: &'a str,
}

/// Why a machine cannot boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BootError {
    /// The kernel is no bzImage, or one that cannot be booted; what is wrong with it.
    Kernel(&'static str),
    /// The command line with the platform's arguments is longer than the kernel takes.
    CommandLineTooLong {
        /// Its length in bytes.
        length: usize,
        /// The longest the kernel takes.
        limit: usize,
    },
    /// The command line has a NUL byte in it.
    CommandLineHasNul,
    /// The machine's memory is too small.
    MemoryTooSmall {
        /// Bytes the machine has.
        ram_bytes: u64,
        /// Bytes the kernel and the initramfs need to be unpacked.
        needed_bytes: u64,
    },
    /// The number of vCPUs is not in 1..=254.
    VcpuCount(u32),
    /// Guest memory could not be written.
    Memory(MemoryError),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(reason) => write!(f, "the image's kernel cannot be booted: {reason}"),
            Self::CommandLineTooLong { length, limit } => {
                write!(
                    f,
                    "the kernel command line has {length} bytes, but the kernel takes {limit}: shorten the image's cmdline"
                )
            }
            Self::CommandLineHasNul => {
                f.write_str("the kernel command line has a NUL byte: remove it from the image's cmdline")
            }
            Self::MemoryTooSmall { ram_bytes, needed_bytes } => write!(
                f,
                "the machine has {} MiB of memory, but the image needs {} MiB to boot: raise mem_size_mib",
                ram_bytes >> 20,
                needed_bytes.div_ceil(1 << 20)
            ),
            Self::VcpuCount(count) => {
                write!(f, "{count} vCPUs are not possible: vcpu_count must be 1 to 254")
            }
            Self::Memory(error) => write!(f, "the machine's memory could not be written: {error}"),
        }
    }
}

impl core::error::Error for BootError {}

impl From<MemoryError> for BootError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

const PAGE: u64 = 4096;
/// End of the RAM below the legacy video and firmware area.
const CONVENTIONAL_END: u64 = 0xA_0000;
const ONE_MIB: u64 = 0x10_0000;
/// Where a processor starts in real mode, F000:FFF0, and where a guest jumps to have the firmware reset the machine.
const RESET_VECTOR: u64 = 0xF_FFF0;
/// Writes 1 to the ACPI reset register: `mov dx, 0x602; mov al, 1; out dx, al; hlt`.
const RESET_CODE: [u8; 7] = [0xBA, 0x02, 0x06, 0xB0, layout::ACPI_RESET_VALUE, 0xEE, 0xF4];
/// Offset of the 64-bit entry point in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: usize = 512;

/// Offsets in `struct boot_params`.
mod zero_page {
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const SETUP_HEADER: usize = 0x1F1;
    pub(super) const E820_TABLE: usize = 0x2D0;
    pub(super) const E820_ENTRIES_MAX: usize = 128;
}

/// Offsets in `struct setup_header`, counted from the start of the image (and of `struct boot_params`).
mod header {
    pub(super) const SETUP_SECTORS: usize = 0x1F1;
    pub(super) const BOOT_FLAG: usize = 0x1FE;
    pub(super) const LENGTH: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const LOADER_TYPE: usize = 0x210;
    pub(super) const LOAD_FLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const COMMAND_LINE: usize = 0x228;
    pub(super) const INITRD_ADDRESS_MAX: usize = 0x22C;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const LOAD_FLAGS_64: usize = 0x236;
    pub(super) const COMMAND_LINE_SIZE: usize = 0x238;
    pub(super) const PREFERRED_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;

    pub(super) const BOOT_FLAG_VALUE: u16 = 0xAA55;
    pub(super) const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"HdrS");
    /// The first protocol version with `xloadflags`.
    pub(super) const VERSION_MIN: u16 = 0x20C;
    pub(super) const LOADER_UNDEFINED: u8 = 0xFF;
    pub(super) const LOADED_HIGH: u8 = 1 << 0;
    pub(super) const KERNEL_64: u16 = 1 << 0;
}

/// Types of e820 entries.
mod e820 {
    pub(super) const RAM: u32 = 1;
    pub(super) const RESERVED: u32 = 2;
    pub(super) const ACPI: u32 = 3;
}

/// The parts of a bzImage that matter for its 64-bit entry.
struct BzImage<'a> {
    /// The setup header, to be copied to `struct boot_params`.
    header: &'a [u8],
    /// The protected-mode kernel.
    body: &'a [u8],
    command_line_max: usize,
    initrd_address_max: u64,
    /// Bytes from the load address on that the kernel uses before it knows the memory map.
    init_size: u64,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], BootError> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .ok_or(BootError::Kernel("it is shorter than a bzImage's header"))
}

impl<'a> BzImage<'a> {
    fn parse(kernel: &'a [u8]) -> Result<Self, BootError> {
        let refused = |reason| Err(BootError::Kernel(reason));
        if u16::from_le_bytes(field(kernel, header::BOOT_FLAG)?) != header::BOOT_FLAG_VALUE
            || u32::from_le_bytes(field(kernel, header::MAGIC)?) != header::MAGIC_VALUE
        {
            return refused("it is not a bzImage (no boot sector signature, or no HdrS)");
        }
        if u16::from_le_bytes(field(kernel, header::VERSION)?) < header::VERSION_MIN {
            return refused("its boot protocol is older than 2.12");
        }
        if u16::from_le_bytes(field(kernel, header::LOAD_FLAGS_64)?) & header::KERNEL_64 == 0 {
            return refused("it has no 64-bit entry point (xloadflags bit 0 is clear)");
        }
        if field::<1>(kernel, header::LOAD_FLAGS)?[0] & header::LOADED_HIGH == 0 {
            return refused("it is a zImage, which loads below 1 MiB");
        }
        let preferred = u64::from_le_bytes(field(kernel, header::PREFERRED_ADDRESS)?);
        let alignment = u64::from(u32::from_le_bytes(field(kernel, header::KERNEL_ALIGNMENT)?));
        let relocatable = field::<1>(kernel, header::RELOCATABLE)?[0] != 0;
        let aligned = alignment.is_power_of_two() && layout::KERNEL & (alignment - 1) == 0;
        if preferred != layout::KERNEL && !(relocatable && aligned) {
            return refused("it cannot be loaded at 16 MiB (not relocatable, or its alignment is larger)");
        }

        let setup_sectors = match field::<1>(kernel, header::SETUP_SECTORS)?[0] {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let body = kernel.get((setup_sectors + 1) * SECTOR..).unwrap_or_default();
        if body.len() as u64 <= ENTRY_64 {
            return refused("it ends before its protected-mode part");
        }
        let header_end = header::MAGIC + usize::from(field::<1>(kernel, header::LENGTH)?[0]);
        let header = kernel
            .get(zero_page::SETUP_HEADER..header_end)
            .filter(|_| (header::INIT_SIZE + 4..=zero_page::E820_TABLE).contains(&header_end))
            .ok_or(BootError::Kernel("its setup header has an impossible length"))?;
        Ok(Self {
            header,
            body,
            command_line_max: u32::from_le_bytes(field(kernel, header::COMMAND_LINE_SIZE)?) as usize,
            initrd_address_max: u64::from(u32::from_le_bytes(field(kernel, header::INITRD_ADDRESS_MAX)?)),
            init_size: u64::from(u32::from_le_bytes(field(kernel, header::INIT_SIZE)?)),
        })
    }
}

/// Writes a machine's kernel, initramfs, command line, boot parameters, descriptor and page tables and ACPI tables to its memory;
/// returns the state in which its first vCPU starts.
///
/// `ram_bytes` is the machine's RAM, laid out as [`layout`] says; `vcpu_count` is 1 to 254.
pub fn load(
    memory: &mut dyn GuestMemory,
    image: &LinuxImage<'_>,
    ram_bytes: u64,
    vcpu_count: u32,
) -> Result<VcpuState, BootError> {
    let vcpus = u8::try_from(vcpu_count).ok().filter(|count| (1..=254).contains(count));
    let vcpus = vcpus.ok_or(BootError::VcpuCount(vcpu_count))?;
    let kernel = BzImage::parse(image.kernel)?;
    let command_line = command_line(image.command_line, kernel.command_line_max)?;

    let low_ram_end = ram_bytes.min(layout::LOW_RAM_END) & !(PAGE - 1);
    let kernel_end = layout::KERNEL.saturating_add(kernel.init_size.max(kernel.body.len() as u64));
    let initramfs_at = place_initramfs(image.initramfs.len() as u64, kernel_end, low_ram_end, &kernel)
        .ok_or(BootError::MemoryTooSmall {
            ram_bytes,
            needed_bytes: kernel_end.saturating_add(image.initramfs.len() as u64).next_multiple_of(PAGE),
        })?;

    memory.write(GuestPhysAddr(layout::KERNEL), kernel.body)?;
    memory.write(GuestPhysAddr(initramfs_at), image.initramfs)?;
    memory.write(GuestPhysAddr(layout::COMMAND_LINE), &command_line)?;
    memory.write(GuestPhysAddr(layout::ACPI_TABLES), &acpi::tables(layout::ACPI_TABLES, vcpus))?;
    memory.write(GuestPhysAddr(RESET_VECTOR), &RESET_CODE)?;
    memory.write(
        GuestPhysAddr(layout::BOOT_PARAMS),
        &boot_params(&kernel, initramfs_at, image.initramfs.len() as u64, ram_bytes),
    )?;
    write_page_tables(memory)?;
    Ok(entry_state(memory)?)
}

/// The whole command line, NUL-terminated.
fn command_line(of_image: &str, limit: usize) -> Result<Vec<u8>, BootError> {
    if of_image.contains('\0') {
        return Err(BootError::CommandLineHasNul);
    }
    let mut line = String::from(PLATFORM_ARGUMENTS);
    if !of_image.is_empty() {
        line.push(' ');
        line.push_str(of_image);
    }
    if line.len() > limit {
        return Err(BootError::CommandLineTooLong { length: line.len(), limit });
    }
    let mut line = line.into_bytes();
    line.push(0);
    Ok(line)
}

/// The highest page-aligned place for the initramfs below the ends of low RAM and of what the kernel can address, above the space
/// the kernel unpacks itself in. `None` if there is none.
fn place_initramfs(length: u64, kernel_end: u64, low_ram_end: u64, kernel: &BzImage<'_>) -> Option<u64> {
    let top = low_ram_end.min(kernel.initrd_address_max.saturating_add(1));
    let at = top.checked_sub(length)? & !(PAGE - 1);
    (at >= kernel_end && kernel_end <= low_ram_end).then_some(at)
}

/// Writes `bytes` at `at`; the zero page is long enough for every caller's constant offsets.
fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = page.get_mut(at..).and_then(|rest| rest.get_mut(..bytes.len())) {
        to.copy_from_slice(bytes);
    }
}

fn boot_params(kernel: &BzImage<'_>, initramfs_at: u64, initramfs_length: u64, ram_bytes: u64) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    put(&mut page, zero_page::SETUP_HEADER, kernel.header);
    put(&mut page, header::LOADER_TYPE, &[header::LOADER_UNDEFINED]);
    put(&mut page, header::LOAD_FLAGS, &[header::LOADED_HIGH]);
    put(&mut page, header::CODE32_START, &(layout::KERNEL as u32).to_le_bytes());
    if initramfs_length > 0 {
        // Both fit: place_initramfs stays below 4 GiB.
        put(&mut page, header::RAMDISK_IMAGE, &(initramfs_at as u32).to_le_bytes());
        put(&mut page, header::RAMDISK_SIZE, &(initramfs_length as u32).to_le_bytes());
    }
    put(&mut page, header::COMMAND_LINE, &(layout::COMMAND_LINE as u32).to_le_bytes());
    put(&mut page, zero_page::ACPI_RSDP, &layout::ACPI_TABLES.to_le_bytes());

    let map = memory_map(ram_bytes);
    for (index, (start, end, kind)) in map.iter().take(zero_page::E820_ENTRIES_MAX).enumerate() {
        let at = zero_page::E820_TABLE + index * 20;
        put(&mut page, at, &start.to_le_bytes());
        put(&mut page, at + 8, &(end - start).to_le_bytes());
        put(&mut page, at + 16, &kind.to_le_bytes());
    }
    put(&mut page, zero_page::E820_ENTRIES, &[map.len() as u8]);
    page
}

/// The e820 map: start, end and type of each range, ascending.
fn memory_map(ram_bytes: u64) -> Vec<(u64, u64, u32)> {
    let ram_end = ram_bytes & !(PAGE - 1);
    let mut map = vec![
        (0, CONVENTIONAL_END, e820::RAM),
        (layout::ACPI_TABLES, ONE_MIB, e820::ACPI),
        (ONE_MIB, ram_end.clamp(ONE_MIB, layout::LOW_RAM_END), e820::RAM),
        (layout::ECAM_BASE, layout::ECAM_BASE + layout::ECAM_SIZE, e820::RESERVED),
    ];
    if let Some(high) = ram_end.checked_sub(layout::LOW_RAM_END).filter(|&high| high > 0) {
        map.push((layout::HIGH_RAM_START, layout::HIGH_RAM_START.saturating_add(high), e820::RAM));
    }
    map
}

/// Identity-maps the first 4 GiB with 2 MiB pages.
fn write_page_tables(memory: &mut dyn GuestMemory) -> Result<(), MemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let root = layout::BOOT_PAGE_TABLES;
    let pointers = root + PAGE;
    let directories = pointers + PAGE;
    memory.write(GuestPhysAddr(root), &(pointers | PRESENT_WRITABLE).to_le_bytes())?;
    let entries: Vec<u8> = (0..DIRECTORIES)
        .flat_map(|index| ((directories + index * PAGE) | PRESENT_WRITABLE).to_le_bytes())
        .collect();
    memory.write(GuestPhysAddr(pointers), &entries)?;
    let entries: Vec<u8> = (0..DIRECTORIES * 512)
        .flat_map(|index| (index << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes())
        .collect();
    memory.write(GuestPhysAddr(directories), &entries)
}

/// Writes the GDT and returns the register state that boot.rst asks for: 64-bit mode, flat `__BOOT_CS` and `__BOOT_DS`, RSI at the
/// boot parameters, interrupts off.
fn entry_state(memory: &mut dyn GuestMemory) -> Result<VcpuState, MemoryError> {
    const BOOT_CS: u16 = 0x10;
    const BOOT_DS: u16 = 0x18;
    const GDT: [u64; 4] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];
    const CR0_PROTECTED_PAGED: u64 = 1 << 31 | 1 << 4 | 1 << 0;
    const CR4_PAE: u64 = 1 << 5;
    const RFLAGS_FIXED: u64 = 1 << 1;
    const DR6_RESET: u64 = 0xFFFF_0FF0;
    const DR7_RESET: u64 = 0x400;

    let gdt: Vec<u8> = GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    memory.write(GuestPhysAddr(layout::BOOT_GDT), &gdt)?;

    let data = Segment { selector: BOOT_DS, attributes: 0xC93, limit: u32::MAX, base: 0 };
    let mut state = VcpuState::default();
    state.registers.rip = layout::KERNEL + ENTRY_64;
    state.registers.rflags = RFLAGS_FIXED;
    state.registers.set(Gpr::Rsi, layout::BOOT_PARAMS);
    // The entry code loads a stack of its own; this one ends below the page tables.
    state.registers.set(Gpr::Rsp, layout::BOOT_PAGE_TABLES);
    let system = &mut state.system;
    system.cs = Segment { selector: BOOT_CS, attributes: 0xA9B, limit: u32::MAX, base: 0 };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    // A busy 64-bit TSS, which 64-bit mode must have, and no LDT.
    system.tr = Segment { selector: 0, attributes: 0x8B, limit: 0x67, base: 0 };
    system.ldtr = Segment { selector: 0, attributes: 0x82, limit: 0xFFFF, base: 0 };
    system.gdtr = TableRegister { base: layout::BOOT_GDT, limit: gdt.len() as u16 - 1 };
    system.idtr = TableRegister { base: 0, limit: 0 };
    system.cr0 = CR0_PROTECTED_PAGED;
    system.cr3 = layout::BOOT_PAGE_TABLES;
    system.cr4 = CR4_PAE;
    system.efer = EFER_LME | EFER_LMA;
    system.dr6 = DR6_RESET;
    system.dr7 = DR7_RESET;
    Ok(state)
}

#[cfg(test)]
mod tests;
