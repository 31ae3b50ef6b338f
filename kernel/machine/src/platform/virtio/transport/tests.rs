use super::super::driver::{EVENT_INDEX, Guest, INDIRECT, VERSION_1};
use super::*;
use crate::address::GuestPhysAddr;
use crate::platform::MachineEnd;

const RNG: u16 = 0x1044;
const VSOCK: u16 = 0x1053;

#[test]
fn the_offered_features_are_the_transports() {
    let mut guest = Guest::new();
    let device = guest.find(VSOCK);
    assert_eq!(device.features(&mut guest), VERSION_1 | EVENT_INDEX | INDIRECT);
    guest.platform.pio_write(device.common, 4, 2);
    assert_eq!(guest.platform.pio_read(device.common + 4, 4), 0, "there is no third half");
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [0, EVENT_INDEX, VERSION_1 | 1 << 5, VERSION_1 | 1 << 33] {
        let mut guest = Guest::new();
        let device = guest.find(RNG);
        device.set_status(&mut guest, 3);
        device.set_features(&mut guest, features);
        device.set_status(&mut guest, 11);
        assert_eq!(device.status(&mut guest), 3, "{features:#x}");
    }
}

#[test]
fn accepted_features_cannot_be_changed() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    device.set_status(&mut guest, 3);
    device.set_features(&mut guest, VERSION_1);
    device.set_status(&mut guest, 11);
    device.set_features(&mut guest, VERSION_1 | INDIRECT);
    guest.platform.pio_write(device.common + 8, 4, 0);
    assert_eq!(guest.platform.pio_read(device.common + 12, 4), 0);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    guest.platform.pio_write(device.common + 0x10, 2, 2);
    assert_eq!(guest.platform.pio_read(device.common + 0x10, 2), 0xFFFF);
    guest.platform.pio_write(device.common + 0x10, 2, 1);
    assert_eq!(guest.platform.pio_read(device.common + 0x10, 2), 1);
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    guest.platform.pio_write(device.common + 0x16, 2, 1);
    assert_eq!(guest.platform.pio_read(device.common + 0x18, 2), 0);
    guest.platform.pio_write(device.common + 0x1C, 2, 1);
    assert_eq!(guest.platform.end(), None);
}

#[test]
fn a_queue_with_an_impossible_size_or_misaligned_rings_is_a_fault() {
    let cases = [
        (0x18, 2, 0, "size 0 is not a power of two from 1 to 8"),
        (0x18, 2, 6, "size 6 is not"),
        (0x18, 2, 16, "size 16 is not"),
        (0x20, 4, 8, "the descriptor table at 0x8 is not aligned to 16 bytes"),
        (0x28, 4, 1, "the available ring at 0x1 is not aligned to 2 bytes"),
        (0x30, 4, 2, "the used ring at 0x2 is not aligned to 4 bytes"),
    ];
    for (register, width, value, message) in cases {
        let mut guest = Guest::new();
        let device = guest.find(RNG);
        device.set_status(&mut guest, 3);
        device.set_features(&mut guest, VERSION_1);
        device.set_status(&mut guest, 11);
        guest.platform.pio_write(device.common + register, width, value);
        guest.platform.pio_write(device.common + 0x1C, 2, 1);
        let Some(MachineEnd::DeviceFault { reason, .. }) = guest.platform.end() else { panic!("{message}") };
        assert!(reason.starts_with("queue 0: ") && reason.contains(message), "{reason}");
    }
}

#[test]
fn an_enabled_queue_stays_as_it_is_until_the_device_is_reset() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    device.initialize(&mut guest, VERSION_1);
    let read = |guest: &mut Guest, register| guest.platform.pio_read(device.common + register, 4);
    let at = read(&mut guest, 0x20);
    guest.platform.pio_write(device.common + 0x20, 4, 0x5000);
    assert_eq!(read(&mut guest, 0x20), at);
    device.set_status(&mut guest, 0);
    assert_eq!((read(&mut guest, 0x20), device.status(&mut guest)), (0, 0));
}

#[test]
fn the_bars_are_reached_through_the_pci_access_capability() {
    let mut guest = Guest::new();
    let device = guest.find(VSOCK);
    let mut capability = u64::from(guest.read_config(device.slot, 0x34, 1));
    while guest.read_config(device.slot, capability + 3, 1) != 5
        || guest.read_config(device.slot, capability, 1) != 9
    {
        capability = u64::from(guest.read_config(device.slot, capability + 1, 1));
        assert_ne!(capability, 0);
    }
    let mut access = |bar, offset, length, write: Option<u32>| {
        guest.write_config(device.slot, capability + 4, 1, bar);
        guest.write_config(device.slot, capability + 8, 4, offset);
        guest.write_config(device.slot, capability + 12, 4, length);
        match write {
            Some(value) => {
                guest.write_config(device.slot, capability + 16, 4, value);
                0
            }
            None => guest.read_config(device.slot, capability + 16, 4),
        }
    };
    assert_eq!(access(0, DEVICE, 4, None), 3, "the guest's context id");
    assert_eq!(access(0, 0x12, 2, None), 3, "three queues");
    access(0, 0x14, 1, Some(1));
    access(1, 8, 4, Some(0x77));
    assert_eq!(access(1, 8, 4, None), 0x77);
    assert_eq!(access(0, 0x14, 1, None), 1, "the status written before");
    for (bar, offset, length) in
        [(0, 1, 4), (0, 256, 4), (2, 0, 4), (0, 0, 3), (0, 0, 0), (1, u32::MAX - 3, 4)]
    {
        access(0, 0, 4, Some(0));
        access(bar, offset, length, Some(u32::MAX));
    }
    assert_eq!(device.status(&mut guest), 1);
}

#[test]
fn a_masked_vector_is_pending_in_the_table_until_it_is_unmasked() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    let mut queues = device.initialize(&mut guest, VERSION_1);
    let control = GuestPhysAddr(device.msix_table + 16 + 12);
    guest.platform.mmio_write(control, 4, 1);
    let at = guest.allocate(16);
    queues[0].add(&mut guest, &[(at, 16, true)]);
    device.notify(&mut guest, &queues[0]);
    assert!(guest.interrupts().is_empty());
    let pending = GuestPhysAddr(device.msix_table + u64::from(MSIX_PENDING));
    assert_eq!(guest.platform.mmio_read(pending, 8), 2);
    guest.platform.mmio_write(control, 4, 0);
    assert_eq!(guest.interrupts().len(), 1);
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    let mut queues = device.initialize(&mut guest, VERSION_1);
    let at = guest.allocate(16);
    guest.ram.write(GuestPhysAddr(queues[0].avail()), &[1, 0]).unwrap();
    queues[0].add(&mut guest, &[(at, 16, true)]);
    device.notify(&mut guest, &queues[0]);
    assert!(queues[0].take_used(&guest.ram).is_some() && guest.interrupts().is_empty());
}

#[test]
fn fields_read_at_another_width_than_their_own_are_zero() {
    let mut guest = Guest::new();
    let device = guest.find(RNG);
    device.set_status(&mut guest, 3);
    assert_eq!(guest.platform.pio_read(device.common + 0x14, 2), 0);
    guest.platform.pio_write(device.common + 0x14, 4, 0);
    assert_eq!(device.status(&mut guest), 3);
}
