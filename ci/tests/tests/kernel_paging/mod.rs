//! A machine's memory and a clone's, walked as the processor would.

use super::hypervisor::nested::{NestedEntry, Table, walk};
use super::hypervisor::pages::{Change, Pages};
use super::hypervisor::ram::{RamView, Translations};
use super::memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME};
use super::pool_of;
use nestling_machine::address::GuestPhysAddr;
use nestling_machine::layout::{HIGH_RAM_START, LOW_RAM_END};
use nestling_machine::memory::{GuestMemory, MemoryError};
use std::cell::Cell;

/// A format of its own, so that the walk is tested and not a vendor's bits.
struct TestEntry;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const LARGE: u64 = 4;

impl NestedEntry for TestEntry {
    fn table(physical: u64) -> u64 {
        physical | PRESENT | WRITABLE
    }

    fn large_leaf(physical: u64) -> u64 {
        physical | PRESENT | WRITABLE | LARGE
    }

    fn small_leaf(physical: u64) -> u64 {
        physical | PRESENT | WRITABLE
    }

    fn device_leaf(physical: u64) -> u64 {
        physical | PRESENT
    }

    fn read_only(entry: u64) -> u64 {
        entry & !WRITABLE
    }

    fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    fn is_writable(entry: u64) -> bool {
        entry & WRITABLE != 0
    }

    fn is_large(entry: u64) -> bool {
        entry & LARGE != 0
    }

    fn address(entry: u64) -> u64 {
        entry & !0xFFF
    }
}

type TestPages = Pages<TestEntry>;

/// Counts how often translations had to be dropped.
#[derive(Default)]
struct Drops(Cell<u32>);

impl Translations for &Drops {
    fn drop_all(&self) {
        self.0.set(self.0.get() + 1);
    }
}

fn view<'a>(pages: &'a TestPages, pool: &'a FramePool) -> RamView<'a, TestEntry, ()> {
    RamView { pages, pool, translations: () }
}

fn write(pages: &TestPages, pool: &FramePool, at: u64, from: &[u8]) {
    view(pages, pool).write(GuestPhysAddr(at), from).unwrap();
}

fn read<const N: usize>(pages: &TestPages, pool: &FramePool, at: u64) -> [u8; N] {
    let mut bytes = [0xEE; N];
    view(pages, pool).read(GuestPhysAddr(at), &mut bytes).unwrap();
    bytes
}

fn is_private(pages: &TestPages, at: u64) -> Option<bool> {
    // SAFETY: the root is a live table.
    let root = unsafe { Table::at(pages.root()) };
    walk::<TestEntry>(root, GuestPhysAddr(at)).map(|place| place.is_private)
}

/// Gives a machine's or clone's memory back.
fn free(pages: TestPages, pool: &FramePool) {
    // SAFETY: the tests' machines have no processors, and clones are freed first.
    unsafe { pages.free(pool) };
}

#[test]
fn ram_is_backed_on_the_first_write_only_and_reads_as_zero_before() {
    let pool = pool_of(5);
    let before = pool.counts();
    let pages = TestPages::new(8 * LARGE_FRAME, &pool).unwrap();
    assert_eq!(read::<16>(&pages, &pool, 3 * LARGE_FRAME), [0; 16]);
    assert_eq!(is_private(&pages, 3 * LARGE_FRAME), None);
    // Across a border of two frames.
    write(&pages, &pool, 2 * LARGE_FRAME - 8, &[7; 16]);
    assert_eq!(read::<16>(&pages, &pool, 2 * LARGE_FRAME - 8), [7; 16]);
    assert_eq!(pages.private_bytes(), 2 * LARGE_FRAME + 3 * SMALL_FRAME, "RAM and three tables");
    free(pages, &pool);
    assert_eq!(pool.counts(), before);
}

#[test]
fn what_is_not_ram_is_refused_and_so_is_a_range_that_leaves_it() {
    let pool = pool_of(2);
    let pages = TestPages::new(LARGE_FRAME, &pool).unwrap();
    let mut view = view(&pages, &pool);
    for at in [LARGE_FRAME, LARGE_FRAME - 1, LOW_RAM_END, HIGH_RAM_START, u64::MAX, u64::MAX - LARGE_FRAME] {
        let refused = MemoryError::NotRam { at: GuestPhysAddr(at), length: 2 };
        assert_eq!(view.write(GuestPhysAddr(at), &[1, 2]), Err(refused), "{at:#x}");
        assert_eq!(view.read(GuestPhysAddr(at), &mut [0; 2]), Err(refused), "{at:#x}");
    }
    free(pages, &pool);
}

#[test]
fn ram_beyond_the_low_part_continues_at_four_gibibytes() {
    let pool = pool_of(3);
    let pages = TestPages::new(LOW_RAM_END + LARGE_FRAME, &pool).unwrap();
    assert!(pages.contains(GuestPhysAddr(LOW_RAM_END - 1)));
    assert!(!pages.contains(GuestPhysAddr(LOW_RAM_END)));
    assert!(pages.contains(GuestPhysAddr(HIGH_RAM_START)));
    assert!(!pages.contains(GuestPhysAddr(HIGH_RAM_START + LARGE_FRAME)));
    let across = view(&pages, &pool).write(GuestPhysAddr(LOW_RAM_END - 1), &[1, 2]);
    assert!(matches!(across, Err(MemoryError::NotRam { .. })));
    write(&pages, &pool, HIGH_RAM_START, &[9]);
    assert_eq!(read::<1>(&pages, &pool, HIGH_RAM_START), [9]);
    free(pages, &pool);
}

#[test]
fn a_machine_without_free_frames_is_told_so_and_what_it_has_stays() {
    let pool = pool_of(2);
    let pages = TestPages::new(4 * LARGE_FRAME, &pool).unwrap();
    write(&pages, &pool, 0, &[1]);
    let refused = view(&pages, &pool).write(GuestPhysAddr(LARGE_FRAME), &[1]);
    assert_eq!(refused, Err(MemoryError::OutOfFrames));
    assert_eq!(read::<1>(&pages, &pool, 0), [1]);
    free(pages, &pool);
}

#[test]
fn a_device_page_is_shown_and_taken_away_again_and_is_never_written() {
    let pool = pool_of(2);
    let before = pool.counts();
    let pages = TestPages::new(LARGE_FRAME, &pool).unwrap();
    let (page, other) = (pool.small().unwrap(), pool.small().unwrap());
    let at = 0xE000_8000;
    assert_eq!(pages.map_device(GuestPhysAddr(at), page.address(), &pool), Some(Change::Added));
    pages.map_device(GuestPhysAddr(at + 0x1000), other.address(), &pool).unwrap();
    assert_eq!(pages.find(GuestPhysAddr(at)).map(|place| place.physical), Some(page.address()));
    assert_eq!(is_private(&pages, at), Some(false));
    assert!(matches!(pages.make_private(GuestPhysAddr(at), &pool), Err(MemoryError::NotRam { .. })));
    let clone = pages.share(&pool).unwrap();
    assert_eq!(clone.map_device(GuestPhysAddr(at), other.address(), &pool), Some(Change::Moved));
    assert_eq!(clone.find(GuestPhysAddr(at)).map(|place| place.physical), Some(other.address()));
    assert_eq!(pages.find(GuestPhysAddr(at)).map(|place| place.physical), Some(page.address()));
    free(clone, &pool);
    assert_eq!(pages.unmap_device(GuestPhysAddr(at), &pool), Some(Change::Moved));
    assert_eq!(pages.find(GuestPhysAddr(at)), None);
    free(pages, &pool);
    pool.free_small(page);
    pool.free_small(other);
    assert_eq!(pool.counts(), before);
}

/// A template with something in its second and fourth large page.
fn template(pool: &FramePool, large_pages: u64) -> TestPages {
    let pages = TestPages::new(large_pages * LARGE_FRAME, pool).unwrap();
    write(&pages, pool, LARGE_FRAME + 100, b"template");
    write(&pages, pool, 3 * LARGE_FRAME, &[3; 64]);
    pages
}

#[test]
fn a_clone_costs_one_frame_whatever_its_size_and_reads_what_its_template_has() {
    let pool = pool_of(6);
    for large_pages in [4, 256, 1024] {
        let template = template(&pool, large_pages);
        let before = pool.counts();
        let clone = template.share(&pool).unwrap();
        assert_eq!(before.0 - pool.counts().0, 1);
        assert_eq!(clone.private_bytes(), SMALL_FRAME);
        assert_eq!(&read::<8>(&clone, &pool, LARGE_FRAME + 100), b"template");
        assert_eq!(read::<4>(&clone, &pool, 0), [0; 4]);
        assert_eq!(is_private(&clone, LARGE_FRAME), Some(false));
        free(clone, &pool);
        assert_eq!(pool.counts(), before);
        free(template, &pool);
    }
}

#[test]
fn a_write_copies_the_page_and_the_tables_on_the_way_and_neither_template_nor_sibling_sees_it() {
    let pool = pool_of(6);
    let template = template(&pool, 64);
    let digest = template.digest();
    let free_frames = pool.counts();
    let (one, other) = (template.share(&pool).unwrap(), template.share(&pool).unwrap());
    let drops = Drops::default();
    let mut memory = RamView { pages: &one, pool: &pool, translations: &drops };
    memory.write(GuestPhysAddr(LARGE_FRAME + 104), b"XY").unwrap();
    memory.write(GuestPhysAddr(LARGE_FRAME + 106), b"Z").unwrap();
    assert_eq!(drops.0.get(), 1, "once for the copy, not again for a page that is private");
    assert_eq!(one.private_bytes(), 5 * SMALL_FRAME, "root, three tables, the page");
    assert_eq!(one.copied_pages(), 1);
    assert_eq!(&read::<8>(&one, &pool, LARGE_FRAME + 100), b"tempXYZe");
    assert_eq!(&read::<8>(&other, &pool, LARGE_FRAME + 100), b"template");
    assert_eq!(read::<2>(&one, &pool, 3 * LARGE_FRAME), [3; 2]);
    assert_eq!(is_private(&one, LARGE_FRAME), Some(true));
    assert_eq!(is_private(&one, LARGE_FRAME + SMALL_FRAME), Some(false), "its neighbour is still shared");
    assert_eq!(template.digest(), digest);
    free(one, &pool);
    free(other, &pool);
    assert_eq!((pool.counts(), template.digest()), (free_frames, digest));
    free(template, &pool);
}

#[test]
fn fresh_memory_of_a_clone_comes_in_pieces_that_grow_with_what_it_has() {
    let pool = pool_of(80);
    let template = template(&pool, 512);
    let clone = template.share(&pool).unwrap();
    let before = clone.private_bytes();
    write(&clone, &pool, 8 * LARGE_FRAME, &[1]);
    assert_eq!(clone.private_bytes() - before, 4 * SMALL_FRAME, "a page and its way");
    let mut touched = 0;
    let mut exits = 0;
    for at in (9 * LARGE_FRAME..9 * LARGE_FRAME + (64 << 20)).step_by(SMALL_FRAME as usize) {
        touched += SMALL_FRAME;
        if is_private(&clone, at).is_none() {
            exits += 1;
            assert_eq!(read::<8>(&clone, &pool, at), [0; 8]);
            write(&clone, &pool, at, &[1]);
            assert!(clone.private_bytes() < touched + touched / 2 + 16 * SMALL_FRAME, "at {touched}");
        }
    }
    assert!(exits < 110, "{exits} exits for 64 MiB");
    free(clone, &pool);
    free(template, &pool);
    assert_eq!(std::iter::from_fn(|| pool.large()).count(), 80);
}

#[test]
fn a_clone_of_a_clone_is_as_flat_as_the_first_and_outlives_nothing_it_needs() {
    let pool = pool_of(8);
    let before = pool.counts();
    let mut generations = vec![template(&pool, 16)];
    for depth in 0..6_u8 {
        let clone = generations.last().unwrap().share(&pool).unwrap();
        assert_eq!(clone.private_bytes(), SMALL_FRAME);
        write(&clone, &pool, LARGE_FRAME + u64::from(depth) * SMALL_FRAME, &[depth + 1]);
        assert_eq!(clone.private_bytes(), 5 * SMALL_FRAME, "depth {depth}");
        generations.push(clone);
    }
    let last = generations.last().unwrap();
    for depth in 0..6_u8 {
        assert_eq!(read::<1>(last, &pool, LARGE_FRAME + u64::from(depth) * SMALL_FRAME), [depth + 1]);
    }
    assert_eq!(&read::<8>(&generations[0], &pool, LARGE_FRAME + 100), b"template");
    while let Some(pages) = generations.pop() {
        free(pages, &pool);
    }
    assert_eq!(pool.counts(), before);
}

#[test]
fn what_a_first_clone_copied_is_recorded_and_can_be_copied_ahead_in_the_next() {
    let pool = pool_of(6);
    let template = template(&pool, 16);
    let first = template.share(&pool).unwrap();
    first.start_record();
    write(&first, &pool, LARGE_FRAME, &[1]);
    write(&first, &pool, 3 * LARGE_FRAME + 5 * SMALL_FRAME, &[1]);
    write(&first, &pool, 10 * LARGE_FRAME, &[1]);
    let record = first.take_record();
    assert_eq!(record, [512, 3 * 512 + 5], "memory that the template does not have is not copied");
    let second = template.share(&pool).unwrap();
    for page in &record {
        assert_eq!(second.copy_ahead(*page, &pool), Ok(Change::Moved));
    }
    write(&second, &pool, LARGE_FRAME, &[1]);
    assert_eq!(second.copied_pages(), 0);
    assert!(matches!(second.copy_ahead(u32::MAX, &pool), Err(MemoryError::NotRam { .. })));
    free(first, &pool);
    free(second, &pool);
    free(template, &pool);
}

#[test]
fn copies_grow_with_what_was_copied_so_that_one_that_changes_all_takes_few_exits() {
    let pool = pool_of(40);
    let template = TestPages::new(64 * LARGE_FRAME, &pool).unwrap();
    for at in (0..8 * LARGE_FRAME).step_by(LARGE_FRAME as usize) {
        write(&template, &pool, at, &[1; 8]);
    }
    let clone = template.share(&pool).unwrap();
    for page in 0..120 {
        write(&clone, &pool, page * 3 * SMALL_FRAME, &[2]);
        assert!(clone.private_bytes() <= (page + 12) * SMALL_FRAME, "a page each at first");
    }
    let few = clone.copied_pages();
    for page in 0..8 * 512 {
        write(&clone, &pool, page * SMALL_FRAME, &[2]);
        assert_eq!(read::<1>(&clone, &pool, page * SMALL_FRAME), [2]);
    }
    assert!(clone.copied_pages() - few < 700, "{} exits for 16 MiB", clone.copied_pages() - few);
    free(clone, &pool);
    assert_eq!(read::<2>(&template, &pool, LARGE_FRAME), [1; 2]);
    free(template, &pool);
}

#[test]
fn what_was_promised_to_others_is_not_a_clones() {
    let pool = pool_of(6);
    let template = template(&pool, 16);
    let clone = template.share(&pool).unwrap();
    pool.promise(pool.counts().0);
    let refused = view(&clone, &pool).write(GuestPhysAddr(LARGE_FRAME), &[1]);
    assert_eq!(refused, Err(MemoryError::OutOfFrames));
    write(&template, &pool, 5 * LARGE_FRAME, &[1]);
    pool.promise(pool.counts().0 - 8);
    write(&clone, &pool, LARGE_FRAME, &[1]);
    free(clone, &pool);
    free(template, &pool);
}

#[test]
fn a_clone_that_meets_an_empty_pool_is_told_so_and_gives_back_what_it_has() {
    let pool = pool_of(3);
    let template = template(&pool, 16);
    let before = pool.counts();
    let clone = template.share(&pool).unwrap();
    let hoard: Vec<_> = std::iter::from_fn(|| pool.small()).collect();
    let refused = view(&clone, &pool).write(GuestPhysAddr(LARGE_FRAME), &[1]);
    assert_eq!(refused, Err(MemoryError::OutOfFrames));
    assert_eq!(&read::<8>(&clone, &pool, LARGE_FRAME + 100), b"template");
    hoard.into_iter().for_each(|frame| pool.free_small(frame));
    free(clone, &pool);
    assert_eq!(pool.counts(), before);
    free(template, &pool);
}
