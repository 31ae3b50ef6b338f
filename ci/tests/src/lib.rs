//! Helpers of the booting tests.
