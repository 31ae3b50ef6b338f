//! What the cores of a node share: virtualization, frames, randomness, and each other.

use super::backend::Backend;
use super::cores::Core;
use crate::memory::frames::FramePool;
use crate::storage::Storage;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use nestling_machine::platform::Entropy;
use spin::Mutex;

/// Random bytes for guests, from any core.
pub type SharedEntropy = Mutex<Box<dyn Entropy + Send>>;

/// Why the service is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Call {
    /// A machine has sent frames.
    Frames = 1,
    /// Anything else: an agent spoke, a machine has ended.
    News = 2,
}

/// A node, as its cores see it. It lives for ever.
///
/// Locks are taken in this order, and none but the first is held while a guest runs: a vCPU's own state, its machine's devices, its machine's
/// nested page table, the node's disk, randomness, the frame pool. A core's queue is held alone.
pub struct Node<B: Backend> {
    /// The vendor's virtualization, on on every core.
    pub backend: &'static B,
    /// Where machines' frames come from.
    pub pool: FramePool,
    /// The node's disk.
    pub storage: Mutex<Storage>,
    /// Whether there is one.
    has_disk: bool,
    /// The size of its scratch partition; zero without one.
    pub scratch_bytes: u64,
    /// The number of the next volume.
    next_volume: AtomicU64,
    /// Something has arrived from it that machines may wait for.
    has_arrived: AtomicBool,
    /// Randomness for guests' entropy devices.
    pub entropy: SharedEntropy,
    /// The cores in use. The first runs the service besides.
    pub cores: Vec<Core<B>>,
    /// The [`Call`]s that the service has not heard yet.
    calls: AtomicU8,
}

impl<B: Backend> Node<B> {
    /// A node whose cores have these APIC ids.
    pub fn new(
        backend: &'static B,
        pool: FramePool,
        storage: Storage,
        entropy: Box<dyn Entropy + Send>,
        apic_ids: &[u32],
    ) -> Self {
        let cores = apic_ids.iter().enumerate().map(|(index, id)| Core::new(index, *id)).collect();
        Self {
            backend,
            pool,
            has_disk: storage.has_disk(),
            scratch_bytes: storage.scratch_bytes(),
            next_volume: AtomicU64::new(0),
            storage: Mutex::new(storage),
            has_arrived: AtomicBool::new(false),
            entropy: Mutex::new(entropy),
            cores,
            calls: AtomicU8::new(0),
        }
    }

    /// A number that no other volume of this node has had.
    pub fn next_volume(&self) -> u64 {
        self.next_volume.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes what the node's disk has done, and gives it more to do. Cheap when there is no disk.
    pub fn poll_disk(&self) {
        if self.has_disk {
            self.poll_storage(&mut self.storage.lock());
        }
    }

    /// The same, by who uses it already.
    pub fn poll_storage(&self, storage: &mut Storage) {
        let before = storage.arrivals();
        storage.poll();
        if storage.arrivals() != before {
            self.has_arrived.store(true, Ordering::SeqCst);
            self.kick_first();
        }
    }

    /// Whether something has arrived from the disk since the last call: the machines are to be told.
    pub fn take_arrived(&self) -> bool {
        self.has_arrived() && self.has_arrived.swap(false, Ordering::SeqCst)
    }

    /// Whether something has arrived from the disk that machines were not told.
    pub fn has_arrived(&self) -> bool {
        self.has_arrived.load(Ordering::Relaxed)
    }

    /// When [`Self::poll_disk`] has to be called at the latest, in nanoseconds since boot.
    pub fn disk_deadline(&self) -> Option<u64> {
        if self.has_disk { self.storage.lock().deadline() } else { None }
    }

    fn kick_first(&self) {
        if let Some(core) = self.cores.first() {
            core.kick();
        }
    }

    /// Calls the service: it is woken, or its core's guest is left once it has had its time.
    pub fn want_service(&self, call: Call) {
        if self.calls.fetch_or(call as u8, Ordering::SeqCst) == 0 {
            self.kick_first();
        }
    }

    /// Whether the service was called.
    pub fn is_service_wanted(&self) -> bool {
        self.calls.load(Ordering::SeqCst) != 0
    }

    /// The service looks: what calls it from now on is for its next round. Whether there is more than frames.
    pub fn take_calls(&self) -> bool {
        self.calls.swap(0, Ordering::SeqCst) & Call::News as u8 != 0
    }

    /// vCPUs wait on a core: one that has nothing to do may take one of them.
    pub fn offer_work(&self) {
        if let Some(idle) = self.cores.iter().find(|core| core.is_idle()) {
            idle.kick();
        }
    }
}
