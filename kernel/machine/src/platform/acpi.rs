//! The ACPI tables a machine's firmware would provide.
//!
//! ACPI 6.5: 5.2.5 (RSDP), 5.2.8 (XSDT), 5.2.9 (FADT), 5.2.12 (MADT), 4.8.3.7 (sleep registers), 4.1 (hardware-reduced ACPI);
//! PCI Firmware 3.3, 4.1.2 (MCFG). The machine is hardware-reduced: no 8259, 8254, PM timer or SCI exist, and Linux looks for none
//! of them. There is no `_PRT`: PCI functions have no interrupt pin, only MSI-X.

use super::ioapic;
use crate::layout;
use acpi_tables::Aml;
use acpi_tables::aml::{self, AddressSpace, AddressSpaceCacheable, EISAName, Name, ResourceTemplate};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use alloc::vec;
use alloc::vec::Vec;

const OEM_ID: [u8; 6] = *b"NESTLG";
const OEM_TABLE_ID: [u8; 8] = *b"NESTLING";
const OEM_REVISION: u32 = 1;

/// Value of `SLP_TYP` that means S5, from `\_S5` in the DSDT.
pub(super) const SLEEP_TYPE_S5: u8 = 5;
/// FADT `IAPC_BOOT_ARCH`: VGA not present, CMOS RTC not present. No legacy devices and no 8042 by absence.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 5;
/// Last port of the window for PCI I/O BARs.
const PCI_IO_LAST: u16 = 0xFFFF;

/// Collects tables behind each other at their final addresses.
struct Tables {
    base: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table at the next 16-byte boundary; returns its address.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

/// All tables, to be written at `base`; the RSDP comes first. `vcpu_count` is at most 255.
pub(super) fn tables(base: u64, vcpu_count: u8) -> Vec<u8> {
    let mut tables = Tables { base, bytes: vec![0; Rsdp::len()] };

    let dsdt = tables.place(&dsdt());
    let fadt = tables.place(&fadt(dsdt));
    let madt = tables.place(&madt(vcpu_count));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_BASE, 0, 0, 0);
    let mcfg = tables.place(&mcfg);

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = tables.place(&xsdt);

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes.iter_mut().zip(rsdp).for_each(|(to, from)| *to = from);
    tables.bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let byte_port = |port: u16| GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        // Power and sleep buttons are not fixed hardware, which a hardware-reduced machine cannot have.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = byte_port(layout::ACPI_RESET_PORT);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(layout::ACPI_SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpu_count: u8) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LAPIC_BASE as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for id in 0..vcpu_count {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, ioapic::FIRST_GSI));
    madt
}

fn dsdt() -> Sdt {
    let ecam = [layout::ECAM_BASE as u32, layout::ECAM_SIZE as u32];
    let window = [layout::PCI_MMIO_BASE as u32, (layout::PCI_MMIO_END - 1) as u32];
    let uncached = AddressSpaceCacheable::NotCacheable;
    let sleep_ports = layout::ACPI_SLEEP_CONTROL_PORT;
    let uart = layout::UART_PORT;

    let host_bridge = [
        hardware_id("PNP0A08"),
        Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        unique_id(0),
        resources(vec![
            &AddressSpace::<u16>::new_bus_number(0, 0),
            &AddressSpace::<u16>::new_io(layout::PCI_IO_BASE, PCI_IO_LAST, None),
            &AddressSpace::<u32>::new_memory(uncached, true, window[0], window[1], None),
        ]),
    ];
    // Linux uses ECAM only when a motherboard device reserves it.
    let motherboard = [
        hardware_id("PNP0C02"),
        unique_id(0),
        resources(vec![
            &aml::Memory32Fixed::new(true, ecam[0], ecam[1]),
            &aml::IO::new(sleep_ports, sleep_ports, 1, 3),
        ]),
    ];
    let serial = [
        hardware_id("PNP0501"),
        unique_id(0),
        resources(vec![
            &aml::IO::new(uart, uart, 1, 8),
            &aml::Interrupt::new(true, true, false, false, layout::UART_GSI),
        ]),
    ];
    let sleep_type: aml::Byte = SLEEP_TYPE_S5;
    let s5 =
        Name::new("_S5_".into(), &aml::Package::new(vec![&sleep_type, &aml::ZERO, &aml::ZERO, &aml::ZERO]));

    let host_bridge = device("PCI0", &host_bridge);
    let motherboard = device("MBRD", &motherboard);
    let serial = device("COM1", &serial);
    let mut body = Vec::new();
    aml::Scope::new("_SB_".into(), vec![&host_bridge, &motherboard, &serial]).to_aml_bytes(&mut body);
    s5.to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn device<'a>(name: &str, children: &'a [Name]) -> aml::Device<'a> {
    aml::Device::new(name.into(), children.iter().map(|child| child as &dyn Aml).collect())
}

fn hardware_id(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn unique_id(id: u8) -> Name {
    Name::new("_UID".into(), &id)
}

fn resources(descriptors: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = layout::ACPI_TABLES;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, &byte| sum.wrapping_add(byte))
    }

    /// The table at guest physical address `at`, its length and checksum verified.
    fn table(bytes: &[u8], at: u64) -> &[u8] {
        let start = usize::try_from(at - BASE).unwrap();
        let length = u32_at(bytes, start + 4) as usize;
        let table = &bytes[start..start + length];
        assert_eq!(sum(table), 0, "checksum of {:?}", core::str::from_utf8(&table[..4]));
        table
    }

    /// The table with this signature, found as a guest finds it.
    fn find<'a>(bytes: &'a [u8], signature: &[u8; 4]) -> &'a [u8] {
        let xsdt = table(bytes, u64_at(bytes, 24));
        (36..xsdt.len())
            .step_by(8)
            .map(|entry| table(bytes, u64_at(xsdt, entry)))
            .find(|table| &table[..4] == signature)
            .unwrap()
    }

    #[test]
    fn the_root_pointer_stands_first_with_both_checksums_right() {
        let bytes = tables(BASE, 1);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(sum(&bytes[..20]), 0);
        assert_eq!(sum(&bytes[..36]), 0);
        assert_eq!(&table(&bytes, u64_at(&bytes, 24))[..4], b"XSDT");
    }

    #[test]
    fn the_machine_is_hardware_reduced_and_can_sleep_and_reset() {
        let bytes = tables(BASE, 1);
        let fadt = find(&bytes, b"FACP");
        assert_ne!(u32_at(fadt, 112) & 1 << 20, 0, "HW_REDUCED_ACPI");
        assert_ne!(u32_at(fadt, 112) & 1 << 10, 0, "RESET_REG_SUP");
        assert_eq!(fadt[109], 0x24, "no VGA, no RTC, no 8042, no legacy devices");
        assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x02, 0x06, 0, 0, 0, 0, 0, 0], "reset register");
        assert_eq!(fadt[128], layout::ACPI_RESET_VALUE);
        assert_eq!(fadt[244..256], [1, 8, 0, 1, 0x00, 0x06, 0, 0, 0, 0, 0, 0], "sleep control");
        assert_eq!(fadt[256..268], [1, 8, 0, 1, 0x01, 0x06, 0, 0, 0, 0, 0, 0], "sleep status");
        let dsdt = table(&bytes, u64_at(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
    }

    #[test]
    fn every_processor_and_the_io_apic_are_listed() {
        let bytes = tables(BASE, 3);
        let madt = find(&bytes, b"APIC");
        assert_eq!(u32_at(madt, 36), 0xFEE0_0000);
        assert_eq!(u32_at(madt, 40), 0, "no 8259");
        for id in 0..3_usize {
            let entry = &madt[44 + 8 * id..52 + 8 * id];
            assert_eq!(entry, [0, 8, id as u8, id as u8, 1, 0, 0, 0]);
        }
        assert_eq!(&madt[68..], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, layout::UART_GSI as u8, 0, 0, 0]);
    }

    #[test]
    fn configuration_space_is_one_bus_of_ecam() {
        let bytes = tables(BASE, 1);
        let mcfg = find(&bytes, b"MCFG");
        assert_eq!(u64_at(mcfg, 44), layout::ECAM_BASE);
        assert_eq!(&mcfg[52..60], [0; 8], "segment 0, buses 0-0");
    }

    #[test]
    fn the_most_processors_still_fit_below_the_firmware_segment() {
        assert!(BASE + tables(BASE, 255).len() as u64 <= 0xF_0000);
    }

    /// With `NESTLING_ACPI_DUMP=FOLDER` the tables are written there, to be read with `iasl -d`.
    #[test]
    fn tables_can_be_dumped_for_a_disassembler() {
        extern crate std;
        let Ok(folder) = std::env::var("NESTLING_ACPI_DUMP") else { return };
        let bytes = tables(BASE, 2);
        let fadt = find(&bytes, b"FACP");
        let dsdt = table(&bytes, u64_at(fadt, 140));
        for (name, table) in
            [("facp", fadt), ("dsdt", dsdt), ("apic", find(&bytes, b"APIC")), ("mcfg", find(&bytes, b"MCFG"))]
        {
            std::fs::write(std::format!("{folder}/{name}.dat"), table).unwrap();
        }
    }
}
