use super::*;
use crate::cache::{BlockCache, LINE_BYTES};
use crate::overlay::SLAB_BYTES;
use crate::scratch::{CLUSTER_BYTES, Scratch};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

type TestVolume = Volume<Vec<u8>>;

/// A base that differs from byte to byte and block to block.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 + at * 3 + 1) as u8).collect()
}

fn leak(bytes: Vec<u8>) -> &'static mut [u8] {
    Box::leak(bytes.into_boxed_slice())
}

/// Serves a volume with slabs and with lines of a disk, as the kernel does.
struct Bench {
    volume: TestVolume,
    backing: Backing,
    disk: Vec<u8>,
    slabs_left: usize,
}

impl Bench {
    /// A base of `base` bytes, on a disk at an odd sector if `on_disk`.
    fn new(base: usize, bytes: u64, overlay_bytes: u64, on_disk: bool) -> Self {
        let content = content(base);
        let (volume_base, disk) = if on_disk {
            let disk = [vec![0xDD; 3 * 512], content, vec![0xEE; 512]].concat();
            (Base::Disk { at: 3 * 512, bytes: base as u64 }, disk)
        } else {
            (Base::Memory(leak(content)), Vec::new())
        };
        let lines = (0..4).map(|_| leak(vec![0; LINE_BYTES]));
        Self {
            volume: Volume::new(1, volume_base, bytes, overlay_bytes),
            backing: Backing { cache: BlockCache::new(disk.len() as u64, lines), scratch: None },
            disk,
            slabs_left: 100,
        }
    }

    /// Adds a scratch partition of so many clusters behind everything else on the disk.
    fn with_scratch(mut self, clusters: usize) -> Self {
        let at = self.disk.len().next_multiple_of(512);
        self.disk.resize(at + clusters * CLUSTER_BYTES, 0xC3);
        let buffers = (0..2).map(|_| leak(vec![0; CLUSTER_BYTES]));
        self.backing.scratch = Some(Scratch::new(at as u64, leak(vec![0; clusters]), buffers));
        let lines = (0..4).map(|_| leak(vec![0; LINE_BYTES]));
        self.backing.cache = BlockCache::new(self.disk.len() as u64, lines);
        self
    }

    fn scratch_bytes(&self) -> u64 {
        self.backing.scratch.as_ref().map_or(0, Scratch::used_bytes)
    }

    /// What the kernel does between two tries. False if there was nothing to do.
    fn serve(&mut self) -> bool {
        let mut served = false;
        if self.volume.wants_slab() {
            let slab = self.slabs_left.checked_sub(1).map(|left| {
                self.slabs_left = left;
                vec![0xA5; SLAB_BYTES]
            });
            self.volume.give_slab(slab);
            served = true;
        }
        while let Some(fetch) = self.backing.cache.next_fetch() {
            fetch.buffer[..fetch.bytes].copy_from_slice(&self.disk[fetch.at as usize..][..fetch.bytes]);
            self.backing.cache.filled(fetch.line, Some(fetch.buffer), Ok(()));
            served = true;
        }
        served |= self.volume.spill(&mut self.backing);
        if let Some(scratch) = &mut self.backing.scratch {
            while let Some(write) = scratch.next_write() {
                self.disk[write.at as usize..][..CLUSTER_BYTES].copy_from_slice(write.buffer);
                scratch.written(write.cluster, Some(write.buffer), Ok(()));
                served = true;
            }
        }
        served
    }

    /// Repeats an access until all of it is done; false if it failed.
    fn all(&mut self, length: u64, mut access: impl FnMut(&mut Self, u64) -> Progress) -> bool {
        let mut done = 0;
        while done < length {
            match access(self, done) {
                Progress::Done(0) => panic!("no progress"),
                Progress::Done(bytes) => done += bytes,
                Progress::Wait => assert!(self.serve(), "it waits for nothing"),
                Progress::Failed => return false,
            }
        }
        assert_eq!(done, length);
        true
    }

    fn read(&mut self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let read = self.all(length, |bench, done| {
            let Bench { volume, backing, .. } = bench;
            volume.read(backing, at + done, length - done, &mut |part| bytes.extend_from_slice(part))
        });
        assert!(read && bytes.len() as u64 == length);
        bytes
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> bool {
        let mut given = 0;
        self.all(bytes.len() as u64, |bench, done| {
            let Bench { volume, backing, .. } = bench;
            volume.write(backing, at + done, bytes.len() as u64 - done, &mut |place| {
                place.copy_from_slice(&bytes[given..given + place.len()]);
                given += place.len();
            })
        })
    }

    fn discard(&mut self, at: u64, length: u64) -> bool {
        self.all(length, |bench, done| {
            let Bench { volume, backing, .. } = bench;
            volume.discard(backing, at + done, length - done)
        })
    }

    fn zero(&mut self, at: u64, length: u64) -> bool {
        self.all(length, |bench, done| {
            let Bench { volume, backing, .. } = bench;
            volume.write_zeroes(backing, at + done, length - done)
        })
    }
}

#[test]
fn a_fresh_disk_reads_as_its_base_with_zeros_behind_it() {
    for on_disk in [false, true] {
        let mut bench = Bench::new(100_352, MIB, MIB, on_disk);
        let wanted = [content(100_352), vec![0; MIB as usize - 100_352]].concat();
        assert!(bench.read(0, MIB) == wanted);
        assert_eq!(bench.volume.used_bytes(), 0);
    }
}

#[test]
fn a_sequential_write_fills_large_pieces() {
    let mut bench = Bench::new(0, 64 * MIB, 64 * MIB, false);
    bench.volume.give_slab(Some(vec![0; SLAB_BYTES]));
    let mut pieces = Vec::new();
    let progress = bench.volume.write(&mut Backing::none(), 0, MIB, &mut |place| pieces.push(place.len()));
    assert_eq!(progress, Progress::Done(MIB));
    assert_eq!(pieces, [MIB as usize]);
    let mut pieces = Vec::new();
    bench.volume.read(&mut Backing::none(), 0, MIB, &mut |part| pieces.push(part.len()));
    assert_eq!(pieces.len(), 1, "{pieces:?}");
}

#[test]
fn a_full_overlay_refuses_what_does_not_fit_tells_why_and_goes_on_after_a_discard() {
    let mut bench = Bench::new(0, 16 * MIB, MIB, false);
    assert!(bench.write(0, &vec![1; MIB as usize - 4096]));
    assert_eq!((bench.volume.used_bytes(), bench.volume.problem()), (MIB, None));
    assert!(!bench.write(2 * MIB, &[2; 4096]));
    let problem = bench.volume.problem().unwrap();
    assert!(problem.starts_with("overlay full: 1 MiB written; the node keeps 1 MiB"), "{problem}");
    assert!(bench.write(0, &[3; 4096]), "what has a place can be changed");
    assert!(bench.discard(4096, 4096));
    assert!(bench.write(2 * MIB, &[2; 4096]));
    assert_eq!(bench.read(2 * MIB, 4096), [2; 4096]);
}

#[test]
fn a_node_without_memory_is_told_apart_from_a_full_overlay() {
    let mut bench = Bench::new(0, 16 * MIB, 8 * MIB, false);
    bench.slabs_left = 1;
    assert!(!bench.write(0, &vec![1; 3 << 20]));
    assert!(bench.volume.problem().unwrap().contains("the node has no memory left"));
    assert_eq!(bench.volume.slabs(), 1);
    assert_eq!(bench.volume.into_slabs(&mut bench.backing).count(), 1);
}

#[test]
fn a_base_that_cannot_be_read_is_a_fault_with_its_reason() {
    let mut bench = Bench::new(8192, MIB, MIB, true);
    assert_eq!(bench.volume.read(&mut bench.backing, 0, 512, &mut |_| {}), Progress::Wait);
    let fetch = bench.backing.cache.next_fetch().unwrap();
    bench.backing.cache.filled(fetch.line, Some(fetch.buffer), Err("the disk does not answer".into()));
    assert_eq!(bench.volume.read(&mut bench.backing, 0, 512, &mut |_| {}), Progress::Failed);
    assert_eq!(bench.volume.fault(), Some("the disk does not answer"));
    assert_eq!(bench.volume.problem(), None);
}

#[test]
fn zeros_behind_the_base_and_discarded_blocks_cost_nothing() {
    let mut bench = Bench::new(8192, 3 << 40, MIB, false);
    assert!(bench.zero(MIB, 1 << 40) && bench.discard(0, 1 << 40));
    assert_eq!(bench.volume.used_bytes(), 0);
    assert!(bench.zero(0, 4096));
    assert_eq!(bench.volume.used_bytes(), 4096, "the map's table alone");
    assert_eq!(bench.read(0, 8192), [vec![0; 4096], content(8192)[4096..].to_vec()].concat());
}

#[test]
fn what_does_not_fit_into_memory_goes_to_the_scratch_partition_and_comes_back() {
    let mut bench = Bench::new(8192, 16 * MIB, MIB, true).with_scratch(100);
    let bytes: Vec<u8> = (0..5 << 20).map(|at: usize| (at / 4096 * 31 + at) as u8).collect();
    assert!(bench.write(4096, &bytes));
    assert!(bench.volume.used_bytes() <= MIB && bench.scratch_bytes() >= 4 * MIB);
    assert!(bench.read(4096, bytes.len() as u64) == bytes);
    assert!(bench.write(MIB + 512, &[7; 1024]), "a part of a block that is there");
    let found = bench.read(MIB, 2048);
    let before = &bytes[MIB as usize - 4096..];
    assert_eq!(
        (&found[..512], &found[512..1536], &found[1536..]),
        (&before[..512], [7; 1024].as_slice(), &before[1536..2048])
    );
    assert!(bench.discard(0, 16 * MIB));
    assert_eq!(bench.scratch_bytes(), 0);
    assert_eq!(bench.read(0, 8192), content(8192));
}

#[test]
fn a_full_scratch_partition_refuses_what_does_not_fit_tells_why_and_goes_on_after_a_discard() {
    let mut bench = Bench::new(0, 16 * MIB, MIB, true).with_scratch(16);
    assert!(!bench.write(0, &vec![5; 4 << 20]));
    let problem = bench.volume.problem().unwrap();
    assert!(
        problem.starts_with("overlay full: 2 MiB written; memory for it and the node's scratch"),
        "{problem}"
    );
    assert!(bench.discard(0, MIB));
    assert!(bench.write(8 * MIB, &vec![6; MIB as usize / 2]));
    assert_eq!(bench.read(8 * MIB, 4096), [6; 4096]);
}

#[test]
fn a_scratch_partition_that_fails_is_a_fault() {
    let mut bench = Bench::new(0, 16 * MIB, MIB, true).with_scratch(16);
    assert!(bench.write(0, &vec![5; MIB as usize - 4096]));
    let progress = bench.volume.write(&mut bench.backing, 2 * MIB, 4096, &mut |_| {});
    assert_eq!(progress, Progress::Wait);
    assert!(!bench.volume.spill(&mut bench.backing));
    let scratch = bench.backing.scratch.as_mut().unwrap();
    let write = scratch.next_write().unwrap();
    scratch.written(write.cluster, Some(write.buffer), Err("the disk is full of holes".into()));
    assert!(bench.volume.spill(&mut bench.backing));
    assert_eq!(bench.volume.fault(), Some("the disk is full of holes"));
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, u8),
    Discard(u64, u64),
    Zero(u64, u64),
}

const SECTORS: u64 = 9 * MIB / 512 + 3;

fn step() -> impl Strategy<Value = Step> {
    // Close together around the base's end and a table's, so that accesses meet.
    let start = prop_oneof![0..40_u64, 180..260_u64, 8150..8250_u64, SECTORS - 20..SECTORS];
    let range = (start, prop_oneof![Just(8_u64), 1..40_u64, 200..300_u64]);
    let range = range.prop_map(|(sector, sectors)| (sector, sectors.min(SECTORS - sector)));
    (range, 0..4_u8, any::<u8>()).prop_map(|((sector, sectors), kind, value)| {
        let (at, length) = (sector * 512, sectors * 512);
        match kind {
            0 => Step::Read(at, length),
            1 => Step::Write(at, length, value),
            2 => Step::Discard(at, length),
            _ => Step::Zero(at, length),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_disk_equals_a_plain_array_whatever_is_done_to_it(
        steps in prop::collection::vec(step(), 1..60),
        on_disk: bool,
        limit in prop_oneof![Just(64 * MIB), (4..40_u64).prop_map(|blocks| blocks * 4096)],
        clusters in prop_oneof![Just(0_usize), Just(200), 1..12_usize],
    ) {
        let base = 215 * 512;
        let mut bench = Bench::new(base, SECTORS * 512, limit, on_disk);
        if clusters > 0 {
            bench = bench.with_scratch(clusters);
        }
        let mut model = content(base);
        let original = model.clone();
        model.resize((SECTORS * 512) as usize, 0);
        for step in steps {
            match step {
                Step::Read(at, length) => {
                    prop_assert!(bench.read(at, length) == model[at as usize..(at + length) as usize]);
                }
                Step::Write(at, length, value) => {
                    let bytes: Vec<u8> = (0..length).map(|offset| (offset as u8).wrapping_add(value)).collect();
                    if bench.write(at, &bytes) {
                        model[at as usize..(at + length) as usize].copy_from_slice(&bytes);
                    } else {
                        // What was written before there was no room is there.
                        prop_assert!(bench.volume.problem().is_some());
                        model[at as usize..(at + length) as usize].copy_from_slice(&bench.read(at, length));
                    }
                }
                Step::Discard(at, length) => {
                    prop_assert!(bench.discard(at, length));
                    for block in at.div_ceil(BLOCK)..(at + length) / BLOCK {
                        for at in block * BLOCK..(block + 1) * BLOCK {
                            model[at as usize] = original.get(at as usize).copied().unwrap_or(0);
                        }
                    }
                }
                Step::Zero(at, length) => {
                    if bench.zero(at, length) {
                        model[at as usize..(at + length) as usize].fill(0);
                    } else {
                        prop_assert!(bench.volume.problem().is_some());
                        model[at as usize..(at + length) as usize].copy_from_slice(&bench.read(at, length));
                    }
                }
            }
            prop_assert!(bench.volume.used_bytes() <= limit);
        }
        prop_assert!(bench.read(0, SECTORS * 512) == model);
        let Bench { volume, mut backing, .. } = bench;
        drop(volume.into_slabs(&mut backing));
        prop_assert_eq!(backing.scratch.map_or(0, |scratch| scratch.used_bytes()), 0);
    }
}
