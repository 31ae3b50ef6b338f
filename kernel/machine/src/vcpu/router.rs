//! The way of an interrupt to the vCPUs it is for: what a machine's bus does between local APICs, devices and the I/O APIC.
//!
//! Intel SDM vol. 3, 11.6 (interprocessor interrupts and destinations), 11.11 (message signalled interrupts).

use super::lapic::Addressing;
use super::{Inbox, Lapic, VcpuConfig};
use crate::address::Vector;
use crate::interrupt::{DeliveryMode, Ipi, MsiMessage};
use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

/// One vCPU, as the others see it.
#[derive(Debug)]
struct Port {
    inbox: Inbox,
    /// See [`Addressing::to_bits`].
    addressing: AtomicU64,
}

impl Clone for Port {
    fn clone(&self) -> Self {
        let addressing = AtomicU64::new(self.addressing.load(Ordering::SeqCst));
        Self { inbox: self.inbox.clone(), addressing }
    }
}

/// A machine's interrupts on their way. Any core may use it at any time. A copy has what is on its way at that time.
#[derive(Clone, Debug)]
pub struct InterruptRouter {
    ports: Box<[Port]>,
}

impl InterruptRouter {
    /// A router for a machine whose APICs are as after power-on; their ids are 0 to `vcpu_count` - 1.
    pub fn new(vcpu_count: u32) -> Self {
        let port = |id| {
            let addressing = Lapic::new(&VcpuConfig { id, vcpu_count, tsc_khz: 1 }).addressing();
            Port { inbox: Inbox::default(), addressing: AtomicU64::new(addressing.to_bits()) }
        };
        Self { ports: (0..vcpu_count).map(port).collect() }
    }

    /// A vCPU's inbox; `None` when there is no such vCPU.
    pub fn inbox(&self, vcpu: usize) -> Option<&Inbox> {
        self.ports.get(vcpu).map(|port| &port.inbox)
    }

    /// Whether an NMI, INIT or start-up interrupt is on its way to anyone.
    pub fn has_signal(&self) -> bool {
        self.ports.iter().any(|port| port.inbox.has_signal())
    }

    /// A vCPU's APIC may have changed: to be called before others can have seen an effect of that.
    pub fn publish(&self, vcpu: usize, lapic: &Lapic) {
        let bits = lapic.addressing().to_bits();
        if let Some(port) = self.ports.get(vcpu)
            && port.addressing.load(Ordering::Relaxed) != bits
        {
            port.addressing.store(bits, Ordering::SeqCst);
        }
    }

    fn addressings(&self) -> impl Iterator<Item = (usize, &Port, Addressing)> {
        self.ports.iter().enumerate().map(|(index, port)| {
            (index, port, Addressing::from_bits(index as u32, port.addressing.load(Ordering::SeqCst)))
        })
    }

    /// Posts a device's message to its destinations and tells `posted` each of them that has to look into its inbox.
    pub fn post_message(&self, message: &MsiMessage, posted: impl FnMut(usize)) {
        if let Some(mode) = message.delivery_mode().filter(|_| message.is_assert()) {
            let accepts = |_, addressing: Addressing| addressing.accepts(message);
            self.post(accepts, mode, message.vector(), message.is_level(), posted);
        }
    }

    /// Posts what the APIC of `sender` handed out to its destinations and tells `posted` each of them that has to look into its inbox.
    pub fn post_ipi(&self, ipi: &Ipi, sender: usize, posted: impl FnMut(usize)) {
        // The sender has taken what was for itself, except where that is beyond its APIC.
        let with_sender = matches!(ipi.delivery, DeliveryMode::Init | DeliveryMode::StartUp);
        let accepts =
            |vcpu, addressing: Addressing| addressing.accepts_ipi(ipi) && (with_sender || vcpu != sender);
        self.post(accepts, ipi.delivery, ipi.vector, false, posted);
    }

    fn post(
        &self,
        accepts: impl Fn(usize, Addressing) -> bool,
        mode: DeliveryMode,
        vector: Vector,
        level: bool,
        mut posted: impl FnMut(usize),
    ) {
        for (vcpu, port, addressing) in self.addressings() {
            if !addressing.is_enabled() || !accepts(vcpu, addressing) {
                continue;
            }
            let is_first = match mode {
                DeliveryMode::LowestPriority if !addressing.takes_vectors() => continue,
                DeliveryMode::Fixed | DeliveryMode::LowestPriority => port.inbox.post(vector, level),
                DeliveryMode::Nmi => port.inbox.post_nmi(),
                DeliveryMode::Init => port.inbox.post_init(),
                DeliveryMode::StartUp => port.inbox.post_start_up(vector),
                DeliveryMode::Smi | DeliveryMode::ExtInt => continue,
            };
            // One that has been told and has yet to look is not told again: a guest that sends interrupts in a loop would have other machines'
            // cores interrupted as often.
            if is_first {
                posted(vcpu);
            }
            if mode == DeliveryMode::LowestPriority {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{GuestTsc, MsrIndex};
    use crate::layout;
    use crate::vcpu::Signals;
    use alloc::vec::Vec;

    struct Machine {
        router: InterruptRouter,
        lapics: Vec<Lapic>,
    }

    impl Machine {
        fn new(vcpu_count: u32) -> Self {
            let router = InterruptRouter::new(vcpu_count);
            let mut lapics: Vec<Lapic> = (0..vcpu_count)
                .map(|id| Lapic::new(&VcpuConfig { id, vcpu_count, tsc_khz: 1_000_000 }))
                .collect();
            for (index, lapic) in lapics.iter_mut().enumerate() {
                lapic.msr_write(MsrIndex(0x80F), 0x1FF, GuestTsc(0)).unwrap();
                router.publish(index, lapic);
            }
            Self { router, lapics }
        }

        /// The vCPU writes its interrupt command register; who was told.
        fn send(&mut self, vcpu: usize, command: u64) -> Vec<usize> {
            self.lapics[vcpu].msr_write(MsrIndex(0x830), command, GuestTsc(0)).unwrap();
            let mut told = Vec::new();
            if let Some(ipi) = self.lapics[vcpu].take_ipi() {
                self.router.post_ipi(&ipi, vcpu, |vcpu| told.push(vcpu));
            }
            told
        }

        fn message(&self, message: MsiMessage) -> Vec<usize> {
            let mut told = Vec::new();
            self.router.post_message(&message, |vcpu| told.push(vcpu));
            told
        }

        /// All look into their inboxes.
        fn take_all(&mut self) {
            for vcpu in 0..self.lapics.len() {
                self.take(vcpu);
            }
        }

        fn take(&mut self, vcpu: usize) -> (Signals, Option<Vector>) {
            let signals = self.router.inbox(vcpu).unwrap().take(&mut self.lapics[vcpu]);
            (signals, self.lapics[vcpu].acknowledge())
        }
    }

    #[test]
    fn an_interrupt_reaches_its_destination_and_nobody_else() {
        let mut machine = Machine::new(4);
        assert_eq!(machine.send(1, 2 << 32 | 0x40), [2]);
        assert_eq!(machine.take(2).1, Some(Vector(0x40)));
        for other in [0, 1, 3] {
            assert_eq!(machine.take(other), (Signals::default(), None));
        }
        assert!(machine.send(1, 9 << 32 | 0x40).is_empty(), "nobody has this id");
    }

    #[test]
    fn broadcasts_reach_all_with_or_without_their_sender() {
        let mut machine = Machine::new(4);
        assert_eq!(machine.send(1, 0xC_0040), [0, 2, 3]);
        machine.take_all();
        assert_eq!(machine.send(1, 0x8_0050), [0, 2, 3], "the sender has taken its own");
        assert_eq!(machine.take(1).1, Some(Vector(0x50)));
        machine.take_all();
        assert_eq!(machine.send(2, 0xFFFF_FFFF_0000_0060), [0, 1, 3]);
        machine.take_all();
        assert_eq!(
            machine.send(0, 0b1101 << 32 | 0x870),
            [2, 3],
            "a logical destination that includes the sender"
        );
        assert_eq!(machine.take(0).1, Some(Vector(0x70)));
    }

    #[test]
    fn one_of_the_destinations_takes_an_interrupt_of_lowest_priority() {
        let mut machine = Machine::new(4);
        machine.lapics[1].msr_write(MsrIndex(0x80F), 0xFF, GuestTsc(0)).unwrap();
        let lapic = &machine.lapics[1];
        machine.router.publish(1, lapic);
        let message = MsiMessage { address: 0xFEE0_0004 | 0b1110 << 12, data: 0x140 };
        assert_eq!(machine.message(message), [2], "not 1, whose APIC is disabled by software");
        assert!(machine.message(message).is_empty(), "2 has been told and has yet to look");
        machine.take_all();
        let message = MsiMessage { data: 0x40, ..message };
        assert_eq!(machine.message(message), [1, 2, 3]);
    }

    #[test]
    fn init_and_start_up_reach_their_processor_and_the_sender_too_if_it_means_itself() {
        let mut machine = Machine::new(3);
        assert_eq!(machine.send(0, 1 << 32 | 0x4500), [1]);
        assert!(machine.send(0, 1 << 32 | 0x469A).is_empty(), "it has been told and has yet to look");
        assert_eq!(machine.take(1).0, Signals { init: true, start_up: Some(Vector(0x9A)) });
        assert_eq!(machine.send(0, 0xC_4500), [1, 2]);
        machine.take_all();
        assert_eq!(machine.send(2, 2 << 32 | 0x4500), [2]);
    }

    #[test]
    fn a_de_asserted_level_message_is_ignored() {
        let mut machine = Machine::new(1);
        assert!(machine.message(MsiMessage { address: 0xFEE0_0000, data: 0x8040 }).is_empty());
        assert_eq!(machine.message(MsiMessage { address: 0xFEE0_0000, data: 0xC040 }), [0]);
        assert_eq!(machine.take(0).1, Some(Vector(0x40)));
    }

    #[test]
    fn an_apic_that_is_off_takes_nothing() {
        let mut machine = Machine::new(2);
        machine.lapics[1].set_base(layout::LAPIC_BASE).unwrap();
        let lapic = &machine.lapics[1];
        machine.router.publish(1, lapic);
        for command in [0x40, 0x4400, 0x4500, 0x469A] {
            assert!(machine.send(0, 1 << 32 | command).is_empty(), "{command:#x}");
        }
    }
}
