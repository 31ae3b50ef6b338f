//! One machine: what its vCPUs share, from creation to the return of every frame.

use super::backend::{Backend, TscOffset};
use super::config_space::ConfigSpace;
use super::disk::MachineDisk;
use super::node::{Call, Node};
use super::pages::{Change, Pages};
use super::ram::{RamView, Translations};
use super::template::Template;
use super::vcpu::{Activity, Place, VcpuCell};
use crate::cpu::clock;
use crate::memory::frames::{FramePool, LARGE_FRAME, PrivateFrame};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::memory::MemoryError;
use nestling_machine::platform::linux::{self, BootError, LinuxImage};
use nestling_machine::platform::{
    DiskConfig, Host, MachineEnd, NetworkConfig, Platform, PlatformConfig, VsockState,
};
use nestling_machine::vcpu::{HostCpuid, InterruptRouter, Vcpu, VcpuConfig};
use nestling_storage::volume::{Base, Volume};
use spin::{Mutex, Once};

/// The context id every guest has on its own vsock.
const GUEST_CID: u64 = 3;

/// Why a machine runs no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// By its devices: power-off, reset, or a broken queue.
    Platform(MachineEnd),
    /// A vCPU shut down after a triple fault.
    TripleFault,
    /// HLT with interrupts off on every vCPU that runs: nothing can wake one.
    Halted,
    /// An INIT from its only vCPU to itself: nothing can start it again.
    WaitsForStartUp,
    /// The node ran out of frames for its RAM.
    OutOfFrames,
    /// The node could not read what the machine's disk is made from.
    Disk(String),
    /// The guest did what the hypervisor does not support; the text says what.
    Unsupported(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Platform(end) => end.fmt(f),
            Self::TripleFault => f.write_str("the guest's CPU shut down after a triple fault"),
            Self::Halted => f.write_str("the guest's CPU halted with interrupts off and can never wake"),
            Self::WaitsForStartUp => {
                f.write_str("the guest's CPU sent itself an INIT and no other CPU can start it again")
            }
            Self::OutOfFrames => f.write_str("the node has no free memory left for the guest"),
            Self::Disk(reason) => write!(f, "the node could not read the image's disk: {reason}"),
            Self::Unsupported(what) => write!(f, "the guest did what nestling does not support: {what}"),
        }
    }
}

/// Why a machine could not be made.
#[derive(Debug)]
pub enum CreateError {
    /// The pool cannot back the machine.
    OutOfFrames,
    /// The image does not boot.
    Boot(BootError),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfFrames => f.write_str("the node has too little free memory for the machine"),
            Self::Boot(error) => error.fmt(f),
        }
    }
}

/// What the guest changes on its devices that the service may wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Progress {
    /// The vsock connection's state, bytes to take, and bytes that wait for room.
    vsock: (VsockState, usize, usize),
}

/// A machine's devices. Who has touched them settles what comes of it: see [`Machine::with_devices`].
pub struct Devices {
    pub(super) platform: Platform,
    pub(super) volume: Option<Volume<PrivateFrame>>,
    pub(super) config_space: ConfigSpace,
    /// What the service has seen of them.
    seen: Progress,
    /// Frames sent by the guest, for which the service was called.
    pub(super) frames_sent: u64,
}

impl Devices {
    /// Those of a clone. Whatever there is for the service, it has not seen.
    pub(super) const fn resumed(
        platform: Platform,
        volume: Option<Volume<PrivateFrame>>,
        config_space: ConfigSpace,
        frames_sent: u64,
    ) -> Self {
        let seen = Progress { vsock: (VsockState::Listening, 0, 0) };
        Self { platform, volume, config_space, seen, frames_sent }
    }

    fn progress(&mut self) -> Progress {
        let vsock = self.platform.vsock();
        Progress { vsock: (vsock.state(), vsock.readable(), vsock.unsent()) }
    }
}

/// What a machine gets of the node.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Its RAM in MiB, a multiple of 2.
    pub memory_mib: u32,
    /// How many vCPUs it has, at least 1.
    pub vcpu_count: u32,
    /// Its network card, if it has one.
    pub network: Option<NetworkConfig>,
    /// Its disk, if it has one.
    pub disk: Option<DiskSize>,
}

/// What a machine's disk is made from, and what it may grow to.
#[derive(Clone, Copy, Debug)]
pub struct DiskSize {
    /// What it holds at first.
    pub base: Base,
    /// Its size in bytes.
    pub bytes: u64,
    /// The most memory for what the machine changes, in bytes.
    pub overlay_bytes: u64,
    /// The most room on the scratch partition for what does not fit there, in bytes.
    pub scratch_bytes: u64,
}

/// A machine.
pub struct Machine<B: Backend> {
    pub(super) vcpus: Box<[VcpuCell<B>]>,
    pub(super) router: InterruptRouter,
    pub(super) pages: Pages<B::Entry>,
    pub(super) size: Size,
    devices: Mutex<Devices>,
    end: Once<End>,
    /// It has ended or is to be destroyed: no vCPU is entered again.
    is_over: AtomicBool,
    /// Nobody waits for its agent yet.
    is_booting: AtomicBool,
    /// See [`Self::has_work`].
    has_work: AtomicBool,
    /// vCPUs that only another vCPU can wake.
    stuck: AtomicUsize,
    /// What it is a clone of.
    template: Option<Arc<Template<B>>>,
}

/// What a machine that stopped leaves to its template.
pub struct Parts<B: Backend> {
    pub(super) vcpus: Box<[VcpuCell<B>]>,
    pub(super) router: InterruptRouter,
    pub(super) pages: Pages<B::Entry>,
    pub(super) size: Size,
    pub(super) devices: Devices,
}

/// A machine's RAM, as devices and emulation see it.
pub type MachineMemory<'a, B> = RamView<'a, <B as Backend>::Entry, Processors<'a, B>>;

/// The vCPUs of a machine, with what they may have cached of its translations.
pub struct Processors<'a, B: Backend> {
    machine: &'a Machine<B>,
    node: &'a Node<B>,
}

impl<B: Backend> Translations for Processors<'_, B> {
    fn drop_all(&self) {
        self.machine.drop_translations(self.node);
    }
}

impl<B: Backend> Machine<B> {
    /// Makes a machine and loads its kernel. `components` are the XSAVE components of the node. No vCPU is loaded on this core.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is kept then.
    pub fn new(
        node: &Node<B>,
        host: &HostCpuid,
        components: u64,
        image: &LinuxImage<'_>,
        size: &Size,
    ) -> Result<Self, CreateError> {
        let Size { memory_mib, vcpu_count, network, disk } = *size;
        let pool = &node.pool;
        let ram_bytes = u64::from(memory_mib) << 20;
        let Some(pages) = Pages::new(ram_bytes, pool) else { return Err(CreateError::OutOfFrames) };
        let mut memory = RamView { pages: &pages, pool, translations: () };
        let state = match linux::load(&mut memory, image, ram_bytes, vcpu_count) {
            Ok(state) => state,
            Err(error) => {
                // SAFETY: no vCPU and no clone was made of it.
                unsafe { pages.free(pool) };
                return Err(match error {
                    BootError::Memory(MemoryError::OutOfFrames) => CreateError::OutOfFrames,
                    other => CreateError::Boot(other),
                });
            }
        };
        // The same for all, so that their counters agree.
        let offset = TscOffset(clock::tsc().wrapping_neg());
        let tsc_khz = u32::try_from(clock::khz()).unwrap_or(u32::MAX);
        let vcpu = |id| {
            let mut vcpu = Vcpu::new(&VcpuConfig { id, vcpu_count, tsc_khz }, host);
            let (state, activity) = match id {
                0 => (state, Activity::Running),
                _ => (vcpu.init(), Activity::WaitsForStartUp),
            };
            let hardware = node.backend.vcpu(pages.root(), &state);
            VcpuCell::new(hardware, vcpu, offset, activity, components)
        };
        let vcpus: Box<[_]> = (0..vcpu_count).map(vcpu).collect();
        let mut devices = Devices {
            platform: Platform::new(PlatformConfig {
                guest_cid: GUEST_CID,
                network,
                disk: disk.map(|disk| DiskConfig {
                    bytes: disk.bytes,
                    queues: u16::try_from(vcpu_count).unwrap_or(u16::MAX),
                }),
            }),
            volume: disk
                .map(|disk| Volume::new(node.next_volume(), disk.base, disk.bytes, disk.overlay_bytes)),
            config_space: ConfigSpace::new(),
            seen: Progress { vsock: (VsockState::Listening, 0, 0) },
            frames_sent: 0,
        };
        devices.seen = devices.progress();
        let mut machine = Self {
            stuck: AtomicUsize::new(vcpus.len().saturating_sub(1)),
            vcpus,
            router: InterruptRouter::new(vcpu_count),
            pages,
            size: *size,
            devices: Mutex::new(devices),
            end: Once::new(),
            is_over: AtomicBool::new(false),
            is_booting: AtomicBool::new(true),
            has_work: AtomicBool::new(false),
            template: None,
        };
        if machine.map_config_space(pool) {
            Ok(machine)
        } else {
            machine.free(node);
            Err(CreateError::OutOfFrames)
        }
    }

    /// A clone.
    pub(super) fn resumed(
        vcpus: Box<[VcpuCell<B>]>,
        router: InterruptRouter,
        pages: Pages<B::Entry>,
        size: Size,
        devices: Devices,
        stuck: usize,
        template: Arc<Template<B>>,
    ) -> Self {
        Self {
            vcpus,
            router,
            pages,
            size,
            devices: Mutex::new(devices),
            end: Once::new(),
            is_over: AtomicBool::new(false),
            is_booting: AtomicBool::new(false),
            has_work: AtomicBool::new(false),
            stuck: AtomicUsize::new(stuck),
            template: Some(template),
        }
    }

    /// What it is made of, and what it is a clone of. No core has any of its vCPUs.
    pub(super) fn into_parts(self) -> (Parts<B>, Option<Arc<Template<B>>>) {
        let Self { vcpus, router, pages, size, devices, template, .. } = self;
        (Parts { vcpus, router, pages, size, devices: devices.into_inner() }, template)
    }

    /// What it is a clone of.
    pub fn template(&self) -> Option<&Arc<Template<B>>> {
        self.template.as_ref()
    }

    /// Why it cannot be frozen now, if it cannot.
    pub fn unrest(&self) -> Option<&'static str> {
        let devices = self.devices.lock();
        let volume = devices.volume.as_ref().and_then(Volume::unrest);
        devices.platform.unrest().or(volume)
    }

    /// Whether all its vCPUs wait for something.
    pub fn is_idle(&self) -> bool {
        self.vcpus.iter().all(|cell| cell.place() == Place::Resting)
    }

    /// It was stopped, has not ended and goes on. No core has any of its vCPUs.
    pub fn resume(&self) {
        self.is_over.store(false, Ordering::SeqCst);
    }

    fn map_config_space(&mut self, pool: &FramePool) -> bool {
        let Devices { platform, config_space, .. } = self.devices.get_mut();
        config_space.map(platform, &self.pages, pool)
    }

    /// Gives every frame back. No core has any of its vCPUs.
    pub fn free(self, node: &Node<B>) {
        let pool = &node.pool;
        drop(self.vcpus);
        if let Some(template) = &self.template {
            template.learn(self.pages.copied_pages() as u64, self.pages.take_record());
        }
        let Devices { config_space, volume, .. } = self.devices.into_inner();
        config_space.free(pool);
        // SAFETY: the vCPUs are gone, and only a template has clones.
        unsafe { self.pages.free(pool) };
        if let Some(volume) = volume {
            let slabs = volume.into_slabs(&mut node.storage.lock().backing);
            slabs.for_each(|slab| pool.free_large(slab.into_frame()));
        }
        // Last: until here its pages led to the template's.
        drop(self.template);
    }

    /// Bytes of memory that are its own: RAM, nested page tables, and the changes on its disk.
    pub fn memory_bytes(&self) -> u64 {
        let slabs = self.devices.lock().volume.as_ref().map_or(0, Volume::slabs);
        self.pages.private_bytes() + slabs as u64 * LARGE_FRAME
    }

    /// What went wrong with its disk for want of memory.
    pub fn disk_problem(&self) -> Option<String> {
        self.devices.lock().volume.as_ref().and_then(Volume::problem)
    }

    /// RAM as devices and emulation see it.
    pub(super) fn memory<'a>(&'a self, node: &'a Node<B>) -> MachineMemory<'a, B> {
        RamView { pages: &self.pages, pool: &node.pool, translations: Processors { machine: self, node } }
    }

    /// Lets `work` use the devices, and settles what comes of it: queues are worked on, interrupts go to their vCPUs, an end is noticed.
    /// True when the service has not seen all that is there for it.
    pub(super) fn with_devices<R>(&self, node: &Node<B>, work: impl FnOnce(&mut Devices) -> R) -> (R, bool) {
        let mut devices = self.devices.lock();
        let result = work(&mut devices);
        let progress = self.settle(&mut devices, node);
        (result, progress != devices.seen)
    }

    /// The same for who serves a device, but not the agent: what the agent has brought is still news.
    pub fn with_devices_beside_agent<R>(&self, node: &Node<B>, work: impl FnOnce(&mut Platform) -> R) -> R {
        let (result, has_news) = self.with_devices(node, |devices| work(&mut devices.platform));
        if has_news {
            node.want_service(Call::News);
        }
        if self.has_work() {
            self.notify(node, 0);
        }
        result
    }

    /// The same for the service when it looks after the agent: it sees what there is.
    pub fn with_devices_for_service<R>(&self, node: &Node<B>, work: impl FnOnce(&mut Platform) -> R) -> R {
        let mut devices = self.devices.lock();
        let result = work(&mut devices.platform);
        let (state, readable, _) = devices.progress().vsock;
        devices.seen = self.settle(&mut devices, node);
        if (devices.seen.vsock.0, devices.seen.vsock.1) != (state, readable) {
            // The guest's own came after the service had looked.
            node.want_service(Call::News);
        }
        if self.has_work() {
            self.notify(node, 0);
        }
        result
    }

    fn settle(&self, devices: &mut Devices, node: &Node<B>) -> Progress {
        let Devices { platform, volume, frames_sent, .. } = devices;
        if platform.needs_poll() && !self.is_over() {
            self.work(platform, volume.as_mut(), node);
        }
        self.has_work.store(platform.needs_poll(), Ordering::Relaxed);
        while let Some(message) = platform.take_interrupt() {
            self.router.post_message(&message, |vcpu| self.notify(node, vcpu));
        }
        if let Some(end) = platform.end() {
            self.end(node, || End::Platform(end.clone()));
        }
        // Frames are no news that end a turn at once: the service comes when the guest waits or has had its time, not for each.
        let sent = platform.network().map_or(0, |network| network.sent());
        if core::mem::replace(frames_sent, sent) != sent {
            node.want_service(Call::Frames);
        }
        let progress = devices.progress();
        self.is_booting.store(progress.vsock.0 == VsockState::Listening, Ordering::Relaxed);
        progress
    }

    /// Lets the devices do a piece of their work.
    fn work(&self, platform: &mut Platform, mut volume: Option<&mut Volume<PrivateFrame>>, node: &Node<B>) {
        let mut storage = node.storage.lock();
        if let Some(volume) = volume.as_deref_mut() {
            volume.spill(&mut storage.backing);
        }
        let mut disk = MachineDisk { volume: volume.as_deref_mut(), backing: &mut storage.backing };
        {
            let mut entropy = node.entropy.lock();
            platform.poll(&mut self.memory(node), &mut Host { entropy: &mut **entropy, disk: &mut disk });
        }
        if volume.as_deref_mut().is_some_and(|volume| volume.spill(&mut storage.backing)) {
            platform.wake_disk();
        }
        node.poll_storage(&mut storage);
        let Some(volume) = volume else { return };
        if volume.wants_slab() {
            let may_take = self.template.is_none() || node.pool.has_unpromised();
            let slab = if may_take { node.pool.large() } else { None };
            volume.give_slab(slab.map(PrivateFrame::new));
            platform.wake_disk();
        }
        if let Some(reason) = volume.fault() {
            self.end(node, || End::Disk(reason.into()));
        }
    }

    /// Something has arrived from the node's disk that its own may wait for.
    pub fn wake_disk(&self, node: &Node<B>) {
        if self.size.disk.is_some() {
            self.with_devices_beside_agent(node, Platform::wake_disk);
        }
    }

    /// Whether its devices have done a piece of their work and go on, which any of its vCPUs sees to.
    pub fn has_work(&self) -> bool {
        self.has_work.load(Ordering::Relaxed)
    }

    /// Something was posted to a vCPU: sees to it that it is looked at in time.
    pub(super) fn notify(&self, node: &Node<B>, vcpu: usize) {
        let Some(cell) = self.vcpus.get(vcpu) else { return };
        let Some(core) = node.cores.get(cell.core()) else { return };
        match cell.place() {
            // It looks when its turn comes.
            Place::Ready => {}
            // It looks before its next entry, and on this core is not in the guest now.
            Place::Current if core.is_this() => {}
            Place::Current | Place::Resting => core.kick(),
        }
    }

    /// A page of RAM was touched that is not there, or written to that is the template's: gives the machine its own. False when the pool is empty.
    pub(super) fn back(&self, node: &Node<B>, at: GuestPhysAddr) -> bool {
        let change = self.pages.make_private(at, &node.pool);
        if change == Ok(Change::Moved) {
            self.drop_translations(node);
        }
        change.is_ok()
    }

    /// Shows the guest what a write to configuration space has changed there.
    pub(super) fn update_config_space(&self, node: &Node<B>, devices: &mut Devices) {
        let Devices { platform, config_space, .. } = devices;
        match config_space.update(platform, &self.pages, &node.pool) {
            Ok(true) => self.drop_translations(node),
            Ok(false) => {}
            Err(_) => self.end(node, || End::OutOfFrames),
        }
    }

    /// Sees to it that no vCPU uses a nested translation any more that was cached before.
    fn drop_translations(&self, node: &Node<B>) {
        self.vcpus.iter().for_each(VcpuCell::want_flush);
        for cell in &self.vcpus {
            let Some(core) = node.cores.get(cell.core()).filter(|core| !core.is_this()) else { continue };
            if cell.place() != Place::Current {
                continue;
            }
            core.kick();
            // Outside of the guest it drops them before it enters again. It needs no lock to get there.
            while cell.wants_flush() && cell.place() == Place::Current && core.is_in_guest() {
                core::hint::spin_loop();
            }
        }
    }

    /// Ends the machine, unless it has ended already.
    pub(super) fn end(&self, node: &Node<B>, end: impl FnOnce() -> End) {
        self.end.call_once(end);
        if !self.is_over.swap(true, Ordering::SeqCst) {
            self.kick_all(node);
            node.want_service(Call::News);
        }
    }

    /// Sees to it that no vCPU is entered again.
    pub fn stop(&self, node: &Node<B>) {
        self.is_over.store(true, Ordering::SeqCst);
        self.kick_all(node);
    }

    fn kick_all(&self, node: &Node<B>) {
        self.vcpus.iter().filter_map(|cell| node.cores.get(cell.core())).for_each(|core| core.kick());
    }

    /// A vCPU waits for what only another one can send it. When all do, `end` is the machine's.
    pub(super) fn add_stuck(&self, node: &Node<B>, end: End) {
        let all = self.stuck.fetch_add(1, Ordering::SeqCst) + 1 >= self.vcpus.len();
        if all && !self.router.has_signal() {
            self.end(node, || end);
        }
    }

    /// It looks at what it was sent. Before it takes anything: another must not find the inbox empty and this one stuck.
    pub(super) fn remove_stuck(&self) {
        self.stuck.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether it has ended or is to be destroyed.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// Why it ended, once it has.
    pub fn ended(&self) -> Option<&End> {
        self.end.get()
    }

    /// Whether nobody waits for its agent yet.
    pub fn is_booting(&self) -> bool {
        self.is_booting.load(Ordering::Relaxed)
    }

    /// The last `lines` that it printed on its console.
    pub fn console(&self, lines: usize) -> Vec<String> {
        self.devices.lock().platform.console().last_lines(lines)
    }
}
