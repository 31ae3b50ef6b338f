//! The PVH boot protocol, as QEMU's `-kernel` and Firecracker speak it.
//!
//! Xen "x86/HVM direct boot ABI": `hvm_start_info` version 1.

use super::{BootInfo, CommandLine, MemoryKind, MemoryRange};
use alloc::string::String;
use alloc::vec::Vec;
use pvh::start_info::reader::StartInfoReader;
use pvh::start_info::{MemmapTableEntry, MemmapType};

/// Copies what the loader says. `None` when the structure is not there or lacks a memory map (version 0).
///
/// # Safety
/// `address` must be what the loader passed, and the first 4 GiB identity-mapped.
pub unsafe fn read(address: u32) -> Option<BootInfo> {
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
    MemoryRange::new(entry.addr, entry.size, kind)
}
