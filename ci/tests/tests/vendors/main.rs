//! What holds on every bed and every vendor: `NESTLING_BED` chooses where these tests run.
//!
//! The expectations stand here once. That each bed meets them is what makes the beds equal. One node serves all tests: in Bochs a boot takes
//! longer than they do.

mod disk;
mod files;
mod job;
mod network;
mod smoke;

use nestling::bed::{BedBuilder, BedKind, RunningBed};
use nestling_tests::guest::bundle;
use nestling_tests::node::{Shared, any_bed, bed_kind};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use tar::{Archive, Builder};

static NODE: Shared = Shared::new(builder);

fn builder() -> BedBuilder {
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    let images = bundle(&bundle_path(), &minimal, &smoke::guests());
    let images = nestling_tests::disk::bundle(&images, &images, &nestling_tests::disk::file_system(8, 2), 16);
    // Bochs 2.7's phenom offers POPCNT and refuses to execute it: Linux must not believe it there, nested or not.
    if bed_kind() == (BedKind::Bochs { model: "phenom_8650_toliman".to_owned() }) {
        add_to_command_line(&images, "clearcpuid=151");
    }
    any_bed().image(images)
}

/// Adds words to the kernel command line of the image `minimal` in a bundle.
fn add_to_command_line(images: &Path, words: &str) {
    let bytes = fs::read(images).unwrap();
    let mut bundle = Builder::new(Vec::new());
    for member in Archive::new(bytes.as_slice()).entries().unwrap() {
        let mut member = member.unwrap();
        let (mut header, name) = (member.header().clone(), member.path().unwrap().into_owned());
        let mut contents = Vec::new();
        member.read_to_end(&mut contents).unwrap();
        if name == Path::new("minimal/image.json") {
            let mut image: serde_json::Value = serde_json::from_slice(&contents).unwrap();
            image["cmdline"] = format!("{} {words}", image["cmdline"].as_str().unwrap()).into();
            contents = image.to_string().into_bytes();
            header.set_size(contents.len() as u64);
        }
        bundle.append_data(&mut header, name, contents.as_slice()).unwrap();
    }
    fs::write(images, bundle.into_inner().unwrap()).unwrap();
}

/// Where the images are until the node has read them.
fn bundle_path() -> PathBuf {
    std::env::temp_dir().join(format!("nestling-vendors-{}.tar", std::process::id()))
}

/// The node of this binary's tests.
fn node() -> &'static RunningBed {
    let _bundle = Bundle;
    NODE.get()
}

/// The file with the images, which goes when the node has read it or has failed to.
struct Bundle;

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_file(bundle_path());
    }
}
