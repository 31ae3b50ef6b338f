//! Jobs in clones of a template.

use nestling::bed::{Bed, BedBuilder, RunningBed};
use nestling::client::Streams;
use nestling::client::types::{Conclusion, JobRequest, MachineConfig, Template};
use nestling_tests::disk::{NAME, bundle, drive, file_system};
use nestling_tests::job::{create, job, run, wait, wait_until, warm_up};
use nestling_tests::node::{memory, ready};
use std::time::{SystemTime, UNIX_EPOCH};

fn template(node: &RunningBed) -> Template {
    let list = node.client().templates().unwrap();
    assert_eq!(list.total_count, 1, "{list:?}");
    list.templates.into_iter().next().unwrap()
}

fn log(node: &RunningBed, id: &str) -> String {
    String::from_utf8(node.client().log(id, Streams::Stdout).unwrap()).unwrap()
}

#[test]
fn the_first_job_makes_a_template_and_the_next_begins_in_a_clone_of_it() {
    let node = ready(Bed::builder());
    assert_eq!(node.client().templates().unwrap().total_count, 0);
    let first = run(&node, &job("echo first"));
    assert_eq!((&*first.stdout, first.job.conclusion), (&b"first\n"[..], Some(Conclusion::Success)));
    assert!(first.job.timings.cloned_ms.is_some(), "{:?}", first.job.timings);
    let second = run(&node, &job("echo second; cat /proc/uptime"));
    assert_eq!(second.job.conclusion, Some(Conclusion::Success), "{second:?}");
    assert!(second.stdout.starts_with(b"second\n"));
    let (one, two) = (first.job.timings, second.job.timings);
    assert!(two.first_output_ms.unwrap() * 4 < one.first_output_ms.unwrap(), "{one:?} {two:?}");
    let template = template(&node);
    assert_eq!((template.image.as_str(), template.clones_made, template.clones_alive), ("minimal", 2, 0));
    println!("{template:?} {one:?} {two:?} {:?}", second.job.memory);
    let cold = run(&node, &JobRequest { cold: true, ..job("echo cold") });
    assert_eq!((&*cold.stdout, cold.job.timings.cloned_ms), (&b"cold\n"[..], None));
    let other = JobRequest {
        machine_config: Some(MachineConfig { mem_size_mib: 128, ..MachineConfig::default() }),
        ..job("echo other")
    };
    assert_eq!(&*run(&node, &other).stdout, b"other\n");
    assert_eq!(node.client().templates().unwrap().total_count, 2, "one for each shape");
}

/// A node that looks at every byte of a template when a clone has ended.
fn checked() -> BedBuilder {
    Bed::builder().append("check_templates=on")
}

#[test]
fn clones_see_neither_each_others_memory_nor_their_templates_and_leave_nothing_behind() {
    let node = ready(checked());
    assert_eq!(run(&node, &job("true")).job.conclusion, Some(Conclusion::Success));
    let with_template = memory(&node).free_frames;
    // Files in memory, and 24 MiB that the template never had.
    let script = |word: &str| {
        format!(
            "ls /tmp; echo {word} > /tmp/word; head -c 25165824 /dev/zero | tr '\\0' {letter} > /tmp/much; sleep 1; cat /tmp/word; \
             tr -d {letter} < /tmp/much | wc -c",
            letter = &word[..1]
        )
    };
    let jobs = ["one", "two", "three"].map(|word| (word, create(&node, &job(&script(word))).id));
    for (word, id) in jobs {
        let job = wait(&node, &id);
        assert_eq!(job.conclusion, Some(Conclusion::Success), "{job:?}");
        assert_eq!(log(&node, &id), format!("{word}\n0\n"));
        assert!(job.memory.peak_mib.unwrap() >= 24, "{:?}", job.memory);
    }
    assert_eq!(memory(&node).free_frames, with_template);
    let log = node.serial_log();
    assert_eq!(log.matches("template unchanged").count(), 4, "{log}");
    assert!(!log.contains("template changed"), "{log}");
    assert_eq!(template(&node).clones_alive, 0);
}

#[test]
fn clones_draw_random_bytes_of_their_own_and_know_the_time() {
    let node = ready(Bed::builder());
    // What the kernel gives by its file, to a new process by getrandom (mktemp's name), and as identifiers.
    let script = "head -c 32 /dev/urandom | od -An -tx1; mktemp -u; cat /proc/sys/kernel/random/uuid; date +%s; cut -d. -f1 /proc/uptime";
    let drawn: Vec<_> = (0..4)
        .map(|_| {
            let finished = run(&node, &job(script));
            assert!(finished.job.timings.cloned_ms.is_some());
            String::from_utf8(finished.stdout).unwrap()
        })
        .collect();
    let mut words: Vec<_> = drawn.iter().flat_map(|text| text.lines().take(4)).collect();
    assert_eq!(words.len(), 16, "{drawn:?}");
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), 16, "two clones drew the same: {drawn:?}");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for text in &drawn {
        let time: u64 = text.lines().nth(4).unwrap().parse().unwrap();
        // The node's clock came from its firmware's, in whole seconds, and an emulated one drifts.
        assert!(time.abs_diff(now) < 600, "{time} at {now}");
    }
}

#[test]
fn clones_of_several_vcpus_go_on_with_all_of_them_on_any_core() {
    let node = ready(checked().cores(2));
    let request = |script: &str| JobRequest {
        machine_config: Some(MachineConfig { vcpu_count: 2, ..MachineConfig::default() }),
        ..job(script)
    };
    let script = "nproc; for i in 1 2 3 4; do (n=0; while [ $n -lt 3000 ]; do n=$((n+1)); done; echo $n > /tmp/$i) & done; wait; cat /tmp/[1-4]";
    for _ in 0..3 {
        let finished = run(&node, &request(script));
        assert_eq!(String::from_utf8_lossy(&finished.stdout), "2\n3000\n3000\n3000\n3000\n", "{finished:?}");
        assert!(finished.job.timings.cloned_ms.is_some());
    }
    assert_eq!(template(&node).clones_made, 3);
}

#[test]
fn twenty_clones_at_once_do_their_work() {
    let node = ready(checked().cores(2).append("vcpus_per_core=16 clone_reserve_mib=16"));
    run(&node, &job("true"));
    let before = memory(&node).free_frames;
    let jobs: Vec<_> =
        (0..20).map(|number| create(&node, &job(&format!("echo {number}; sleep 3"))).id).collect();
    wait_until(&node, &jobs[19], |job| job.timings.first_output_ms.is_some());
    let figures = template(&node);
    assert!(figures.clones_alive >= 10, "{figures:?}");
    for (number, id) in jobs.iter().enumerate() {
        assert_eq!(wait(&node, id).conclusion, Some(Conclusion::Success));
        assert_eq!(log(&node, id), format!("{number}\n"));
    }
    assert_eq!(memory(&node).free_frames, before);
    assert!(!node.serial_log().contains("template changed"));
}

#[test]
fn clones_write_to_their_own_disks() {
    let path = std::env::temp_dir().join(format!("nestling-clones-{}.tar", std::process::id()));
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    let store = bundle(&path, &minimal, &file_system(16, 2), 64);
    let node = ready(checked().no_image().qemu_args(drive(&store)));
    let script = |word: &str| JobRequest {
        image: Some(NAME.into()),
        ..job(&format!(
            "mount -t ext4 /dev/vda /mnt; ls /mnt | grep -c mark || true; echo {word} > /mnt/mark-{word}; sync; \
             head -c 8388608 /dev/urandom > /mnt/much; sync; sleep 1; echo 3 > /proc/sys/vm/drop_caches; ls /mnt | grep mark; cat /mnt/mark-*"
        ))
    };
    run(&node, &script("first"));
    let jobs = ["one", "two"].map(|word| (word, create(&node, &script(word)).id));
    for (word, id) in jobs {
        let job = wait(&node, &id);
        assert!(job.timings.cloned_ms.is_some());
        assert_eq!(log(&node, &id), format!("0\nmark-{word}\n{word}\n"), "{job:?}");
    }
}

#[test]
fn a_clone_that_finds_no_memory_ends_with_that_reason_and_one_that_boots_has_its_own() {
    let node = ready(checked().memory_mib(640).cores(2).append("clone_reserve_mib=8"));
    let with = |script: &str| JobRequest {
        machine_config: Some(MachineConfig { mem_size_mib: 256, ..MachineConfig::default() }),
        ..job(script)
    };
    warm_up(&node, &with("true"));
    let before = memory(&node).free_frames;
    let fill = "head -c 94371840 /dev/zero > /tmp/much; echo full; sleep 20";
    let cold = create(
        &node,
        &JobRequest { cold: true, ..with("sleep 5; head -c 83886080 /dev/zero > /tmp/much; echo full") },
    )
    .id;
    let clones = [0, 1, 2].map(|_| create(&node, &with(fill)).id);
    let ends = clones.map(|id| wait(&node, &id));
    let failed = ends.iter().filter(|job| job.conclusion == Some(Conclusion::SystemFailure));
    let reasons: Vec<_> = failed.map(|job| job.failure_reason.clone().unwrap()).collect();
    assert!(!reasons.is_empty(), "{ends:?}");
    assert!(reasons.iter().all(|reason| reason.contains("no free memory left")), "{reasons:?}");
    let cold = wait(&node, &cold);
    assert_eq!(cold.conclusion, Some(Conclusion::Success), "{cold:?}");
    assert_eq!(memory(&node).free_frames, before);
    assert_eq!(&*run(&node, &with("echo fine")).stdout, b"fine\n");
    assert!(!node.serial_log().contains("template changed"));
}

#[test]
fn a_hundred_clones_of_512_mib_are_there_at_once_on_a_node_of_2_gib() {
    let append = "vcpus_per_core=64 clone_reserve_mib=8";
    let node = ready(Bed::builder().memory_mib(2048).cores(2).append(append));
    let request = |script: &str| JobRequest {
        machine_config: Some(MachineConfig { mem_size_mib: 512, ..MachineConfig::default() }),
        ..job(script)
    };
    warm_up(&node, &request("true"));
    warm_up(&node, &request("true"));
    let before = memory(&node);
    let jobs: Vec<_> =
        (0..100).map(|number| create(&node, &request(&format!("echo {number}; sleep 1000"))).id).collect();
    for (number, id) in jobs.iter().enumerate() {
        wait_until(&node, id, |job| job.timings.first_output_ms.is_some());
        assert_eq!(log(&node, id), format!("{number}\n"));
    }
    let during = memory(&node);
    assert_eq!(template(&node).clones_alive, 100);
    let each = (before.free_frames - during.free_frames) * 4 / 100;
    println!(
        "a clone that runs a shell: {each} KiB; free {} MiB of {}",
        during.free_frames / 256,
        during.total_frames / 256
    );
    assert!(each < 4096, "{each} KiB each");
    for id in &jobs {
        node.client().cancel(id).unwrap();
    }
    for id in &jobs {
        assert_eq!(wait(&node, id).conclusion, Some(Conclusion::Cancelled));
    }
    assert_eq!(memory(&node).free_frames, before.free_frames);
}

/// With `-icount` a tick of the time-stamp counter is an instruction.
#[test]
#[ignore = "prints figures"]
fn figures() {
    for (mem_size_mib, counts) in [(256, true), (1024, true), (256, false), (1024, false)] {
        let count: &[&str] = if counts { &["-icount", "shift=0"] } else { &[] };
        let bed = Bed::builder().memory_mib(3072).append("log=debug").qemu_args(count.iter().copied());
        let node = ready(bed);
        let request = |script: &str| JobRequest {
            machine_config: Some(MachineConfig { mem_size_mib, ..MachineConfig::default() }),
            ..job(script)
        };
        let firsts: Vec<_> = (0..12).map(|_| run(&node, &request("echo hi")).job).collect();
        let timings: Vec<_> = firsts.iter().map(|job| job.timings.first_output_ms.unwrap()).collect();
        let exits: Vec<_> = firsts.iter().map(|job| job.exits["ram_fault"]).collect();
        println!(
            "{mem_size_mib} MiB: first output {timings:?} ms, ram faults {exits:?}, {:?}",
            template(&node)
        );
        let idle = memory(&node);
        let job = create(&node, &request("sleep 5"));
        wait_until(&node, &job.id, |job| job.timings.agent_ready_ms.is_some());
        let busy = memory(&node);
        println!(
            "a clone in sleep: {} KiB, heap {} KiB",
            (idle.free_frames - busy.free_frames) * 4,
            busy.heap_used_bytes.saturating_sub(idle.heap_used_bytes) >> 10
        );
        let log = node.serial_log();
        log.lines()
            .filter(|line| line.contains("clone:") || line.contains("tsc"))
            .for_each(|line| println!("{line}"));
    }
}

#[test]
#[ignore = "prints figures"]
fn figures_of_writing() {
    let node = ready(Bed::builder().cores(2));
    let script = "for i in 1 2; do s=$(cut -d' ' -f1 /proc/uptime); head -c 83886080 /dev/zero > /tmp/x; e=$(cut -d' ' -f1 /proc/uptime); rm /tmp/x; echo $s $e; done";
    for cold in [false, false, true] {
        let finished = run(&node, &JobRequest { cold, ..job(script) });
        println!(
            "cold {cold}: {} {:?}",
            String::from_utf8_lossy(&finished.stdout).replace('\n', "; "),
            finished.job.exits
        );
    }
}
