//! Host tests of the kernel's parts that need no hardware. The kernel itself is built for a target without a test harness, so its
//! files are taken in by path.
#![allow(dead_code, reason = "the kernel uses what these tests do not")]

extern crate alloc;

#[path = "../../../kernel/src/boot/command_line.rs"]
mod command_line;

/// Where the kernel's files look for it.
mod boot {
    pub use super::command_line::CommandLine;
}

#[path = "../../../kernel/src/memory"]
mod memory {
    pub mod frames;
}

#[path = "../../../kernel/src/hypervisor"]
mod hypervisor {
    pub mod exit;
    pub mod nested;
    pub mod pages;
    pub mod ram;
    pub mod refusal;
    pub mod schedule;
    pub mod settings;
    pub mod svm {
        pub mod features;
    }
}

#[path = "kernel_paging/mod.rs"]
mod paging;

use command_line::CommandLine;
use hypervisor::svm::features::{check, feature};
use memory::frames::{FramePool, LARGE_FRAME, SMALL_FRAME, SMALL_PER_LARGE};

/// Memory that stays allocated: the pool believes that it owns it for ever.
fn pool_of(large_frames: usize) -> FramePool {
    let layout =
        std::alloc::Layout::from_size_align(large_frames * LARGE_FRAME as usize, LARGE_FRAME as usize)
            .unwrap();
    // SAFETY: the layout is not empty, and every byte is initialised below.
    let start = unsafe { std::alloc::alloc(layout) };
    assert!(!start.is_null());
    // SAFETY: just allocated with this size. Rubbish in it shows whether frames are zeroed.
    unsafe { std::ptr::write_bytes(start, 0xA5, layout.size()) };
    let mut pool = FramePool::new();
    pool.add(start as u64, start as u64 + layout.size() as u64);
    pool
}

fn is_zero(address: u64, bytes: u64) -> bool {
    // SAFETY: the address comes from a pool made by `pool_of`.
    let content = unsafe { std::slice::from_raw_parts(address as *const u8, bytes as usize) };
    content.iter().all(|byte| *byte == 0)
}

fn soil(address: u64, bytes: u64) {
    // SAFETY: the address comes from a pool made by `pool_of`.
    unsafe { std::ptr::write_bytes(address as *mut u8, 0x5A, bytes as usize) };
}

#[test]
fn frames_are_zero_when_they_are_handed_out_however_they_came_back() {
    let pool = pool_of(3);
    for round in 0..4 {
        let large = pool.large().unwrap();
        let small = pool.small().unwrap();
        assert!(
            is_zero(large.address(), LARGE_FRAME) && is_zero(small.address(), SMALL_FRAME),
            "round {round}"
        );
        soil(large.address(), LARGE_FRAME);
        soil(small.address(), SMALL_FRAME);
        pool.free_large(large);
        pool.free_small(small);
        if round % 2 == 0 {
            while pool.clean_one() {}
        }
    }
}

#[test]
fn every_frame_that_was_taken_is_counted_and_comes_back() {
    let pool = pool_of(4);
    let all = (4 * SMALL_PER_LARGE, 4 * SMALL_PER_LARGE);
    assert_eq!(pool.counts(), all);
    let small: Vec<_> = std::iter::from_fn(|| pool.small()).take(SMALL_PER_LARGE + 7).collect();
    assert_eq!(pool.counts().0, all.0 - SMALL_PER_LARGE - 7);
    let large: Vec<_> = std::iter::from_fn(|| pool.large()).collect();
    assert_eq!(large.len(), 2, "two of four large frames were split");
    small.into_iter().for_each(|frame| pool.free_small(frame));
    large.into_iter().for_each(|frame| pool.free_large(frame));
    assert_eq!(pool.counts(), all);
    assert_eq!(std::iter::from_fn(|| pool.large()).count(), 4, "split frames are whole again");
}

#[test]
fn memory_that_is_carved_out_is_in_one_piece_and_never_handed_out_again() {
    let mut pool = pool_of(6);
    let held = pool.large().unwrap();
    while pool.clean_one() {}
    let carved = pool.carve(LARGE_FRAME + 1).unwrap();
    assert_eq!(carved.len() as u64, 2 * LARGE_FRAME);
    carved.fill(1);
    assert_eq!(pool.counts(), (3 * SMALL_PER_LARGE, 4 * SMALL_PER_LARGE));
    assert!(
        pool.carve(4 * LARGE_FRAME).is_none() && pool.carve(0).is_none() && pool.carve(u64::MAX).is_none()
    );
    let rest: Vec<_> = std::iter::from_fn(|| pool.large()).collect();
    assert_eq!(rest.len(), 3);
    assert!(rest.iter().all(|frame| !carved.as_ptr_range().contains(&(frame.address() as *const u8))));
    assert!(carved.iter().all(|byte| *byte == 1));
    rest.into_iter().chain([held]).for_each(|frame| pool.free_large(frame));
    assert_eq!(pool.counts().0, 4 * SMALL_PER_LARGE);
}

#[test]
fn thousands_of_small_frames_come_and_go_in_any_order_and_none_is_lost() {
    let pool = pool_of(8);
    let all = pool.counts();
    let mut random = 1_u64;
    let mut held = Vec::new();
    for _ in 0..20_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if random >> 63 == 0 || held.is_empty() {
            held.extend(pool.small());
        } else {
            pool.free_small(held.swap_remove((random >> 33) as usize % held.len()));
        }
        assert_eq!(pool.counts().0 + held.len(), all.0);
    }
    held.into_iter().for_each(|frame| pool.free_small(frame));
    assert_eq!(pool.counts(), all);
    assert_eq!(std::iter::from_fn(|| pool.large()).count(), 8, "split frames are whole again");
}

#[test]
fn a_frame_that_was_filled_holds_that_and_nothing_else() {
    let pool = pool_of(1);
    let copy = pool.unfilled().unwrap().copy(&[7; SMALL_FRAME as usize]);
    let words = pool.unfilled().unwrap().fill(|index| index as u64);
    // SAFETY: both frames are the pool's, a page long.
    let (copied, filled) = unsafe {
        (
            std::slice::from_raw_parts(copy.address() as *const u8, SMALL_FRAME as usize),
            std::slice::from_raw_parts(words.address() as *const u64, SMALL_FRAME as usize / 8),
        )
    };
    assert!(copied.iter().all(|byte| *byte == 7));
    assert!(filled.iter().enumerate().all(|(index, word)| *word == index as u64));
    pool.free_small(copy);
    pool.free_small(words);
}

#[test]
fn an_empty_pool_refuses_and_no_two_owners_share_a_frame() {
    let pool = pool_of(1);
    let frames: Vec<_> = std::iter::from_fn(|| pool.small()).collect();
    assert_eq!(frames.len(), SMALL_PER_LARGE);
    assert!(pool.small().is_none() && pool.large().is_none());
    let mut addresses: Vec<_> = frames.iter().map(|frame| frame.address()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), SMALL_PER_LARGE);
    frames.into_iter().for_each(|frame| pool.free_small(frame));
}

const MAX_LEAF: u32 = 0x8000_000A;
const SVM: u32 = 1 << 2;

#[test]
fn svm_that_the_firmware_disabled_and_locked_is_refused_with_the_cure() {
    let refusal = check(MAX_LEAF, SVM, feature::NESTED_PAGING, 1 << 4 | 1 << 3).unwrap_err().to_string();
    assert!(
        refusal.contains("locked by the firmware") && refusal.contains("enable SVM (AMD-V)"),
        "{refusal}"
    );
    let unlocked = check(MAX_LEAF, SVM, feature::NESTED_PAGING, 1 << 4).unwrap_err().to_string();
    assert!(unlocked.contains("disabled") && !unlocked.contains("locked"), "{unlocked}");
}

#[test]
fn a_cpu_without_svm_or_nested_paging_is_refused_with_the_cure() {
    for (max_leaf, ecx) in [(0x8000_0008, SVM), (MAX_LEAF, 0)] {
        let refusal = check(max_leaf, ecx, u32::MAX, 0).unwrap_err().to_string();
        assert!(refusal.contains("nested virtualization"), "{refusal}");
    }
    let refusal = check(MAX_LEAF, SVM, !feature::NESTED_PAGING, 0).unwrap_err().to_string();
    assert!(refusal.contains("nested paging"), "{refusal}");
    assert!(check(MAX_LEAF, SVM, feature::NESTED_PAGING, 0).is_ok());
}

#[test]
fn the_last_of_several_values_on_the_command_line_counts() {
    let line = CommandLine::new("token=a  ip=dhcp token=b quiet =x");
    assert_eq!(line.value("token"), Some("b"));
    assert_eq!(line.value("ip"), Some("dhcp"));
    assert_eq!(line.value("quiet"), None);
    assert_eq!(line.words().count(), 5);
}

#[test]
fn an_exit_that_was_a_ram_fault_is_counted_once() {
    use hypervisor::exit::{ExitCounters, MMIO, RAM_FAULT};
    let counters = ExitCounters::default();
    counters.count(MMIO);
    counters.count(MMIO);
    counters.recount(MMIO, RAM_FAULT);
    assert_eq!(counters.counts().iter().collect::<Vec<_>>(), [("ram_fault", 1), ("mmio", 1)]);
}

#[test]
fn the_command_line_bounds_cores_and_vcpus_and_what_is_no_number_is_refused() {
    use hypervisor::settings::Settings;
    let read = |line| Settings::read(&CommandLine::new(line));
    let usual =
        Settings { cores: usize::MAX, vcpus_per_core: 4, clone_reserve_bytes: None, check_templates: false };
    assert_eq!(read("log=info"), Ok(usual));
    assert_eq!(read("cores=2 vcpus_per_core=64"), Ok(Settings { cores: 2, vcpus_per_core: 64, ..usual }));
    assert_eq!(read("clone_reserve_mib=8"), Ok(Settings { clone_reserve_bytes: Some(8 << 20), ..usual }));
    assert_eq!(read("check_templates=on"), Ok(Settings { check_templates: true, ..usual }));
    for line in [
        "cores=0",
        "cores=",
        "cores=two",
        "vcpus_per_core=0",
        "vcpus_per_core=65",
        "vcpus_per_core=-1",
        "clone_reserve_mib=0",
    ] {
        let error = read(line).unwrap_err();
        assert!(error.contains(line), "{error}");
    }
}

mod scheduling {
    use super::hypervisor::schedule::{Entity, LEAST_NS, SLICE_NS, Wants, choose, place};

    const fn entity(ran_ns: u64, wants: Wants) -> Entity {
        Entity { ran_ns, wants }
    }

    /// Lets a core run `vcpus`, all of which always want to, for `turns`: how long each has run.
    fn run(vcpus: &mut [Entity], turns: usize) {
        let mut floor = 0;
        for _ in 0..turns {
            let choice = choose(vcpus.iter().copied(), &mut floor).unwrap();
            vcpus[choice.index].ran_ns = choice.ran_ns + choice.slice_ns.unwrap_or(SLICE_NS);
        }
    }

    #[test]
    fn vcpus_that_share_a_core_get_equal_parts_of_it() {
        let mut vcpus = [entity(0, Wants::Run); 3];
        run(&mut vcpus, 1000);
        let ran = vcpus.map(|vcpu| vcpu.ran_ns);
        let (least, most) = (*ran.iter().min().unwrap(), *ran.iter().max().unwrap());
        assert!(most - least <= 2 * SLICE_NS && least >= 300 * SLICE_NS, "{vcpus:?}");
    }

    #[test]
    fn one_alone_runs_without_an_end() {
        let mut floor = 0;
        let resting = entity(0, Wants::Rest { until: Some(7) });
        let choice = choose([resting, entity(9, Wants::Run)].into_iter(), &mut floor).unwrap();
        assert_eq!((choice.index, choice.slice_ns, choice.next_wake_ns), (1, None, Some(7)));
        assert!(choose([resting].into_iter(), &mut floor).is_none());
    }

    #[test]
    fn one_that_wakes_after_a_rest_comes_first_and_has_saved_up_no_more_than_a_slice() {
        let mut floor = 1000 * SLICE_NS;
        let busy = entity(floor + 1, Wants::Run);
        let woken = entity(3, Wants::Wake);
        let choice = choose([busy, woken].into_iter(), &mut floor).unwrap();
        assert_eq!((choice.index, choice.ran_ns), (1, 999 * SLICE_NS));
        assert!(choice.slice_ns.unwrap() <= 3 * SLICE_NS);
    }

    #[test]
    fn one_that_wakes_all_the_time_does_not_keep_others_from_running() {
        let mut floor = 0;
        let mut vcpus = [entity(0, Wants::Run), entity(0, Wants::Wake), entity(0, Wants::Wake)];
        for _ in 0..3000 {
            let choice = choose(vcpus.iter().copied(), &mut floor).unwrap();
            let runs_for = if choice.index == 0 { choice.slice_ns.unwrap() } else { LEAST_NS };
            vcpus[choice.index].ran_ns = choice.ran_ns + runs_for;
        }
        let [busy, one, other] = vcpus.map(|vcpu| vcpu.ran_ns);
        assert!(busy.abs_diff(one) <= 3 * SLICE_NS && busy.abs_diff(other) <= 3 * SLICE_NS, "{vcpus:?}");
    }

    #[test]
    fn a_change_of_vcpu_is_not_made_too_often() {
        let mut floor = 0;
        let far_ahead = entity(100 * SLICE_NS, Wants::Run);
        let choice = choose([far_ahead, entity(100 * SLICE_NS, Wants::Run)].into_iter(), &mut floor).unwrap();
        assert!(choice.slice_ns.unwrap() >= LEAST_NS);
    }

    #[test]
    fn a_new_vcpu_goes_where_the_fewest_are_and_to_the_services_core_last() {
        assert_eq!(place([0].into_iter()), 0);
        let mut loads = [0_usize; 3];
        let mut order = Vec::new();
        for _ in 0..7 {
            let core = place(loads.iter().copied());
            loads[core] += 1;
            order.push(core);
        }
        assert_eq!(order, [1, 2, 0, 1, 2, 0, 1]);
    }
}
