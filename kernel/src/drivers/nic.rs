//! What the uplink needs of a network interface, and the search for one.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use super::e1000::E1000;
use super::pci::Bus;
use super::virtio_net::VirtioNet;

/// The longest Ethernet frame without its checksum: 1500 bytes of payload.
pub const MAX_FRAME_BYTES: usize = 1514;

/// A network interface. No call waits for the device.
pub trait Nic {
    /// The driver's name for people.
    fn driver(&self) -> &'static str;

    /// The interface's Ethernet address.
    fn mac(&self) -> [u8; 6];

    /// Copies the oldest received frame to the front of `into` and returns its length; frames that do not fit
    /// are dropped.
    fn receive(&mut self, into: &mut [u8]) -> Option<usize>;

    /// How many frames [`Nic::transmit`] would take now.
    fn transmit_room(&mut self) -> usize;

    /// Whether [`Nic::transmit`] would take a frame now.
    fn can_transmit(&mut self) -> bool {
        self.transmit_room() > 0
    }

    /// Queues a frame for sending, at the latest at the next [`Nic::flush`]. False if it was dropped because the queue is full, the
    /// frame too long or the device broken.
    fn transmit(&mut self, frame: &[u8]) -> bool;

    /// Tells the device of the frames that were queued: once for many, because that can cost an exit to L0.
    fn flush(&mut self) {}

    /// Whether the interface has raised an interrupt since the last call.
    fn take_interrupt(&mut self) -> bool;

    /// Whether the interface raises interrupts; otherwise it has to be polled.
    fn has_interrupt(&self) -> bool;
}

/// The first usable network interface, virtio's before others, or why there is none.
///
/// # Errors
/// A message that names what was found and what to do.
pub fn find(bus: Option<&Bus>) -> Result<Box<dyn Nic>, String> {
    let advice = "give the VM a virtio-net or e1000 PCI device (QEMU: -device virtio-net-pci,netdev=... or \
                  -device e1000,netdev=...)";
    let bus = bus.ok_or_else(|| alloc::format!("no PCI bus found; {advice}"))?;
    let Bus { space, functions } = bus;
    let mut failures = Vec::new();
    for function in functions.iter().filter(|function| VirtioNet::drives(function)) {
        match VirtioNet::new(*space, function) {
            Ok(nic) => return Ok(Box::new(nic)),
            Err(error) => failures.push(alloc::format!("virtio-net {function}: {error}")),
        }
    }
    for function in functions.iter().filter(|function| E1000::drives(function)) {
        match E1000::new(*space, function) {
            Ok(nic) => return Ok(Box::new(nic)),
            Err(error) => failures.push(alloc::format!("e1000 {function}: {error}")),
        }
    }
    if failures.is_empty() {
        failures.push("no supported network interface found".into());
    }
    Err(alloc::format!("{}; {advice}", failures.join("; ")))
}
