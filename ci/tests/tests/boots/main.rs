//! Tests that boot the real kernel in QEMU and send it real jobs.
//!
//! One binary, so that two tests run side by side on two cores; the tests of one theme share a node where they can.

mod api;
mod boot;
mod clones;
mod disk;
mod e1000;
mod exits;
mod files;
mod guest;
mod images;
mod jobs;
mod leak;
mod network;
mod several;
