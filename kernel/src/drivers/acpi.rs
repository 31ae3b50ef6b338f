//! What the firmware's ACPI tables tell: cores, the PM timer, PCI's configuration window, how to power off.
//!
//! ACPI specification 6.5: 5.2.5 (RSDP), 5.2.7-5.2.8 (RSDT, XSDT), 5.2.9 (FADT), 5.2.12 (MADT), 4.8.3.3 (PM
//! timer), 4.8.3.2.1 (PM1 control), 4.8.3.7 (sleep control), 7.4.2 (the \_S5 object); PCI Firmware
//! specification 3.3, 4.1.2 (MCFG).
//!
//! Only fixed tables are read, no AML runs: the one AML value needed, the sleep type of \_S5, is a constant
//! package that is found by its name. Every table is copied out once, its length bounded and its checksum
//! proven, before it is parsed.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use x86_64::instructions::port::Port;

/// The largest table that is read; the DSDT of a big server has some hundred KiB.
const MAX_TABLE_BYTES: usize = 2 << 20;
/// The most entries of the root table that are followed.
const MAX_TABLES: usize = 256;
/// Length of the header every table but the RSDP starts with.
const HEADER_BYTES: usize = 36;

const FADT_TIMER_IS_32_BIT: u32 = 1 << 8;
const FADT_HARDWARE_REDUCED: u32 = 1 << 20;
const MADT_CORE_ENABLED: u32 = 1;
const PM1_SCI_ENABLED: u16 = 1;
const PM1_SLEEP_ENABLE: u16 = 1 << 13;

/// Why the firmware's tables cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcpiError {
    /// No RSDP at the given physical address, or its checksum is wrong.
    NoRootPointer(u64),
    /// Neither the XSDT nor the RSDT the RSDP points at can be read.
    NoRootTable(u64),
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRootPointer(at) => write!(f, "no valid ACPI root pointer (RSDP) at {at:#x}"),
            Self::NoRootTable(at) => write!(f, "no valid ACPI root table (XSDT or RSDT) at {at:#x}"),
        }
    }
}

/// A register in port or memory space (5.2.3.2, Generic Address Structure).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// An I/O port.
    Port(u16),
    /// A physical address.
    Memory(u64),
}

/// PCI's memory-mapped configuration window of segment 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigWindow {
    /// Physical address of bus 0's configuration space, whatever `first_bus` is.
    pub base: u64,
    /// First bus the window decodes.
    pub first_bus: u8,
    /// Last bus the window decodes.
    pub last_bus: u8,
}

/// How to enter sleep state S5 ("soft off").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PowerOff {
    Pm1 { control_a: u16, control_b: Option<u16>, type_a: u8, type_b: u8, enable: Option<(u16, u8)> },
    SleepControl { register: Register, sleep_type: u8 },
}

/// What was read from the firmware's tables. [`Firmware::default`] is a machine that tells nothing.
#[derive(Debug, Clone, Default)]
pub struct Firmware {
    /// I/O port of the PM timer, which counts at 3,579,545 Hz.
    pub pm_timer_port: Option<u16>,
    /// The PM timer wraps at 32 bits, else at 24.
    pub pm_timer_is_32_bit: bool,
    /// APIC identifiers of the enabled cores, in the table's order (the boot core is first by custom).
    pub apic_ids: Vec<u32>,
    /// PCI's memory-mapped configuration space, where there is one.
    pub config_window: Option<ConfigWindow>,
    power_off: Option<PowerOff>,
}

impl Firmware {
    /// Reads the tables the RSDP at physical address `rsdp` leads to. A table that is missing or broken
    /// leaves its fields empty.
    ///
    /// # Errors
    /// When there is no valid RSDP or root table.
    pub fn read(rsdp: u64) -> Result<Self, AcpiError> {
        let (root, entry_bytes) = root_table(rsdp)?;
        let mut firmware = Self::default();
        let entries = root.get(HEADER_BYTES..).unwrap_or_default();
        for entry in entries.chunks_exact(entry_bytes).take(MAX_TABLES) {
            let address = entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            let Some(signature) = copy(address, 4) else { continue };
            match signature.as_slice() {
                b"FACP" => table(address).iter().for_each(|fadt| firmware.read_fadt(fadt)),
                b"APIC" => table(address).iter().for_each(|madt| firmware.read_madt(madt)),
                b"MCFG" => table(address).iter().for_each(|mcfg| firmware.read_mcfg(mcfg)),
                _ => {}
            }
        }
        Ok(firmware)
    }

    fn read_fadt(&mut self, fadt: &[u8]) {
        let flags = u32_at(fadt, 112).unwrap_or(0);
        if let Some(Register::Port(port)) = block(fadt, 76, 208) {
            self.pm_timer_port = Some(port);
            self.pm_timer_is_32_bit = flags & FADT_TIMER_IS_32_BIT != 0;
        }
        let dsdt =
            u64_at(fadt, 140).filter(|at| *at != 0).or_else(|| u32_at(fadt, 40).map(u64::from)).unwrap_or(0);
        let Some((type_a, type_b)) = table(dsdt).as_deref().and_then(s5_sleep_types) else { return };
        self.power_off = if flags & FADT_HARDWARE_REDUCED != 0 {
            generic_address(fadt, 244).map(|register| PowerOff::SleepControl { register, sleep_type: type_a })
        } else if let Some(Register::Port(control_a)) = block(fadt, 64, 172) {
            let control_b = match block(fadt, 68, 184) {
                Some(Register::Port(port)) => Some(port),
                _ => None,
            };
            let command =
                u32_at(fadt, 48).and_then(|port| u16::try_from(port).ok()).filter(|port| *port != 0);
            let enable = command.zip(fadt.get(52).copied().filter(|value| *value != 0));
            Some(PowerOff::Pm1 { control_a, control_b, type_a, type_b, enable })
        } else {
            None
        };
    }

    fn read_madt(&mut self, madt: &[u8]) {
        let mut rest = madt.get(44..).unwrap_or_default();
        while let [kind, length, ..] = *rest {
            let length = usize::from(length);
            let (Some(entry), true) = (rest.get(..length), length >= 2) else { break };
            let (id, flags) = match kind {
                0 => (entry.get(3).map(|id| u32::from(*id)), u32_at(entry, 4)),
                9 => (u32_at(entry, 4), u32_at(entry, 8)),
                _ => (None, None),
            };
            if let (Some(id), Some(flags)) = (id, flags)
                && flags & MADT_CORE_ENABLED != 0
                && !self.apic_ids.contains(&id)
            {
                self.apic_ids.push(id);
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }

    fn read_mcfg(&mut self, mcfg: &[u8]) {
        for entry in mcfg.get(44..).unwrap_or_default().chunks_exact(16) {
            if let (Some(base), [.., 0, 0, first_bus, last_bus, _, _, _, _]) = (u64_at(entry, 0), entry)
                && self.config_window.is_none()
                && first_bus <= last_bus
            {
                self.config_window = Some(ConfigWindow { base, first_bus: *first_bus, last_bus: *last_bus });
            }
        }
    }

    /// Powers the machine off. Returns only where the firmware names no way to, or the way did not work
    /// within some milliseconds.
    pub fn power_off(&self) {
        // The serial port's last bytes would be lost with the power.
        log::logger().flush();
        match self.power_off {
            Some(PowerOff::Pm1 { control_a, control_b, type_a, type_b, enable }) => {
                if let Some((command, value)) = enable
                    && read_port(control_a) & PM1_SCI_ENABLED == 0
                {
                    Register::Port(command).write_byte(value);
                    // The firmware may take a moment to hand the registers over; reading a port takes about a
                    // microsecond.
                    for _ in 0..10_000 {
                        if read_port(control_a) & PM1_SCI_ENABLED != 0 {
                            break;
                        }
                    }
                }
                write_port(control_a, u16::from(type_a & 7) << 10 | PM1_SLEEP_ENABLE);
                if let Some(control_b) = control_b {
                    write_port(control_b, u16::from(type_b & 7) << 10 | PM1_SLEEP_ENABLE);
                }
                for _ in 0..10_000 {
                    read_port(control_a);
                }
            }
            Some(PowerOff::SleepControl { register, sleep_type }) => {
                register.write_byte((sleep_type & 7) << 2 | 1 << 5)
            }
            None => {}
        }
    }
}

impl Register {
    fn write_byte(self, value: u8) {
        match self {
            // SAFETY: the port is the one the firmware's tables (or the PC platform) name for this purpose;
            // no memory is reached through it.
            Self::Port(port) => unsafe { Port::<u8>::new(port).write(value) },
            // SAFETY: map_mmio returns a mapped pointer to at least one byte; the firmware's tables name the
            // address as a register.
            Self::Memory(address) => unsafe { crate::memory::map_mmio(address, 1).write_volatile(value) },
        }
    }
}

fn read_port(port: u16) -> u16 {
    // SAFETY: reading a PM1 control register the FADT names has no side effects.
    unsafe { Port::<u16>::new(port).read() }
}

fn write_port(port: u16, value: u16) {
    // SAFETY: the port is a PM1 control register the FADT names; writing it changes the machine's power state
    // only.
    unsafe { Port::<u16>::new(port).write(value) }
}

/// The root table and the size of its entries: 8 for the XSDT, which is preferred, 4 for the RSDT.
fn root_table(rsdp: u64) -> Result<(Vec<u8>, usize), AcpiError> {
    let pointer = copy(rsdp, 20)
        .filter(|bytes| bytes.starts_with(b"RSD PTR ") && sums_to_zero(bytes))
        .ok_or(AcpiError::NoRootPointer(rsdp))?;
    let xsdt = if pointer.get(15).is_some_and(|revision| *revision >= 2) {
        copy(rsdp, 36).filter(|bytes| sums_to_zero(bytes)).and_then(|bytes| u64_at(&bytes, 24))
    } else {
        None
    };
    if let Some(root) = xsdt.and_then(table).filter(|table| table.starts_with(b"XSDT")) {
        return Ok((root, 8));
    }
    let rsdt = u32_at(&pointer, 16).map_or(0, u64::from);
    table(rsdt)
        .filter(|table| table.starts_with(b"RSDT"))
        .map(|root| (root, 4))
        .ok_or(AcpiError::NoRootTable(rsdt))
}

/// A copy of the table at a physical address, if its length is sane and its checksum right.
fn table(address: u64) -> Option<Vec<u8>> {
    let header = copy(address, HEADER_BYTES)?;
    let length = u32_at(&header, 4)? as usize;
    if !(HEADER_BYTES..=MAX_TABLE_BYTES).contains(&length) {
        return None;
    }
    let table = copy(address, length)?;
    if !sums_to_zero(&table) {
        log::warn!("acpi: the table at {address:#x} has a wrong checksum and is not used");
        return None;
    }
    Some(table)
}

fn copy(address: u64, bytes: usize) -> Option<Vec<u8>> {
    // Below 4 KiB is no table, above 2^46 no processor decodes.
    if address < 0x1000 || address.checked_add(bytes as u64)? > 1 << 46 {
        return None;
    }
    let source = crate::memory::map_mmio(address, bytes);
    let mut into = vec![0; bytes];
    // SAFETY: map_mmio makes `bytes` bytes readable at the returned pointer; the vector is as long and fresh,
    // so they do not overlap.
    unsafe { core::ptr::copy_nonoverlapping(source, into.as_mut_ptr(), bytes) };
    Some(into)
}

/// A fixed hardware block: the 64-bit form at `extended` where it is present and not zero, else the I/O port
/// at `legacy`.
fn block(fadt: &[u8], legacy: usize, extended: usize) -> Option<Register> {
    generic_address(fadt, extended).or_else(|| {
        let port = u16::try_from(u32_at(fadt, legacy)?).ok()?;
        (port != 0).then_some(Register::Port(port))
    })
}

fn generic_address(table: &[u8], offset: usize) -> Option<Register> {
    let address = u64_at(table, offset.checked_add(4)?)?;
    match (table.get(offset)?, address) {
        (_, 0) => None,
        (0, address) => Some(Register::Memory(address)),
        (1, address) => u16::try_from(address).ok().map(Register::Port),
        _ => None,
    }
}

/// The two sleep types of the package `\_S5` in a DSDT: `Name (_S5, Package () { a, b, ... })`, its integers
/// encoded as AML constants.
fn s5_sleep_types(dsdt: &[u8]) -> Option<(u8, u8)> {
    const PACKAGE: u8 = 0x12;
    let body = dsdt.get(HEADER_BYTES..)?;
    body.windows(4).enumerate().filter(|(_, name)| name == b"_S5_").find_map(|(at, _)| {
        let package = body.get(at.checked_add(4)?..)?;
        let (&[PACKAGE, lead], rest) = package.split_first_chunk::<2>()? else { return None };
        // The top two bits of a PkgLength's first byte count the bytes that follow it; then comes the number
        // of elements.
        let elements = rest.get(usize::from(lead >> 6) + 1..)?;
        let (a, rest) = aml_byte(elements)?;
        let b = aml_byte(rest).map_or(a, |(b, _)| b);
        Some((a, b))
    })
}

/// One small AML integer (20.2.3): ZeroOp, OneOp, or BytePrefix, WordPrefix, DWordPrefix with its value; and
/// what follows it.
fn aml_byte(aml: &[u8]) -> Option<(u8, &[u8])> {
    let (first, rest) = aml.split_first()?;
    match first {
        0x00 | 0x01 => Some((*first, rest)),
        0x0a => Some((*rest.first()?, rest.get(1..)?)),
        0x0b => Some((*rest.first()?, rest.get(2..)?)),
        0x0c => Some((*rest.first()?, rest.get(4..)?)),
        _ => None,
    }
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::place;

    const RSDP: u64 = 0xf_0000;
    const RSDT: u64 = 0x10_0000;

    /// Puts a table into memory with its length and a right checksum.
    fn place_table(address: u64, signature: &[u8; 4], body: &[u8]) {
        let mut table = vec![0; HEADER_BYTES];
        table[..4].copy_from_slice(signature);
        table[4..8].copy_from_slice(&((HEADER_BYTES + body.len()) as u32).to_le_bytes());
        table.extend(body);
        table[9] = 0_u8.wrapping_sub(table.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
        place(address, &table);
    }

    fn place_root(tables: &[u64]) {
        let mut pointer = *b"RSD PTR \0nestlg\0\0\0\0\0";
        pointer[16..20].copy_from_slice(&(RSDT as u32).to_le_bytes());
        pointer[8] = 0_u8.wrapping_sub(pointer.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
        place(RSDP, &pointer);
        let entries: Vec<u8> = tables.iter().flat_map(|at| (*at as u32).to_le_bytes()).collect();
        place_table(RSDT, b"RSDT", &entries);
    }

    fn fadt(dsdt: u32) -> Vec<u8> {
        let mut body = vec![0; 244 - HEADER_BYTES];
        let mut put = |offset: usize, value: u32| {
            body[offset - HEADER_BYTES..offset - HEADER_BYTES + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(40, dsdt);
        put(64, 0x604);
        put(76, 0x608);
        put(112, FADT_TIMER_IS_32_BIT);
        body
    }

    #[test]
    fn cores_timer_window_and_power_off_are_found() {
        place_root(&[0x20_0000, 0x30_0000, 0x40_0000]);
        place_table(0x20_0000, b"FACP", &fadt(0x50_0000));
        // Name (_S5, Package (4) { 5, 1, 0, 0 })
        place_table(0x50_0000, b"DSDT", b"junk_S5_junk\x08_S5_\x12\x08\x04\x0a\x05\x01\x00\x00");
        let mut madt = vec![0; 8];
        madt.extend([0, 8, 0, 3, 1, 0, 0, 0]); // enabled
        madt.extend([0, 8, 1, 4, 0, 0, 0, 0]); // disabled
        madt.extend([9, 16, 0, 0, 0x44, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]); // x2APIC, enabled
        madt.extend([1, 0]); // a length of zero ends the list
        place_table(0x30_0000, b"APIC", &madt);
        let mut mcfg = vec![0; 8];
        mcfg.extend(0xe000_0000_u64.to_le_bytes());
        mcfg.extend([0, 0, 0, 7, 0, 0, 0, 0]);
        place_table(0x40_0000, b"MCFG", &mcfg);
        let firmware = Firmware::read(RSDP).unwrap();
        assert_eq!(firmware.apic_ids, [3, 0x144]);
        assert_eq!((firmware.pm_timer_port, firmware.pm_timer_is_32_bit), (Some(0x608), true));
        assert_eq!(
            firmware.config_window,
            Some(ConfigWindow { base: 0xe000_0000, first_bus: 0, last_bus: 7 })
        );
        let pm1 = PowerOff::Pm1 { control_a: 0x604, control_b: None, type_a: 5, type_b: 1, enable: None };
        assert_eq!(firmware.power_off, Some(pm1));
    }

    #[test]
    fn a_missing_or_damaged_root_is_named() {
        assert_eq!(Firmware::read(RSDP).unwrap_err(), AcpiError::NoRootPointer(RSDP));
        assert_eq!(Firmware::read(0).unwrap_err(), AcpiError::NoRootPointer(0));
        place_root(&[]);
        place(RSDT + 9, &[0xff]);
        assert_eq!(Firmware::read(RSDP).unwrap_err(), AcpiError::NoRootTable(RSDT));
    }

    #[test]
    fn a_damaged_table_and_one_of_absurd_length_leave_their_fields_empty() {
        place_root(&[0x20_0000, 0x30_0000, u64::from(u32::MAX)]);
        place_table(0x20_0000, b"FACP", &fadt(0));
        place(0x20_0000 + 100, &[1]);
        place(0x30_0000, b"APIC\xff\xff\xff\xff");
        let firmware = Firmware::read(RSDP).unwrap();
        assert!(
            firmware.pm_timer_port.is_none() && firmware.apic_ids.is_empty() && firmware.power_off.is_none()
        );
    }

    #[test]
    fn a_table_that_ends_early_is_read_as_far_as_it_goes() {
        for length in 0..60 {
            place_root(&[0x20_0000, 0x30_0000]);
            place_table(0x20_0000, b"FACP", &fadt(0x50_0000)[..length]);
            place_table(
                0x30_0000,
                b"APIC",
                &[0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 3, 1, 0, 0, 0][..length.min(16)],
            );
            let firmware = Firmware::read(RSDP).unwrap();
            assert_eq!(firmware.apic_ids.len(), usize::from(length >= 16));
        }
    }
}
