//! What a machine's disk is made of: the image store it comes from, the cache of the node's disk, and the machine's own changes.
//!
//! Everything here is a plain state machine. Memory and the node's disk belong to the kernel: it carries out what [`cache`] wants
//! fetched and [`volume`] wants added, and calls again.
//!
//! [`volume`] is the disk a machine sees: a read-only base, from memory or through [`cache`], under an [`overlay`] of what the machine
//! has written, part of which may be on the [`scratch`] partition. [`partitions`] and [`archive`] find images on the node's disk.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod archive;
pub mod backing;
pub mod cache;
pub mod overlay;
pub mod partitions;
pub mod scratch;
pub mod source;
pub mod volume;

/// Bytes of a sector, the unit of a disk's positions and lengths.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of a block, the unit in which a machine's disk differs from its base.
pub const BLOCK_BYTES: usize = 4096;
