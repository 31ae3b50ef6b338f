//! What all machines' disks share of the node's own.

use crate::cache::BlockCache;
use crate::scratch::Scratch;

/// The node's disk behind its cache, and the scratch partition on it.
#[derive(Debug)]
pub struct Backing {
    /// What was read from the disk.
    pub cache: BlockCache,
    /// Where overlays put what does not fit into memory, if there is such a place.
    pub scratch: Option<Scratch>,
}

impl Backing {
    /// The backing of a node without a disk.
    #[must_use]
    pub fn none() -> Self {
        Self { cache: BlockCache::new(0, []), scratch: None }
    }
}
