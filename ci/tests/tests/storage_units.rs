//! Host tests of the node's disk and its cache when the disk does not answer. The kernel's files are taken in by path; what they need of
//! the rest of the kernel, and the disk, are played here.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

#[path = "../../../kernel/src/storage.rs"]
mod storage;

#[path = "../../../kernel/src/memory"]
mod memory {
    pub mod frames;
}

mod cpu {
    use std::cell::Cell;

    thread_local! {
        pub static NOW: Cell<u64> = const { Cell::new(0) };
    }

    /// Who waits lets time go by.
    pub fn take_interrupts() {
        NOW.set(NOW.get() + super::SECOND);
    }

    pub mod clock {
        pub fn now_ns() -> u64 {
            super::NOW.get()
        }
    }
}

#[path = "../../../kernel/src/drivers"]
mod drivers {
    pub mod disk;

    /// No disk is looked for here.
    pub mod pci {
        #[derive(Clone, Copy)]
        pub struct Space;

        pub struct Bus {
            pub space: Space,
            pub functions: Vec<&'static str>,
        }
    }

    pub mod virtio_blk {
        use super::super::SilentDisk;
        use super::pci::Space;

        pub(crate) type VirtioBlk = SilentDisk;

        impl VirtioBlk {
            pub fn drives(_: &str) -> bool {
                false
            }

            pub fn new(_: Space, _: &str) -> Result<Self, String> {
                Err("no disk is looked for here".into())
            }
        }
    }
}

use std::collections::VecDeque;

use cpu::NOW;
use drivers::disk::{Buffer, Completion, Disk};
use memory::frames::{FramePool, LARGE_FRAME};
use nestling_storage::cache::Lookup;
use nestling_storage::scratch::{CLUSTER_BYTES, Scratch};
use nestling_storage::source::Source;
use storage::Storage;

const SECOND: u64 = 1_000_000_000;
const TIMEOUT: u64 = 30 * SECOND;

/// A disk that takes accesses and never ends one; as the driver does, it gives each up after 30 s and keeps the memory.
#[derive(Default)]
pub(crate) struct SilentDisk {
    under_way: VecDeque<(usize, u64)>,
}

impl SilentDisk {
    fn take(&mut self, tag: usize) -> Result<(), Buffer> {
        self.under_way.push_back((tag, NOW.get() + TIMEOUT));
        Ok(())
    }
}

impl Disk for SilentDisk {
    fn driver(&self) -> &'static str {
        "silent"
    }

    fn bytes(&self) -> u64 {
        1 << 30
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&mut self, _: u64, _: usize, _: Buffer, tag: usize) -> Result<(), Buffer> {
        self.take(tag)
    }

    fn write(&mut self, _: u64, _: usize, _: Buffer, tag: usize) -> Result<(), Buffer> {
        self.take(tag)
    }

    fn completed(&mut self, now: u64) -> Option<Completion> {
        let (tag, _) = self.under_way.pop_front_if(|(_, deadline)| *deadline <= now)?;
        Some(Completion { tag, buffer: None, outcome: Err("the disk has not answered for 30 s".into()) })
    }

    fn deadline(&self) -> Option<u64> {
        self.under_way.front().map(|(_, deadline)| *deadline)
    }

    fn take_interrupt(&mut self) -> bool {
        false
    }

    fn has_interrupt(&self) -> bool {
        true
    }
}

/// A node's storage on a disk that does not answer.
fn storage() -> Storage {
    const FRAMES: usize = 8;
    let layout =
        std::alloc::Layout::from_size_align(FRAMES * LARGE_FRAME as usize, LARGE_FRAME as usize).unwrap();
    // SAFETY: the layout is not empty.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    assert!(!start.is_null());
    let mut pool = FramePool::new();
    pool.add(start as u64, start as u64 + layout.size() as u64);
    Storage::new(Some(Box::new(SilentDisk::default())), &mut pool)
}

#[test]
fn a_read_without_an_answer_fails_after_its_time_and_can_be_tried_again() {
    let mut storage = storage();
    assert_eq!(storage.deadline(), None, "nothing is under way");
    for round in 0..3 {
        let began = NOW.get();
        assert!(matches!(storage.backing.cache.read(0, 512), Lookup::Miss), "round {round}");
        storage.poll();
        assert_eq!(storage.deadline(), Some(began + TIMEOUT));
        let arrivals = storage.arrivals();
        NOW.set(began + TIMEOUT - 1);
        storage.poll();
        assert_eq!(storage.arrivals(), arrivals);
        assert!(matches!(storage.backing.cache.read(0, 512), Lookup::Miss));
        NOW.set(began + TIMEOUT);
        storage.poll();
        assert_ne!(storage.arrivals(), arrivals, "who waits is to look again");
        match storage.backing.cache.read(0, 512) {
            Lookup::Failed(reason) => assert_eq!(reason, "the disk has not answered for 30 s"),
            other => panic!("{other:?}"),
        }
        assert_eq!(storage.deadline(), None);
    }
}

#[test]
fn a_write_without_an_answer_is_its_machines_failure_and_holds_up_nobody_else() {
    let mut storage = storage();
    let table = vec![0_u8; 4].leak();
    let buffers = (0..2).map(|_| vec![0_u8; CLUSTER_BYTES].leak());
    storage.backing.scratch = Some(Scratch::new(0, table, buffers));
    let mut begin = |owner| {
        let scratch = storage.backing.scratch.as_mut().unwrap();
        let cluster = scratch.begin(owner, |_| {}).unwrap();
        storage.poll();
        NOW.set(NOW.get() + TIMEOUT);
        storage.poll();
        let (done, outcome) = storage.backing.scratch.as_mut().unwrap().take_done(owner).unwrap();
        assert_eq!(done, cluster);
        assert_eq!(outcome.unwrap_err(), "the disk has not answered for 30 s");
    };
    begin(1);
    begin(2);
    assert_eq!(storage.deadline(), None);
}

#[test]
fn a_node_whose_disk_does_not_answer_boots_nevertheless() {
    let mut storage = storage();
    let began = NOW.get();
    let error = storage.read(0, &mut [0; 512]).unwrap_err();
    assert_eq!(error, "the disk has not answered for 30 s");
    // The failure is seen after the wait that follows it.
    assert_eq!(NOW.get(), began + TIMEOUT + SECOND);
}
