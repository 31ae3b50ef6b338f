//! Builds the images that machines boot, and keeps stores of them.
//!
//! A root file system comes as an archive, a folder or an OCI image ([`build::Source`]), becomes a [`Tree`] in memory, is completed
//! ([`root`]), written as ext4 ([`ext4`]), and put into a bundle with a kernel and the agent ([`build`], [`bundle`]). Bundles go into a
//! store ([`store`]), which nodes read.

#![forbid(unsafe_code)]

mod archive;
pub mod build;
pub mod bundle;
mod content;
pub mod cpio;
pub mod directory;
pub mod ext4;
pub mod kernel;
pub mod modules;
pub mod oci;
pub mod packages;
pub mod process;
pub mod root;
pub mod store;
mod tree;

#[cfg(test)]
mod testing;

pub use content::Content;
pub use tree::{Kind, Node, NodeId, Tree};

use sha2::{Digest, Sha256};

/// SHA-256 of bytes, hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
