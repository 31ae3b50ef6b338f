//! Checks of the host state: Intel SDM vol. 3, 27.2.2-27.2.4. The host is in 64-bit mode.

use super::{CR0_WP, CR4_CET, CR4_PAE, Checks, EFER_DEFINED, EFER_LMA, EFER_LME, PHYSICAL_WIDTH};
use crate::hypervisor::vmx::controls::exit;
use crate::hypervisor::vmx::fields::Field;

/// RPL and the table indicator.
const NOT_INDEX: u64 = 0b111;

impl Checks<'_> {
    pub(super) fn host(&mut self) {
        let known = *self.capabilities;
        self.require_fixed(Field::HostCr0, known.cr0_fixed0, known.cr0_fixed1, 0, "IA32_VMX_CR0_FIXED0/1");
        self.require_fixed(Field::HostCr4, known.cr4_fixed0, known.cr4_fixed1, 0, "IA32_VMX_CR4_FIXED0/1");
        let cr4 = self.get(Field::HostCr4);
        let holds = cr4 & CR4_CET == 0 || self.get(Field::HostCr0) & CR0_WP != 0;
        self.require(holds, Field::HostCr4, "CET needs CR0.WP");
        self.require(cr4 & CR4_PAE != 0, Field::HostCr4, "a 64-bit host has PAE");
        self.require_clear(Field::HostCr3, u64::MAX << PHYSICAL_WIDTH, "beyond the physical address width");
        let holds = self.has_exit(exit::HOST_64_BIT);
        self.require(holds, Field::ExitControls, "the host is in 64-bit mode, so it must stay so");
        if self.has_exit(exit::LOAD_PAT) {
            self.require_pat(Field::HostIa32Pat);
        }
        if self.has_exit(exit::LOAD_EFER) {
            self.require_clear(Field::HostIa32Efer, !EFER_DEFINED, "reserved");
            let both = EFER_LMA | EFER_LME;
            let holds = self.get(Field::HostIa32Efer) & both == both;
            self.require(holds, Field::HostIa32Efer, "a 64-bit host has LME and LMA");
        }
        self.host_segments();
        for field in [
            Field::HostSysenterEsp,
            Field::HostSysenterEip,
            Field::HostFsBase,
            Field::HostGsBase,
            Field::HostTrBase,
            Field::HostGdtrBase,
            Field::HostIdtrBase,
            Field::HostRip,
        ] {
            self.require_canonical(field);
        }
    }

    fn host_segments(&mut self) {
        for field in [
            Field::HostEsSelector,
            Field::HostCsSelector,
            Field::HostSsSelector,
            Field::HostDsSelector,
            Field::HostFsSelector,
            Field::HostGsSelector,
            Field::HostTrSelector,
        ] {
            self.require_clear(field, NOT_INDEX, "RPL and table indicator");
        }
        for field in [Field::HostCsSelector, Field::HostTrSelector] {
            let selector = self.get(field);
            self.require(selector != 0, field, "must not be null");
        }
    }
}
