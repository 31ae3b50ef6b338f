//! All that a vCPU is, read once when its machine becomes a template, and written to each clone's VMCS.
//!
//! Intel SDM vol. 3, 25.4 (guest state: registers, and 25.4.2, what is not a register), 25.8.1 (the entry control that follows EFER.LMA),
//! 25.6.6 (read shadows).

use super::super::Shared;
use super::super::controls::entry;
use super::super::fields::Field;
use super::{SWITCHED_MSRS, VmxVcpu};
use alloc::sync::Arc;
use alloc::vec::Vec;
use nestling_machine::state::{Registers, VcpuState};

/// Every field that the guest, or an exit on its behalf, changes.
const STATE: [Field; 64] = [
    Field::GuestEsSelector,
    Field::GuestCsSelector,
    Field::GuestSsSelector,
    Field::GuestDsSelector,
    Field::GuestFsSelector,
    Field::GuestGsSelector,
    Field::GuestLdtrSelector,
    Field::GuestTrSelector,
    Field::GuestIa32Debugctl,
    Field::GuestIa32Efer,
    Field::GuestPdpte0,
    Field::GuestPdpte1,
    Field::GuestPdpte2,
    Field::GuestPdpte3,
    Field::VmcsLinkPointer,
    Field::GuestEsLimit,
    Field::GuestCsLimit,
    Field::GuestSsLimit,
    Field::GuestDsLimit,
    Field::GuestFsLimit,
    Field::GuestGsLimit,
    Field::GuestLdtrLimit,
    Field::GuestTrLimit,
    Field::GuestGdtrLimit,
    Field::GuestIdtrLimit,
    Field::GuestEsAccessRights,
    Field::GuestCsAccessRights,
    Field::GuestSsAccessRights,
    Field::GuestDsAccessRights,
    Field::GuestFsAccessRights,
    Field::GuestGsAccessRights,
    Field::GuestLdtrAccessRights,
    Field::GuestTrAccessRights,
    Field::GuestInterruptibility,
    Field::GuestActivityState,
    Field::GuestSysenterCs,
    Field::Cr0ReadShadow,
    Field::Cr4ReadShadow,
    Field::GuestCr0,
    Field::GuestCr3,
    Field::GuestCr4,
    Field::GuestEsBase,
    Field::GuestCsBase,
    Field::GuestSsBase,
    Field::GuestDsBase,
    Field::GuestFsBase,
    Field::GuestGsBase,
    Field::GuestLdtrBase,
    Field::GuestTrBase,
    Field::GuestGdtrBase,
    Field::GuestIdtrBase,
    Field::GuestDr7,
    Field::GuestRsp,
    Field::GuestRip,
    Field::GuestRflags,
    Field::GuestPendingDebugExceptions,
    Field::GuestSysenterEsp,
    Field::GuestSysenterEip,
    Field::EntryInterruptionInfo,
    Field::EntryExceptionErrorCode,
    Field::EntryInstructionLength,
    Field::ExceptionBitmap,
    Field::Cr0Mask,
    Field::Cr4Mask,
];

/// A vCPU's state: of its VMCS, and beside it.
pub struct Snapshot {
    fields: Vec<(Field, u64)>,
    is_long: bool,
    registers: Registers,
    cr0_shadow: u64,
    cr4_shadow: u64,
    efer: u64,
    dr6: u64,
    cr2: u64,
    msrs: [u64; SWITCHED_MSRS.len()],
    event: u32,
    event_error: u32,
    nmi_pending: bool,
    nmi_seen: bool,
    task_priority: u8,
}

impl VmxVcpu {
    /// Takes a snapshot of a vCPU that was unloaded.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        for field in
            [&self.rip, &self.rsp, &self.rflags, &self.interruptibility, &self.cr0, &self.cr3, &self.cr4]
        {
            field.write_back(&self.vmcs);
        }
        // A field that this processor does not have, it does not need either.
        let read = |field: Field| Some((field, self.vmcs.try_read(field)?));
        Snapshot {
            fields: STATE.into_iter().filter_map(read).collect(),
            is_long: self.vmcs.read(Field::EntryControls) & u64::from(entry::IA32E_MODE_GUEST) != 0,
            registers: self.registers,
            cr0_shadow: self.cr0_shadow,
            cr4_shadow: self.cr4_shadow,
            efer: self.efer,
            dr6: self.dr6,
            cr2: self.cr2,
            msrs: self.msrs,
            event: self.event,
            event_error: self.event_error,
            nmi_pending: self.nmi_pending,
            nmi_seen: self.nmi_seen,
            task_priority: self.task_priority,
        }
    }

    /// A vCPU that goes on where the snapshot was taken.
    pub(in super::super) fn thaw(
        nested_root: u64,
        snapshot: &Snapshot,
        vpid: u16,
        shared: Arc<Shared>,
    ) -> Self {
        let mut vcpu = Self::new(nested_root, &VcpuState::default(), vpid, shared);
        for (field, value) in &snapshot.fields {
            vcpu.vmcs.write(*field, *value);
        }
        let long = if snapshot.is_long { entry::IA32E_MODE_GUEST } else { 0 };
        vcpu.vmcs.write(Field::EntryControls, u64::from(vcpu.controls.entry | long));
        vcpu.forget();
        vcpu.registers = snapshot.registers;
        (vcpu.cr0_shadow, vcpu.cr4_shadow, vcpu.efer) =
            (snapshot.cr0_shadow, snapshot.cr4_shadow, snapshot.efer);
        (vcpu.dr6, vcpu.cr2, vcpu.msrs) = (snapshot.dr6, snapshot.cr2, snapshot.msrs);
        (vcpu.event, vcpu.event_error) = (snapshot.event, snapshot.event_error);
        (vcpu.nmi_pending, vcpu.nmi_seen) = (snapshot.nmi_pending, snapshot.nmi_seen);
        vcpu.task_priority = snapshot.task_priority;
        vcpu.vmcs.count_from_here();
        vcpu
    }
}
