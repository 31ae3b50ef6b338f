//! PCI configuration: finding functions, their regions, and message-signalled interrupts.
//!
//! PCI Local Bus specification 3.0: 3.2.2.3.2 (configuration by ports 0xCF8 and 0xCFC), 6.1 (header), 6.2.4
//! (interrupt line and pin), 6.2.5 (base addresses), 6.8.1 (MSI), 6.8.2 (MSI-X). PCI Express Base specification: 7.2.2
//! (memory-mapped configuration).

use alloc::vec::Vec;
use core::fmt;

use virtio_drivers::transport::pci::bus::{BarInfo, Command, ConfigurationAccess, DeviceFunction, PciRoot};
use x86_64::instructions::port::Port;

use super::acpi::{ConfigWindow, Firmware};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const CONFIG_ENABLE: u32 = 1 << 31;
const NO_FUNCTION: u32 = u32::MAX;
const MULTIPLE_FUNCTIONS: u32 = 1 << 23;
const HEADER_TYPE: u32 = 0x7f << 16;
const HEADER_TYPE_BRIDGE: u32 = 1 << 16;
const INTERRUPT: u8 = 0x3c;
const CAPABILITY_MSI: u8 = 0x05;
const CAPABILITY_MSIX: u8 = 0x11;
const MSI_ENABLE: u32 = 1 << 16;
const MSI_SEVERAL_MESSAGES: u32 = 7 << 20;
const MSI_64_BIT: u32 = 1 << 23;
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_MASK_ALL: u32 = 1 << 30;
const MSIX_ENTRY_BYTES: u64 = 16;
/// The most functions a node looks at.
const MAX_FUNCTIONS: usize = 256;

/// One function of a device on a bus.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    /// Bus, device and function number.
    pub address: DeviceFunction,
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{:04x}:{:04x}]", self.address, self.vendor, self.device)
    }
}

/// A range of physical memory a function decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Physical address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Region {
    /// The part of `bytes` bytes at `offset`, if it lies within.
    #[must_use]
    pub fn part(self, offset: u64, bytes: u64) -> Option<Self> {
        let end = offset.checked_add(bytes)?;
        (bytes > 0 && end <= self.bytes).then_some(Self { address: self.address.checked_add(offset)?, bytes })
    }
}

/// Where a function's MSI-X structures lie.
#[derive(Debug, Clone, Copy)]
pub struct Msix {
    /// Offset of the capability in configuration space.
    capability: u8,
    /// Table entry 0.
    entry: Region,
}

/// Where a function's MSI capability lies.
#[derive(Debug, Clone, Copy)]
pub struct Msi {
    /// Its offset in configuration space.
    capability: u8,
}

/// How configuration space is reached.
#[derive(Debug, Clone, Copy)]
pub enum ConfigSpace {
    /// By the port pair every PC has.
    Ports,
    /// By memory, on platforms without the ports.
    Window(ConfigWindow),
}

/// What is on the buses.
#[derive(Debug)]
pub struct Bus {
    /// How configuration space is reached.
    pub space: ConfigSpace,
    /// Every function.
    pub functions: Vec<Function>,
}

impl Bus {
    /// Looks at all buses; `None` on a platform without PCI.
    #[must_use]
    pub fn find(firmware: &Firmware) -> Option<Self> {
        let space = ConfigSpace::find(firmware)?;
        let functions = space.functions();
        functions.iter().for_each(|function| log::debug!("pci: {function}"));
        Some(Self { space, functions })
    }
}

impl ConfigSpace {
    /// The way this platform offers; `None` on a platform without PCI.
    #[must_use]
    pub fn find(firmware: &Firmware) -> Option<Self> {
        // SAFETY: the address port only latches what is written; on a PC nothing else lies there.
        let latched = unsafe {
            Port::<u32>::new(CONFIG_ADDRESS).write(CONFIG_ENABLE);
            Port::<u32>::new(CONFIG_ADDRESS).read()
        };
        if latched == CONFIG_ENABLE {
            return Some(Self::Ports);
        }
        let window = firmware.config_window?;
        let first = window.base + (u64::from(window.first_bus) << 20);
        let buses = usize::from(window.last_bus - window.first_bus) + 1;
        crate::memory::map_mmio(first, buses << 20);
        Some(Self::Window(window))
    }

    /// Every function, breadth first from bus 0 through bridges.
    #[must_use]
    pub fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        let mut buses = Vec::from([0_u8]);
        let mut next = 0;
        while let Some(bus) = buses.get(next).copied() {
            next += 1;
            for device in 0..32 {
                let mut last = 0;
                let mut function = 0;
                while function <= last {
                    let address = DeviceFunction { bus, device, function };
                    let id = self.read_word(address, 0);
                    if id != NO_FUNCTION && functions.len() < MAX_FUNCTIONS {
                        let header = self.read_word(address, 0x0c);
                        if function == 0 && header & MULTIPLE_FUNCTIONS != 0 {
                            last = 7;
                        }
                        if header & HEADER_TYPE == HEADER_TYPE_BRIDGE {
                            let [_, secondary, _, _] = self.read_word(address, 0x18).to_le_bytes();
                            // A bridge the firmware left unconfigured says 0; a loop is not followed.
                            if !buses.contains(&secondary) {
                                buses.push(secondary);
                            }
                        }
                        let [v0, v1, d0, d1] = id.to_le_bytes();
                        functions.push(Function {
                            address,
                            vendor: u16::from_le_bytes([v0, v1]),
                            device: u16::from_le_bytes([d0, d1]),
                        });
                    }
                    function += 1;
                }
            }
        }
        functions
    }

    /// Stops the function from decoding its registers. Finding out a region's size writes to its base address
    /// register; emulators rebuild their memory map each time (a millisecond) unless decoding is off.
    pub fn disable(&self, function: DeviceFunction) {
        let mut root = PciRoot::new(*self);
        let (_, command) = root.get_status_command(function);
        root.set_command(function, command & !(Command::MEMORY_SPACE | Command::IO_SPACE));
    }

    /// Lets the function decode its registers and reach memory, and keeps its pin interrupt quiet.
    pub fn enable(&self, function: DeviceFunction) {
        let mut root = PciRoot::new(*self);
        let (_, command) = root.get_status_command(function);
        root.set_command(
            function,
            command | Command::MEMORY_SPACE | Command::BUS_MASTER | Command::INTERRUPT_DISABLE,
        );
    }

    /// The memory behind base address register `index`; `None` if it is unused, in port space, or has no
    /// address.
    #[must_use]
    pub fn memory_region(&self, function: DeviceFunction, index: u8) -> Option<Region> {
        if index > 5 {
            return None;
        }
        match PciRoot::new(*self).bar_info(function, index).ok()?? {
            BarInfo::Memory { address, size, .. } if address != 0 => Some(Region { address, bytes: size }),
            _ => None,
        }
    }

    /// Offsets of the function's capabilities of kind `id`.
    #[must_use]
    pub fn capabilities(&self, function: DeviceFunction, id: u8) -> Vec<u8> {
        let root = PciRoot::new(*self);
        // 48 capabilities fill the space they lie in: more are a loop.
        root.capabilities(function)
            .take(48)
            .filter(|capability| capability.id == id)
            .map(|capability| capability.offset)
            .collect()
    }

    /// The line of the legacy interrupt controllers that the firmware routed the function's pin to (6.2.4); `None` if it
    /// has no pin or the firmware routed it nowhere.
    #[must_use]
    pub fn interrupt_line(&self, function: DeviceFunction) -> Option<u8> {
        let [line, pin, _, _] = self.read_word(function, INTERRUPT).to_le_bytes();
        ((1..=4).contains(&pin) && line < 16).then_some(line)
    }

    /// Lets the function's pin interrupt and keeps all other functions' pins quiet: nobody would answer for one that
    /// shares the line.
    pub fn enable_line(&self, function: DeviceFunction) {
        let mut root = PciRoot::new(*self);
        for other in self.functions() {
            let (_, command) = root.get_status_command(other.address);
            if other.address != function && !command.contains(Command::INTERRUPT_DISABLE) {
                root.set_command(other.address, command | Command::INTERRUPT_DISABLE);
            }
        }
        let (_, command) = root.get_status_command(function);
        root.set_command(function, command & !Command::INTERRUPT_DISABLE);
    }

    /// Keeps the function's pin quiet.
    pub fn disable_line(&self, function: DeviceFunction) {
        let mut root = PciRoot::new(*self);
        let (_, command) = root.get_status_command(function);
        root.set_command(function, command | Command::INTERRUPT_DISABLE);
    }

    /// The function's MSI capability, if it has one.
    #[must_use]
    pub fn msi(&self, function: DeviceFunction) -> Option<Msi> {
        let capability = self.capabilities(function, CAPABILITY_MSI).first().copied()?;
        Some(Msi { capability })
    }

    /// Makes the function signal by one interrupt message.
    pub fn enable_msi(&self, function: DeviceFunction, msi: Msi, address: u64, data: u32) {
        let mut space = *self;
        let mut write =
            |offset, value| space.write_word(function, msi.capability.wrapping_add(offset), value);
        let control = self.read_word(function, msi.capability) & !(MSI_ENABLE | MSI_SEVERAL_MESSAGES);
        let [a0, a1, a2, a3, b0, b1, b2, b3] = address.to_le_bytes();
        write(0, control);
        write(4, u32::from_le_bytes([a0, a1, a2, a3]));
        if control & MSI_64_BIT == 0 {
            write(8, data);
        } else {
            write(8, u32::from_le_bytes([b0, b1, b2, b3]));
            write(12, data);
        }
        write(0, control | MSI_ENABLE);
    }

    /// Ends signalling by message.
    pub fn disable_msi(&self, function: DeviceFunction, msi: Msi) {
        let mut space = *self;
        let control = self.read_word(function, msi.capability);
        space.write_word(function, msi.capability, control & !MSI_ENABLE);
    }

    /// The function's MSI-X structures, if it has any.
    #[must_use]
    pub fn msix(&self, function: DeviceFunction) -> Option<Msix> {
        let capability = self.capabilities(function, CAPABILITY_MSIX).first().copied()?;
        let table = self.read_word(function, capability.wrapping_add(4));
        let [bar, ..] = (table & 7).to_le_bytes();
        let entry = self.memory_region(function, bar)?.part(u64::from(table & !7), MSIX_ENTRY_BYTES)?;
        Some(Msix { capability, entry })
    }

    /// Points MSI-X table entry 0 at an interrupt message and enables MSI-X. The function must be enabled.
    pub fn enable_msix(&self, function: DeviceFunction, msix: Msix, address: u64, data: u32) {
        let mut space = *self;
        let control = self.read_word(function, msix.capability);
        // All entries stay masked until entry 0 is written.
        space.write_word(function, msix.capability, control | MSIX_ENABLE | MSIX_MASK_ALL);
        let registers = crate::memory::map_mmio(msix.entry.address, MSIX_ENTRY_BYTES as usize).cast::<u32>();
        let [a0, a1, a2, a3, b0, b1, b2, b3] = address.to_le_bytes();
        let words = [u32::from_le_bytes([a0, a1, a2, a3]), u32::from_le_bytes([b0, b1, b2, b3]), data, 0];
        for (index, word) in words.into_iter().enumerate() {
            // SAFETY: the entry's 16 bytes lie within the function's region, were just mapped, and hold four
            // aligned 32-bit registers.
            unsafe { registers.add(index).write_volatile(word) };
        }
        space.write_word(function, msix.capability, (control | MSIX_ENABLE) & !MSIX_MASK_ALL);
    }
}

fn port_address(function: DeviceFunction, offset: u8) -> u32 {
    CONFIG_ENABLE
        | u32::from(function.bus) << 16
        | u32::from(function.device & 31) << 11
        | u32::from(function.function & 7) << 8
        | u32::from(offset & !3)
}

fn window_pointer(window: ConfigWindow, function: DeviceFunction, offset: u8) -> Option<*mut u32> {
    let inside = (window.first_bus..=window.last_bus).contains(&function.bus);
    let place = u64::from(function.bus) << 20
        | u64::from(function.device & 31) << 15
        | u64::from(function.function & 7) << 12
        | u64::from(offset & !3);
    inside.then_some((window.base + place) as *mut u32)
}

impl ConfigurationAccess for ConfigSpace {
    fn read_word(&self, function: DeviceFunction, offset: u8) -> u32 {
        match self {
            // SAFETY: the ports select and read a configuration register, which has no effect on memory; only
            // one core does this.
            Self::Ports => unsafe {
                Port::<u32>::new(CONFIG_ADDRESS).write(port_address(function, offset));
                Port::<u32>::new(CONFIG_DATA).read()
            },
            Self::Window(window) => {
                window_pointer(*window, function, offset).map_or(NO_FUNCTION, |register| {
                    // SAFETY: `find` mapped the whole window and the pointer is an aligned word within it.
                    unsafe { register.read_volatile() }
                })
            }
        }
    }

    fn write_word(&mut self, function: DeviceFunction, offset: u8, value: u32) {
        match self {
            // SAFETY: the ports select and write a configuration register of a function that this kernel
            // owns; only one core does this.
            Self::Ports => unsafe {
                Port::<u32>::new(CONFIG_ADDRESS).write(port_address(function, offset));
                Port::<u32>::new(CONFIG_DATA).write(value);
            },
            Self::Window(window) => {
                if let Some(register) = window_pointer(*window, function, offset) {
                    // SAFETY: `find` mapped the whole window and the pointer is an aligned word within it.
                    unsafe { register.write_volatile(value) }
                }
            }
        }
    }

    unsafe fn unsafe_clone(&self) -> Self {
        *self
    }
}
