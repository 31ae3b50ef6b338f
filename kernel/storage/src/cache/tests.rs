use super::*;
use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::vec;
use proptest::prelude::*;

const LINE: u64 = LINE_BYTES as u64;

fn cache(disk_bytes: u64, lines: usize) -> BlockCache {
    BlockCache::new(
        disk_bytes,
        (0..lines).map(|_| &mut *Box::leak(vec![0xA5; LINE_BYTES].into_boxed_slice())),
    )
}

/// What the disk holds at a position: its sector's number.
fn content(at: u64) -> u8 {
    (at / 512 % 251) as u8
}

fn fill(fetch: &mut Fetch) {
    for (offset, byte) in fetch.buffer[..fetch.bytes].iter_mut().enumerate() {
        *byte = content(fetch.at + offset as u64);
    }
}

/// Serves everything that is wanted; returns the positions.
fn serve(cache: &mut BlockCache) -> Vec<u64> {
    let mut served = Vec::new();
    while let Some(mut fetch) = cache.next_fetch() {
        fill(&mut fetch);
        served.push(fetch.at);
        cache.filled(fetch.line, Some(fetch.buffer), Ok(()));
    }
    served
}

fn is_hit(cache: &mut BlockCache, at: u64) -> bool {
    matches!(cache.read(at, 1), Lookup::Hit(_))
}

#[test]
fn a_line_is_fetched_once_for_all_who_wait_for_it_and_then_read_from_memory() {
    let mut cache = cache(10 * LINE, 8);
    assert_eq!(cache.read(5 * LINE + 512, 4096), Lookup::Miss);
    assert_eq!(cache.read(5 * LINE, 512), Lookup::Miss);
    assert!(cache.is_waiting());
    assert_eq!(serve(&mut cache), [5 * LINE]);
    assert!(!cache.is_waiting());
    let Lookup::Hit(bytes) = cache.read(5 * LINE + 512, 4096) else { panic!() };
    let wanted: Vec<u8> = (0..4096).map(|offset| content(5 * LINE + 512 + offset)).collect();
    assert_eq!(bytes, wanted);
    assert_eq!(serve(&mut cache), []);
}

#[test]
fn a_read_ends_at_its_lines_end_and_the_last_line_at_the_disks() {
    let mut cache = cache(LINE + 1024, 8);
    (0..2).for_each(|line| assert_eq!(cache.read(line * LINE, 1), Lookup::Miss));
    serve(&mut cache);
    let mut length = |at, length| match cache.read(at, length) {
        Lookup::Hit(bytes) => bytes.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(length(LINE - 512, 4096), 512);
    assert_eq!(length(LINE + 512, 4096), 512);
    assert!(matches!(cache.read(LINE + 1024, 512), Lookup::Failed(_)));
}

#[test]
fn a_sequential_reader_finds_its_next_lines_fetched_and_a_random_one_fetches_nothing_ahead() {
    let mut cache = cache(1000 * LINE, 64);
    for line in [500, 20, 300, 7] {
        assert_eq!(cache.read(line * LINE, 1), Lookup::Miss);
        assert_eq!(serve(&mut cache).len(), 1);
    }
    let mut misses = 0;
    for line in 100..160 {
        for part in 0..16 {
            if !is_hit(&mut cache, line * LINE + part * 4096) {
                misses += 1;
            }
            serve(&mut cache);
        }
    }
    assert_eq!(misses, 2, "the first line, and the one that shows that there is a sequence");
    assert!(serve(&mut cache).is_empty());
}

#[test]
fn the_line_that_was_not_read_for_long_is_replaced() {
    let mut cache = cache(1000 * LINE, 8);
    let lines: Vec<u64> = (0..8).map(|line| line * 10).collect();
    for line in &lines {
        cache.read(line * LINE, 1);
    }
    serve(&mut cache);
    // Everything was read since the hand last passed; it takes the mark from all and then the first.
    cache.read(500 * LINE, 1);
    serve(&mut cache);
    let kept: Vec<u64> = lines[1..7].to_vec();
    kept.iter().for_each(|line| assert!(is_hit(&mut cache, line * LINE)));
    cache.read(600 * LINE, 1);
    serve(&mut cache);
    kept.iter().for_each(|line| assert!(is_hit(&mut cache, line * LINE), "line {line} is in use"));
    assert!(!is_hit(&mut cache, 70 * LINE), "the one that was not");
}

#[test]
fn a_failure_is_told_once_and_tried_again() {
    let mut cache = cache(10 * LINE, 4);
    cache.read(0, 1);
    let fetch = cache.next_fetch().unwrap();
    cache.filled(fetch.line, Some(fetch.buffer), Err("the disk is broken".into()));
    assert_eq!(cache.read(0, 1), Lookup::Failed("the disk is broken".into()));
    assert_eq!(cache.read(0, 1), Lookup::Miss);
    assert_eq!(serve(&mut cache), [0]);
    assert!(is_hit(&mut cache, 0));
}

#[test]
fn a_line_whose_buffer_was_lost_is_never_used_again() {
    let mut cache = cache(100 * LINE, 2);
    cache.read(0, 1);
    let fetch = cache.next_fetch().unwrap();
    cache.filled(fetch.line, None, Err("no answer".into()));
    assert_eq!(cache.read(0, 1), Lookup::Failed("no answer".into()));
    for line in 1..50 {
        assert_eq!(cache.read(line * 2 * LINE, 1), Lookup::Miss);
        assert_eq!(serve(&mut cache).len(), 1);
        assert!(is_hit(&mut cache, line * 2 * LINE));
        assert!(cache.filled_bytes() <= LINE);
    }
}

#[test]
fn with_all_lines_under_way_a_read_waits_and_a_fetch_that_was_put_back_comes_first() {
    let mut cache = cache(100 * LINE, 2);
    [10, 20, 30].iter().for_each(|line| assert_eq!(cache.read(line * LINE, 1), Lookup::Miss));
    let first = cache.next_fetch().unwrap();
    cache.put_back(first);
    assert_eq!(serve(&mut cache), [10 * LINE, 20 * LINE]);
    assert_eq!(cache.read(30 * LINE, 1), Lookup::Miss);
    assert_eq!(serve(&mut cache), [30 * LINE]);
}

#[test]
fn what_was_written_meanwhile_is_fetched_again() {
    let mut cache = cache(100 * LINE, 8);
    [0, 10, 20].iter().for_each(|line| assert_eq!(cache.read(line * LINE, 1), Lookup::Miss));
    let late = cache.next_fetch().unwrap();
    serve(&mut cache);
    cache.invalidate(0, 10 * LINE + 1);
    cache.filled(late.line, Some(late.buffer), Ok(()));
    assert!(!is_hit(&mut cache, 0) && !is_hit(&mut cache, 10 * LINE));
    assert!(is_hit(&mut cache, 20 * LINE));
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64),
    Start,
    Finish(u8, bool),
    Invalidate(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..12 * LINE / 512, 1..200_u64).prop_map(|(sector, sectors)| Step::Read(sector * 512, sectors * 512)),
        3 => Just(Step::Start),
        3 => (any::<u8>(), any::<bool>()).prop_map(|(which, ok)| Step::Finish(which, ok)),
        1 => (0..12 * LINE, 1..3 * LINE).prop_map(|(at, length)| Step::Invalidate(at, length)),
    ]
}

proptest! {
    #[test]
    fn it_gives_what_the_disk_has_and_never_more_lines_than_it_has_buffers(
        steps in prop::collection::vec(step(), 0..300),
        lines in 1..6_usize,
    ) {
        let mut cache = cache(12 * LINE - 1024, lines);
        let mut flying: Vec<Fetch> = Vec::new();
        for step in steps {
            match step {
                Step::Read(at, length) => {
                    if let Lookup::Hit(bytes) = cache.read(at, length) {
                        prop_assert!(!bytes.is_empty() && bytes.len() as u64 <= length);
                        let right = bytes.iter().enumerate().all(|(offset, byte)| *byte == content(at + offset as u64));
                        prop_assert!(right, "at {}", at);
                    }
                }
                Step::Start => flying.extend(cache.next_fetch()),
                Step::Finish(which, ok) if !flying.is_empty() => {
                    let mut fetch = flying.swap_remove(usize::from(which) % flying.len());
                    fill(&mut fetch);
                    cache.filled(fetch.line, Some(fetch.buffer), if ok { Ok(()) } else { Err("no".into()) });
                }
                Step::Finish(..) => {}
                Step::Invalidate(at, length) => cache.invalidate(at, length),
            }
            prop_assert!(cache.filled_bytes() <= lines as u64 * LINE);
            prop_assert!(flying.len() <= lines);
            let mut places = BTreeSet::new();
            prop_assert!(flying.iter().all(|fetch| places.insert(fetch.at)), "no line is fetched twice at once");
        }
        // Whatever has happened, what is wanted comes.
        while let Some(fetch) = flying.pop() {
            cache.filled(fetch.line, Some(fetch.buffer), Ok(()));
        }
        cache.invalidate(0, 12 * LINE);
        serve(&mut cache);
        cache.read(3 * LINE, 1);
        cache.read(3 * LINE, 1);
        serve(&mut cache);
        prop_assert!(is_hit(&mut cache, 3 * LINE));
    }
}
