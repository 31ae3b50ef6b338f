//! What a machine's processor does, by bare guests of one behaviour each, the same on every vendor.
//!
//! Every guest is an image of one bundle beside `minimal`, so that a node boots once and runs each as a job. The bed is named by
//! `NESTLING_BED`. What is expected comes from the manuals: Intel SDM, AMD APM.

mod bad_guests;
mod control_registers;
mod cpuid;
mod deliveries;
mod exceptions;
mod instructions;
mod interrupts;
mod mmio;
mod mmio_modify;
mod modes;
mod msrs;
mod nmi;
mod ports;
mod several_vcpus;
mod state;
mod timer;

use nestling::bed::{BedBuilder, RunningBed};
use nestling::client::types::Job;
use nestling_tests::bare::{self, Facts, Program};
use nestling_tests::guest::bundle;
use nestling_tests::node::{Shared, any_bed};
use std::path::PathBuf;

/// The guests of all files.
const GUESTS: &[&[(&str, Program)]] = &[
    bad_guests::GUESTS,
    control_registers::GUESTS,
    cpuid::GUESTS,
    deliveries::GUESTS,
    exceptions::GUESTS,
    instructions::GUESTS,
    interrupts::GUESTS,
    mmio::GUESTS,
    mmio_modify::GUESTS,
    modes::GUESTS,
    msrs::GUESTS,
    nmi::GUESTS,
    ports::GUESTS,
    several_vcpus::GUESTS,
    state::GUESTS,
    timer::GUESTS,
];

/// The node that runs them.
static NODE: Shared = Shared::new(node_with_guests);

fn node_with_guests() -> BedBuilder {
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    let guests =
        GUESTS.iter().copied().flatten().map(|(name, program)| (image(name), bare::image(name, *program)));
    let guests: Vec<(String, Vec<u8>)> = guests.collect();
    let guests: Vec<(&str, Vec<u8>)> =
        guests.iter().map(|(name, image)| (name.as_str(), image.clone())).collect();
    any_bed().image(bundle(&bundle_path(), &minimal, &guests))
}

/// Where the bundle is until the node has read it.
fn bundle_path() -> PathBuf {
    std::env::temp_dir().join(format!("nestling-conformance-{}.tar", std::process::id()))
}

/// The name of a guest's image.
fn image(name: &str) -> String {
    format!("conformance-{name}")
}

/// The node of this binary's tests.
fn node() -> &'static RunningBed {
    let node = NODE.get();
    let _ = std::fs::remove_file(bundle_path());
    node
}

/// Whether the processor is QEMU's emulation, which checks neither reserved bits of CR4 nor that an address in an MSR is canonical, and does
/// not intercept XSETBV, among others. A test that accepts that says so.
fn is_emulated_by_qemu() -> bool {
    std::env::var("NESTLING_BED").map_or(true, |bed| bed.is_empty() || bed.starts_with("qemu-tcg"))
}

/// Whether the processor is Bochs' emulation of SVM. A test that accepts its peculiarities says which.
fn is_svm_in_bochs() -> bool {
    let models = ["ryzen", "phenom_8650_toliman", "zambezi", "trinity_apu"];
    std::env::var("NESTLING_BED")
        .is_ok_and(|bed| bed.strip_prefix("bochs:").is_some_and(|model| models.contains(&model)))
}

/// Runs a guest, however it ends.
fn run_to_any_end(name: &str) -> Facts {
    let node = node();
    bare::finish(node, &bare::start(node, &image(name)))
}

/// Starts a guest on a machine of several vCPUs.
fn start_with(name: &str, vcpus: u32) -> Job {
    bare::start_with(node(), &image(name), vcpus)
}

/// What a started guest had reported when it ended, however it ended.
fn finish(started: &Job) -> Facts {
    bare::finish(node(), started)
}

/// Runs a guest to its proper end.
#[track_caller]
fn run(name: &str) -> Facts {
    bare::run(node(), &image(name))
}
