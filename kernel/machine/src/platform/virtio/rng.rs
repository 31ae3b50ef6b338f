//! The entropy device.
//!
//! Virtio 1.2, 5.4 (entropy device).

use super::queue::{Chain, Queue, QueueError};
use super::transport::VirtioDevice;
use crate::memory::GuestMemory;
use crate::platform::{Entropy, Host};

const QUEUE_SIZE: u16 = 8;
/// The most bytes given for one request; the device may give fewer than asked for.
const REQUEST_MAX: u64 = 4096;
const COPY_BYTES: usize = 256;

/// The entropy device.
#[derive(Clone, Debug, Default)]
pub(in crate::platform) struct Rng {
    notified: bool,
    chain: Chain,
}

impl Rng {
    fn fill(&self, memory: &mut dyn GuestMemory, entropy: &mut dyn Entropy) -> Result<u32, QueueError> {
        let wanted = self.chain.writable_bytes().min(REQUEST_MAX) as usize;
        let mut buffer = [0; COPY_BYTES];
        let mut filled = 0;
        while let Some(part) =
            buffer.get_mut(..(wanted - filled).min(COPY_BYTES)).filter(|part| !part.is_empty())
        {
            entropy.fill(part);
            self.chain.write(memory, filled as u64, part)?;
            filled += part.len();
        }
        Ok(filled as u32)
    }
}

impl VirtioDevice for Rng {
    const NAME: &'static str = "virtio-rng";
    const ID: u16 = 4;
    // No class of its own.
    const CLASS: [u8; 3] = [0xFF, 0x00, 0x00];
    const CONFIG_BYTES: u32 = 0;

    fn vectors(&self) -> u16 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_byte(&self, _offset: u32) -> u8 {
        0
    }

    fn start(
        &mut self,
        _features: u64,
        _queues: &mut [Queue],
        _memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError> {
        self.notified = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.notified = false;
    }

    fn notify(&mut self, _queue: u16) {
        self.notified = true;
    }

    fn has_work(&self) -> bool {
        self.notified
    }

    fn work(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        host: &mut Host<'_>,
    ) -> Result<(), QueueError> {
        self.notified = false;
        let [queue] = queues else { return Ok(()) };
        for _ in 0..QUEUE_SIZE {
            if !queue.pop(memory, &mut self.chain)? {
                queue.set_notifications(memory, true)?;
                if !queue.has_available(memory)? {
                    return Ok(());
                }
                continue;
            }
            let filled = self.fill(memory, host.entropy)?;
            queue.push_used(memory, self.chain.head(), filled)?;
        }
        self.notified = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{EVENT_INDEX, Guest, INDIRECT, VERSION_1, bytes};
    use super::*;
    use crate::platform::MachineEnd;

    const ID: u16 = 0x1044;

    #[test]
    fn a_request_is_filled_and_interrupts() {
        for features in [VERSION_1, VERSION_1 | EVENT_INDEX, VERSION_1 | EVENT_INDEX | INDIRECT] {
            let mut guest = Guest::new();
            let device = guest.find(ID);
            let mut queues = device.initialize(&mut guest, features);
            let at = guest.allocate(64);
            let head = queues[0].add(&mut guest, &[(at, 16, true), (at + 32, 8, true)]);
            device.notify(&mut guest, &queues[0]);
            assert_eq!(queues[0].take_used(&guest.ram), Some((head.into(), 24)));
            assert_eq!(bytes(&guest.ram, at, 17), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 0]);
            assert_eq!(bytes(&guest.ram, at + 32, 8), [17, 18, 19, 20, 21, 22, 23, 24]);
            let interrupts = guest.interrupts();
            assert_eq!(interrupts.len(), 1);
            assert_eq!(interrupts[0].data, 0x41, "the queue's vector");
            assert_eq!(guest.platform.pio_read(device.isr, 1), ISR_QUEUE);
            assert_eq!(guest.platform.pio_read(device.isr, 1), 0, "reading acknowledges");
        }
    }

    const ISR_QUEUE: u32 = 1;

    #[test]
    fn a_huge_request_gets_a_bounded_answer() {
        let mut guest = Guest::new();
        let device = guest.find(ID);
        let mut queues = device.initialize(&mut guest, VERSION_1);
        let at = guest.allocate(1 << 20);
        queues[0].add(&mut guest, &[(at, 1 << 20, true)]);
        device.notify(&mut guest, &queues[0]);
        assert_eq!(queues[0].take_used(&guest.ram), Some((0, REQUEST_MAX as u32)));
    }

    #[test]
    fn a_buffer_that_is_not_ram_ends_the_machine_with_the_reason() {
        let mut guest = Guest::new();
        let device = guest.find(ID);
        let mut queues = device.initialize(&mut guest, VERSION_1);
        guest.interrupts();
        queues[0].add(&mut guest, &[(0xE000_0000, 16, true)]);
        device.notify(&mut guest, &queues[0]);
        assert_eq!(device.status(&mut guest) & 64, 64, "DEVICE_NEEDS_RESET");
        assert_eq!(guest.interrupts()[0].data, 0x40, "the configuration vector");
        let Some(MachineEnd::DeviceFault { device, reason }) = guest.platform.end() else { panic!() };
        assert_eq!(*device, "virtio-rng");
        assert_eq!(reason, "queue 0: 16 bytes at gpa:0xe0000000 are not all RAM");
        assert!(!guest.platform.needs_poll());
    }

    #[test]
    fn a_request_made_before_the_driver_was_ready_is_served_when_it_is() {
        let mut guest = Guest::new();
        let device = guest.find(ID);
        device.set_status(&mut guest, 3);
        device.set_features(&mut guest, VERSION_1);
        device.set_status(&mut guest, 11);
        let mut queue = device.set_up_queue(&mut guest, 0, VERSION_1);
        let at = guest.allocate(16);
        queue.add(&mut guest, &[(at, 16, true)]);
        device.notify(&mut guest, &queue);
        assert_eq!(queue.take_used(&guest.ram), None);
        device.set_status(&mut guest, 15);
        guest.poll();
        assert!(queue.take_used(&guest.ram).is_some());
    }
}
