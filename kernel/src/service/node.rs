//! The node as its API sees it.

#![forbid(unsafe_code)]

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use nestling_api::Node;
use nestling_api::jobs::request::LargestMachine;
use nestling_api::types::{self, BootTimes, Host};
use nestling_machine::platform::Entropy;

use super::entropy::RandomSource;
use super::images::Image;
use super::machines::Machines;
use crate::cpu::clock;

/// The version of this kernel, which is the node's.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the API is told, gathered for one call of it.
pub struct NodeView<'a, M> {
    /// The node's name.
    pub name: &'a str,
    /// Its images.
    pub images: &'a [Image],
    /// What is wrong with others.
    pub image_problems: &'a [String],
    /// Its network.
    pub uplink: types::Uplink,
    /// The hypervisor.
    pub machines: &'a M,
    /// Its templates.
    pub templates: Vec<types::Template>,
    /// Jobs that have a machine.
    pub running: usize,
    /// Nanoseconds from the kernel's entry until it was ready, if it is.
    pub ready_ns: Option<u64>,
    /// Random bytes.
    pub random: &'a mut RandomSource,
}

impl<M: Machines> Node for NodeView<'_, M> {
    fn ready(&self) -> bool {
        self.ready_ns.is_some()
    }

    fn version(&self) -> &str {
        VERSION
    }

    fn host(&self) -> Host {
        let report = self.machines.report();
        let mut exits = report.exits;
        let total = exits.values().fold(0_u64, |sum, count| sum.saturating_add(*count));
        exits.entry(String::from("total")).or_insert(total);
        Host {
            name: self.name.to_string(),
            version: VERSION.to_string(),
            vendor: report.vendor,
            features: report.features,
            cores: report.cores,
            memory: report.memory,
            machines: u32::try_from(self.running).unwrap_or(u32::MAX),
            uptime_ms: clock::now_ns() / 1_000_000,
            boot: BootTimes { kernel_entry_to_ready_ms: self.ready_ns.map(|ns| (ns / 1000) as f64 / 1000.0) },
            exits,
            vmcs_accesses: report.vmcs_accesses,
            uplink: Some(self.uplink.clone()),
            tsc_khz: report.tsc_khz,
        }
    }

    fn image_problems(&self) -> Vec<String> {
        self.image_problems.to_vec()
    }

    fn images(&self) -> Vec<types::Image> {
        self.images.iter().map(Image::describe).collect()
    }

    fn templates(&self) -> Vec<types::Template> {
        self.templates.clone()
    }

    fn largest_machine(&self) -> LargestMachine {
        LargestMachine { memory_mib: self.machines.max_mem_size_mib(), vcpus: self.machines.max_vcpu_count() }
    }

    fn random(&mut self, into: &mut [u8]) {
        self.random.fill(into);
    }
}
