use super::super::driver::{Device, DriverQueue, EVENT_INDEX, Guest, INDIRECT, VERSION_1, bytes};
use super::*;
use crate::address::GuestPhysAddr;
use crate::platform::MachineEnd;
use crate::platform::testing::DISCARDED;
use alloc::vec;
use proptest::prelude::*;

const ID: u16 = 0x1042;
const DISK_BYTES: usize = 1 << 20;
const ALL: u64 = u64::MAX;
/// A status byte that no device writes.
const NONE: u8 = 0xEE;

struct Bench {
    guest: Guest,
    device: Device,
    queues: Vec<DriverQueue>,
}

/// A request the driver has made.
struct Sent {
    head: u16,
    data: u64,
    length: u32,
    status: u64,
}

impl Bench {
    fn new(queues: u16, features: u64) -> Self {
        let mut guest = Guest::with_disk(DISK_BYTES, queues);
        let device = guest.find(ID);
        let queues = device.initialize(&mut guest, features);
        guest.interrupts();
        Self { guest, device, queues }
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.guest.allocate(bytes.len() as u32);
        self.guest.ram.write(GuestPhysAddr(at), bytes).unwrap();
        at
    }

    /// Makes a request of a header, data in two parts and a status byte.
    fn send(&mut self, queue: usize, kind: u32, sector: u64, data: &[u8], device_writes: bool) -> Sent {
        let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
        let header = self.put(&header);
        let length = data.len() as u32;
        let data = self.put(data);
        let status = self.put(&[NONE]);
        let first = length / 3;
        let parts = [(data, first, device_writes), (data + u64::from(first), length - first, device_writes)];
        let mut chain = vec![(header, 16, false)];
        chain.extend(parts.into_iter().filter(|part| part.1 > 0));
        chain.push((status, 1, true));
        let head = self.queues[queue].add(&mut self.guest, &chain);
        Sent { head, data, length, status }
    }

    fn notify(&mut self, queue: usize) {
        self.device.notify(&mut self.guest, &self.queues[queue]);
    }

    /// The status a request was answered with; `None` if it was not answered.
    fn status(&mut self, queue: usize, sent: &Sent) -> Option<u8> {
        let (head, _) = self.queues[queue].take_used(&self.guest.ram)?;
        assert_eq!(head, u32::from(sent.head));
        Some(bytes(&self.guest.ram, sent.status, 1)[0])
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[u8], device_writes: bool) -> (Option<u8>, Vec<u8>) {
        let sent = self.send(0, kind, sector, data, device_writes);
        self.notify(0);
        let status = self.status(0, &sent);
        (status, bytes(&self.guest.ram, sent.data, sent.length as usize))
    }

    fn read(&mut self, sector: u64, length: usize) -> (Option<u8>, Vec<u8>) {
        self.request(TYPE_READ, sector, &vec![0x11; length], true)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> Option<u8> {
        self.request(TYPE_WRITE, sector, data, false).0
    }

    fn wake(&mut self) {
        self.guest.platform.wake_disk();
        self.guest.poll();
    }
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 512 + seed) as u8).collect()
}

#[test]
fn what_is_written_is_read_back_and_interrupts() {
    for features in [VERSION_1, VERSION_1 | EVENT_INDEX, ALL] {
        let mut bench = Bench::new(1, features);
        let data = pattern(5 * 512, 3);
        assert_eq!(bench.write(7, &data), Some(0));
        assert_eq!(bench.guest.interrupts().len(), 1);
        assert_eq!(bench.guest.disk.bytes[7 * 512..12 * 512], data);
        assert_eq!(bench.read(7, 5 * 512), (Some(0), data));
        assert_eq!(bench.read(6, 512), (Some(0), vec![0; 512]));
        assert_eq!(bench.request(TYPE_FLUSH, 0, &[], false).0, Some(0));
    }
}

#[test]
fn the_configuration_tells_size_blocks_queues_and_limits() {
    let mut bench = Bench::new(3, ALL);
    let config = bench.device.config;
    let mut read = |offset, width| bench.guest.platform.pio_read(config + offset, width);
    assert_eq!(u64::from(read(0, 4)) | u64::from(read(4, 4)) << 32, DISK_BYTES as u64 / 512);
    assert_eq!((read(12, 4), read(20, 4), read(24, 1), read(34, 2)), (126, 512, 3, 3));
    assert_eq!((read(36, 4), read(40, 4), read(44, 4)), (RANGE_SECTORS_MAX, 1, 8));
    assert_eq!((read(48, 4), read(52, 4), read(56, 1)), (RANGE_SECTORS_MAX, 1, 1));
    assert_eq!(bench.queues.len(), 3);
    let features = bench.device.features(&mut bench.guest);
    assert_ne!(features & FEATURE_QUEUES, 0);
    let mut one = Bench::new(1, ALL);
    assert_eq!(one.device.features(&mut one.guest) & FEATURE_QUEUES, 0, "one queue is no feature");
    assert_eq!(Bench::new(99, ALL).queues.len(), 8);
}

#[test]
fn each_queue_answers_its_own_requests() {
    let mut bench = Bench::new(4, VERSION_1);
    let sent: Vec<Sent> = (0..4)
        .map(|queue| bench.send(queue, TYPE_WRITE, queue as u64, &[queue as u8 + 1; 512], false))
        .collect();
    for queue in [2, 0, 3, 1] {
        bench.notify(queue);
        assert_eq!(bench.status(queue, &sent[queue]), Some(0));
    }
    for sector in 0..4 {
        assert_eq!(bench.guest.disk.bytes[sector * 512], sector as u8 + 1);
    }
}

#[test]
fn a_request_that_waits_goes_on_when_the_disk_wakes_the_device_and_others_pass_it() {
    let mut bench = Bench::new(2, VERSION_1);
    bench.guest.disk.bytes[..4096].copy_from_slice(&pattern(4096, 1));
    bench.guest.disk.most = 1024;
    bench.guest.disk.ready = Some(2);
    let slow = bench.send(0, TYPE_READ, 0, &[0; 4096], true);
    bench.notify(0);
    assert_eq!(bench.status(0, &slow), None);
    assert!(!bench.guest.platform.needs_poll(), "waiting is no work");
    let flush = bench.send(1, TYPE_FLUSH, 0, &[], false);
    bench.notify(1);
    assert_eq!(bench.status(1, &flush), Some(0));
    bench.guest.disk.ready = Some(1);
    bench.wake();
    assert_eq!(bench.status(0, &slow), None);
    bench.guest.disk.ready = None;
    bench.wake();
    assert_eq!(bench.status(0, &slow), Some(0));
    assert_eq!(bytes(&bench.guest.ram, slow.data, 4096), pattern(4096, 1));
    assert!(!bench.guest.platform.needs_poll());
}

#[test]
fn no_more_requests_wait_than_the_device_keeps_and_none_is_lost() {
    let mut bench = Bench::new(3, ALL);
    bench.guest.disk.ready = Some(0);
    let mut sent = Vec::new();
    for index in 0..120 {
        for queue in 0..3 {
            sent.push((queue, bench.send(queue, TYPE_WRITE, index * 3 + queue as u64, &[9; 512], false)));
        }
    }
    (0..3).for_each(|queue| bench.notify(queue));
    assert!(!bench.guest.platform.needs_poll(), "the device is full");
    bench.guest.disk.ready = None;
    bench.wake();
    let mut statuses = 0;
    for queue in 0..3 {
        while bench.queues[queue].take_used(&bench.guest.ram).is_some() {
            statuses += 1;
        }
    }
    assert_eq!(statuses, sent.len());
    assert!(sent.iter().all(|(_, sent)| bytes(&bench.guest.ram, sent.status, 1) == [0]));
    assert!(bench.guest.disk.bytes[..360 * 512].iter().all(|byte| *byte == 9));
}

#[test]
fn a_reset_forgets_what_waits() {
    let mut bench = Bench::new(1, VERSION_1);
    bench.guest.disk.ready = Some(0);
    let sent = bench.send(0, TYPE_READ, 0, &[0; 512], true);
    bench.notify(0);
    bench.device.set_status(&mut bench.guest, 0);
    bench.guest.disk.ready = None;
    bench.wake();
    assert_eq!(bytes(&bench.guest.ram, sent.status, 1), [NONE]);
}

#[test]
fn what_lies_outside_the_disk_or_is_no_whole_sector_is_an_io_error() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    let last = DISK_BYTES as u64 / 512 - 1;
    assert_eq!(bench.read(last, 512).0, Some(0));
    for (sector, length) in
        [(last, 1024), (last + 1, 512), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 513), (0, 0)]
    {
        assert_eq!(bench.read(sector, length).0, Some(1), "read {length} at {sector}");
        assert_eq!(bench.write(sector, &vec![1; length]), Some(1), "write {length} at {sector}");
    }
    for (sector, sectors) in [(last, 2), (u64::MAX, 1), (0, 0), (0, RANGE_SECTORS_MAX + 1)] {
        for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
            let answer = bench.request(kind, 0, &segment(sector, sectors, 0), false).0;
            assert_eq!(answer, Some(1), "{kind}: {sectors} at {sector}");
        }
    }
    assert!(bench.guest.disk.bytes.iter().all(|byte| *byte == 0));
    assert_eq!(bench.guest.platform.end(), None);
}

#[test]
fn discard_and_write_zeroes_take_one_segment_and_known_flags() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    bench.guest.disk.bytes.fill(5);
    assert_eq!(bench.request(TYPE_DISCARD, 0, &segment(8, 8, 0), false).0, Some(0));
    assert_eq!(bench.request(TYPE_WRITE_ZEROES, 0, &segment(16, 1, FLAG_UNMAP), false).0, Some(0));
    let sectors: Vec<u8> = bench.guest.disk.bytes.chunks(512).take(18).map(|sector| sector[0]).collect();
    assert_eq!(sectors[..8], [5; 8]);
    assert_eq!(sectors[8..16], [DISCARDED; 8]);
    assert_eq!(sectors[16..], [0, 5]);
    assert_eq!(bench.request(TYPE_DISCARD, 0, &segment(0, 1, FLAG_UNMAP), false).0, Some(2));
    assert_eq!(bench.request(TYPE_WRITE_ZEROES, 0, &segment(0, 1, 2), false).0, Some(2));
    let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
    assert_eq!(bench.request(TYPE_DISCARD, 0, &two, false).0, Some(1));
    assert_eq!(bench.request(TYPE_DISCARD, 0, &two[..15], false).0, Some(1));
    assert_eq!(bench.guest.disk.bytes[0], 5);
}

#[test]
fn the_serial_number_is_cut_to_the_room_there_is() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    let (status, id) = bench.request(TYPE_GET_ID, 0, &[1; 24], true);
    assert_eq!((status, &id[..10], &id[20..]), (Some(0), b"nestling\0\0".as_slice(), [1; 4].as_slice()));
    assert_eq!(bench.request(TYPE_GET_ID, 0, &[1; 4], true), (Some(0), b"nest".to_vec()));
}

#[test]
fn unknown_requests_and_buffers_of_the_wrong_kind_are_refused() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    for kind in [2, 3, 5, 99, u32::MAX] {
        assert_eq!(bench.request(kind, 0, &[0; 512], true).0, Some(2), "{kind}");
    }
    assert_eq!(bench.request(TYPE_READ, 0, &[0; 512], false).0, Some(1));
    assert_eq!(bench.request(TYPE_WRITE, 0, &[0; 512], true).0, Some(1));
    assert_eq!(bench.request(TYPE_DISCARD, 0, &segment(0, 1, 0), true).0, Some(1));
    let status = bench.put(&[NONE]);
    let header = bench.put(&[0; 15]);
    bench.queues[0].add(&mut bench.guest, &[(header, 15, false), (status, 1, true)]);
    bench.notify(0);
    assert_eq!(bytes(&bench.guest.ram, status, 1), [1], "a header that is too short");
}

#[test]
fn data_that_is_not_in_ram_is_an_io_error_and_a_chain_without_room_for_it_ends_the_machine() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    let status = bench.put(&[NONE]);
    let header = bench.put(&[0; 16]);
    bench.queues[0]
        .add(&mut bench.guest, &[(header, 16, false), (0xE000_0000, 512, true), (status, 1, true)]);
    bench.notify(0);
    assert_eq!(bytes(&bench.guest.ram, status, 1), [1]);
    assert_eq!(bench.guest.platform.end(), None);
    bench.queues[0].add(&mut bench.guest, &[(header, 16, false)]);
    bench.notify(0);
    let Some(MachineEnd::DeviceFault { device: "virtio-blk", reason }) = bench.guest.platform.end() else {
        panic!()
    };
    assert!(reason.contains("room for 0 bytes"), "{reason}");
}

#[test]
fn a_disk_that_fails_is_an_io_error() {
    let mut bench = Bench::new(1, VERSION_1 | INDIRECT);
    bench.guest.disk.fails = true;
    assert_eq!(bench.read(0, 512).0, Some(1));
    assert_eq!(bench.write(0, &[0; 512]), Some(1));
    assert_eq!(bench.request(TYPE_DISCARD, 0, &segment(0, 1, 0), false).0, Some(1));
}

#[test]
fn a_large_request_is_done_in_several_rounds() {
    let mut guest = Guest::with_disk(64 << 20, 1);
    let device = guest.find(ID);
    let queues = device.initialize(&mut guest, ALL);
    let mut bench = Bench { guest, device, queues };
    let header = [1_u32.to_le_bytes().as_slice(), &[0; 12]].concat();
    let header = bench.put(&header);
    let status = bench.put(&[NONE]);
    let data = bench.put(&[0x77; 4096]);
    // The same page over and over: 126 segments of 64 KiB would not fit the test's RAM otherwise.
    let mut chain = vec![(header, 16, false)];
    chain.extend((0..126).map(|_| (0x20_0000, 64 << 10, false)));
    chain.push((status, 1, true));
    bench.queues[0].add(&mut bench.guest, &chain);
    bench.guest.platform.pio_write(bench.device.notify, 2, 0);
    let mut rounds = 0;
    while bench.guest.platform.needs_poll() {
        let mut host = Host { entropy: &mut bench.guest.entropy, disk: &mut bench.guest.disk };
        bench.guest.platform.poll(&mut bench.guest.ram, &mut host);
        rounds += 1;
    }
    assert_eq!(bytes(&bench.guest.ram, status, 1), [0]);
    assert!((8..=10).contains(&rounds), "{rounds} rounds for {} bytes", 126 << 16);
    let offset = (data - 0x20_0000) as usize;
    assert!(bench.guest.disk.bytes[(125 << 16) + offset..][..4096].iter().all(|byte| *byte == 0x77));
}

/// One request of the property below.
#[derive(Clone, Debug)]
struct Step {
    kind: u32,
    sector: u64,
    sectors: u32,
    seed: usize,
    queue: usize,
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop::sample::select(vec![TYPE_READ, TYPE_WRITE, TYPE_WRITE, TYPE_DISCARD, TYPE_WRITE_ZEROES]);
    (kind, 0..64_u64, 1..9_u32, any::<u8>(), 0..2_usize).prop_map(|(kind, sector, sectors, seed, queue)| {
        Step { kind, sector, sectors, seed: seed.into(), queue }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_slow_disk_behaves_like_a_plain_array(
        steps in prop::collection::vec(step(), 1..40),
        most in 1..4_u64,
        ready in 0..3_u32,
    ) {
        let mut bench = Bench::new(2, ALL);
        let mut model = vec![0_u8; DISK_BYTES];
        bench.guest.disk.most = most * 512;
        for step in steps {
            let range = step.sector as usize * 512..(step.sector as usize + step.sectors as usize) * 512;
            let data = match step.kind {
                TYPE_READ => vec![0x11; range.len()],
                TYPE_WRITE => pattern(range.len(), step.seed),
                _ => segment(step.sector, step.sectors, 0),
            };
            bench.guest.disk.ready = Some(ready);
            let sent = bench.send(step.queue, step.kind, step.sector, &data, step.kind == TYPE_READ);
            bench.notify(step.queue);
            let mut status = bench.status(step.queue, &sent);
            let mut rounds = 0;
            while status.is_none() {
                rounds += 1;
                prop_assert!(rounds < 100);
                bench.guest.disk.ready = Some(ready + 1);
                bench.wake();
                status = bench.status(step.queue, &sent);
            }
            prop_assert_eq!(status, Some(0));
            match step.kind {
                TYPE_READ => prop_assert_eq!(&bytes(&bench.guest.ram, sent.data, range.len()), &model[range]),
                TYPE_WRITE => model[range].copy_from_slice(&data),
                TYPE_DISCARD => model[range].fill(DISCARDED),
                _ => model[range].fill(0),
            }
        }
        prop_assert_eq!(&bench.guest.disk.bytes, &model);
    }

    /// Descriptors, headers and the ring hold rubbish: the device answers or stops, and touches nothing but the disk's sectors.
    #[test]
    fn rubbish_in_rings_never_breaks_the_device(
        descriptors in prop::collection::vec((0..5_u64, any::<u16>(), 0..5000_u32, 0..8_u16, 0..16_u16), 16),
        headers in prop::collection::vec((0..15_u32, 0..3000_u64), 8),
        heads in prop::collection::vec(0..18_u16, 1..40),
        ready in prop::option::of(0..20_u32),
    ) {
        let mut bench = Bench::new(2, VERSION_1 | INDIRECT | EVENT_INDEX);
        bench.guest.disk.ready = ready;
        let area = bench.guest.allocate(64 << 10);
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
            bench.guest.ram.write(GuestPhysAddr(area + 512 * index as u64), &header).unwrap();
        }
        let table = bench.queues[0].at;
        for (index, (place, offset, length, flags, next)) in descriptors.into_iter().enumerate() {
            let at = match place {
                0..=2 => area + 512 * u64::from(offset % 8),
                3 => table,
                _ => u64::from(offset) << 48,
            };
            bench.queues[0].put_descriptor(&mut bench.guest.ram, table, index as u16, (at, length), flags, next);
        }
        for head in heads {
            bench.queues[0].make_available(&mut bench.guest.ram, head);
            bench.notify(0);
            bench.wake();
        }
        bench.guest.disk.ready = None;
        bench.wake();
        prop_assert!(!bench.guest.platform.needs_poll());
    }
}
