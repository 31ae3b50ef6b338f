//! What tests of several modules share: machines that are none, with an agent that a test speaks for, and a
//! cable between two uplinks.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use std::cell::RefCell;
use std::rc::Rc;

use nestling_api::Clock;
use nestling_api::agent::AgentMessage;
use nestling_api::jobs::{JobId, JobStore, MachineEnd, MachineReport, request};
use nestling_api::types::{self, HostMemory, JobRequest, StepRequest, Vendor};
use nestling_machine::platform::{Accepts, Offload};

use super::images::Image;
use super::machines::{
    AgentLink, CreateError, HypervisorReport, MachineSpec, Machines, NetworkLink, TemplateFigures,
};
use super::uplink::{Addressing, Said, Uplink};
use crate::drivers::nic::Nic;

/// So many milliseconds after boot.
pub fn at(ms: u64) -> Clock {
    Clock { monotonic_ns: ms * 1_000_000, unix_ns: 1_800_000_000_000_000_000 + ms * 1_000_000 }
}

/// An image that nobody boots.
pub fn image(name: &str) -> Image {
    Image {
        name: name.into(),
        version: "1".into(),
        kernel: b"kernel",
        initramfs: b"initramfs",
        command_line: "quiet".into(),
        sha256: BTreeMap::new(),
        disk: None,
    }
}

/// A job of one step in a store.
pub fn queue_job(jobs: &mut JobStore, number: u8) -> JobId {
    let steps = vec![StepRequest { run: "true".into(), ..StepRequest::default() }];
    let request = JobRequest { steps, ..JobRequest::default() };
    let images = [types::Image { name: "minimal".into(), ..types::Image::default() }];
    let plan =
        request::plan(request, &images, request::LargestMachine { memory_mib: 1024, vcpus: 4 }).unwrap();
    let id = JobId::parse(&format!("{number:032x}")).unwrap();
    jobs.create(id, plan, None, at(0)).unwrap().id()
}

/// An agent's side of a conversation.
#[derive(Clone, Default)]
pub struct FakeAgent {
    pub connected: bool,
    pub finished: bool,
    pub to_node: Vec<u8>,
    pub from_node: Vec<u8>,
}

impl FakeAgent {
    /// Sends a message to the node.
    pub fn say(&mut self, message: &AgentMessage) {
        self.connected = true;
        self.to_node.extend(message.encode().unwrap());
    }
}

impl AgentLink for FakeAgent {
    fn has_connected(&self) -> bool {
        self.connected
    }

    fn has_finished(&self) -> bool {
        self.finished
    }

    fn readable(&self) -> usize {
        self.to_node.len()
    }

    fn receive(&mut self, into: &mut [u8]) -> usize {
        let count = into.len().min(self.to_node.len());
        for (to, from) in into.iter_mut().zip(self.to_node.drain(..count)) {
            *to = from;
        }
        count
    }

    fn send(&mut self, from: &[u8]) -> usize {
        self.from_node.extend(from);
        from.len()
    }
}

/// A machine's end of its cable: what the node gives, and what a test has the machine send.
pub struct FakeNetwork {
    pub to_node: VecDeque<(Vec<u8>, Offload)>,
    pub from_node: Vec<(Vec<u8>, Offload)>,
    /// Frames that [`NetworkLink::give_frame`] still takes.
    pub room: usize,
    pub accepts: Accepts,
}

impl Default for FakeNetwork {
    fn default() -> Self {
        let accepts = Accepts { csum: true, tso4: true };
        Self { to_node: VecDeque::new(), from_node: Vec::new(), room: usize::MAX, accepts }
    }
}

impl NetworkLink for FakeNetwork {
    fn has_frame(&self) -> bool {
        !self.to_node.is_empty()
    }

    fn take_frame(&mut self, into: &mut Vec<u8>) -> Option<Offload> {
        let (frame, offload) = self.to_node.pop_front()?;
        *into = frame;
        Some(offload)
    }

    fn give_frame(&mut self, frame: &[u8], offload: Offload) -> bool {
        if self.room == 0 {
            return false;
        }
        self.room -= 1;
        self.from_node.push((frame.to_vec(), offload));
        true
    }

    fn accepts(&self) -> Accepts {
        self.accepts
    }
}

/// Machines that do nothing by themselves.
pub struct FakeMachines {
    /// Those that exist, by their number.
    pub alive: BTreeMap<u32, FakeAgent>,
    /// The cables of those that have a network card.
    pub networks: BTreeMap<u32, FakeNetwork>,
    /// The agents of machines that were frozen, by the template's number.
    pub templates: BTreeMap<u32, FakeAgent>,
    /// Of which template a machine is a clone.
    pub clones: BTreeMap<u32, u32>,
    /// Machines cannot be frozen for this reason.
    pub unrest: Option<&'static str>,
    /// Their vCPUs have something to do.
    pub busy: bool,
    /// How the machine with a number ended by itself.
    pub ended: BTreeMap<u32, MachineEnd>,
    /// The answer to the next creation, if it is to fail.
    pub refuse: Option<CreateError>,
    /// Machines ever made.
    pub made: u32,
    /// Machines that may exist at once.
    pub limit: usize,
}

impl Default for FakeMachines {
    fn default() -> Self {
        Self {
            alive: BTreeMap::new(),
            networks: BTreeMap::new(),
            templates: BTreeMap::new(),
            clones: BTreeMap::new(),
            unrest: None,
            busy: false,
            ended: BTreeMap::new(),
            refuse: None,
            made: 0,
            limit: 1,
        }
    }
}

impl Machines for FakeMachines {
    type Id = u32;
    type Template = u32;

    fn create(&mut self, spec: &MachineSpec<'_>) -> Result<u32, CreateError> {
        if let Some(error) = &self.refuse {
            return Err(error.clone());
        }
        self.made += 1;
        self.alive.insert(self.made, FakeAgent::default());
        if spec.network.is_some() {
            self.networks.insert(self.made, FakeNetwork::default());
        }
        Ok(self.made)
    }

    fn is_idle(&self, _: u32) -> bool {
        !self.busy
    }

    fn fits_beside_template(&self, _: u32) -> bool {
        true
    }

    fn freeze(&mut self, id: u32) -> Result<u32, &'static str> {
        if let Some(reason) = self.unrest {
            return Err(reason);
        }
        let agent = self.alive.remove(&id).ok_or("there is no such machine")?;
        self.networks.remove(&id);
        self.templates.insert(id, agent);
        Ok(id)
    }

    fn clone_template(&mut self, template: u32) -> Result<u32, CreateError> {
        if let Some(error) = &self.refuse {
            return Err(error.clone());
        }
        self.made += 1;
        self.alive.insert(self.made, self.templates[&template].clone());
        self.networks.insert(self.made, FakeNetwork::default());
        self.clones.insert(self.made, template);
        Ok(self.made)
    }

    fn drop_template(&mut self, template: u32) {
        assert!(self.templates.remove(&template).is_some(), "template {template} was dropped twice");
    }

    fn template_figures(&self, template: u32) -> Option<TemplateFigures> {
        let alive = self.clones.values().filter(|of| **of == template).count() as u64;
        let figures = TemplateFigures { clones_alive: alive, shared_bytes: 60, ..TemplateFigures::default() };
        self.templates.contains_key(&template).then_some(figures)
    }

    fn template_budget_bytes(&self) -> u64 {
        100
    }

    fn with_agent<R>(&mut self, id: u32, work: impl FnOnce(&mut dyn AgentLink) -> R) -> Option<R> {
        self.alive.get_mut(&id).map(|agent| work(agent))
    }

    fn with_network<R>(&mut self, id: u32, work: impl FnOnce(&mut dyn NetworkLink) -> R) -> Option<R> {
        self.networks.get_mut(&id).map(|network| work(network))
    }

    fn ended(&self, id: u32) -> Option<MachineEnd> {
        self.ended.get(&id).cloned()
    }

    fn figures(&self, _: u32) -> (BTreeMap<String, u64>, Option<u64>) {
        ([(String::from("cpuid"), 3)].into(), Some(64))
    }

    fn destroy(&mut self, id: u32) -> MachineReport {
        assert!(self.alive.remove(&id).is_some(), "machine {id} was destroyed twice");
        self.networks.remove(&id);
        self.clones.remove(&id);
        let end = self.ended.remove(&id).unwrap_or(MachineEnd::Destroyed);
        let (exits, peak_mib) = self.figures(id);
        MachineReport { end, console_tail: "the last line".into(), exits, peak_mib, disk_problem: None }
    }

    fn limit(&self) -> usize {
        self.limit
    }

    fn max_mem_size_mib(&self) -> u32 {
        1024
    }

    fn max_vcpu_count(&self) -> u32 {
        4
    }

    fn report(&self) -> HypervisorReport {
        HypervisorReport {
            vendor: Vendor::Amd,
            features: BTreeMap::new(),
            cores: 1,
            memory: HostMemory::default(),
            exits: BTreeMap::new(),
            vmcs_accesses: None,
            tsc_khz: 1_000_000,
        }
    }
}

/// Frames on their way in one direction.
pub type Wire = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of a cable.
pub struct CableEnd {
    pub mac: u8,
    pub incoming: Wire,
    pub outgoing: Wire,
    /// Frames the end takes before [`Nic::can_transmit`] says no, until the other end has received some.
    pub queue: usize,
}

impl Nic for CableEnd {
    fn driver(&self) -> &'static str {
        "cable"
    }

    fn mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, 0, self.mac]
    }

    fn receive(&mut self, into: &mut [u8]) -> Option<usize> {
        let frame = self.incoming.borrow_mut().pop_front()?;
        into.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }

    fn transmit_room(&mut self) -> usize {
        self.queue.saturating_sub(self.outgoing.borrow().len())
    }

    fn transmit(&mut self, frame: &[u8]) -> bool {
        let room = self.can_transmit();
        if room {
            self.outgoing.borrow_mut().push_back(frame.to_vec());
        }
        room
    }

    fn take_interrupt(&mut self) -> bool {
        false
    }

    fn has_interrupt(&self) -> bool {
        true
    }
}

/// Two uplinks, 10.0.0.1 and 10.0.0.2, and the wires between them: frames to the first, frames to the second.
pub fn connected_uplinks(queue: usize) -> (Uplink, Uplink, Wire, Wire) {
    let (to_first, to_second) = (Wire::default(), Wire::default());
    let end = |mac, incoming: &Wire, outgoing: &Wire| {
        let nic = CableEnd { mac, incoming: Rc::clone(incoming), outgoing: Rc::clone(outgoing), queue };
        let ip = alloc::format!("10.0.0.{mac}/24");
        Uplink::new(
            Box::new(nic),
            Addressing::parse(Some(&ip), None).unwrap(),
            Said::default(),
            80,
            u64::from(mac),
            0,
        )
    };
    (end(1, &to_first, &to_second), end(2, &to_second, &to_first), to_first, to_second)
}
