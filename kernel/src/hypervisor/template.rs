//! Templates: machines that were frozen once they had booted, and the clones made of them.
//!
//! A template owns what its machine did and changes none of it any more. A clone takes over registers, devices and interrupts on their way by
//! copying them, a few KiB, and memory by a root of its own over the template's tables: nothing that a clone costs depends on the machine's size.
//! Clones keep their template alive; no page has a count.

use super::backend::Backend;
use super::config_space::ConfigSpace;
use super::figures::TemplateFigures;
use super::machine::{CreateError, Devices, Machine, Size};
use super::node::Node;
use super::pages::Pages;
use super::vcpu::{FrozenVcpu, VcpuCell};
use crate::cpu::clock;
use crate::memory::frames::{LARGE_FRAME, PrivateFrame, SMALL_FRAME};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use nestling_machine::platform::Platform;
use nestling_machine::vcpu::InterruptRouter;
use nestling_storage::volume::FrozenVolume;
use spin::Mutex;

/// From this many clones on, what they copy is no longer recorded.
const RECORDED_CLONES: u64 = 1;
/// Pages are copied before a clone is entered until it has this much of its own, tables included: three quarters of what an idle clone may cost.
const WORKING_SET_BYTES: u64 = 384 << 10;
/// The most pages that are kept for that.
const WORKING_SET_MAX: usize = (WORKING_SET_BYTES / SMALL_FRAME) as usize;

/// A frozen machine.
pub struct Template<B: Backend> {
    node: &'static Node<B>,
    size: Size,
    vcpus: Box<[FrozenVcpu<B>]>,
    router: InterruptRouter,
    platform: Platform,
    frames_sent: u64,
    /// The host's time-stamp counter when the machine stopped.
    frozen_at: u64,
    /// There until the template is dropped.
    owned: Option<Owned<B>>,
    /// What this template is itself a clone of.
    _parent: Option<Arc<Self>>,
    working_set: Mutex<Vec<u32>>,
    clones: AtomicU64,
    faults: AtomicU64,
    faults_first: AtomicU64,
    digest: Option<u64>,
}

/// What goes back to the node.
struct Owned<B: Backend> {
    pages: Pages<B::Entry>,
    config_space: ConfigSpace,
    volume: Option<FrozenVolume<PrivateFrame>>,
}

impl<B: Backend> Template<B> {
    /// Freezes a machine that is on no core; `with_digest`, for [`Self::check`].
    pub fn new(machine: Machine<B>, node: &'static Node<B>, with_digest: bool) -> Self {
        let frozen_at = clock::tsc();
        let (parts, parent) = machine.into_parts();
        let Devices { platform, volume, config_space, frames_sent, .. } = parts.devices;
        let mut template = Self {
            node,
            size: parts.size,
            vcpus: parts.vcpus.into_vec().into_iter().map(|cell| cell.into_own().freeze()).collect(),
            router: parts.router,
            platform,
            frames_sent,
            frozen_at,
            owned: Some(Owned {
                pages: parts.pages,
                config_space,
                volume: volume.map(|volume| volume.freeze()),
            }),
            _parent: parent,
            working_set: Mutex::new(Vec::new()),
            clones: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            faults_first: AtomicU64::new(0),
            digest: None,
        };
        if with_digest {
            template.digest = template.digest_now();
        }
        template
    }

    /// What its clones get of the node.
    pub const fn size(&self) -> &Size {
        &self.size
    }

    /// Bytes of memory that its clones share.
    pub fn shared_bytes(&self) -> u64 {
        self.owned.as_ref().map_or(0, |owned| {
            let slabs = owned.volume.as_ref().map_or(0, FrozenVolume::own_slabs) as u64;
            owned.pages.private_bytes() + slabs * LARGE_FRAME
        })
    }

    /// See [`TemplateFigures`]. `alive` clones exist.
    pub fn figures(&self, number: u64, alive: u64) -> TemplateFigures {
        TemplateFigures {
            number,
            shared_bytes: self.shared_bytes(),
            clones_alive: alive,
            clones_made: self.clones.load(Ordering::Relaxed),
            working_set_pages: self.working_set.lock().len() as u64,
            first_faults: self.faults_first.load(Ordering::Relaxed),
            later_faults: self.faults.load(Ordering::Relaxed),
        }
    }

    fn digest_now(&self) -> Option<u64> {
        self.owned.as_ref().map(|owned| owned.pages.digest())
    }

    /// Looks whether every byte that is shared is as it was, if that was noted.
    pub fn check(&self) {
        let (Some(before), Some(now)) = (self.digest, self.digest_now()) else { return };
        if before == now {
            log::info!("template unchanged, digest {now:016x}");
        } else {
            log::error!("template changed: digest {before:016x} became {now:016x}");
        }
    }

    /// Makes a clone, which is on no core yet. No vCPU is loaded on this one.
    ///
    /// # Errors
    /// [`CreateError::OutOfFrames`]; nothing is kept then.
    pub fn clone_machine(self: &Arc<Self>) -> Result<Machine<B>, CreateError> {
        let pool = &self.node.pool;
        let Some(owned) = &self.owned else { return Err(CreateError::OutOfFrames) };
        let pages = owned.pages.share(pool).ok_or(CreateError::OutOfFrames)?;
        let number = self.clones.fetch_add(1, Ordering::Relaxed);
        if number < RECORDED_CLONES {
            pages.start_record();
        }
        for page in self.working_set.lock().iter() {
            if pages.private_bytes() >= WORKING_SET_BYTES {
                break;
            }
            // What cannot be copied now can be when it is needed, or the machine ends then.
            let _ = pages.copy_ahead(*page, pool);
        }
        let backend = self.node.backend;
        let thaw = |vcpu| VcpuCell::thaw(backend, pages.root(), vcpu, self.frozen_at);
        let vcpus: Box<[_]> = self.vcpus.iter().map(thaw).collect();
        let stuck = self.vcpus.iter().filter(|vcpu| vcpu.is_stuck()).count();
        let devices = Devices::resumed(
            self.platform.clone(),
            owned.volume.as_ref().map(|volume| volume.share(self.node.next_volume())),
            owned.config_space.share(),
            self.frames_sent,
        );
        let router = self.router.clone();
        Ok(Machine::resumed(vcpus, router, pages, self.size, devices, stuck, Arc::clone(self)))
    }

    /// A clone is about to end that copied so many pages because it wrote to them, and these first.
    pub(super) fn learn(&self, copied: u64, record: Vec<u32>) {
        if record.is_empty() {
            self.faults.fetch_add(copied, Ordering::Relaxed);
            return;
        }
        self.faults_first.store(copied, Ordering::Relaxed);
        let mut working_set = self.working_set.lock();
        if working_set.is_empty() {
            *working_set = record;
            // In the order they were needed: the first are needed by the shortest job.
            working_set.truncate(WORKING_SET_MAX);
        }
    }
}

impl<B: Backend> Drop for Template<B> {
    fn drop(&mut self) {
        let Some(Owned { pages, config_space, volume }) = self.owned.take() else { return };
        let pool = &self.node.pool;
        config_space.free(pool);
        // SAFETY: its vCPUs are snapshots, and every clone holds a reference to the template until its own pages are given back.
        unsafe { pages.free(pool) };
        if let Some(volume) = volume {
            volume.into_slabs().for_each(|slab| pool.free_large(slab.into_frame()));
        }
    }
}
