//! A limit on memory that many connections share.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that may be in use at once, over all holders.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    free: Arc<AtomicUsize>,
}

/// Bytes taken from a [`Budget`]; they go back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Budget,
    bytes: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        Self { free: Arc::new(AtomicUsize::new(bytes)) }
    }

    /// A share of nothing, to grow.
    pub(crate) fn share(&self) -> Share {
        Share { budget: self.clone(), bytes: 0 }
    }

    /// Takes `bytes`, or nothing at all when there are not as many left.
    pub(crate) fn take(&self, bytes: usize) -> Option<Share> {
        let mut share = self.share();
        share.grow(bytes).then_some(share)
    }

    #[cfg(test)]
    pub(crate) fn free(&self) -> usize {
        self.free.load(Ordering::Relaxed)
    }
}

impl Share {
    /// Takes `more` bytes on top; false, and nothing changed, when there are not as many left.
    pub(crate) fn grow(&mut self, more: usize) -> bool {
        let taken = self
            .budget
            .free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(more));
        if taken.is_ok() {
            self.bytes = self.bytes.saturating_add(more);
        }
        taken.is_ok()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.free.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_comes_back_on_drop() {
        let budget = Budget::new(10);
        let mut first = budget.take(4).unwrap();
        assert!(budget.take(7).is_none());
        assert!(first.grow(6));
        assert!(!first.grow(1));
        assert_eq!(budget.free(), 0);
        drop(first);
        assert_eq!(budget.free(), 10);
    }
}
