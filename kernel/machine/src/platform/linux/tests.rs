use super::*;
use crate::testing::Ram;
use alloc::string::ToString;

const RAM_BYTES: u64 = 64 << 20;
const INIT_SIZE: u32 = 8 << 20;

/// A bzImage whose protected-mode part is `body`.
fn bz_image(body: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 3 * SECTOR];
    image[header::SETUP_SECTORS] = 2;
    put(&mut image, header::BOOT_FLAG, &header::BOOT_FLAG_VALUE.to_le_bytes());
    image[header::LENGTH] = 0x6A;
    put(&mut image, header::MAGIC, b"HdrS");
    put(&mut image, header::VERSION, &0x20F_u16.to_le_bytes());
    image[header::LOAD_FLAGS] = header::LOADED_HIGH;
    put(&mut image, header::INITRD_ADDRESS_MAX, &0x7FFF_FFFF_u32.to_le_bytes());
    put(&mut image, header::KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    image[header::RELOCATABLE] = 1;
    image[header::LOAD_FLAGS_64] = 0x7F;
    put(&mut image, header::COMMAND_LINE_SIZE, &2047_u32.to_le_bytes());
    put(&mut image, header::PREFERRED_ADDRESS, &layout::KERNEL.to_le_bytes());
    put(&mut image, header::INIT_SIZE, &INIT_SIZE.to_le_bytes());
    image.extend(body);
    image
}

fn load_it(kernel: &[u8], initramfs: &[u8], command_line: &str) -> (Ram, Result<VcpuState, BootError>) {
    let mut ram = Ram::new(RAM_BYTES as usize);
    let image = LinuxImage { kernel, initramfs, command_line };
    let result = load(&mut ram, &image, RAM_BYTES, 1);
    (ram, result)
}

#[test]
fn the_kernel_starts_at_its_64_bit_entry_with_rsi_at_the_boot_parameters() {
    let (ram, state) = load_it(&bz_image(&[0xAB; 1024]), b"initramfs", "quiet");
    let state = state.unwrap();
    assert_eq!(state.registers.rip, layout::KERNEL + 0x200);
    assert_eq!(state.registers.get(Gpr::Rsi), layout::BOOT_PARAMS);
    assert!(state.system.cs.is_long() && !state.system.cs.is_32_bit());
    assert_eq!(ram.0[layout::KERNEL as usize..][..1024], [0xAB; 1024]);
}

#[test]
fn boot_parameters_point_at_the_initramfs_command_line_and_acpi_tables() {
    let (ram, state) = load_it(&bz_image(&[0; 1024]), b"initramfs", "quiet init=/agent");
    state.unwrap();
    let at = |offset: usize| GuestPhysAddr(layout::BOOT_PARAMS + offset as u64);
    let initramfs = ram.read_u32(at(header::RAMDISK_IMAGE)).unwrap() as usize;
    assert_eq!(initramfs as u64, RAM_BYTES - PAGE);
    assert_eq!(&ram.0[initramfs..initramfs + 9], b"initramfs");
    assert_eq!(ram.read_u32(at(header::RAMDISK_SIZE)).unwrap(), 9);
    let line = ram.read_u32(at(header::COMMAND_LINE)).unwrap() as usize;
    let expected = alloc::format!("{PLATFORM_ARGUMENTS} quiet init=/agent\0");
    assert_eq!(&ram.0[line..line + expected.len()], expected.as_bytes());
    let rsdp = ram.read_u64(at(zero_page::ACPI_RSDP)).unwrap() as usize;
    assert_eq!(&ram.0[rsdp..rsdp + 8], b"RSD PTR ");
    assert_eq!(ram.read_u32(at(header::MAGIC)).unwrap(), header::MAGIC_VALUE, "the setup header is copied");
}

#[test]
fn the_page_tables_map_the_first_4_gib_to_themselves() {
    let (ram, state) = load_it(&bz_image(&[0; 1024]), b"", "");
    let root = state.unwrap().system.cr3;
    for address in [0_u64, 0x1234_5678, 0xFFFF_FFFF] {
        let mut table = root;
        for shift in [39, 30] {
            table = ram.read_u64(GuestPhysAddr(table + (address >> shift & 511) * 8)).unwrap();
            assert_eq!(table & 0xFFF, 3);
            table &= !0xFFF;
        }
        let entry = ram.read_u64(GuestPhysAddr(table + (address >> 21 & 511) * 8)).unwrap();
        assert_eq!(entry, address & !0x1F_FFFF | 0x83);
    }
}

#[test]
fn the_real_mode_reset_vector_resets_the_machine() {
    assert_eq!(u16::from_le_bytes([RESET_CODE[1], RESET_CODE[2]]), layout::ACPI_RESET_PORT);
    let (ram, state) = load_it(&bz_image(&[0; 1024]), b"", "");
    state.unwrap();
    assert_eq!(ram.0[RESET_VECTOR as usize..][..7], RESET_CODE);
}

#[test]
fn the_memory_map_leaves_out_the_legacy_hole_and_reserves_ecam() {
    let map = memory_map(5 << 30);
    assert_eq!(map[0], (0, 0xA_0000, e820::RAM));
    assert_eq!(map[1], (0xE_0000, 0x10_0000, e820::ACPI));
    assert_eq!(map[2], (0x10_0000, 0xC000_0000, e820::RAM));
    assert_eq!(map[3], (0xE000_0000, 0xE010_0000, e820::RESERVED));
    assert_eq!(map[4], (1 << 32, (1 << 32) + (2 << 30), e820::RAM));
    let ram: u64 = map.iter().filter(|range| range.2 == e820::RAM).map(|range| range.1 - range.0).sum();
    assert_eq!(ram, (5 << 30) - 0x6_0000);
    assert_eq!(memory_map(256 << 20).len(), 4, "no RAM above 4 GiB");
}

#[test]
fn kernels_that_cannot_boot_are_refused_with_the_reason() {
    let refused = |change: fn(&mut Vec<u8>)| {
        let mut kernel = bz_image(&[0; 1024]);
        change(&mut kernel);
        load_it(&kernel, b"", "").1.unwrap_err().to_string()
    };
    assert!(refused(|kernel| kernel.truncate(0)).contains("shorter than"));
    assert!(refused(|kernel| kernel[header::MAGIC] = 0).contains("not a bzImage"));
    assert!(refused(|kernel| kernel[header::BOOT_FLAG] = 0).contains("not a bzImage"));
    assert!(refused(|kernel| kernel[header::VERSION] = 0x0B).contains("older than 2.12"));
    assert!(refused(|kernel| kernel[header::LOAD_FLAGS_64] = 0).contains("64-bit entry"));
    assert!(refused(|kernel| kernel[header::LOAD_FLAGS] = 0).contains("zImage"));
    assert!(refused(|kernel| kernel.truncate(4 * SECTOR)).contains("protected-mode part"));
    assert!(refused(|kernel| kernel[header::LENGTH] = 0x10).contains("impossible length"));
    let fixed = |kernel: &mut Vec<u8>| {
        kernel[header::RELOCATABLE] = 0;
        kernel[header::PREFERRED_ADDRESS] = 1;
    };
    assert!(refused(fixed).contains("16 MiB"));
}

#[test]
fn a_machine_too_small_for_its_image_is_refused_with_what_it_needs() {
    let (_, result) = load_it(&bz_image(&[0; 1024]), &vec![0; 48 << 20], "");
    let message = result.unwrap_err().to_string();
    assert_eq!(
        message,
        "the machine has 64 MiB of memory, but the image needs 72 MiB to boot: raise mem_size_mib"
    );
}

#[test]
fn a_command_line_too_long_or_with_a_nul_is_refused() {
    let kernel = bz_image(&[0; 1024]);
    let long = "x".repeat(2047);
    assert!(matches!(load_it(&kernel, b"", &long).1, Err(BootError::CommandLineTooLong { limit: 2047, .. })));
    assert_eq!(load_it(&kernel, b"", "a\0b").1.unwrap_err(), BootError::CommandLineHasNul);
}

#[test]
fn the_number_of_vcpus_is_checked() {
    let mut ram = Ram::new(RAM_BYTES as usize);
    let kernel = bz_image(&[0; 1024]);
    let image = LinuxImage { kernel: &kernel, initramfs: b"", command_line: "" };
    for count in [0, 255, u32::MAX] {
        assert_eq!(load(&mut ram, &image, RAM_BYTES, count).unwrap_err(), BootError::VcpuCount(count));
    }
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let mut ram = Ram::new(1 << 20);
    let kernel = bz_image(&[0; 1024]);
    let image = LinuxImage { kernel: &kernel, initramfs: b"", command_line: "" };
    assert!(matches!(load(&mut ram, &image, RAM_BYTES, 1), Err(BootError::Memory(_))));
}
