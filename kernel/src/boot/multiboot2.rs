//! The Multiboot2 boot protocol, as GRUB speaks it.
//!
//! Multiboot2 Specification 2.0, "Boot information format": "Boot command line", "Modules", "Memory map", "ACPI old RSDP" and
//! "ACPI new RSDP".

use super::{BootInfo, CommandLine, MemoryKind, MemoryRange};
use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use multiboot2::{
    BootInformation, BootInformationHeader, CommandLineTag, LoadError, MAGIC, MaybeDynSized, MemoryArea,
    MemoryAreaType, MemoryMapTag, ModuleTag, RsdpV1Tag, RsdpV2Tag, TagHeader, TagType,
};

/// Why the loader's information cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Multiboot2Error {
    /// EAX at entry: no Multiboot2 loader started the kernel.
    Magic(u32),
    /// The structure is no list of tags.
    Damaged(LoadError),
    /// No memory map, or no memory in it.
    NoMemoryMap,
}

impl fmt::Display for Multiboot2Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(magic) => {
                write!(
                    f,
                    "EAX was {magic:#x} at entry and not {MAGIC:#x}: no Multiboot2 loader started this kernel"
                )
            }
            Self::Damaged(error) => write!(f, "the Multiboot2 information is damaged: {error}"),
            Self::NoMemoryMap => write!(f, "the Multiboot2 information has no memory map"),
        }
    }
}

/// What the loader's information says, copied out of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Information {
    /// The kernel's command line, without the file's name.
    pub command_line: String,
    /// Physical addresses of each module, in the loader's order. None is empty, all lie in usable memory.
    pub modules: Vec<Range<u64>>,
    /// Physical memory, in the loader's order.
    pub memory: Vec<MemoryRange>,
    /// The ACPI root pointer itself: 20 bytes of version 1, or 36 of a later one.
    pub rsdp: Option<Vec<u8>>,
}

/// Copies what the loader says. `magic` is EAX at entry, `address` was in EBX.
///
/// # Errors
/// [`Multiboot2Error`] when no Multiboot2 loader was there or it told nothing of memory.
///
/// # Safety
/// If `magic` is right, `address` must be what the loader passed, and the first 4 GiB identity-mapped.
pub unsafe fn read(magic: u32, address: usize) -> Result<BootInfo, Multiboot2Error> {
    if magic != MAGIC {
        return Err(Multiboot2Error::Magic(magic));
    }
    // SAFETY: the loader's structure is valid by the protocol and identity-mapped, as the caller promises; it is
    // copied before any memory is reused.
    let information = unsafe { BootInformation::load(address as *const BootInformationHeader) }
        .map_err(Multiboot2Error::Damaged)?;
    let Information { command_line, modules, memory, rsdp } = parse(&information)?;
    let modules = modules.into_iter().map(|module| {
        // SAFETY: the loader put the module there; `memory::init` keeps its pages out of every pool.
        unsafe {
            core::slice::from_raw_parts(module.start as *const u8, (module.end - module.start) as usize)
        }
    });
    Ok(BootInfo {
        command_line: CommandLine::new(command_line.leak()),
        modules: modules.collect(),
        memory,
        // The loader's copy lies in memory that will be reused; this one stays.
        rsdp: rsdp.map(|pointer| pointer.leak().as_ptr() as u64),
    })
}

/// What a structure that was found sound says.
///
/// # Errors
/// [`Multiboot2Error::NoMemoryMap`].
pub fn parse(information: &BootInformation<'_>) -> Result<Information, Multiboot2Error> {
    let mut found =
        Information { command_line: String::new(), modules: Vec::new(), memory: Vec::new(), rsdp: None };
    let mut modules = Vec::new();
    for tag in information.tags() {
        let TagHeader { typ, size } = *tag.header();
        let size = size as usize;
        // The crate takes a tag's size for granted when it casts.
        match TagType::from(typ) {
            TagType::Cmdline if size >= CommandLineTag::BASE_SIZE => {
                found.command_line = tag.cast::<CommandLineTag>().cmdline().unwrap_or_default().to_owned();
            }
            TagType::Module if size >= ModuleTag::BASE_SIZE => {
                let module = tag.cast::<ModuleTag>();
                modules.push(u64::from(module.start_address())..u64::from(module.end_address()));
            }
            TagType::Mmap
                if size >= MemoryMapTag::BASE_SIZE
                    && (size - MemoryMapTag::BASE_SIZE).is_multiple_of(size_of::<MemoryArea>()) =>
            {
                let map = tag.cast::<MemoryMapTag>();
                if map.entry_size() as usize == size_of::<MemoryArea>() {
                    found.memory = map.memory_areas().iter().filter_map(range).collect();
                }
            }
            TagType::AcpiV1 if size == RsdpV1Tag::BASE_SIZE && found.rsdp.is_none() => {
                found.rsdp = Some(tag.payload().get(..20).unwrap_or_default().to_owned());
            }
            TagType::AcpiV2 if size >= RsdpV2Tag::BASE_SIZE => {
                found.rsdp = Some(tag.payload().get(..36).unwrap_or_default().to_owned());
            }
            _ => {}
        }
    }
    let usable = |module: &Range<u64>| {
        found.memory.iter().any(|range| {
            range.kind == MemoryKind::Usable && range.start <= module.start && module.end <= range.end
        })
    };
    for module in modules {
        if module.is_empty() || !usable(&module) {
            log::warn!(
                "the boot module at {:#x} to {:#x} lies in no memory and is left out",
                module.start,
                module.end
            );
        } else {
            found.modules.push(module);
        }
    }
    if found.memory.iter().any(|range| range.kind == MemoryKind::Usable) {
        Ok(found)
    } else {
        Err(Multiboot2Error::NoMemoryMap)
    }
}

fn range(area: &MemoryArea) -> Option<MemoryRange> {
    let kind = match area.typ() {
        MemoryAreaType::Available => MemoryKind::Usable,
        MemoryAreaType::Reserved | MemoryAreaType::AcpiAvailable | MemoryAreaType::ReservedHibernate => {
            MemoryKind::Firmware
        }
        _ => return None,
    };
    MemoryRange::new(area.start_address(), area.size(), kind)
}
