//! What an exit loads: L1's own state.
//!
//! Intel SDM vol. 3, 25.5 (host-state area), 27.2.2-27.2.4 (checks on it), 28.5 (loading it).

use super::fields::Field;
use super::vmcs::Vmcs;
use core::arch::asm;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::registers::model_specific::{Efer, FsBase, GsBase};

/// Fills the host state of `vmcs` with this core's state; an exit continues at `exit_point`. HostRsp is the entry code's.
///
/// An exit sets the limits of GDTR and IDTR to 0xFFFF. That is left so: L1 loads no selector from beyond its tables' ends, and its IDT has all
/// 256 entries.
pub fn write(vmcs: &Vmcs, exit_point: u64) {
    let task: u16;
    // SAFETY: reads the selector.
    unsafe { asm!("str {:x}", out(reg) task, options(nomem, nostack, preserves_flags)) };
    let (frame, flags) = Cr3::read_raw();
    for (field, value) in [
        (Field::HostCr0, Cr0::read_raw()),
        (Field::HostCr3, frame.start_address().as_u64() | u64::from(flags)),
        (Field::HostCr4, Cr4::read_raw()),
        (Field::HostCsSelector, u64::from(CS::get_reg().0)),
        (Field::HostSsSelector, u64::from(SS::get_reg().0)),
        (Field::HostDsSelector, u64::from(DS::get_reg().0)),
        (Field::HostEsSelector, u64::from(ES::get_reg().0)),
        (Field::HostFsSelector, u64::from(FS::get_reg().0)),
        (Field::HostGsSelector, u64::from(GS::get_reg().0)),
        (Field::HostTrSelector, u64::from(task)),
        (Field::HostFsBase, FsBase::read().as_u64()),
        (Field::HostGsBase, GsBase::read().as_u64()),
        (Field::HostTrBase, task_base(task)),
        (Field::HostGdtrBase, sgdt().base.as_u64()),
        (Field::HostIdtrBase, sidt().base.as_u64()),
        (Field::HostSysenterCs, 0),
        (Field::HostSysenterEsp, 0),
        (Field::HostSysenterEip, 0),
        (Field::HostIa32Efer, Efer::read_raw()),
        (Field::HostRip, exit_point),
        (Field::HostRsp, 0),
    ] {
        vmcs.write(field, value);
    }
}

/// The base address in the 16-byte descriptor of the task-state segment (7.2.3).
fn task_base(selector: u16) -> u64 {
    let descriptor = (sgdt().base.as_u64() + u64::from(selector & !7)) as *const u64;
    // SAFETY: the selector was loaded from this table, so its two words are there.
    let (low, high) = unsafe { (descriptor.read(), descriptor.add(1).read()) };
    low >> 16 & 0xFF_FFFF | (low >> 56 & 0xFF) << 24 | (high & 0xFFFF_FFFF) << 32
}
