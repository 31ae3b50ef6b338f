//! A small virtio driver for tests: finds a device on the bus as a guest does and drives its real registers.

use crate::address::GuestPhysAddr;
use crate::interrupt::MsiMessage;
use crate::layout;
use crate::memory::GuestMemory;
use crate::platform::testing::{Counting, MemoryDisk};
use crate::platform::{DiskConfig, Host, NetworkConfig, Platform, PlatformConfig};
use crate::testing::Ram;
use alloc::vec;
use alloc::vec::Vec;

pub(in crate::platform) const GUEST_CID: u64 = 3;
pub(in crate::platform) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(in crate::platform) const MTU: u16 = 1500;
const RAM_BYTES: usize = 4 << 20;
const QUEUES_AT: u64 = 0x10_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;
const BUFFERS_AT: u64 = 0x20_0000;

pub(in crate::platform) const VERSION_1: u64 = 1 << 32;
pub(in crate::platform) const EVENT_INDEX: u64 = 1 << 29;
pub(in crate::platform) const INDIRECT: u64 = 1 << 28;

/// A machine with RAM.
pub(in crate::platform) struct Guest {
    pub(in crate::platform) platform: Platform,
    pub(in crate::platform) ram: Ram,
    pub(in crate::platform) entropy: Counting,
    pub(in crate::platform) disk: MemoryDisk,
    next_buffer: u64,
}

/// A virtio device as the driver found it.
pub(in crate::platform) struct Device {
    pub(in crate::platform) slot: u64,
    pub(in crate::platform) common: u16,
    pub(in crate::platform) notify: u16,
    pub(in crate::platform) isr: u16,
    pub(in crate::platform) config: u16,
    pub(in crate::platform) msix_table: u64,
    multiplier: u16,
}

/// A queue as the driver sees it.
pub(in crate::platform) struct DriverQueue {
    pub(in crate::platform) index: u16,
    pub(in crate::platform) size: u16,
    pub(in crate::platform) at: u64,
    features: u64,
    next_descriptor: u16,
    available: u16,
    seen_used: u16,
}

impl Guest {
    pub(in crate::platform) fn new() -> Self {
        Self::with_disk(0, 0)
    }

    /// A machine with a disk of `bytes` with `queues` queues; without one if it has none.
    pub(in crate::platform) fn with_disk(bytes: usize, queues: u16) -> Self {
        let disk = (queues > 0).then_some(DiskConfig { bytes: bytes as u64, queues });
        Self::made_of(PlatformConfig { guest_cid: GUEST_CID, network: None, disk }, bytes)
    }

    /// A machine with a network card.
    pub(in crate::platform) fn with_network() -> Self {
        let network = Some(NetworkConfig { mac: MAC, mtu: MTU });
        Self::made_of(PlatformConfig { guest_cid: GUEST_CID, network, disk: None }, 0)
    }

    fn made_of(config: PlatformConfig, disk_bytes: usize) -> Self {
        Self {
            platform: Platform::new(config),
            ram: Ram::new(RAM_BYTES),
            entropy: Counting::default(),
            disk: MemoryDisk::new(disk_bytes),
            next_buffer: BUFFERS_AT,
        }
    }

    pub(in crate::platform) fn poll(&mut self) {
        while self.platform.needs_poll() {
            let mut host = Host { entropy: &mut self.entropy, disk: &mut self.disk };
            self.platform.poll(&mut self.ram, &mut host);
        }
    }

    pub(in crate::platform) fn read_config(&mut self, slot: u64, register: u64, width: u8) -> u32 {
        self.platform.mmio_read(GuestPhysAddr(layout::ECAM_BASE + (slot << 15) + register), width) as u32
    }

    pub(in crate::platform) fn write_config(&mut self, slot: u64, register: u64, width: u8, value: u32) {
        let at = GuestPhysAddr(layout::ECAM_BASE + (slot << 15) + register);
        self.platform.mmio_write(at, width, value.into());
    }

    /// All interrupt messages sent since the last call.
    pub(in crate::platform) fn interrupts(&mut self) -> Vec<MsiMessage> {
        core::iter::from_fn(|| self.platform.take_interrupt()).collect()
    }

    /// `length` bytes of RAM nobody else uses.
    pub(in crate::platform) fn allocate(&mut self, length: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += u64::from(length).next_multiple_of(16);
        assert!(self.next_buffer <= RAM_BYTES as u64, "the test needs more RAM");
        at
    }

    /// Finds the device with this PCI device id, switches its decoders and MSI-X on.
    pub(in crate::platform) fn find(&mut self, id: u16) -> Device {
        let slot =
            (0..32).find(|&slot| self.read_config(slot, 0, 4) == u32::from(id) << 16 | 0x1AF4).unwrap();
        let mut device =
            Device { slot, common: 0, notify: 0, isr: 0, config: 0, msix_table: 0, multiplier: 0 };
        let io = (self.read_config(slot, 0x10, 4) & !3) as u16;
        let mut capability = u64::from(self.read_config(slot, 0x34, 1));
        while capability != 0 {
            let port = io + self.read_config(slot, capability + 8, 4) as u16;
            match (self.read_config(slot, capability, 1), self.read_config(slot, capability + 3, 1)) {
                (9, 1) => device.common = port,
                (9, 2) => {
                    device.notify = port;
                    device.multiplier = self.read_config(slot, capability + 16, 4) as u16;
                }
                (9, 3) => device.isr = port,
                (9, 4) => device.config = port,
                (0x11, _) => {
                    let table = self.read_config(slot, capability + 4, 4);
                    assert_eq!(table & 7, 1, "the table is in BAR 1");
                    device.msix_table =
                        u64::from(self.read_config(slot, 0x14, 4) & !0xF) + u64::from(table & !7);
                    let control = self.read_config(slot, capability + 2, 2);
                    self.write_config(slot, capability + 2, 2, control | 0x8000);
                }
                _ => {}
            }
            capability = u64::from(self.read_config(slot, capability + 1, 1));
        }
        self.write_config(slot, 4, 2, 7);
        device
    }
}

impl Device {
    pub(in crate::platform) fn status(&self, guest: &mut Guest) -> u8 {
        guest.platform.pio_read(self.common + 0x14, 1) as u8
    }

    pub(in crate::platform) fn set_status(&self, guest: &mut Guest, value: u8) {
        guest.platform.pio_write(self.common + 0x14, 1, value.into());
    }

    pub(in crate::platform) fn features(&self, guest: &mut Guest) -> u64 {
        let mut half = |select| {
            guest.platform.pio_write(self.common, 4, select);
            u64::from(guest.platform.pio_read(self.common + 4, 4))
        };
        half(0) | half(1) << 32
    }

    pub(in crate::platform) fn set_features(&self, guest: &mut Guest, features: u64) {
        for select in 0..2_u32 {
            guest.platform.pio_write(self.common + 8, 4, select);
            guest.platform.pio_write(self.common + 12, 4, (features >> (32 * select)) as u32);
        }
    }

    /// Programs an unmasked MSI-X vector with `data` and returns the message it sends.
    pub(in crate::platform) fn set_vector(&self, guest: &mut Guest, vector: u16, data: u32) -> MsiMessage {
        let entry = self.msix_table + 16 * u64::from(vector);
        for (offset, value) in [(0, 0xFEE0_0000), (4, 0), (8, data), (12, 0)] {
            guest.platform.mmio_write(GuestPhysAddr(entry + offset), 4, value.into());
        }
        MsiMessage { address: 0xFEE0_0000, data }
    }

    /// Sets up queue `index` with MSI-X vector 1.
    pub(in crate::platform) fn set_up_queue(
        &self,
        guest: &mut Guest,
        index: u16,
        features: u64,
    ) -> DriverQueue {
        let platform = &mut guest.platform;
        platform.pio_write(self.common + 0x16, 2, index.into());
        let size = platform.pio_read(self.common + 0x18, 2) as u16;
        let at = QUEUES_AT + u64::from(index) * QUEUE_STRIDE;
        let queue = DriverQueue { index, size, at, features, next_descriptor: 0, available: 0, seen_used: 0 };
        for (offset, address) in [(0x20, at), (0x28, queue.avail()), (0x30, queue.used())] {
            platform.pio_write(self.common + offset, 4, address as u32);
            platform.pio_write(self.common + offset + 4, 4, (address >> 32) as u32);
        }
        platform.pio_write(self.common + 0x1A, 2, 1);
        assert_eq!(platform.pio_read(self.common + 0x1A, 2), 1);
        platform.pio_write(self.common + 0x1C, 2, 1);
        queue
    }

    /// The whole initialization with the wanted features; returns the queues.
    pub(in crate::platform) fn initialize(&self, guest: &mut Guest, wanted: u64) -> Vec<DriverQueue> {
        self.set_status(guest, 0);
        self.set_status(guest, 1);
        self.set_status(guest, 3);
        let features = self.features(guest) & wanted;
        self.set_features(guest, features);
        self.set_status(guest, 11);
        assert_eq!(self.status(guest), 11, "the features are accepted");
        let count = guest.platform.pio_read(self.common + 0x12, 2) as u16;
        self.set_vector(guest, 0, 0x40);
        self.set_vector(guest, 1, 0x41);
        guest.platform.pio_write(self.common + 0x10, 2, 0);
        let queues = (0..count).map(|index| self.set_up_queue(guest, index, features)).collect();
        self.set_status(guest, 15);
        guest.poll();
        queues
    }

    /// Notifies a queue and lets the device work.
    pub(in crate::platform) fn notify(&self, guest: &mut Guest, queue: &DriverQueue) {
        guest.platform.pio_write(self.notify + queue.index * self.multiplier, 2, queue.index.into());
        guest.poll();
    }
}

impl DriverQueue {
    pub(in crate::platform) fn avail(&self) -> u64 {
        self.at + 0x4000
    }

    pub(in crate::platform) fn used(&self) -> u64 {
        self.at + 0x8000
    }

    pub(in crate::platform) fn put_descriptor(
        &self,
        ram: &mut Ram,
        table: u64,
        index: u16,
        (at, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        ram.write(GuestPhysAddr(table + 16 * u64::from(index)), &bytes).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub(in crate::platform) fn make_available(&mut self, ram: &mut Ram, head: u16) {
        let slot = u64::from(self.available % self.size);
        ram.write(GuestPhysAddr(self.avail() + 4 + 2 * slot), &head.to_le_bytes()).unwrap();
        self.available = self.available.wrapping_add(1);
        ram.write(GuestPhysAddr(self.avail() + 2), &self.available.to_le_bytes()).unwrap();
    }

    /// Adds a chain of (address, length, writable) buffers; indirect if that was negotiated. Returns its head.
    pub(in crate::platform) fn add(&mut self, guest: &mut Guest, buffers: &[(u64, u32, bool)]) -> u16 {
        let indirect = self.features & INDIRECT != 0;
        let head = self.next_descriptor % self.size;
        let (table, first) = if indirect {
            (guest.allocate(16 * buffers.len() as u32), 0)
        } else {
            assert!(head as usize + buffers.len() <= self.size as usize);
            (self.at, head)
        };
        for (offset, &(at, length, writable)) in (0..).zip(buffers) {
            let last = offset as usize + 1 == buffers.len();
            let flags = u16::from(!last) | u16::from(writable) << 1;
            self.put_descriptor(
                &mut guest.ram,
                table,
                first + offset,
                (at, length),
                flags,
                first + offset + 1,
            );
        }
        if indirect {
            let bytes = 16 * buffers.len() as u32;
            self.put_descriptor(&mut guest.ram, self.at, head, (table, bytes), 4, 0);
        }
        self.next_descriptor += if indirect { 1 } else { buffers.len() as u16 };
        self.make_available(&mut guest.ram, head);
        head
    }

    /// The next chain the device has given back: head and bytes written.
    pub(in crate::platform) fn take_used(&mut self, ram: &Ram) -> Option<(u32, u32)> {
        if ram.read_u16(GuestPhysAddr(self.used() + 2)).unwrap() == self.seen_used {
            return None;
        }
        let element = self.used() + 4 + 8 * u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        let head = ram.read_u32(GuestPhysAddr(element)).unwrap();
        Some((head, ram.read_u32(GuestPhysAddr(element + 4)).unwrap()))
    }

    /// With event indexes: asks for an interrupt when the next chain is given back.
    pub(in crate::platform) fn want_interrupt(&self, ram: &mut Ram) {
        let at = self.avail() + 4 + 2 * u64::from(self.size);
        ram.write(GuestPhysAddr(at), &self.seen_used.to_le_bytes()).unwrap();
    }

    /// With event indexes: whether the device wants to be told of the chains added since there were `before` of them.
    pub(in crate::platform) fn wants_notification(&self, ram: &Ram, before: u16) -> bool {
        let event = ram.read_u16(GuestPhysAddr(self.used() + 4 + 8 * u64::from(self.size))).unwrap();
        self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
    }

    pub(in crate::platform) const fn added(&self) -> u16 {
        self.available
    }
}

/// Bytes of guest memory.
pub(in crate::platform) fn bytes(ram: &Ram, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    ram.read(GuestPhysAddr(at), &mut bytes).unwrap();
    bytes
}
