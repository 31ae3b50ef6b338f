//! Guests that are no Linux: a few instructions in the clothes of a bzImage, packed as images beside `minimal`.
//!
//! Linux, Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot Protocol"). A guest starts in 64-bit mode with the
//! first 4 GiB mapped to themselves and a small stack.

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use tar::{Archive, Builder, EntryType, Header};

/// Where the protected-mode part is loaded.
pub const LOAD: u64 = 0x100_0000;
/// The 64-bit entry point in the protected-mode part.
pub const ENTRY: usize = 0x200;
const SECTOR: usize = 512;

/// A bzImage that runs what `write` assembles.
///
/// # Panics
/// When the instructions do not assemble.
pub fn program(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).expect("64 bits are a mode");
    write(&mut assembler).expect("the guest's instructions assemble");
    let code = assembler.assemble(LOAD + ENTRY as u64).expect("the guest's instructions can be placed");
    kernel(&code)
}

/// A bzImage whose 64-bit entry point is `code`'s first byte.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    // One boot sector and one of setup, the least there is; then the protected-mode part, its first sector unused.
    let mut image = vec![0; 2 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]); // setup_sects
    put(0x1FE, &0xAA55_u16.to_le_bytes()); // boot_flag
    put(0x200, &[0xEB, 0x6A]); // jump over the header: its length
    put(0x202, b"HdrS");
    put(0x206, &0x20F_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x22C, &0x7FFF_FFFF_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &LOAD.to_le_bytes()); // pref_address
    put(0x260, &(1_u32 << 20).to_le_bytes()); // init_size
    image.resize(2 * SECTOR + ENTRY, 0);
    image.extend_from_slice(code);
    image.resize(image.len().next_multiple_of(SECTOR) + SECTOR, 0);
    image
}

/// Writes a bundle of the images in the file `minimal` and of these guests to `path`, and returns `path`.
///
/// # Panics
/// When a file cannot be read or written.
pub fn bundle(path: &Path, minimal: &Path, guests: &[(&str, Vec<u8>)]) -> PathBuf {
    let mut bundle = Builder::new(Vec::new());
    let bytes = fs::read(minimal).expect("the minimal image can be read");
    for member in Archive::new(bytes.as_slice()).entries().expect("the minimal image is a tar") {
        let mut member = member.expect("the minimal image is whole");
        let name = member.path().expect("a member has a path").display().to_string();
        let mut contents = Vec::new();
        member.read_to_end(&mut contents).expect("the minimal image is whole");
        append(&mut bundle, &name, &contents);
    }
    for (name, kernel) in guests {
        let description = serde_json::json!({
            "name": name, "version": "1", "kernel": "vmlinuz", "initramfs": "initramfs.cpio", "cmdline": "", "sha256": {},
        });
        append(&mut bundle, &format!("{name}/image.json"), description.to_string().as_bytes());
        append(&mut bundle, &format!("{name}/vmlinuz"), kernel);
        append(&mut bundle, &format!("{name}/initramfs.cpio"), &[0; SECTOR]);
    }
    fs::write(path, bundle.into_inner().expect("the bundle ends")).expect("the bundle can be written");
    path.to_owned()
}

fn append(bundle: &mut Builder<Vec<u8>>, name: &str, contents: &[u8]) {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(contents.len() as u64);
    bundle.append_data(&mut header, name, contents).expect("a member is appended");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_instruction_is_at_the_64_bit_entry_point() {
        let image = program(|guest| {
            guest.cli()?;
            guest.hlt()
        });
        assert_eq!(image[2 * SECTOR + ENTRY..][..2], [0xFA, 0xF4]);
    }
}
