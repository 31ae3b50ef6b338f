//! The entropy device.
//!
//! Virtio 1.2, 5.4 (entropy device).

use super::queue::{Chain, Queue, QueueError};
use super::transport::VirtioDevice;
use crate::memory::GuestMemory;
use crate::platform::Entropy;

const QUEUE_SIZE: u16 = 8;
/// The most bytes given for one request; the device may give fewer than asked for.
const REQUEST_MAX: u64 = 4096;
const COPY_BYTES: usize = 256;

/// The entropy device.
#[derive(Debug, Default)]
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
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const CONFIG_BYTES: u32 = 0;

    fn config_byte(&self, _offset: u32) -> u8 {
        0
    }

    fn start(&mut self, _queues: &mut [Queue], _memory: &mut dyn GuestMemory) -> Result<(), QueueError> {
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
        entropy: &mut dyn Entropy,
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
            let filled = self.fill(memory, entropy)?;
            queue.push_used(memory, self.chain.head(), filled)?;
        }
        self.notified = true;
        Ok(())
    }
}
