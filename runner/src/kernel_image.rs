//! The kernel this binary carries.

use std::fs;
use std::io;
use std::path::Path;

/// The kernel's ELF, as build.rs built it or `NESTLING_KERNEL` gave it at build time.
pub static ELF: &[u8] = include_bytes!(env!("NESTLING_KERNEL_ELF"));

/// Writes the kernel to `path`, where a virtual machine monitor can load it.
///
/// # Errors
/// Those of writing a file.
pub fn write(path: &Path) -> io::Result<()> {
    fs::write(path, ELF)
}
