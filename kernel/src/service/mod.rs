//! The node's I/O: uplink, HTTP and the job engine, polled by the main loop.
//!
//! Arrows: [`http_server`] carries bytes between [`uplink`]'s sockets and nestling-api; [`engine`] joins
//! nestling-api's job store to the hypervisor through [`machines`]. Nothing here waits; [`Service::poll`]
//! does what can be done now and says when it wants to be called next.

#![forbid(unsafe_code)]

mod engine;
pub mod entropy;
mod fleet;
mod http_server;
mod images;
pub mod machines;
mod network;
mod node;
mod settings;
mod templates;
mod uplink;

use alloc::boxed::Box;
use alloc::string::String;

use nestling_api::{Api, ApiConfig, Clock, Limits};

use crate::boot::BootInfo;
use crate::cpu::clock;
use crate::drivers::nic::Nic;
use crate::memory::frames::{FramePool, SMALL_FRAME};
use crate::storage::Storage;
use engine::Engine;
use entropy::RandomSource;
use http_server::HttpServer;
use images::Catalog;
use machines::Machines;
use network::MachineNetwork;
use node::NodeView;
use settings::Settings;
use uplink::{Said, Uplink};

/// Between two rounds that nothing but a deadline asks for.
const LEAST_PAUSE_NS: u64 = 500_000;
const MIB: usize = 1 << 20;
/// What the API may keep, fitted to a heap of 48 MiB that also holds sockets (6 MiB), what connections read and
/// send (6 MiB), network buffers (1 MiB), a request while it is answered and page tables.
const LIMITS: Limits = Limits {
    body_bytes: MIB,
    bodies_total_bytes: 4 * MIB,
    answers_total_bytes: 4 * MIB,
    queued_jobs: 1000,
    completed_jobs: 200,
    jobs_total_bytes: 8 * MIB,
    workspace_bytes: 4 << 30,
    log_bytes: 4 * MIB,
    logs_total_bytes: 12 * MIB,
};

/// Everything the node does besides running machines.
pub struct Service<Id, T> {
    name: String,
    api: Api,
    catalog: Catalog,
    random: RandomSource,
    network: Network,
    machine_network: MachineNetwork<Id>,
    engine: Engine<Id, T>,
    ready_ns: Option<u64>,
    /// When anything but machines' frames has to be looked at, in nanoseconds since boot.
    due: Option<u64>,
}

/// The network interface and who listens on it.
struct Network {
    uplink: Uplink,
    server: HttpServer,
}

/// The images of a node and what is wrong with others, from its boot modules and from its disk. Kernels and initramfses from the disk are kept in memory that is taken out of
/// `frames`, at most a quarter of it.
pub fn find_images(modules: &[&'static [u8]], storage: &mut Storage, frames: &mut FramePool) -> Catalog {
    let mut catalog = Catalog::default();
    for (index, module) in modules.iter().enumerate() {
        catalog.add_module(index, module);
    }
    if storage.has_disk() {
        let mut left = frames.counts().1 as u64 * SMALL_FRAME / 4;
        catalog.add_disk(storage, &mut |bytes| {
            left = left.checked_sub(bytes)?;
            frames.carve(bytes)
        });
    }
    catalog.problems.iter().for_each(|problem| log::warn!("{problem}"));
    if catalog.images.is_empty() {
        log::warn!(
            "no image to boot machines from: give one as boot module (QEMU: -initrd target/images/minimal.tar) or on a disk"
        );
    }
    for image in &catalog.images {
        log::info!("image {} {}, {} KiB", image.name, image.version, image.bytes() / 1024);
    }
    catalog
}

impl<Id: Copy, T: Copy + PartialEq> Service<Id, T> {
    /// Sets up the node's I/O.
    ///
    /// # Errors
    /// What is wrong with the command line, for the operator.
    pub fn new(
        boot: &BootInfo,
        nic: Box<dyn Nic>,
        mut random: RandomSource,
        catalog: Catalog,
    ) -> Result<Self, String> {
        let settings = Settings::read(&boot.command_line)?;
        if settings.token.is_none() {
            log::warn!("auth=off: everybody who reaches this node may run jobs on it");
        }
        let seed = random.number();
        let said = Said { dns_servers: settings.dns_servers, mtu: settings.mtu };
        let mut uplink = Uplink::new(nic, settings.addressing, said, settings.port, seed, clock::now_ns());
        let server = HttpServer::new(settings.port, &mut uplink.sockets);
        let network = Network { uplink, server };
        Ok(Self {
            name: settings.name,
            api: Api::new(ApiConfig { token: settings.token, limits: LIMITS }),
            catalog,
            machine_network: MachineNetwork::new(random.seed()),
            engine: Engine::new(settings.templates, random.fork()),
            random,
            network,
            ready_ns: None,
            due: None,
        })
    }

    /// Does all there is to do now; without `has_news`, machines have had nothing for it but frames. Returns when to call again at the
    /// latest, in nanoseconds since boot; interrupts and machines that want something are reasons to call earlier.
    pub fn poll<M: Machines<Id = Id, Template = T>>(
        &mut self,
        machines: &mut M,
        has_news: bool,
    ) -> Option<u64> {
        let now = Clock { monotonic_ns: clock::now_ns(), unix_ns: clock::unix_ns() };
        let ns = now.monotonic_ns;
        let Network { uplink, server } = &mut self.network;
        let machine_network = &mut self.machine_network;
        let is_spoken_to = uplink.receive(
            ns,
            |frame, nic| machine_network.receive(frame, nic, ns),
            |sockets| server.listen(sockets, ns),
        );
        let (configuration, nic) = uplink.parts();
        machine_network.follow(configuration, nic, ns);
        // Most rounds only carry machines' frames, and a round trip waits for two of them.
        if has_news || is_spoken_to || self.due.is_some_and(|due| ns >= due) {
            self.serve(machines, now);
        } else {
            machine_network.carry(uplink.parts().1, machines, &mut self.api.jobs, now);
        }
        // Everything due now was done: what still says so waits for somebody else, and machines must get
        // their turn.
        let soonest = clock::now_ns().saturating_add(LEAST_PAUSE_NS);
        let machine_network = self.machine_network.deadline(ns);
        self.due.into_iter().chain(machine_network).min().map(|deadline| deadline.max(soonest))
    }

    /// Jobs, their agents, and the API's clients.
    fn serve<M: Machines<Id = Id, Template = T>>(&mut self, machines: &mut M, now: Clock) {
        let Network { uplink, server } = &mut self.network;
        let machine_network = &mut self.machine_network;
        let ns = now.monotonic_ns;
        if self.ready_ns.is_none() && uplink.is_up() && !self.catalog.images.is_empty() {
            self.ready_ns = Some(ns);
            log::info!("ready {}.{:03} ms after the kernel's entry", ns / 1_000_000, ns / 1000 % 1000);
        }
        // Output comes first, so that whoever follows it gets it in this round.
        self.engine.poll(&mut self.api.jobs, &self.catalog.images, machines, machine_network, now);
        machine_network.carry(uplink.parts().1, machines, &mut self.api.jobs, now);
        let mut node = NodeView {
            name: &self.name,
            images: &self.catalog.images,
            image_problems: &self.catalog.problems,
            uplink: uplink.describe(),
            machines: &*machines,
            templates: self.engine.templates(machines),
            running: self.engine.running(),
            ready_ns: self.ready_ns,
            random: &mut self.random,
        };
        server.poll(&mut uplink.sockets, &mut self.api, &mut node, now);
        uplink.transmit(ns);
        // What clients just asked for starts at once: a new job, a cancel, an agent held back by a reader of
        // its log.
        self.engine.poll(&mut self.api.jobs, &self.catalog.images, machines, machine_network, now);
        let network = self.network.deadline(ns);
        let jobs = self.api.jobs.deadline(now).into_iter().chain(self.engine.deadline(now)).min();
        self.due = network.into_iter().chain(jobs).min();
    }
}

impl Network {
    fn deadline(&mut self, now: u64) -> Option<u64> {
        let uplink = self.uplink.deadline(now);
        uplink.into_iter().chain(self.server.deadline()).min()
    }
}
