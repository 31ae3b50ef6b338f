//! The modern virtio-pci transport.
//!
//! Virtio 1.2, 4.1 (virtio over PCI bus), 3.1.1 (device initialization), 2.1 (device status), 2.2 (feature bits).
//!
//! BAR 0 is 256 I/O ports with every structure of the transport. Linux takes them in I/O space as well as in memory, and a port access
//! exits with its size and value, while a memory access must be decoded. BAR 1 is memory with the MSI-X table alone. There is no
//! interrupt pin.

use super::queue::{NO_VECTOR, Queue, QueueError};
use crate::memory::GuestMemory;
use crate::platform::Host;
use crate::platform::msix::{self, Msix};
use crate::platform::outbox::Outbox;
use crate::platform::pci::{CONFIG_BYTES, ConfigSpace, Function, Identity, Space};
use alloc::string::{String, ToString};
use alloc::vec::Vec;

const IO_BAR: usize = 0;
const MSIX_BAR: usize = 1;
/// Ports of BAR 0.
pub(in crate::platform) const IO_BAR_BYTES: u32 = 256;
/// Bytes of BAR 1.
pub(in crate::platform) const MSIX_BAR_BYTES: u32 = 4096;

const COMMON: u32 = 0x00;
const COMMON_BYTES: u32 = 0x38;
const ISR: u32 = 0x40;
const ISR_BYTES: u32 = 4;
const NOTIFY: u32 = 0x60;
/// Ports of one queue: each has its own, so that a notification's value does not matter.
const NOTIFY_MULTIPLIER: u32 = 4;
const DEVICE: u32 = 0x80;
const MSIX_TABLE: u32 = 0;
const MSIX_PENDING: u32 = 0x800;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI_ACCESS: u8 = 5;

const VENDOR: u16 = 0x1AF4;
const DEVICE_ID_BASE: u16 = 0x1040;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 64;

const FEATURE_INDIRECT: u64 = 1 << 28;
const FEATURE_EVENT_INDEX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;
const TRANSPORT_FEATURES: u64 = FEATURE_INDIRECT | FEATURE_EVENT_INDEX | FEATURE_VERSION_1;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What is different from device to device.
pub(in crate::platform) trait VirtioDevice {
    /// Name for messages.
    const NAME: &'static str;
    /// Virtio device id.
    const ID: u16;
    /// PCI class.
    const CLASS: [u8; 3];
    /// Bytes of the device-specific configuration.
    const CONFIG_BYTES: u32;

    /// MSI-X vectors. One is for configuration changes; with fewer others than queues, the driver lets queues share one.
    fn vectors(&self) -> u16;

    /// The most descriptors of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits of the device's own.
    fn features(&self) -> u64 {
        0
    }

    /// The device-specific configuration's byte at `offset`.
    fn config_byte(&self, offset: u32) -> u8;

    /// The driver is ready (DRIVER_OK), having accepted `features`.
    fn start(
        &mut self,
        features: u64,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
    ) -> Result<(), QueueError>;

    /// The driver has reset the device.
    fn reset(&mut self);

    /// The driver has notified a queue.
    fn notify(&mut self, queue: u16);

    /// Whether [`Self::work`] has something to do.
    fn has_work(&self) -> bool;

    /// Works on the queues.
    fn work(
        &mut self,
        queues: &mut [Queue],
        memory: &mut dyn GuestMemory,
        host: &mut Host<'_>,
    ) -> Result<(), QueueError>;

    /// Whether the configuration has changed since this was last asked.
    fn take_config_change(&mut self) -> bool {
        false
    }
}

/// A virtio device as a PCI function.
#[derive(Clone, Debug)]
pub(in crate::platform) struct VirtioPci<D> {
    /// The device.
    pub(in crate::platform) device: D,
    config: ConfigSpace,
    msix: Msix,
    msix_capability: usize,
    access_capability: usize,
    queues: Vec<Queue>,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    config_vector: u16,
    config_generation: u8,
    isr: u8,
    starting: bool,
    fault: Option<String>,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// The function with its BARs placed at port `io` and address `memory`.
    pub(in crate::platform) fn new(device: D, io: u16, memory: u32) -> Self {
        let mut config = ConfigSpace::new(&Identity {
            id: (VENDOR, DEVICE_ID_BASE + D::ID),
            subsystem: (VENDOR, DEVICE_ID_BASE + D::ID),
            revision: 1,
            class: D::CLASS,
        });
        config.add_bar(IO_BAR, Space::Io, IO_BAR_BYTES, io.into());
        config.add_bar(MSIX_BAR, Space::Memory, MSIX_BAR_BYTES, memory);

        let msix = Msix::new(device.vectors());
        let table_size = (msix.vectors() - 1).to_le_bytes();
        let table = (MSIX_TABLE | MSIX_BAR as u32).to_le_bytes();
        let pending = (MSIX_PENDING | MSIX_BAR as u32).to_le_bytes();
        let msix_capability =
            config.add_capability(CAPABILITY_MSIX, &[table_size.as_slice(), &table, &pending].concat());
        let control = (msix::CONTROL_ENABLE | msix::CONTROL_FUNCTION_MASK).to_le_bytes();
        config.allow(msix_capability + 2, &control);

        let notify_bytes = device.queue_sizes().len() as u32 * NOTIFY_MULTIPLIER;
        add_structure(&mut config, TYPE_COMMON, COMMON, COMMON_BYTES, &[]);
        add_structure(&mut config, TYPE_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_MULTIPLIER.to_le_bytes());
        add_structure(&mut config, TYPE_ISR, ISR, ISR_BYTES, &[]);
        if D::CONFIG_BYTES > 0 {
            add_structure(&mut config, TYPE_DEVICE, DEVICE, D::CONFIG_BYTES, &[]);
        }
        let access_capability = add_structure(&mut config, TYPE_PCI_ACCESS, 0, 0, &[0; 4]);
        // BAR; then offset, length and data.
        config.allow(access_capability + 4, &[0xFF]);
        config.allow(access_capability + 8, &[0xFF; 12]);

        let queues = (0..).zip(device.queue_sizes()).map(|(index, &size)| Queue::new(index, size)).collect();
        Self {
            device,
            config,
            msix,
            msix_capability,
            access_capability,
            queues,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            config_generation: 0,
            isr: 0,
            starting: false,
            fault: None,
        }
    }

    fn fail(&mut self, error: &QueueError, out: &mut Outbox) {
        self.status |= STATUS_NEEDS_RESET;
        self.isr |= ISR_CONFIG;
        self.msix.raise(self.config_vector, out);
        self.fault.get_or_insert(error.to_string());
    }

    const fn running(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0 && self.fault.is_none()
    }

    /// Whether [`Self::work`] has something to do.
    pub(in crate::platform) fn has_work(&self) -> bool {
        self.running() && (self.starting || self.device.has_work())
    }

    /// Works on the queues and raises their interrupts.
    pub(in crate::platform) fn work(
        &mut self,
        memory: &mut dyn GuestMemory,
        host: &mut Host<'_>,
        out: &mut Outbox,
    ) {
        if self.has_work()
            && let Err(error) = self.try_work(memory, host, out)
        {
            self.fail(&error, out);
        }
    }

    fn try_work(
        &mut self,
        memory: &mut dyn GuestMemory,
        host: &mut Host<'_>,
        out: &mut Outbox,
    ) -> Result<(), QueueError> {
        if core::mem::take(&mut self.starting) {
            self.device.start(self.driver_features, &mut self.queues, memory)?;
        }
        self.device.work(&mut self.queues, memory, host)?;
        if self.device.take_config_change() {
            self.config_generation = self.config_generation.wrapping_add(1);
            self.isr |= ISR_CONFIG;
            self.msix.raise(self.config_vector, out);
        }
        for queue in &mut self.queues {
            if queue.take_signal(memory)? {
                self.isr |= ISR_QUEUE;
                self.msix.raise(queue.vector, out);
            }
        }
        Ok(())
    }

    /// BAR, offset and length of the access that touching the PCI access capability's data stands for (4.1.4.9).
    fn indirect_access(&self, register: usize, width: u8) -> Option<(usize, u32, u8)> {
        let capability = self.access_capability;
        if !overlaps(register, width, capability + 16, 4) {
            return None;
        }
        let bar = self.config.read(capability + 4, 1) as usize;
        let offset = self.config.read(capability + 8, 4);
        let length = self.config.read(capability + 12, 4) as u8;
        let size = if bar == IO_BAR { IO_BAR_BYTES } else { MSIX_BAR_BYTES };
        let valid = matches!(self.config.read(capability + 12, 4), 1 | 2 | 4)
            && bar <= MSIX_BAR
            && offset.is_multiple_of(u32::from(length))
            && offset < size;
        valid.then_some((bar, offset, length))
    }

    fn features(&self) -> u64 {
        TRANSPORT_FEATURES | self.device.features()
    }

    fn selected(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Reads a field of the common configuration (4.1.4.3). Fields are read at their own width, 64-bit ones by halves; anything
    /// else reads zero.
    fn common_read(&mut self, offset: u32, width: u8) -> u32 {
        match (offset, width) {
            (0x00, 4) => self.device_feature_select,
            (0x04, 4) => half(self.features(), self.device_feature_select),
            (0x08, 4) => self.driver_feature_select,
            (0x0C, 4) => half(self.driver_features, self.driver_feature_select),
            (0x10, 2) => self.config_vector.into(),
            (0x12, 2) => self.queues.len() as u32,
            (0x14, 1) => self.status.into(),
            (0x15, 1) => self.config_generation.into(),
            (0x16, 2) => self.queue_select.into(),
            (0x1E, 2) => self.queue_select.into(),
            (offset, width) => {
                let Some(queue) = self.selected() else { return 0 };
                match (offset, width) {
                    (0x18, 2) => queue.size.into(),
                    (0x1A, 2) => queue.vector.into(),
                    (0x1C, 2) => queue.enabled().into(),
                    (0x20, 4) => half(queue.descriptors, 0),
                    (0x24, 4) => half(queue.descriptors, 1),
                    (0x28, 4) => half(queue.available, 0),
                    (0x2C, 4) => half(queue.available, 1),
                    (0x30, 4) => half(queue.used, 0),
                    (0x34, 4) => half(queue.used, 1),
                    _ => 0,
                }
            }
        }
    }

    fn common_write(&mut self, offset: u32, width: u8, value: u32, out: &mut Outbox) {
        let vectors = self.msix.vectors();
        let vector = Some(value as u16).filter(|&vector| vector < vectors).unwrap_or(NO_VECTOR);
        match (offset, width) {
            (0x00, 4) => self.device_feature_select = value,
            (0x08, 4) => self.driver_feature_select = value,
            (0x0C, 4) => {
                if self.status & STATUS_FEATURES_OK == 0 {
                    set_half(&mut self.driver_features, self.driver_feature_select, value);
                }
            }
            (0x10, 2) => self.config_vector = vector,
            (0x14, 1) => self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1C, 2) => {
                if value == 1 {
                    self.enable_selected(out);
                }
            }
            (offset, width) => {
                let Some(queue) = self.selected() else { return };
                match (offset, width) {
                    (0x1A, 2) => queue.vector = vector,
                    // What an enabled queue is made of stays as it is.
                    _ if queue.enabled() => {}
                    (0x18, 2) => queue.size = value as u16,
                    (0x20, 4) => set_half(&mut queue.descriptors, 0, value),
                    (0x24, 4) => set_half(&mut queue.descriptors, 1, value),
                    (0x28, 4) => set_half(&mut queue.available, 0, value),
                    (0x2C, 4) => set_half(&mut queue.available, 1, value),
                    (0x30, 4) => set_half(&mut queue.used, 0, value),
                    (0x34, 4) => set_half(&mut queue.used, 1, value),
                    _ => {}
                }
            }
        }
    }

    fn enable_selected(&mut self, out: &mut Outbox) {
        let features = self.driver_features;
        let event_index = features & FEATURE_EVENT_INDEX != 0;
        let indirect = features & FEATURE_INDIRECT != 0;
        let Some(queue) = self.selected().filter(|queue| !queue.enabled()) else { return };
        if let Err(error) = queue.enable(event_index, indirect) {
            self.fail(&error, out);
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut new = value & !STATUS_NEEDS_RESET | self.status & STATUS_NEEDS_RESET;
        let acceptable =
            self.driver_features & !self.features() == 0 && self.driver_features & FEATURE_VERSION_1 != 0;
        if !acceptable {
            // The driver reads the status back and finds its features refused.
            new &= !(STATUS_FEATURES_OK | STATUS_DRIVER_OK);
        }
        if new & !self.status & STATUS_DRIVER_OK != 0 {
            self.starting = true;
        }
        self.status = new;
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.config_vector = NO_VECTOR;
        self.isr = 0;
        self.starting = false;
        self.queues.iter_mut().for_each(Queue::reset);
        self.device.reset();
    }
}

impl<D: VirtioDevice> Function for VirtioPci<D> {
    fn config_read(&mut self, register: usize, width: u8) -> u32 {
        if let Some((bar, offset, length)) = self.indirect_access(register, width) {
            let value = self.bar_read(bar, offset, length) as u32;
            self.config.put(self.access_capability + 16, &value.to_le_bytes());
        }
        self.config.read(register, width)
    }

    fn config_write(&mut self, register: usize, width: u8, value: u32, out: &mut Outbox) {
        self.config.write(register, width, value);
        if overlaps(register, width, self.msix_capability, 4) {
            let control = self.config.read(self.msix_capability + 2, 2) as u16;
            self.msix.set_control(control, out);
        }
        if let Some((bar, offset, length)) = self.indirect_access(register, width) {
            let data = self.config.read(self.access_capability + 16, length);
            self.bar_write(bar, offset, length, data.into(), out);
        }
    }

    fn config_bytes(&self) -> Option<&[u8; CONFIG_BYTES]> {
        // Once the window to the BARs is set up, reading its data register reads a BAR.
        let window_is_open = self.indirect_access(self.access_capability + 16, 4).is_some();
        (!window_is_open).then(|| self.config.bytes())
    }

    fn decode(&self, space: Space, address: u32) -> Option<(usize, u32)> {
        self.config.find_bar(space, address)
    }

    fn bar_read(&mut self, bar: usize, offset: u32, width: u8) -> u64 {
        match (bar, offset) {
            (IO_BAR, COMMON..ISR) => self.common_read(offset - COMMON, width).into(),
            // Reading the interrupt status acknowledges it.
            (IO_BAR, ISR) => core::mem::take(&mut self.isr).into(),
            (IO_BAR, DEVICE..) => (0..u32::from(width.min(4))).fold(0, |value, index| {
                let at = offset - DEVICE + index;
                let byte = if at < D::CONFIG_BYTES { self.device.config_byte(at) } else { 0 };
                value | u64::from(byte) << (8 * index)
            }),
            (MSIX_BAR, MSIX_TABLE..MSIX_PENDING) => self.msix.read_table(offset - MSIX_TABLE, width),
            (MSIX_BAR, MSIX_PENDING..) => self.msix.read_pending(offset - MSIX_PENDING, width),
            _ => 0,
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u32, width: u8, value: u64, out: &mut Outbox) {
        match (bar, offset) {
            (IO_BAR, COMMON..ISR) => self.common_write(offset - COMMON, width, value as u32, out),
            (IO_BAR, NOTIFY..DEVICE) => {
                let queue = (offset - NOTIFY) / NOTIFY_MULTIPLIER;
                if (queue as usize) < self.queues.len() {
                    self.device.notify(queue as u16);
                }
            }
            (MSIX_BAR, MSIX_TABLE..MSIX_PENDING) => {
                self.msix.write_table(offset - MSIX_TABLE, width, value, out);
            }
            _ => {}
        }
    }

    fn fault(&self) -> Option<(&'static str, &str)> {
        self.fault.as_deref().map(|reason| (D::NAME, reason))
    }
}

/// Adds a `virtio_pci_cap` for a structure in BAR 0 (4.1.4); returns the capability's offset.
fn add_structure(config: &mut ConfigSpace, kind: u8, offset: u32, length: u32, more: &[u8]) -> usize {
    let capability_bytes = 16 + more.len() as u8;
    let head = [capability_bytes, kind, IO_BAR as u8, 0, 0, 0];
    let body = [head.as_slice(), &offset.to_le_bytes(), &length.to_le_bytes(), more].concat();
    config.add_capability(CAPABILITY_VENDOR, &body)
}

const fn overlaps(register: usize, width: u8, at: usize, length: usize) -> bool {
    register < at + length && at < register + width as usize
}

/// The low (0) or high (1) half of `value`; other halves do not exist and read zero.
const fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// Sets the low (0) or high (1) half of `value`; other halves do not exist and ignore it.
const fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xFFFF_FFFF | half as u64,
        1 => *value = *value & 0xFFFF_FFFF | (half as u64) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
