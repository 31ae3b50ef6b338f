//! Helpers of the booting tests, which stand in `tests/boots`: nodes ([`node`]), jobs ([`job`]), HTTP byte by byte ([`http`]) and
//! guests that are no Linux ([`guest`], and [`bare`] for those of the conformance tests, in `tests/conformance`).

pub mod bare;
pub mod disk;
pub mod disk_image;
pub mod guest;
pub mod http;
pub mod job;
pub mod node;
pub mod outside;
