//! Host tests of what the kernel makes of a boot loader's information. The kernel's files are taken in by path.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

#[path = "../../../kernel/src/boot"]
mod boot {
    mod command_line;
    mod info;
    pub mod multiboot2;

    pub use command_line::CommandLine;
    pub use info::{BootInfo, MemoryKind, MemoryRange};
}

#[path = "../../../kernel/src/memory"]
mod memory {
    pub mod frames;
    pub mod map;
}

use boot::multiboot2::{Information, Multiboot2Error, parse, read};
use boot::{MemoryKind, MemoryRange};
use memory::map::free_ranges;
use multiboot2::{BootInformation, LoadError, MAGIC};

const MIB: u64 = 1 << 20;
const COMMAND_LINE: u32 = 1;
const MODULE: u32 = 3;
const MEMORY_MAP: u32 = 6;
const ELF_SECTIONS: u32 = 9;
const ACPI_OLD: u32 = 14;
const ACPI_NEW: u32 = 15;

/// A boot information as a loader builds it, 8-byte aligned.
struct Structure(Vec<u64>);

impl Structure {
    fn new(tags: &[(u32, Vec<u8>)]) -> Self {
        let mut bytes = vec![0; 8];
        for (kind, body) in tags.iter().chain([&(0, Vec::new())]) {
            bytes.extend(kind.to_le_bytes());
            bytes.extend((8 + body.len() as u32).to_le_bytes());
            bytes.extend(body);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        Self(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect())
    }

    fn load(&self) -> Result<BootInformation<'_>, LoadError> {
        assert!(self.0[0] as u32 as usize <= self.0.len() * 8, "the crate would read past the structure");
        // SAFETY: as long as its first word says, and borrowed for as long as the result lives.
        unsafe { BootInformation::load(self.0.as_ptr().cast()) }
    }

    fn parse(&self) -> Result<Information, Multiboot2Error> {
        parse(&self.load().map_err(Multiboot2Error::Damaged)?)
    }
}

fn memory_map(areas: &[(u64, u64, u32)]) -> (u32, Vec<u8>) {
    let mut body = [24_u32.to_le_bytes(), 0_u32.to_le_bytes()].concat();
    for (start, bytes, kind) in areas {
        body.extend(start.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        body.extend(u64::from(*kind).to_le_bytes());
    }
    (MEMORY_MAP, body)
}

fn module(start: u32, end: u32) -> (u32, Vec<u8>) {
    (MODULE, [&start.to_le_bytes()[..], &end.to_le_bytes(), b"image\0"].concat())
}

fn a_machine() -> (u32, Vec<u8>) {
    memory_map(&[(0, 0x9_f000, 1), (0xf_0000, 0x1_0000, 2), (MIB, 511 * MIB, 1), (512 * MIB, MIB, 3)])
}

const fn usable(start: u64, end: u64) -> MemoryRange {
    MemoryRange { start, end, kind: MemoryKind::Usable }
}

const fn firmware(start: u64, end: u64) -> MemoryRange {
    MemoryRange { start, end, kind: MemoryKind::Firmware }
}

#[test]
fn all_that_a_loader_tells_is_copied() {
    let old: Vec<u8> = (0..20).collect();
    let new: Vec<u8> = (100..136).collect();
    let structure = Structure::new(&[
        (COMMAND_LINE, b"token=abc name=n1\0".to_vec()),
        (ACPI_NEW, new.clone()),
        module(0x80_0000, 0x90_0001),
        (0x4321, vec![1, 2, 3]),
        a_machine(),
        module(0x40_0000, 0x50_0000),
        (ACPI_OLD, old.clone()),
    ]);
    let found = structure.parse().unwrap();
    assert_eq!(found.command_line, "token=abc name=n1");
    assert_eq!(found.modules, [0x80_0000..0x90_0001, 0x40_0000..0x50_0000]);
    let memory = [
        usable(0, 0x9_f000),
        firmware(0xf_0000, MIB),
        usable(MIB, 512 * MIB),
        firmware(512 * MIB, 513 * MIB),
    ];
    assert_eq!(found.memory, memory);
    assert_eq!(found.rsdp, Some(new), "the newer root pointer is preferred");
    assert_eq!(Structure::new(&[a_machine(), (ACPI_OLD, old.clone())]).parse().unwrap().rsdp, Some(old));
}

#[test]
fn without_memory_the_kernel_is_not_started() {
    let without = Structure::new(&[(COMMAND_LINE, b"a\0".to_vec()), module(MIB as u32, 2 * MIB as u32)]);
    assert_eq!(without.parse(), Err(Multiboot2Error::NoMemoryMap));
    let only_firmware = Structure::new(&[memory_map(&[(0, MIB, 2)])]);
    assert_eq!(only_firmware.parse(), Err(Multiboot2Error::NoMemoryMap));
    let empty = Structure::new(&[memory_map(&[(0, 0, 1), (u64::MAX, 2, 1)])]);
    assert_eq!(empty.parse(), Err(Multiboot2Error::NoMemoryMap));
}

#[test]
fn another_loaders_magic_is_named_and_nothing_is_read() {
    // SAFETY: with a wrong magic the address is not looked at.
    let error = unsafe { read(0x2bad_b002, 0) }.unwrap_err();
    assert_eq!(error, Multiboot2Error::Magic(0x2bad_b002));
    assert!(error.to_string().contains("0x2badb002"), "{error}");
    // SAFETY: the crate refuses address zero.
    assert!(matches!(unsafe { read(MAGIC, 0) }, Err(Multiboot2Error::Damaged(_))));
}

#[test]
fn a_structure_that_ends_early_is_refused_wherever_it_does() {
    let whole = Structure::new(&[(COMMAND_LINE, b"token=abc\0".to_vec()), module(1, 2), a_machine()]);
    for words in 1..whole.0.len() {
        let mut part = Structure(whole.0[..words].to_vec());
        part.0[0] = words as u64 * 8;
        assert!(matches!(part.parse(), Err(Multiboot2Error::Damaged(_))), "{words} words");
    }
}

#[test]
fn tags_of_wrong_sizes_are_passed_over() {
    let odd = |kind, bytes| (kind, vec![0xff; bytes]);
    for bytes in 0..60 {
        let tags = [
            odd(COMMAND_LINE, bytes),
            odd(MODULE, bytes),
            odd(MEMORY_MAP, bytes),
            odd(ELF_SECTIONS, bytes),
            odd(ACPI_OLD, bytes),
            odd(ACPI_NEW, bytes),
        ];
        let found = Structure::new(&tags).parse();
        assert_eq!(found, Err(Multiboot2Error::NoMemoryMap), "{bytes} bytes");
        let found = Structure::new(&[&tags[..], &[a_machine()]].concat()).parse().unwrap();
        assert_eq!((found.command_line.as_str(), found.modules.len()), ("", 0), "{bytes} bytes");
        // A longer one of the new form is a later version, whose first 36 bytes mean the same.
        let length = match bytes {
            36.. => Some(36),
            20 => Some(20),
            _ => None,
        };
        assert_eq!(found.rsdp.map(|pointer| pointer.len()), length, "{bytes} bytes");
    }
}

#[test]
fn modules_that_lie_in_no_memory_are_left_out_and_overlapping_ones_are_not() {
    let found = Structure::new(&[
        module(0x40_0000, 0x50_0000),
        module(0x48_0000, 0x58_0000),
        module(0x50_0000, 0x50_0000),
        module(0x50_0000, 0x40_0000),
        module(0xf_0000, 0xf_8000),
        module((512 * MIB) as u32 - 1, (512 * MIB) as u32 + 1),
        module(0xffff_0000, 0xffff_ffff),
        a_machine(),
    ])
    .parse()
    .unwrap();
    assert_eq!(found.modules, [0x40_0000..0x50_0000, 0x48_0000..0x58_0000]);
}

#[test]
fn what_is_occupied_never_becomes_free_and_the_rest_does() {
    let memory = [usable(0, 0x9_f000), usable(MIB, 64 * MIB), firmware(62 * MIB, 63 * MIB)];
    let modules = [5 * MIB..9 * MIB, 8 * MIB..8 * MIB + 1, 7 * MIB..7 * MIB, 9 * MIB..10 * MIB + 1];
    let occupied = [0..MIB, 2 * MIB..4 * MIB].into_iter().chain(modules);
    assert_eq!(free_ranges(&memory, occupied), [(12 * MIB, 62 * MIB)]);
}

#[test]
fn maps_that_overlap_give_each_frame_once() {
    let memory = [usable(0, 8 * MIB), usable(4 * MIB, 12 * MIB), usable(6 * MIB, 10 * MIB)];
    assert_eq!(free_ranges(&memory, []), [(0, 8 * MIB), (8 * MIB, 12 * MIB)]);
    let to_the_end = [usable(u64::MAX - MIB, u64::MAX)];
    assert_eq!(free_ranges(&to_the_end, []), []);
}
