//! The guest's page tables.
//!
//! Intel SDM vol. 3, 5.3-5.5 (32-bit, PAE, 4- and 5-level paging), 5.6 (access rights), 5.7 (page-fault error codes), 5.8
//! (accessed and dirty flags); AMD APM vol. 2, chapter 5.
//!
//! Protection keys are not checked: an access comes here because the processor tried it and only nested paging stopped it, which
//! is after the check of the guest's own rights.

use super::Stop;
use crate::address::{GuestPhysAddr, GuestVirtAddr};
use crate::memory::{GuestMemory, MemoryError};
use crate::state::{CpuState, EFER_LMA, EFER_NXE, Exception};

pub(super) const CR0_PE: u64 = 1 << 0;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

const ERROR_PRESENT: u32 = 1 << 0;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;
const ERROR_RESERVED: u32 = 1 << 3;
const ERROR_FETCH: u32 = 1 << 4;

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Access {
    /// Write.
    pub write: bool,
    /// Fetch an instruction.
    pub execute: bool,
    /// With user privilege (CPL 3).
    pub user: bool,
}

/// The page table formats.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Bits32,
    Pae,
    Long { levels: u8 },
}

impl Format {
    fn of(state: &dyn CpuState) -> Self {
        if state.efer() & EFER_LMA != 0 {
            Self::Long { levels: if state.cr4() & CR4_LA57 != 0 { 5 } else { 4 } }
        } else if state.cr4() & CR4_PAE != 0 {
            Self::Pae
        } else {
            Self::Bits32
        }
    }

    const fn levels(self) -> u8 {
        match self {
            Self::Bits32 => 2,
            Self::Pae => 3,
            Self::Long { levels } => levels,
        }
    }

    const fn index_bits(self) -> u32 {
        if matches!(self, Self::Bits32) { 10 } else { 9 }
    }

    /// Address bits below those that the entries of `level` (1 is the lowest) translate.
    const fn shift(self, level: u8) -> u32 {
        12 + self.index_bits() * (level as u32 - 1)
    }

    const fn root(self, cr3: u64) -> u64 {
        match self {
            Self::Bits32 => cr3 & 0xFFFF_F000,
            Self::Pae => cr3 & 0xFFFF_FFE0,
            Self::Long { .. } => cr3 & ADDRESS,
        }
    }

    /// A page directory pointer of PAE paging has no rights and no accessed flag.
    const fn is_bare(self, level: u8) -> bool {
        matches!(self, Self::Pae) && level == 3
    }

    fn is_leaf(self, level: u8, entry: u64, state: &dyn CpuState) -> bool {
        match (self, level) {
            (_, 1) => true,
            (Self::Bits32, 2) => entry & LARGE != 0 && state.cr4() & CR4_PSE != 0,
            (Self::Pae, 2) | (Self::Long { .. }, 2 | 3) => entry & LARGE != 0,
            _ => false,
        }
    }

    /// Bits of an entry that must be zero. Those above the processor's physical address width are left to the processor.
    fn reserved(self, level: u8, leaf: bool, state: &dyn CpuState) -> u64 {
        let execute = if state.efer() & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        match (self, level, leaf) {
            (Self::Bits32, 2, true) => 1 << 21,
            (Self::Bits32, _, _) => 0,
            (Self::Pae, 3, _) => 0xFFF0_0000_0000_01E6,
            (Self::Pae, 2, true) => 0x7FF0_0000_001F_E000 | execute,
            (Self::Pae, _, _) => 0x7FF0_0000_0000_0000 | execute,
            (Self::Long { .. }, 2, true) => 0x1F_E000 | execute,
            (Self::Long { .. }, 3, true) => 0x3FFF_E000 | execute,
            (Self::Long { .. }, 4.., _) => LARGE | execute,
            (Self::Long { .. }, _, _) => execute,
        }
    }
}

/// One entry on the way down.
#[derive(Clone, Copy, Default)]
struct Step {
    at: GuestPhysAddr,
    entry: u64,
}

/// True when a 64-bit linear address has the form that the paging mode in force demands.
pub(super) fn is_canonical(state: &dyn CpuState, address: u64) -> bool {
    let unused = if state.cr4() & CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
    ((address << unused) as i64 >> unused) as u64 == address
}

/// Translates a linear address by the guest's page tables, and sets their accessed and dirty flags.
///
/// # Errors
/// [`Stop::Exception`] with the page fault, or #GP for an address that is not canonical; [`Stop::Memory`]; never
/// [`Stop::Unsupported`].
pub fn translate(
    state: &dyn CpuState,
    memory: &mut dyn GuestMemory,
    address: GuestVirtAddr,
    access: Access,
) -> Result<GuestPhysAddr, Stop> {
    if state.cr0() & CR0_PG == 0 {
        return Ok(GuestPhysAddr(address.0 & 0xFFFF_FFFF));
    }
    let format = Format::of(state);
    if matches!(format, Format::Long { .. }) && !is_canonical(state, address.0) {
        return Err(Stop::Exception(Exception::GENERAL_PROTECTION));
    }
    let fault = |bits| Err(Stop::Exception(page_fault(state, address, access, bits)));

    let mut steps = [Step::default(); 5];
    let mut rights = WRITABLE | USER;
    let mut table = format.root(state.cr3());
    for (level, step) in (1..=format.levels()).rev().zip(&mut steps) {
        let index = address.0 >> format.shift(level) & ((1 << format.index_bits()) - 1);
        let index = if format.is_bare(level) { index & 3 } else { index };
        let Some((at, entry)) = read_entry(format, memory, table, index)? else {
            return fault(ERROR_PRESENT | ERROR_RESERVED);
        };
        if entry & PRESENT == 0 {
            return fault(0);
        }
        let leaf = format.is_leaf(level, entry, state);
        if entry & format.reserved(level, leaf, state) != 0 {
            return fault(ERROR_PRESENT | ERROR_RESERVED);
        }
        if !format.is_bare(level) {
            *step = Step { at, entry };
            rights = rights & (entry | !(WRITABLE | USER)) | entry & NO_EXECUTE;
        }
        if leaf {
            if !permits(state, rights, access) {
                return fault(ERROR_PRESENT);
            }
            mark(format, memory, &steps, access.write)?;
            return Ok(GuestPhysAddr(
                page(format, level, entry) | address.0 & ((1 << format.shift(level)) - 1),
            ));
        }
        table = if format == Format::Bits32 { entry & 0xFFFF_F000 } else { entry & ADDRESS };
    }
    fault(0)
}

/// The address of a table entry and its value; `None` outside RAM, where nothing answers and all ones have reserved bits set.
fn read_entry(
    format: Format,
    memory: &mut dyn GuestMemory,
    table: u64,
    index: u64,
) -> Result<Option<(GuestPhysAddr, u64)>, Stop> {
    let (at, value) = if format == Format::Bits32 {
        let at = GuestPhysAddr(table + index * 4);
        (at, memory.read_u32(at).map(u64::from))
    } else {
        let at = GuestPhysAddr(table + index * 8);
        (at, memory.read_u64(at))
    };
    match value {
        Ok(value) => Ok(Some((at, value))),
        Err(MemoryError::NotRam { .. }) => Ok(None),
        Err(error) => Err(Stop::Memory(error)),
    }
}

/// The frame of a leaf entry.
const fn page(format: Format, level: u8, entry: u64) -> u64 {
    let within = (1 << format.shift(level)) - 1;
    match (format, level) {
        // A 4 MiB page has bits 32-39 of its address in bits 13-20.
        (Format::Bits32, 2) => entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32,
        (Format::Bits32, _) => entry & 0xFFFF_F000,
        _ => entry & ADDRESS & !within,
    }
}

fn permits(state: &dyn CpuState, rights: u64, access: Access) -> bool {
    let (writable, user_page) = (rights & WRITABLE != 0, rights & USER != 0);
    if access.user && !user_page {
        return false;
    }
    if access.execute {
        let smep = !access.user && user_page && state.cr4() & CR4_SMEP != 0;
        return rights & NO_EXECUTE == 0 && !smep;
    }
    let smap = || state.cr4() & CR4_SMAP != 0 && state.rflags() & RFLAGS_AC == 0;
    if !access.user && user_page && smap() {
        return false;
    }
    !access.write || writable || !access.user && state.cr0() & CR0_WP == 0
}

/// Sets the accessed flags, and for a write the leaf's dirty flag, where they are not set yet.
fn mark(format: Format, memory: &mut dyn GuestMemory, steps: &[Step], write: bool) -> Result<(), Stop> {
    let used = usize::from(format.levels());
    let last = steps.iter().take(used).rposition(|step| step.entry != 0);
    for (index, step) in steps.iter().enumerate().filter(|(_, step)| step.entry != 0) {
        let dirty = if write && Some(index) == last { DIRTY } else { 0 };
        let marked = step.entry | ACCESSED | dirty;
        if marked == step.entry {
            continue;
        }
        let bytes = marked.to_le_bytes();
        let width = if format == Format::Bits32 { 4 } else { 8 };
        match memory.write(step.at, bytes.get(..width).unwrap_or(&bytes)) {
            Ok(()) | Err(MemoryError::NotRam { .. }) => {}
            Err(error) => return Err(Stop::Memory(error)),
        }
    }
    Ok(())
}

fn page_fault(state: &dyn CpuState, address: GuestVirtAddr, access: Access, bits: u32) -> Exception {
    let tells_fetch = state.cr4() & CR4_SMEP != 0 || state.efer() & EFER_NXE != 0;
    let mut code = bits;
    if access.write {
        code |= ERROR_WRITE;
    }
    if access.user {
        code |= ERROR_USER;
    }
    if access.execute && tells_fetch {
        code |= ERROR_FETCH;
    }
    Exception::page_fault(address.0, code)
}
