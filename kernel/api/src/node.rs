//! What the API asks of the node it speaks for.

use alloc::string::String;
use alloc::vec::Vec;

use crate::jobs::request::LargestMachine;
use crate::types::{Host, Image, Template};

/// The node behind the API. The kernel's service implements it; tests have one of their own.
pub trait Node {
    /// Whether jobs can run: the network is up and an image is there.
    fn ready(&self) -> bool;
    /// The node's version, as Cargo has it.
    fn version(&self) -> &str;
    /// Everything `GET /v1/host` reports.
    fn host(&self) -> Host;
    /// The images machines can boot.
    fn images(&self) -> Vec<Image>;
    /// What kept other images from being there, for people.
    fn image_problems(&self) -> Vec<String>;
    /// The templates of machines.
    fn templates(&self) -> Vec<Template>;
    /// What a machine can ever get here.
    fn largest_machine(&self) -> LargestMachine;
    /// Fills `into` with unpredictable bytes, for identifiers.
    fn random(&mut self, into: &mut [u8]);
}
