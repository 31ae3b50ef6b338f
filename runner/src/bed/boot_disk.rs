//! A boot disk: GRUB, the kernel and the bundle of images on a CD (ISO 9660, El Torito without emulation).
//!
//! Read first: GRUB's manual, "multiboot2" and "module2"; Multiboot2 Specification 2.0. Bochs' BIOS loads nothing else than a disk.
//!
//! Everything GRUB needs is in one image of its own: a full GRUB with menu, fonts and modules in files takes seconds to start where every
//! instruction is emulated. Making the disk takes a fraction of a second, so none is kept.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{BedError, Machine};

/// The disk's name in a node's directory.
pub(crate) const FILE: &str = "boot.iso";
/// The directory beside it that has what goes on it.
pub(crate) const TREE: &str = "boot";

/// GRUB's parts for a BIOS, in Debian's package grub-pc-bin.
const GRUB: &str = "/usr/lib/grub/i386-pc";
/// What GRUB is made of: the BIOS' disks, the file system, the protocol and its `boot`.
const MODULES: [&str; 4] = ["biosdisk", "iso9660", "multiboot2", "boot"];

/// Writes the disk into the machine's directory.
pub(super) fn write(machine: &Machine) -> Result<(), BedError> {
    if !Path::new(GRUB).join("multiboot2.mod").is_file() {
        return Err(BedError::NoBochs("GRUB for a BIOS".to_owned()));
    }
    lay_out(machine).map_err(BedError::Files)?;
    let tree = machine.dir.join(TREE);
    let core = tree.join("grub.img");
    run(
        "grub-mkimage",
        Command::new("grub-mkimage")
            .args(["-O", "i386-pc", "-d", GRUB, "-p", "/", "-c"])
            .arg(tree.join("grub.cfg"))
            .arg("-o")
            .arg(&core)
            .args(MODULES),
    )?;
    let boot = || -> io::Result<()> {
        let start = fs::read(Path::new(GRUB).join("cdboot.img"))?;
        fs::write(tree.join("disk/eltorito.img"), [start, fs::read(&core)?].concat())
    };
    boot().map_err(BedError::Files)?;
    run(
        "xorriso",
        Command::new("xorriso")
            .args([
                "-as",
                "mkisofs",
                "-quiet",
                "-f",
                "-b",
                "eltorito.img",
                "-no-emul-boot",
                "-boot-load-size",
                "4",
            ])
            .args(["-boot-info-table", "--grub2-boot-info", "-o"])
            .arg(machine.dir.join(FILE))
            .arg(tree.join("disk")),
    )
}

/// The files that go on the disk, and GRUB's script.
fn lay_out(machine: &Machine) -> io::Result<()> {
    let tree = machine.dir.join(TREE);
    let disk = tree.join("disk");
    fs::create_dir_all(&disk)?;
    fs::write(disk.join("kernel"), without_sections(fs::read(&machine.kernel)?))?;
    if let Some(image) = &machine.image {
        symlink(image, disk.join("images"))?;
    }
    fs::write(tree.join("grub.cfg"), script(&machine.command_line, machine.image.is_some()))
}

/// What GRUB does: no menu, no pause. Its own words of the command line are quoted, since it expands `$`.
fn script(command_line: &str, image: bool) -> String {
    let words: String = command_line.split_whitespace().map(|word| format!(" '{word}'")).collect();
    let module = if image { "module2 /images images\n" } else { "" };
    format!("multiboot2 /kernel{words}\n{module}boot\n")
}

/// A 64-bit ELF without its section table and whatever no segment loads: GRUB loads debug sections too, and reading them takes seconds in
/// emulation. Anything else as it is.
fn without_sections(mut elf: Vec<u8>) -> Vec<u8> {
    if let Some(end) = end_of_segments(&elf) {
        elf.truncate(end);
        // e_shoff; e_shentsize, e_shnum, e_shstrndx.
        elf[0x28..0x30].fill(0);
        elf[0x3A..0x40].fill(0);
    }
    elf
}

/// Where the last byte that a program header speaks of ends; none when this is no sound 64-bit ELF.
fn end_of_segments(elf: &[u8]) -> Option<usize> {
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?)));
    let long = |at: usize| {
        usize::try_from(u64::from_le_bytes(elf.get(at..at.checked_add(8)?)?.try_into().ok()?)).ok()
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (long(0x20)?, half(0x36)?, half(0x38)?);
    let mut end = table.checked_add(size * count)?;
    for header in (0..count).map(|index| table + index * size) {
        end = end.max(long(header + 0x08)?.checked_add(long(header + 0x20)?)?);
    }
    (end >= 0x40 && end <= elf.len()).then_some(end)
}

/// Runs one of the tools; what it says is told when it fails.
fn run(program: &'static str, command: &mut Command) -> Result<(), BedError> {
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BedError::NoBochs(program.to_owned()));
        }
        Err(error) => return Err(BedError::Files(error)),
    };
    if output.status.success() {
        return Ok(());
    }
    Err(BedError::Refused(program, String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Removes what [`write`] has written.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    gone(fs::remove_file(dir.join(FILE)))?;
    gone(fs::remove_dir_all(PathBuf::from(dir).join(TREE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_quotes_the_command_line_and_loads_what_there_is() {
        assert_eq!(
            script("token=00ff  log=$x", true),
            "multiboot2 /kernel 'token=00ff' 'log=$x'\nmodule2 /images images\nboot\n"
        );
        assert_eq!(script("", false), "multiboot2 /kernel\nboot\n");
    }

    #[test]
    fn the_kernel_loses_its_sections_and_nothing_that_is_loaded() {
        let elf = crate::kernel_image::ELF.to_vec();
        let stripped = without_sections(elf.clone());
        assert!(stripped.len() < elf.len());
        assert_eq!(stripped[..0x28], elf[..0x28]);
        assert_eq!(stripped[0x40..], elf[0x40..stripped.len()]);
        assert_eq!(end_of_segments(&stripped), Some(stripped.len()));
        // The Multiboot2 header (magic number, then architecture 0) is where GRUB looks for it.
        let header = [&0xE852_50D6_u32.to_le_bytes()[..], &[0; 4]].concat();
        assert!(stripped[..32 << 10].chunks_exact(8).any(|words| words == header));
    }

    #[test]
    fn what_is_no_sound_elf_stays_as_it_is() {
        let elf = crate::kernel_image::ELF;
        for bytes in [b"".to_vec(), b"\x7fELF\x02\x01".to_vec(), elf[..0x50].to_vec(), elf[..0x1000].to_vec()]
        {
            assert_eq!(without_sections(bytes.clone()), bytes);
        }
    }
}
