//! What holds on every bed and every vendor: `NESTLING_BED` chooses where these tests run.
//!
//! The expectations stand here once. That each bed meets them is what makes the beds equal. One node serves all tests: in Bochs a boot takes
//! longer than they do.

mod job;
mod smoke;

use nestling::bed::{BedBuilder, RunningBed};
use nestling_tests::guest::bundle;
use nestling_tests::node::{Shared, any_bed};
use std::path::PathBuf;

static NODE: Shared = Shared::new(builder);

fn builder() -> BedBuilder {
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    any_bed().image(bundle(&bundle_path(), &minimal, &smoke::guests()))
}

/// Where the images are until the node has read them.
fn bundle_path() -> PathBuf {
    std::env::temp_dir().join(format!("nestling-vendors-{}.tar", std::process::id()))
}

/// The node of this binary's tests.
fn node() -> &'static RunningBed {
    let node = NODE.get();
    let _ = std::fs::remove_file(bundle_path());
    node
}
