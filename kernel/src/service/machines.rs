//! What the job engine needs of the hypervisor.

#![forbid(unsafe_code)]

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use nestling_api::jobs::{MachineEnd, MachineReport};
use nestling_api::types::{HostMemory, Vendor, WaitingFor};
use nestling_machine::platform::{Accepts, NetworkConfig, Offload};
use nestling_storage::volume::Base;

pub use crate::hypervisor::TemplateFigures;

/// What a machine is made from.
#[derive(Debug, Clone, Copy)]
pub struct MachineSpec<'a> {
    /// The kernel, a bzImage.
    pub kernel: &'a [u8],
    /// The initramfs.
    pub initramfs: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Memory in MiB.
    pub mem_size_mib: u32,
    /// Virtual processors.
    pub vcpu_count: u32,
    /// Its network card, if it has one.
    pub network: Option<NetworkConfig>,
    /// Its disk, if it has one.
    pub disk: Option<DiskSpec>,
}

/// What a machine's disk is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpec {
    /// What it holds at first.
    pub base: Base,
    /// Free space behind that, in MiB.
    pub free_mib: u32,
    /// The job asked for this much itself: memory for all of it is set aside.
    pub asked_for: bool,
}

/// Why there is no machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateError {
    /// Not now: other machines have what this one needs.
    Busy(WaitingFor),
    /// Never: what is wrong with the image or the size, for people.
    Impossible(String),
}

/// What `GET /v1/host` tells of the processor and the machines on it.
#[derive(Debug, Clone)]
pub struct HypervisorReport {
    /// Whose virtualization extensions are in use.
    pub vendor: Vendor,
    /// Processor features that are looked for, and whether they are there.
    pub features: BTreeMap<String, bool>,
    /// Cores in use.
    pub cores: u32,
    /// Memory of the node.
    pub memory: HostMemory,
    /// Exits of all machines since boot, by kind; the sum is added as `total`.
    pub exits: BTreeMap<String, u64>,
    /// Accesses to control blocks that those exits took, where they are instructions rather than plain memory.
    pub vmcs_accesses: Option<u64>,
    /// The time-stamp counter's frequency in kHz.
    pub tsc_khz: u64,
}

/// The node's end of the conversation with the agent in a machine. Bytes move when the machine runs next.
pub trait AgentLink {
    /// The agent has connected; it may have hung up since.
    fn has_connected(&self) -> bool;

    /// The agent will send nothing more than what is [`AgentLink::readable`].
    fn has_finished(&self) -> bool;

    /// Bytes that [`AgentLink::receive`] can give.
    fn readable(&self) -> usize;

    /// Takes received bytes; returns how many.
    fn receive(&mut self, into: &mut [u8]) -> usize;

    /// Queues bytes for the agent; returns how many were taken.
    fn send(&mut self, from: &[u8]) -> usize;
}

/// The node's end of the cable to a machine's network card. Frames move when the machine runs next.
pub trait NetworkLink {
    /// Whether [`NetworkLink::take_frame`] has a frame.
    fn has_frame(&self) -> bool;

    /// Takes the machine's oldest frame in place of what `into` held. `None` when there is none.
    fn take_frame(&mut self, into: &mut Vec<u8>) -> Option<Offload>;

    /// Queues a frame for the machine. False when there is no room for it now; frames that the machine cannot take are dropped.
    fn give_frame(&mut self, frame: &[u8], offload: Offload) -> bool;

    /// What may be left to do to frames for the machine.
    fn accepts(&self) -> Accepts;
}

/// The machines of a node. They run between the calls of [`super::Service::poll`].
pub trait Machines {
    /// Names a machine that exists.
    type Id: Copy;
    /// Names a template that exists.
    type Template: Copy + PartialEq;

    /// Builds a machine and lets it run.
    ///
    /// # Errors
    /// [`CreateError`].
    fn create(&mut self, spec: &MachineSpec<'_>) -> Result<Self::Id, CreateError>;

    /// Whether the machine may be frozen now: all it would lose is time.
    fn is_idle(&self, id: Self::Id) -> bool;

    /// Whether there is room for a clone of the machine besides what stays of it when it is frozen.
    fn fits_beside_template(&self, id: Self::Id) -> bool;

    /// Makes a template of the machine, which is no more then.
    ///
    /// # Errors
    /// Why it cannot be frozen now: it goes on as it was.
    fn freeze(&mut self, id: Self::Id) -> Result<Self::Template, &'static str>;

    /// Makes a clone of a template and lets it run.
    ///
    /// # Errors
    /// [`CreateError::Busy`].
    fn clone_template(&mut self, template: Self::Template) -> Result<Self::Id, CreateError>;

    /// Gives a template up.
    fn drop_template(&mut self, template: Self::Template);

    /// What a template costs and has brought.
    fn template_figures(&self, template: Self::Template) -> Option<TemplateFigures>;

    /// The most memory that templates should take, in bytes.
    fn template_budget_bytes(&self) -> u64;

    /// Lets `work` talk with the machine's agent, while no vCPU uses the machine's devices. Afterwards the devices have taken what was
    /// sent, and the guest is told. `None` when there is no such machine (any more).
    fn with_agent<R>(&mut self, id: Self::Id, work: impl FnOnce(&mut dyn AgentLink) -> R) -> Option<R>;

    /// Lets `work` use the cable to the machine's network card, as [`Machines::with_agent`] does. `None` when the machine has none, or there
    /// is no such machine (any more).
    fn with_network<R>(&mut self, id: Self::Id, work: impl FnOnce(&mut dyn NetworkLink) -> R) -> Option<R>;

    /// Whether and how the machine has ended.
    fn ended(&self, id: Self::Id) -> Option<MachineEnd>;

    /// Exits of the machine so far by kind, and the most MiB of memory it had at once.
    fn figures(&self, id: Self::Id) -> (BTreeMap<String, u64>, Option<u64>);

    /// Ends the machine, gives back all its memory, and tells what is known of it. The report's end is
    /// [`MachineEnd::Destroyed`] for a machine that was still running.
    fn destroy(&mut self, id: Self::Id) -> MachineReport;

    /// Machines that may exist at once.
    fn limit(&self) -> usize;

    /// The largest machine this node can ever have, in MiB.
    fn max_mem_size_mib(&self) -> u32;

    /// The most vCPUs a machine of this node can ever have.
    fn max_vcpu_count(&self) -> u32;

    /// Facts for `GET /v1/host`.
    fn report(&self) -> HypervisorReport;
}
