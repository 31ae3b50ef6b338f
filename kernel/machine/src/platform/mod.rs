//! What a machine's processors share: buses, interrupt routing, devices, firmware tables.
//!
//! [`Platform`] is a pure state machine. The hypervisor feeds it the guest's port and memory-mapped accesses, lets it work on its
//! queues ([`Platform::poll`]), and delivers the interrupt messages it hands out.

mod acpi;
mod cmos;
mod console;
mod ioapic;
pub mod linux;
mod msix;
mod outbox;
mod pci;
mod power;
mod serial;
#[cfg(test)]
mod testing;
pub mod virtio;

use crate::address::{GuestPhysAddr, Vector};
use crate::interrupt::MsiMessage;
use crate::layout;
use crate::memory::GuestMemory;
use alloc::string::String;
use core::fmt;

pub use console::{CONSOLE_TAIL_BYTES, ConsoleTail};
pub use virtio::{
    Accepts, Checksum, Disk, DiskConfig, FRAME_BYTES_MAX, Gso, NetworkConfig, NetworkHost, Offload, Progress,
    VsockHost, VsockState,
};

use cmos::Cmos;
use ioapic::IoApic;
use outbox::Outbox;
use pci::{Function, Space};
use serial::Serial;
use virtio::blk::Blk;
use virtio::net::Net;
use virtio::rng::Rng;
use virtio::transport::{IO_BAR_BYTES, MSIX_BAR_BYTES, VirtioPci};
use virtio::vsock::Vsock;

/// Where functions stand in ECAM, in pages: bits 3-7 are the device, 0-2 the function. There is no host bridge at device 0: the root bus
/// is found by ACPI, and Linux would spend 70 exits on it.
const VSOCK_FUNCTION: u64 = 0x08;
const RNG_FUNCTION: u64 = 0x10;
const NETWORK_FUNCTION: u64 = 0x18;
const DISK_FUNCTION: u64 = 0x20;
const UART_LAST_PORT: u16 = layout::UART_PORT + 7;
const IOAPIC_BYTES: u64 = 4096;

/// A source of random bytes for the guest.
pub trait Entropy {
    /// Fills `into` with random bytes.
    fn fill(&mut self, into: &mut [u8]);
}

/// What a machine's devices need of their host while they work.
pub struct Host<'a> {
    /// Randomness.
    pub entropy: &'a mut dyn Entropy,
    /// What stands behind the disk of a machine that has one.
    pub disk: &'a mut dyn Disk,
}

/// What a machine's platform is made of.
#[derive(Clone, Copy, Debug)]
pub struct PlatformConfig {
    /// The guest's vsock context id, 3 or more.
    pub guest_cid: u64,
    /// Its network card, if it has one.
    pub network: Option<NetworkConfig>,
    /// Its disk, if it has one.
    pub disk: Option<DiskConfig>,
}

/// Why a machine ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MachineEnd {
    /// The guest switched the machine off (ACPI S5).
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest broke a device's rules; the device stopped.
    DeviceFault {
        /// The device.
        device: &'static str,
        /// What was wrong.
        reason: String,
    },
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest switched the machine off"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::DeviceFault { device, reason } => {
                write!(f, "{device} stopped: {reason}")
            }
        }
    }
}

/// A machine's devices.
#[derive(Clone, Debug)]
pub struct Platform {
    vsock: VirtioPci<Vsock>,
    rng: VirtioPci<Rng>,
    network: Option<VirtioPci<Net>>,
    disk: Option<VirtioPci<Blk>>,
    serial: Serial,
    cmos: Cmos,
    ioapic: IoApic,
    interrupts: Outbox,
    end: Option<MachineEnd>,
}

impl Platform {
    /// The devices of a machine that has just been switched on.
    pub fn new(config: PlatformConfig) -> Self {
        // PCI devices 1 to 4, whose BARs are placed behind each other.
        let io = |slot: u16| layout::PCI_IO_BASE + slot * IO_BAR_BYTES as u16;
        let memory = |slot: u32| layout::PCI_MMIO_BASE as u32 + slot * MSIX_BAR_BYTES;
        Self {
            vsock: VirtioPci::new(Vsock::new(config.guest_cid), io(1), memory(1)),
            rng: VirtioPci::new(Rng::default(), io(2), memory(2)),
            network: config.network.map(|network| VirtioPci::new(Net::new(network), io(3), memory(3))),
            disk: config.disk.map(|disk| VirtioPci::new(Blk::new(disk), io(4), memory(4))),
            serial: Serial::default(),
            cmos: Cmos::default(),
            ioapic: IoApic::default(),
            interrupts: Outbox::default(),
            end: None,
        }
    }

    /// The guest reads `width` (1, 2 or 4) bytes from `port`. Unknown ports read all ones.
    pub fn pio_read(&mut self, port: u16, width: u8) -> u32 {
        if let Some((function, bar, offset)) = self.find_bar(Space::Io, port.into()) {
            return function.bar_read(bar, offset, width) as u32;
        }
        // The rest are byte-wide devices: a wider access is one access a byte.
        let mut value = 0;
        for index in 0..width.min(4) {
            value |= u32::from(self.read_byte_port(port.wrapping_add(index.into()))) << (8 * index);
        }
        value
    }

    /// The guest writes `width` (1, 2 or 4) bytes to `port`. Unknown ports ignore writes.
    pub fn pio_write(&mut self, port: u16, width: u8, value: u32) {
        if self.write_bar(Space::Io, port.into(), width, value.into()) {
            return;
        }
        for index in 0..width.min(4) {
            self.write_byte_port(port.wrapping_add(index.into()), (value >> (8 * index)) as u8);
        }
    }

    /// The PCI function that decodes `address`, with the BAR and the offset in it.
    fn find_bar(&mut self, space: Space, address: u32) -> Option<(&mut dyn Function, usize, u32)> {
        let network = self.network.as_mut().map(|network| network as &mut dyn Function);
        let disk = self.disk.as_mut().map(|disk| disk as &mut dyn Function);
        let functions: [Option<&mut dyn Function>; 4] =
            [Some(&mut self.vsock), Some(&mut self.rng), network, disk];
        functions.into_iter().flatten().find_map(|function| {
            let (bar, offset) = function.decode(space, address)?;
            Some((function, bar, offset))
        })
    }

    /// Writes to the PCI function that decodes `address`; returns whether one does.
    fn write_bar(&mut self, space: Space, address: u32, width: u8, value: u64) -> bool {
        let mut out = core::mem::take(&mut self.interrupts);
        let found = self.find_bar(space, address);
        let decoded =
            found.map(|(function, bar, offset)| function.bar_write(bar, offset, width, value, &mut out));
        self.interrupts = out;
        if decoded.is_some() {
            self.notice_faults();
        }
        decoded.is_some()
    }

    /// The PCI function at `offset` in ECAM, and the register in its configuration space.
    fn function_at(&mut self, offset: u64) -> Option<(&mut dyn Function, usize)> {
        let register = (offset & 0xFFF) as usize;
        let function: &mut dyn Function = match offset >> 12 {
            VSOCK_FUNCTION => &mut self.vsock,
            RNG_FUNCTION => &mut self.rng,
            NETWORK_FUNCTION => self.network.as_mut()?,
            DISK_FUNCTION => self.disk.as_mut()?,
            _ => return None,
        };
        Some((function, register))
    }

    /// What the guest reads in the 4 KiB of ECAM at `offset`, a multiple of 4 KiB: the bytes of a function's configuration space, after which
    /// zeros follow. So that these reads need no exit; writes do. `Nothing` where no function is: all ones.
    pub fn config_page(&self, offset: u64) -> ConfigPage<'_> {
        let bytes = match offset >> 12 {
            VSOCK_FUNCTION => self.vsock.config_bytes(),
            RNG_FUNCTION => self.rng.config_bytes(),
            NETWORK_FUNCTION if let Some(network) = &self.network => network.config_bytes(),
            DISK_FUNCTION if let Some(disk) = &self.disk => disk.config_bytes(),
            _ => return ConfigPage::Nothing,
        };
        bytes.map_or(ConfigPage::HasEffects, ConfigPage::Bytes)
    }

    fn notice_faults(&mut self) {
        let network = self.network.as_ref().map(|network| network as &dyn Function);
        let disk = self.disk.as_ref().map(|disk| disk as &dyn Function);
        let functions: [Option<&dyn Function>; 4] = [Some(&self.vsock), Some(&self.rng), network, disk];
        let fault = functions.into_iter().flatten().find_map(Function::fault);
        let fault = fault.map(|(device, reason)| MachineEnd::DeviceFault { device, reason: reason.into() });
        if self.end.is_none() {
            self.end = fault;
        }
    }

    fn read_byte_port(&mut self, port: u16) -> u8 {
        match port {
            layout::UART_PORT..=UART_LAST_PORT => {
                let value = self.serial.read(port - layout::UART_PORT);
                self.update_serial_line();
                value
            }
            cmos::DATA_PORT => self.cmos.read_data(),
            _ => power::read(port).unwrap_or(0xFF),
        }
    }

    fn write_byte_port(&mut self, port: u16, value: u8) {
        match port {
            layout::UART_PORT..=UART_LAST_PORT => {
                self.serial.write(port - layout::UART_PORT, value);
                self.update_serial_line();
            }
            cmos::INDEX_PORT => self.cmos.write_index(value),
            _ => {
                if let Some(end) = power::end_by_write(port, value) {
                    self.end.get_or_insert(end);
                }
            }
        }
    }

    fn update_serial_line(&mut self) {
        if let Some(message) = self.ioapic.set_line(layout::UART_GSI, self.serial.interrupt_line()) {
            self.interrupts.send(message);
        }
    }

    /// The guest reads `width` (1, 2, 4 or 8) bytes at an address that is not RAM. The local APIC's page is not the platform's.
    /// Unknown addresses read all ones.
    pub fn mmio_read(&mut self, at: GuestPhysAddr, width: u8) -> u64 {
        if let Some(offset) = offset_in(at, layout::ECAM_BASE, layout::ECAM_SIZE) {
            return match self.function_at(offset) {
                // A quadword is two dwords.
                Some((function, register)) if width == 8 => {
                    let low = function.config_read(register, 4);
                    u64::from(low) | u64::from(function.config_read(register + 4, 4)) << 32
                }
                Some((function, register)) => function.config_read(register, width).into(),
                None => ones(width),
            };
        }
        if let Some(offset) = offset_in(at, layout::IOAPIC_BASE, IOAPIC_BYTES) {
            let register = u64::from(self.ioapic.read(offset & !3));
            return (register >> (8 * (offset & 3))) & ones(width);
        }
        let bar = u32::try_from(at.0).ok().and_then(|address| self.find_bar(Space::Memory, address));
        bar.map_or(ones(width), |(function, bar, offset)| function.bar_read(bar, offset, width))
    }

    /// The guest writes `width` (1, 2, 4 or 8) bytes at an address that is not RAM. Unknown addresses ignore writes.
    pub fn mmio_write(&mut self, at: GuestPhysAddr, width: u8, value: u64) {
        if let Some(offset) = offset_in(at, layout::ECAM_BASE, layout::ECAM_SIZE) {
            let mut out = core::mem::take(&mut self.interrupts);
            if let Some((function, register)) = self.function_at(offset) {
                function.config_write(register, width.min(4), value as u32, &mut out);
                if width == 8 {
                    function.config_write(register + 4, 4, (value >> 32) as u32, &mut out);
                }
            }
            self.interrupts = out;
            self.notice_faults();
        } else if let Some(offset) = offset_in(at, layout::IOAPIC_BASE, IOAPIC_BYTES) {
            if let Some(message) = self.ioapic.write(offset, (value & ones(width)) as u32) {
                self.interrupts.send(message);
            }
        } else if let Ok(address) = u32::try_from(at.0) {
            self.write_bar(Space::Memory, address, width, value);
        }
    }

    /// Whether [`Self::poll`] has something to do.
    pub fn needs_poll(&self) -> bool {
        self.vsock.has_work()
            || self.rng.has_work()
            || self.network.as_ref().is_some_and(VirtioPci::has_work)
            || self.disk.as_ref().is_some_and(VirtioPci::has_work)
    }

    /// Works on the queues the guest has filled, and moves bytes the host has for the guest. Cheap when there is nothing to do.
    pub fn poll(&mut self, memory: &mut dyn GuestMemory, host: &mut Host<'_>) {
        self.vsock.work(memory, host, &mut self.interrupts);
        self.rng.work(memory, host, &mut self.interrupts);
        if let Some(network) = &mut self.network {
            network.work(memory, host, &mut self.interrupts);
        }
        if let Some(disk) = &mut self.disk {
            disk.work(memory, host, &mut self.interrupts);
        }
        self.notice_faults();
    }

    /// Why the devices are not at rest, if they are not: bytes, frames or requests are under way that a copy of the devices would have twice.
    /// Bytes of the agent's that the host has not taken are no such reason: the copy's host takes them too.
    pub fn unrest(&self) -> Option<&'static str> {
        if self.needs_poll() {
            return Some("a queue is not worked off");
        }
        if self.vsock.device.host.unsent() > 0 {
            return Some("bytes for the agent are on their way");
        }
        if self.network.as_ref().is_some_and(|network| network.device.host.has_frames()) {
            return Some("network frames are on their way");
        }
        let is_busy = self.disk.as_ref().is_some_and(|disk| disk.device.has_requests());
        is_busy.then_some("the disk has requests")
    }

    /// The disk has something for requests that wait.
    pub fn wake_disk(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.device.wake();
        }
    }

    /// The next interrupt message to deliver to a local APIC: from MSI-X or the I/O APIC.
    pub fn take_interrupt(&mut self) -> Option<MsiMessage> {
        self.interrupts.take()
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: Vector) {
        if let Some(message) = self.ioapic.end_of_interrupt(vector) {
            self.interrupts.send(message);
        }
    }

    /// Whether and why the machine has ended. Once it has, it must not run again.
    pub const fn end(&self) -> Option<&MachineEnd> {
        self.end.as_ref()
    }

    /// The host's end of the machine's vsock connection.
    pub fn vsock(&mut self) -> &mut VsockHost {
        &mut self.vsock.device.host
    }

    /// The host's end of the machine's network card, if it has one.
    pub fn network(&mut self) -> Option<&mut NetworkHost> {
        self.network.as_mut().map(|network| &mut network.device.host)
    }

    /// What the machine last printed on its serial port.
    pub const fn console(&self) -> &ConsoleTail {
        self.serial.console()
    }
}

/// See [`Platform::config_page`].
#[derive(Clone, Copy, Debug)]
pub enum ConfigPage<'a> {
    /// A function's configuration space.
    Bytes(&'a [u8; pci::CONFIG_BYTES]),
    /// No function: reads find all ones.
    Nothing,
    /// Reads have to be emulated.
    HasEffects,
}

/// Where `at` is in the region of `length` bytes at `base`, if it is in it.
fn offset_in(at: GuestPhysAddr, base: u64, length: u64) -> Option<u64> {
    at.0.checked_sub(base).filter(|&offset| offset < length)
}

/// All ones in `width` bytes.
fn ones(width: u8) -> u64 {
    u64::MAX.checked_shr(64_u32.saturating_sub(8 * u32::from(width))).unwrap_or(0)
}

#[cfg(test)]
mod tests;
