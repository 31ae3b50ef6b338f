//! Paravirtual end of interrupt: a flag in guest memory that spares the exit of an EOI.
//!
//! Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_PV_EOI_EN). While the flag is set, the guest ends its interrupt by clearing
//! it instead of writing the EOI register. Guest memory is touched only when the flag changes hands and, while it is set, once
//! an exit.

use super::Lapic;
use crate::address::GuestPhysAddr;
use crate::memory::GuestMemory;
use crate::state::Exception;

const ENABLE: u64 = 1;
const ALIGNMENT: u64 = 4;
/// KVM_PV_EOI_BIT
const MAY_SKIP: u32 = 1;

/// One vCPU's flag.
#[derive(Clone, Debug, Default)]
pub(super) struct PvEoi {
    msr: u64,
    armed: bool,
}

impl PvEoi {
    pub(super) const fn msr(&self) -> u64 {
        self.msr
    }

    /// Writes MSR_KVM_PV_EOI_EN: bit 0 enables, the rest is the flag's address.
    pub(super) fn set_msr(&mut self, value: u64, memory: &mut dyn GuestMemory) -> Result<(), Exception> {
        self.disarm(memory);
        if value & ENABLE != 0 {
            let at = value & !ENABLE;
            if !at.is_multiple_of(ALIGNMENT) || memory.read_u32(GuestPhysAddr(at)).is_err() {
                return Err(Exception::GENERAL_PROTECTION);
            }
        }
        self.msr = value;
        Ok(())
    }

    /// Sets or clears the flag so that it says whether the guest may skip its next EOI.
    pub(super) fn before_entry(&mut self, lapic: &Lapic, memory: &mut dyn GuestMemory) {
        if self.msr & ENABLE == 0 {
            return;
        }
        let wanted = lapic.may_defer_end();
        if wanted && !self.armed {
            self.armed = memory.write(self.address(), &MAY_SKIP.to_le_bytes()).is_ok();
        } else if !wanted && self.armed {
            self.disarm(memory);
        }
    }

    /// Ends the interrupt if the guest has cleared the flag.
    pub(super) fn after_exit(&mut self, lapic: &mut Lapic, memory: &mut dyn GuestMemory) {
        if self.armed && memory.read_u32(self.address()).is_ok_and(|flag| flag & MAY_SKIP == 0) {
            self.armed = false;
            lapic.end_of_interrupt();
        }
    }

    fn disarm(&mut self, memory: &mut dyn GuestMemory) {
        if self.armed {
            self.armed = false;
            // It could be written before, so it can be now.
            let _ = memory.write(self.address(), &0_u32.to_le_bytes());
        }
    }

    const fn address(&self) -> GuestPhysAddr {
        GuestPhysAddr(self.msr & !ENABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{GuestTsc, MsrIndex, Vector};
    use crate::testing::Ram;
    use crate::vcpu::VcpuConfig;

    const FLAG: GuestPhysAddr = GuestPhysAddr(0x40);

    fn enabled() -> (PvEoi, Lapic, Ram) {
        let mut lapic = Lapic::new(&VcpuConfig { id: 0, vcpu_count: 1, tsc_khz: 1_000_000 });
        lapic.msr_write(MsrIndex(0x80F), 0x1FF, GuestTsc(0)).unwrap();
        let mut ram = Ram::new(0x1000);
        let mut flag = PvEoi::default();
        flag.set_msr(FLAG.0 | ENABLE, &mut ram).unwrap();
        (flag, lapic, ram)
    }

    #[test]
    fn clearing_the_flag_ends_the_interrupt() {
        let (mut flag, mut lapic, mut ram) = enabled();
        lapic.raise(Vector(0x40), false);
        lapic.acknowledge();
        flag.before_entry(&lapic, &mut ram);
        assert_eq!(ram.read_u32(FLAG), Ok(1));
        lapic.raise(Vector(0x41), false);
        assert_eq!(lapic.pending(), None);
        ram.write(FLAG, &[0; 4]).unwrap();
        flag.after_exit(&mut lapic, &mut ram);
        assert_eq!(lapic.pending(), Some(Vector(0x41)));
    }

    #[test]
    fn an_untouched_flag_ends_nothing() {
        let (mut flag, mut lapic, mut ram) = enabled();
        lapic.raise(Vector(0x40), false);
        lapic.acknowledge();
        flag.before_entry(&lapic, &mut ram);
        flag.after_exit(&mut lapic, &mut ram);
        lapic.raise(Vector(0x41), false);
        assert_eq!(lapic.pending(), None);
    }

    #[test]
    fn the_flag_is_taken_back_when_another_interrupt_waits_for_the_end() {
        let (mut flag, mut lapic, mut ram) = enabled();
        lapic.raise(Vector(0x40), false);
        lapic.acknowledge();
        flag.before_entry(&lapic, &mut ram);
        lapic.raise(Vector(0x41), false);
        flag.before_entry(&lapic, &mut ram);
        assert_eq!(ram.read_u32(FLAG), Ok(0));
        flag.after_exit(&mut lapic, &mut ram);
        assert_eq!(lapic.pending(), None, "a flag that we cleared is no end of interrupt");
    }

    #[test]
    fn a_level_triggered_interrupt_needs_a_real_end() {
        let (mut flag, mut lapic, mut ram) = enabled();
        lapic.raise(Vector(0x40), true);
        lapic.acknowledge();
        flag.before_entry(&lapic, &mut ram);
        assert_eq!(ram.read_u32(FLAG), Ok(0));
    }

    #[test]
    fn an_address_outside_ram_is_refused() {
        let (mut flag, _, mut ram) = enabled();
        assert!(flag.set_msr(0x1000 | ENABLE, &mut ram).is_err());
        assert!(flag.set_msr(0x42 | ENABLE, &mut ram).is_err());
        assert_eq!(flag.msr(), FLAG.0 | ENABLE);
    }
}
