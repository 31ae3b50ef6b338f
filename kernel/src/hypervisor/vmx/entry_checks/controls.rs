//! Checks of the control fields: Intel SDM vol. 3, 27.2.1.

use super::{CR0_PE, Checks, PAGE};
use crate::hypervisor::vmx::controls::{entry, exit, pin, primary, secondary};
use crate::hypervisor::vmx::exit_reason::interruption;
use crate::hypervisor::vmx::fields::Field;

const APIC_VIRTUALIZATION: u32 = secondary::VIRTUALIZE_X2APIC_MODE
    | secondary::APIC_REGISTER_VIRTUALIZATION
    | secondary::VIRTUAL_INTERRUPT_DELIVERY;

/// #DF, #TS, #NP, #SS, #GP, #PF, #AC.
const PUSHES_ERROR_CODE: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;
/// #CP, where the processor has control-flow enforcement.
const CONTROL_PROTECTION: u32 = 21;

const EPT_MEMORY_TYPE: u64 = 0b111;
const EPT_WALK: u64 = 0b111 << 3;
const EPT_ACCESS_DIRTY: u64 = 1 << 6;
const EPT_RESERVED: u64 = 0xF80;

impl Checks<'_> {
    pub(super) fn controls(&mut self) {
        self.reserved_control_bits();
        self.interrupt_controls();
        self.apic_controls();
        self.addresses();
        self.paging_controls();
        self.msr_lists();
        self.injection();
    }

    fn reserved_control_bits(&mut self) {
        let known = *self.capabilities;
        for (field, register, name) in [
            (Field::PinControls, known.pin, "IA32_VMX_PINBASED_CTLS"),
            (Field::PrimaryControls, known.primary, "IA32_VMX_PROCBASED_CTLS"),
            (Field::ExitControls, known.exit, "IA32_VMX_EXIT_CTLS"),
            (Field::EntryControls, known.entry, "IA32_VMX_ENTRY_CTLS"),
        ] {
            self.require_fixed(field, register & 0xFFFF_FFFF, register >> 32, 0, name);
        }
        if self.has_primary(primary::SECONDARY_CONTROLS) {
            let (must, may) = (known.secondary & 0xFFFF_FFFF, known.secondary >> 32);
            self.require_fixed(Field::SecondaryControls, must, may, 0, "IA32_VMX_PROCBASED_CTLS2");
        }
        if self.has_primary(primary::TERTIARY_CONTROLS) {
            self.require_fixed(Field::TertiaryControls, 0, known.tertiary, 0, "IA32_VMX_PROCBASED_CTLS3");
        }
        let targets = self.get_32(Field::Cr3TargetCount);
        self.require(targets <= known.cr3_targets(), Field::Cr3TargetCount, "more than the processor has");
    }

    fn interrupt_controls(&mut self) {
        let holds = self.has_pin(pin::NMI_EXITING) || !self.has_pin(pin::VIRTUAL_NMIS);
        self.require(holds, Field::PinControls, "virtual NMIs need NMI exiting");
        let holds = self.has_pin(pin::VIRTUAL_NMIS) || !self.has_primary(primary::NMI_WINDOW_EXITING);
        self.require(holds, Field::PrimaryControls, "NMI-window exiting needs virtual NMIs");
        let holds = self.has_pin(pin::EXTERNAL_INTERRUPT_EXITING)
            || !self.has_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY);
        self.require(
            holds,
            Field::PinControls,
            "virtual-interrupt delivery needs external-interrupt exiting",
        );
        let holds = self.has_pin(pin::PREEMPTION_TIMER) || !self.has_exit(exit::SAVE_PREEMPTION_TIMER);
        self.require(holds, Field::ExitControls, "saving the preemption timer needs the timer");
        if self.has_pin(pin::POSTED_INTERRUPTS) {
            let holds = self.has_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY)
                && self.has_exit(exit::ACKNOWLEDGE_INTERRUPT);
            self.require(
                holds,
                Field::PinControls,
                "posted interrupts need virtual-interrupt delivery and acknowledgement at exits",
            );
            self.require_clear(Field::PostedInterruptNotificationVector, 0xFF00, "a vector");
            self.require_physical(Field::PostedInterruptDescriptor, 0x3F);
        }
        for (control, what) in [
            (entry::ENTRY_TO_SMM, "entry to SMM from outside it"),
            (entry::DEACTIVATE_DUAL_MONITOR, "dual-monitor treatment outside SMM"),
        ] {
            self.require_clear(Field::EntryControls, u64::from(control), what);
        }
    }

    fn apic_controls(&mut self) {
        if self.has_primary(primary::TPR_SHADOW) {
            self.require_physical(Field::VirtualApicPage, PAGE);
            if !self.has_secondary(secondary::VIRTUAL_INTERRUPT_DELIVERY) {
                self.require_clear(Field::TprThreshold, 0xFFFF_FFF0, "a task priority class");
            }
        } else {
            let holds = !self.has_secondary(APIC_VIRTUALIZATION);
            self.require(holds, Field::SecondaryControls, "APIC virtualization needs the TPR shadow");
        }
        let holds = !self.has_secondary(secondary::VIRTUALIZE_X2APIC_MODE)
            || !self.has_secondary(secondary::VIRTUALIZE_APIC_ACCESSES);
        self.require(holds, Field::SecondaryControls, "virtualize either x2APIC mode or APIC accesses");
    }

    fn addresses(&mut self) {
        if self.has_primary(primary::IO_BITMAPS) {
            self.require_physical(Field::IoBitmapA, PAGE);
            self.require_physical(Field::IoBitmapB, PAGE);
        }
        if self.has_primary(primary::MSR_BITMAPS) {
            self.require_physical(Field::MsrBitmap, PAGE);
        }
        for (control, field) in [
            (secondary::VIRTUALIZE_APIC_ACCESSES, Field::ApicAccessPage),
            (secondary::VMCS_SHADOWING, Field::VmreadBitmap),
            (secondary::VMCS_SHADOWING, Field::VmwriteBitmap),
            (secondary::PAGE_MODIFICATION_LOGGING, Field::PmlAddress),
            (secondary::EPT_VIOLATION_EXCEPTION, Field::VirtualizationExceptionInformation),
        ] {
            if self.has_secondary(control) {
                self.require_physical(field, PAGE);
            }
        }
    }

    fn paging_controls(&mut self) {
        if self.has_secondary(secondary::VPID) {
            let vpid = self.get(Field::Vpid);
            self.require(vpid != 0, Field::Vpid, "0 is the host's");
        }
        if self.has_secondary(secondary::EPT) {
            return self.ept_pointer();
        }
        for (control, name) in [
            (secondary::UNRESTRICTED_GUEST, "unrestricted guest needs EPT"),
            (secondary::MODE_BASED_EXECUTE, "mode-based execute control needs EPT"),
            (secondary::SUB_PAGE_WRITE_PERMISSIONS, "sub-page write permissions need EPT"),
            (secondary::PAGE_MODIFICATION_LOGGING, "page-modification logging needs EPT"),
            (secondary::PT_GUEST_PHYSICAL, "guest-physical processor trace needs EPT"),
        ] {
            let holds = !self.has_secondary(control);
            self.require(holds, Field::SecondaryControls, name);
        }
    }

    fn ept_pointer(&mut self) {
        let pointer = self.get(Field::EptPointer);
        let offered = self.capabilities.ept_vpid;
        let has_type = match pointer & EPT_MEMORY_TYPE {
            0 => offered & 1 << 8 != 0,
            6 => self.capabilities.has_write_back_ept(),
            _ => false,
        };
        self.require(
            has_type,
            Field::EptPointer,
            "bits 0-2 name a memory type that the processor does not offer",
        );
        let has_walk = match (pointer & EPT_WALK) >> 3 {
            3 => self.capabilities.has_four_level_ept(),
            4 => offered & 1 << 7 != 0,
            _ => false,
        };
        self.require(has_walk, Field::EptPointer, "bits 3-5 name a walk that the processor does not offer");
        let holds = pointer & EPT_ACCESS_DIRTY == 0 || self.capabilities.has_ept_access_dirty();
        self.require(holds, Field::EptPointer, "bit 6: there are no accessed and dirty flags");
        self.require_clear(Field::EptPointer, EPT_RESERVED, "reserved");
        self.require_clear(
            Field::EptPointer,
            u64::MAX << super::PHYSICAL_WIDTH,
            "beyond the physical address width",
        );
    }

    fn msr_lists(&mut self) {
        for (count, address) in [
            (Field::ExitMsrStoreCount, Field::ExitMsrStoreAddress),
            (Field::ExitMsrLoadCount, Field::ExitMsrLoadAddress),
            (Field::EntryMsrLoadCount, Field::EntryMsrLoadAddress),
        ] {
            let entries = self.get_32(count);
            if entries != 0 {
                self.require_physical(address, 0xF);
                let most = self.capabilities.msr_list_entries();
                self.require(entries <= most, count, "more than IA32_VMX_MISC allows");
            }
        }
    }

    /// 27.2.1.3: the event to inject.
    fn injection(&mut self) {
        const FIELD: Field = Field::EntryInterruptionInfo;
        let info = self.get_32(FIELD);
        if info & interruption::VALID == 0 {
            return;
        }
        let (kind, vector) = (info & interruption::TYPE, info & interruption::VECTOR);
        self.require_clear(FIELD, 0x7FFF_F000, "reserved");
        match kind {
            interruption::NMI => self.require(vector == 2, FIELD, "an NMI has vector 2"),
            interruption::HARDWARE_EXCEPTION => {
                self.require(vector <= 31, FIELD, "an exception has a vector up to 31");
            }
            interruption::OTHER_EVENT => {
                let has_trap_flag =
                    self.capabilities.primary >> 32 & u64::from(primary::MONITOR_TRAP_FLAG) != 0;
                self.require(
                    has_trap_flag && vector == 0,
                    FIELD,
                    "type 7 is the monitor trap flag with vector 0",
                );
            }
            interruption::EXTERNAL_INTERRUPT
            | interruption::SOFTWARE_INTERRUPT
            | interruption::PRIVILEGED_SOFTWARE_EXCEPTION
            | interruption::SOFTWARE_EXCEPTION => {}
            _ => self.require(false, FIELD, "type 1 is reserved"),
        }
        self.injected_error_code(kind, vector, info & interruption::HAS_ERROR_CODE != 0);
        if interruption::is_software(info) {
            let length = self.get_32(Field::EntryInstructionLength);
            let least = u32::from(!self.capabilities.injects_zero_length_software_events());
            let holds = (least..=15).contains(&length);
            self.require(
                holds,
                Field::EntryInstructionLength,
                "a software event needs its instruction's length",
            );
        }
    }

    fn injected_error_code(&mut self, kind: u32, vector: u32, has_error_code: bool) {
        const FIELD: Field = Field::EntryInterruptionInfo;
        let is_real_mode = self.is_unrestricted() && self.get(Field::GuestCr0) & CR0_PE == 0;
        if has_error_code {
            let holds = kind == interruption::HARDWARE_EXCEPTION;
            self.require(holds, FIELD, "only a hardware exception has an error code");
            self.require(!is_real_mode, FIELD, "no exception has an error code in real mode");
            self.require_clear(Field::EntryExceptionErrorCode, 0xFFFF_0000, "an error code has 16 bits");
        }
        let any_goes = self.capabilities.injects_any_error_code() || vector == CONTROL_PROTECTION;
        if kind != interruption::HARDWARE_EXCEPTION || is_real_mode || any_goes {
            return;
        }
        let pushes = vector < 32 && PUSHES_ERROR_CODE >> vector & 1 != 0;
        self.require(pushes || !has_error_code, FIELD, "this exception has no error code");
        self.require(!pushes || has_error_code, FIELD, "this exception has an error code");
    }
}
