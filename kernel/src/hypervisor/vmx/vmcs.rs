//! A virtual-machine control structure in memory, and the instructions that reach its fields.
//!
//! Intel SDM vol. 3, 25.1-25.2 (regions and the current VMCS), 25.11 (software's use of it), 31.3 (the instructions).

use super::exit_reason::instruction_error;
use super::fields::Field;
use crate::cpu::local::this_core;
use crate::memory::heap::Pages;
use core::arch::asm;
use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};

/// Physical address of this core's current VMCS; 0 for none.
fn current() -> &'static AtomicU64 {
    &this_core().virtualization
}

/// A VMCS. It becomes the core's current one by itself when a field is reached.
pub struct Vmcs {
    region: Pages,
    accesses: Cell<u64>,
}

impl Vmcs {
    /// A cleared VMCS. VMX is on.
    pub fn new(revision: u32) -> Self {
        let mut region = Pages::new(1);
        region.bytes_mut()[..4].copy_from_slice(&revision.to_le_bytes());
        let vmcs = Self { region, accesses: Cell::new(0) };
        vmcs.clear();
        vmcs
    }

    /// Takes it off this core: the processor writes back what it holds of it, and the next entry is a launch.
    pub fn clear(&self) {
        let address = self.region.physical();
        let failed: u8;
        // SAFETY: the page is a VMCS region that `self` owns, and VMX is on as long as the kernel runs.
        unsafe {
            asm!("vmclear [{}]", "setbe {}", in(reg) &raw const address, out(reg_byte) failed, options(nostack))
        };
        assert!(failed == 0, "VMCLEAR of {address:#x} failed");
        let _ = current().compare_exchange(address, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Makes it the core's current VMCS.
    pub fn make_current(&self) {
        let address = self.region.physical();
        if current().load(Ordering::Relaxed) == address {
            return;
        }
        let failed: u8;
        // SAFETY: as for `clear`, which has written the revision and state that the processor expects.
        unsafe {
            asm!("vmptrld [{}]", "setbe {}", in(reg) &raw const address, out(reg_byte) failed, options(nostack))
        };
        assert!(failed == 0, "VMPTRLD of {address:#x} failed");
        current().store(address, Ordering::Relaxed);
    }

    /// A field's value; `None` if this processor has no such field.
    pub fn try_read(&self, field: Field) -> Option<u64> {
        self.make_current();
        self.accesses.set(self.accesses.get() + 1);
        let (value, failed): (u64, u8);
        // SAFETY: reads a field of the current VMCS; a field that does not exist only sets a flag.
        unsafe {
            asm!("vmread {value}, {field}", "setbe {failed}", field = in(reg) u64::from(field.encoding()),
                value = lateout(reg) value, failed = lateout(reg_byte) failed, options(nostack));
        }
        (failed == 0).then_some(value)
    }

    /// A field's value.
    ///
    /// # Panics
    /// When the processor has no such field: its capability registers were misread.
    pub fn read(&self, field: Field) -> u64 {
        match self.try_read(field) {
            Some(value) => value,
            None => panic!("VMREAD of {field:?} failed: {}", self.last_error()),
        }
    }

    /// Sets a field.
    ///
    /// # Panics
    /// As for [`Self::read`].
    pub fn write(&self, field: Field, value: u64) {
        self.make_current();
        self.accesses.set(self.accesses.get() + 1);
        let failed: u8;
        // SAFETY: writes a field of a VMCS that `self` owns; what it means for the guest is the caller's to keep within bounds, and
        // host state is only what L1 runs with.
        unsafe {
            asm!("vmwrite {field}, {value}", "setbe {failed}", field = in(reg) u64::from(field.encoding()),
                value = in(reg) value, failed = lateout(reg_byte) failed, options(nostack));
        }
        if failed != 0 {
            panic!("VMWRITE of {value:#x} to {field:?} failed: {}", self.last_error());
        }
    }

    /// What the last VMX instruction that failed says.
    pub fn last_error(&self) -> &'static str {
        self.try_read(Field::VmInstructionError)
            .map_or("no current VMCS", |number| instruction_error(number as u32))
    }

    /// Forgets the accesses so far.
    pub fn count_from_here(&self) {
        self.accesses.set(0);
    }

    /// How often fields were read and written since [`Self::count_from_here`].
    pub fn accesses(&self) -> u64 {
        self.accesses.get()
    }

    /// Counts a field written in another place.
    pub fn count_access(&self) {
        self.accesses.set(self.accesses.get() + 1);
    }
}

impl Drop for Vmcs {
    fn drop(&mut self) {
        // The processor may hold the fields back until it is told to write them to the page that is about to be freed.
        self.clear();
    }
}

/// A guest register that lives in the VMCS: read when first asked for after an exit, written before the next entry if changed.
pub struct CachedField {
    field: Field,
    value: Cell<Option<u64>>,
    changed: Cell<bool>,
}

impl CachedField {
    /// A field not yet read.
    pub const fn new(field: Field) -> Self {
        Self { field, value: Cell::new(None), changed: Cell::new(false) }
    }

    /// The value.
    pub fn get(&self, vmcs: &Vmcs) -> u64 {
        match self.value.get() {
            Some(value) => value,
            None => {
                let value = vmcs.read(self.field);
                self.value.set(Some(value));
                value
            }
        }
    }

    /// Changes the value.
    pub fn set(&self, value: u64) {
        if self.value.get() != Some(value) {
            self.value.set(Some(value));
            self.changed.set(true);
        }
    }

    /// Writes a changed value, before an entry.
    pub fn write_back(&self, vmcs: &Vmcs) {
        if self.changed.take()
            && let Some(value) = self.value.get()
        {
            vmcs.write(self.field, value);
        }
    }

    /// Forgets the value, after an exit.
    pub fn forget(&self) {
        self.value.set(None);
    }
}
