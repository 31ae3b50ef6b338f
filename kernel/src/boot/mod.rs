//! From the boot loader to Rust: entry in 64-bit mode, and what the loader says of the machine.
//!
//! One file serves two protocols: PVH (QEMU's `-kernel`, Firecracker) and Multiboot2 (GRUB, from disk or CD). Each
//! fills a [`BootInfo`]; nothing after this module knows which one it was.

mod command_line;
mod entry;
mod info;
mod multiboot2;
mod pvh;

pub use command_line::CommandLine;
pub use info::{BootInfo, MemoryKind, MemoryRange};
