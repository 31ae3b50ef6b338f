use super::testing::{Counting, MemoryDisk};
use super::*;
use crate::testing::Ram;
use alloc::vec;
use proptest::prelude::*;
use virtio::driver::Guest;

fn platform() -> Platform {
    let network = Some(NetworkConfig { mac: virtio::driver::MAC, mtu: virtio::driver::MTU });
    Platform::new(PlatformConfig { guest_cid: 3, network, disk: None })
}

#[test]
fn unknown_ports_and_addresses_read_all_ones_and_ignore_writes() {
    let mut platform = platform();
    for (width, ones) in [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)] {
        for port in [0x20, 0x60, 0x80, 0xCF8, 0xCFC, 0xFFFC] {
            platform.pio_write(port, width, 0);
            assert_eq!(platform.pio_read(port, width), ones, "port {port:#x}");
        }
        assert_eq!(platform.mmio_read(GuestPhysAddr(0xD000_0000), width), u64::from(ones));
    }
    assert_eq!(platform.mmio_read(GuestPhysAddr(u64::MAX), 8), u64::MAX);
    platform.mmio_write(GuestPhysAddr(u64::MAX), 8, 0);
    assert_eq!(platform.end(), None);
}

#[test]
fn the_bus_has_two_virtio_devices_and_nothing_else() {
    let mut guest = Guest::new();
    let found: alloc::vec::Vec<u32> =
        (0..32).map(|slot| guest.read_config(slot, 0, 4)).filter(|&id| id != u32::MAX).collect();
    assert_eq!(found, [0x1053_1AF4, 0x1044_1AF4]);
    let function_1 = GuestPhysAddr(layout::ECAM_BASE + (1 << 15) + 0x1000);
    assert_eq!(guest.platform.mmio_read(function_1, 4), 0xFFFF_FFFF, "no function but 0");
}

#[test]
fn bars_are_placed_apart_in_the_host_bridges_windows_with_decoders_off() {
    let mut guest = Guest::new();
    let mut seen = vec![];
    for slot in 1..3 {
        assert_eq!(guest.read_config(slot, 4, 2) & 3, 0);
        let (io, memory) = (guest.read_config(slot, 0x10, 4) & !3, guest.read_config(slot, 0x14, 4));
        assert!(io >= u32::from(layout::PCI_IO_BASE) && io % IO_BAR_BYTES == 0);
        assert!((layout::PCI_MMIO_BASE..layout::PCI_MMIO_END).contains(&memory.into()));
        assert!(!seen.contains(&io) && !seen.contains(&memory));
        seen.extend([io, memory]);
        assert_eq!(guest.platform.pio_read(io as u16, 4), u32::MAX, "the decoder is off");
    }
}

#[test]
fn ecam_is_read_by_bytes_words_dwords_and_quadwords() {
    let mut guest = Guest::new();
    let at = layout::ECAM_BASE + (1 << 15);
    let mut read = |offset, width| guest.platform.mmio_read(GuestPhysAddr(at + offset), width);
    assert_eq!((read(0, 1), read(2, 2), read(0, 4)), (0xF4, 0x1053, 0x1053_1AF4));
    assert_eq!(read(0, 8), 0x0010_0000_1053_1AF4);
    assert_eq!(read(0x100, 4), 0, "no extended capabilities");
}

/// What a guest reads from a page that shows configuration space as memory.
fn shown(platform: &Platform, slot: u64) -> Option<alloc::vec::Vec<u8>> {
    match platform.config_page(slot << 15) {
        ConfigPage::Bytes(bytes) => Some(bytes.to_vec()),
        ConfigPage::Nothing => Some(vec![0xFF; 256]),
        ConfigPage::HasEffects => None,
    }
}

#[test]
fn configuration_space_shown_as_memory_reads_like_the_registers_before_and_after_writes() {
    let mut guest = Guest::new();
    for slot in 0..4 {
        for writes in [&[][..], &[(0x04, 2, 7), (0x10, 4, u32::MAX), (0x3C, 1, 0x5A)]] {
            for &(register, width, value) in writes {
                let at = GuestPhysAddr(layout::ECAM_BASE + (slot << 15) + register);
                guest.platform.mmio_write(at, width, value.into());
            }
            let bytes = shown(&guest.platform, slot).unwrap();
            for (register, byte) in bytes.into_iter().enumerate() {
                assert_eq!(guest.read_config(slot, register as u64, 1), byte.into(), "{slot} {register:#x}");
            }
        }
    }
}

#[test]
fn configuration_space_is_not_shown_as_memory_while_its_window_to_the_bars_is_open() {
    let mut guest = Guest::new();
    let mut capability = guest.read_config(1, 0x34, 1);
    while guest.read_config(1, u64::from(capability) + 3, 1) != 5
        || guest.read_config(1, capability.into(), 1) != 9
    {
        capability = guest.read_config(1, u64::from(capability) + 1, 1);
        assert_ne!(capability, 0, "the device has a PCI configuration access capability");
    }
    assert!(shown(&guest.platform, 1).is_some());
    let length = GuestPhysAddr(layout::ECAM_BASE + (1 << 15) + u64::from(capability) + 12);
    guest.platform.mmio_write(length, 4, 4);
    assert_eq!(shown(&guest.platform, 1), None);
}

#[test]
fn the_serial_interrupt_goes_through_the_io_apic() {
    let mut platform = platform();
    for (index, value) in [(0x10, 0x34), (0x11, 0)] {
        platform.mmio_write(GuestPhysAddr(layout::IOAPIC_BASE), 4, index);
        platform.mmio_write(GuestPhysAddr(layout::IOAPIC_BASE + 0x10), 4, value);
    }
    platform.pio_write(layout::UART_PORT + 4, 1, 8);
    platform.pio_write(layout::UART_PORT + 1, 1, 2);
    let message = MsiMessage { address: 0xFEE0_0000, data: 0x34 };
    assert_eq!(platform.take_interrupt(), Some(message));
    assert_eq!(platform.take_interrupt(), None);
    assert_eq!(platform.pio_read(layout::UART_PORT + 2, 1), 2);
    platform.pio_write(layout::UART_PORT, 1, b'x'.into());
    assert_eq!(platform.take_interrupt(), Some(message));
}

#[test]
fn a_wide_port_access_is_one_access_a_byte() {
    let mut platform = platform();
    platform.pio_write(0x70, 2, 0x990A);
    assert_eq!(platform.pio_read(0x71, 1), 0x26, "CMOS status A: no update in progress");
    assert_eq!(platform.pio_read(0x71, 2), 0xFF26);
}

#[test]
fn the_first_end_is_the_one_that_counts() {
    let mut platform = platform();
    platform.pio_write(layout::ACPI_SLEEP_CONTROL_PORT, 1, 0x34);
    platform.pio_write(layout::ACPI_RESET_PORT, 1, 1);
    assert_eq!(platform.end(), Some(&MachineEnd::PowerOff));
}

#[test]
fn ends_say_what_happened() {
    let fault = MachineEnd::DeviceFault { device: "virtio-rng", reason: "queue 0: rubbish".into() };
    assert_eq!(alloc::format!("{fault}"), "virtio-rng stopped: queue 0: rubbish");
}

/// Something a guest does.
#[derive(Clone, Debug)]
enum Step {
    PortRead(u16, u8),
    PortWrite(u16, u8, u32),
    Read(u64, u8),
    Write(u64, u8, u64),
    Scribble(u64, alloc::vec::Vec<u8>),
    EndOfInterrupt(u8),
    Send(alloc::vec::Vec<u8>),
    Receive(usize),
    Shutdown,
    Give(alloc::vec::Vec<u8>),
    Take,
    Link(bool),
}

fn steps() -> impl Strategy<Value = alloc::vec::Vec<Step>> {
    let width = prop_oneof![Just(1_u8), Just(2), Just(4), Just(8), any::<u8>()];
    let port = prop_oneof![
        4 => 0xC100_u16..0xC400,
        1 => 0x3F8_u16..0x400,
        1 => any::<u16>(),
    ];
    let address = prop_oneof![
        4 => (0_u64..4, 0_u64..0x110).prop_map(|(slot, register)| layout::ECAM_BASE + (slot << 15) + register),
        2 => layout::PCI_MMIO_BASE..layout::PCI_MMIO_BASE + 0x4000,
        2 => layout::IOAPIC_BASE..layout::IOAPIC_BASE + 0x20,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![any::<u32>(), 0_u32..16, Just(u32::MAX)];
    let bytes = prop::collection::vec(prop_oneof![any::<u8>(), 0_u8..8], 0..64);
    let step = prop_oneof![
        2 => (port.clone(), width.clone()).prop_map(|(port, width)| Step::PortRead(port, width)),
        8 => (port, width.clone(), value.clone()).prop_map(|(port, width, value)| Step::PortWrite(port, width, value)),
        2 => (address.clone(), width.clone()).prop_map(|(at, width)| Step::Read(at, width)),
        4 => (address, width, value).prop_map(|(at, width, value)| Step::Write(at, width, value.into())),
        4 => (0_u64..0x4000, bytes.clone()).prop_map(|(at, bytes)| Step::Scribble(at, bytes)),
        1 => any::<u8>().prop_map(Step::EndOfInterrupt),
        1 => bytes.prop_map(Step::Send),
        1 => (0_usize..64).prop_map(Step::Receive),
        1 => Just(Step::Shutdown),
        1 => prop::collection::vec(any::<u8>(), 0..2000).prop_map(Step::Give),
        1 => Just(Step::Take),
        1 => any::<bool>().prop_map(Step::Link),
    ];
    prop::collection::vec(step, 0..200)
}

fn perform(platform: &mut Platform, ram: &mut Ram, step: &Step) {
    match *step {
        Step::PortRead(port, width) => drop(platform.pio_read(port, width)),
        Step::PortWrite(port, width, value) => platform.pio_write(port, width, value),
        Step::Read(at, width) => drop(platform.mmio_read(GuestPhysAddr(at), width)),
        Step::Write(at, width, value) => platform.mmio_write(GuestPhysAddr(at), width, value),
        Step::Scribble(at, ref bytes) => drop(ram.write(GuestPhysAddr(at), bytes)),
        Step::EndOfInterrupt(vector) => platform.end_of_interrupt(Vector(vector)),
        Step::Send(ref bytes) => drop(platform.vsock().send(bytes)),
        Step::Receive(length) => drop(platform.vsock().receive(&mut vec![0; length])),
        Step::Shutdown => platform.vsock().shutdown(),
        Step::Give(ref frame) => drop(platform.network().unwrap().give_frame(frame, Offload::default())),
        Step::Take => drop(platform.network().unwrap().take_frame(&mut vec![])),
        Step::Link(up) => platform.network().unwrap().set_link(up),
    }
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_panics_or_keeps_the_node_busy(steps in steps()) {
        let (mut platform, mut ram) = (platform(), Ram::new(0x4000));
        for slot in 1..4 {
            platform.mmio_write(GuestPhysAddr(layout::ECAM_BASE + (slot << 15) + 4), 2, 7);
        }
        for step in &steps {
            perform(&mut platform, &mut ram, step);
            for _ in 0..4 {
                let (mut entropy, mut disk) = (Counting::default(), MemoryDisk::new(0));
                platform.poll(&mut ram, &mut Host { entropy: &mut entropy, disk: &mut disk });
            }
            prop_assert!(!platform.needs_poll());
            prop_assert!(platform.vsock().readable() <= virtio::RECEIVE_BUFFER_BYTES);
        }
        while platform.take_interrupt().is_some() {}
    }

    #[test]
    fn rubbish_in_the_rings_of_a_running_device_panics_nowhere(
        id in prop_oneof![Just(0x1041_u16), Just(0x1044), Just(0x1053)],
        features in prop_oneof![Just(0_u64), Just(virtio::driver::EVENT_INDEX), Just(virtio::driver::INDIRECT), Just(u64::MAX)],
        scribbles in prop::collection::vec(
            (0_u64..3, prop_oneof![0_u64..0x100, 0x4000_u64..0x4020, 0x8000_u64..0x8020],
             prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(2), Just(4), Just(0x10), any::<u8>()], 1..64)),
            1..20,
        ),
    ) {
        let mut guest = Guest::with_network();
        let device = guest.find(id);
        let mut queues = device.initialize(&mut guest, features | virtio::driver::VERSION_1);
        guest.platform.vsock().send(b"never sent");
        let _ = guest.platform.network().unwrap().give_frame(&[0; 60], Offload::default());
        for (queue, offset, bytes) in scribbles {
            let index = queue as usize % queues.len();
            guest.ram.write(GuestPhysAddr(queues[index].at + offset), &bytes).unwrap();
            queues[index].make_available(&mut guest.ram, u16::from(bytes[0]));
            device.notify(&mut guest, &queues[index]);
            if let Some(MachineEnd::DeviceFault { reason, .. }) = guest.platform.end() {
                prop_assert!(reason.starts_with("queue "));
                prop_assert!(device.status(&mut guest) & 64 != 0);
                break;
            }
        }
    }

    #[test]
    fn any_bytes_as_a_kernel_are_refused_or_loaded(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let mut ram = Ram::new(1 << 20);
        let image = linux::LinuxImage { kernel: &bytes, initramfs: b"", command_line: "" };
        let _ = linux::load(&mut ram, &image, 64 << 20, 1);
    }
}
