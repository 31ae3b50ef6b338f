//! Machines with a disk, from images on the node's own disk.

use nestling::bed::{Bed, BedBuilder};
use nestling::client::types::{Conclusion, Job, JobRequest, MachineConfig};
use nestling_tests::disk::{NAME, SUMS, bundle, drive, file_system, partitioned, writable_drive};
use nestling_tests::job::{create, job, run, wait, warm_up};
use nestling_tests::node::{Shared, memory, ready};
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

const MIB: usize = 1 << 20;

/// The images' file system: 48 MiB, 12 of them data.
static FILE_SYSTEM: LazyLock<Vec<u8>> = LazyLock::new(|| file_system(48, 12));
static NODE: Shared = Shared::new(node);

/// A bundle for this process's nodes, which read it as long as they run.
fn store(name: &str, disk: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("nestling-disk-{name}-{}.tar", std::process::id()));
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    bundle(&path, &minimal, disk, 256)
}

/// A node with its images on a disk and nowhere else.
fn node() -> BedBuilder {
    Bed::builder().no_image().qemu_args(drive(&store("shared", &FILE_SYSTEM)))
}

/// A job in the image with a disk.
fn on_disk(script: &str) -> JobRequest {
    JobRequest { image: Some(NAME.into()), ..job(script) }
}

/// A job in the image with a disk that has so much free space.
fn with_space(script: &str, disk_size_mib: u32) -> JobRequest {
    let machine_config = MachineConfig { disk_size_mib: Some(disk_size_mib), ..MachineConfig::default() };
    JobRequest { machine_config: Some(machine_config), ..on_disk(script) }
}

/// What a job printed, if it succeeded.
#[track_caller]
fn output_of(request: &JobRequest) -> String {
    let finished = run(NODE.get(), request);
    let output = String::from_utf8_lossy(&finished.stdout).into_owned();
    let error = String::from_utf8_lossy(&finished.stderr).into_owned();
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{:?}\n{output}\n{error}", finished.job);
    output
}

#[test]
fn images_on_a_disk_are_listed_and_run() {
    let images = NODE.get().client().images().unwrap().images;
    let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
    assert_eq!(names, [NAME, "minimal"]);
    assert!(images[0].size_bytes > images[1].size_bytes + 32 * MIB as u64);
    let finished = run(NODE.get(), &job("ls /sys/block"));
    assert_eq!(String::from_utf8_lossy(&finished.stdout), "", "minimal has no disk");
}

#[test]
fn a_machine_finds_the_images_files_and_free_space_behind_them() {
    let script = format!(
        "mount -t ext4 /dev/vda /mnt; cd /mnt; sha256sum -c {SUMS} | tail -1; cat /sys/block/vda/size"
    );
    assert_eq!(output_of(&on_disk(&script)), format!("data/9: OK\n{}\n", (48 + 256) * 2048));
    assert_eq!(output_of(&with_space("cat /sys/block/vda/size", 100)), format!("{}\n", (48 + 100) * 2048));
}

#[test]
fn what_is_written_is_read_back_by_files_and_by_blocks_of_any_size() {
    let script = "
        mount -t ext4 /dev/vda /mnt
        head -c 8000000 /dev/urandom > /mnt/a
        cp /mnt/a /mnt/b
        cp -r /mnt/data /mnt/again
        sync
        umount /mnt
        mount -t ext4 /dev/vda /mnt
        cmp /mnt/a /mnt/b
        for file in /mnt/data/*; do cmp $file /mnt/again/${file##*/}; done
        for size in 512 1536 4096 5120 65536 1048576; do
            head -c $((size * 7)) /mnt/a > /tmp/part
            dd if=/tmp/part of=/dev/vda bs=$size seek=$((60000000 / size)) oflag=direct 2> /dev/null
            echo 3 > /proc/sys/vm/drop_caches
            dd if=/dev/vda bs=$size skip=$((60000000 / size)) count=7 iflag=direct 2> /dev/null | cmp - /tmp/part
        done
        mke2fs -q /dev/vda 2> /dev/null || { umount /mnt; mke2fs -q /dev/vda > /dev/null; }
        umount /mnt 2> /dev/null || true
        mount -t ext2 /dev/vda /mnt
        cp /tmp/part /mnt/c
        sync
        cmp /mnt/c /tmp/part
        echo fine";
    assert_eq!(output_of(&on_disk(script)), "fine\n");
}

#[test]
fn a_full_file_system_is_no_space_left_and_goes_on_when_there_is_some() {
    let script = "
        mount -t ext4 /dev/vda /mnt
        ! dd if=/dev/zero of=/mnt/full bs=1M 2> /tmp/error || exit 1
        grep -o 'No space left on device' /tmp/error | head -1
        rm /mnt/full
        head -c 1000000 /dev/zero > /mnt/some
        sync";
    assert_eq!(output_of(&on_disk(script)), "No space left on device\n");
}

#[test]
fn a_full_overlay_fails_the_job_with_the_reason_and_gives_all_memory_back() {
    let node = &ready(node());
    let request = with_space("dd if=/dev/zero of=/dev/vda bs=1M oflag=direct", 16);
    warm_up(node, &request);
    let before = memory(node).free_frames;
    let finished = run(node, &request);
    let reason = finished.job.failure_reason.unwrap();
    assert!(reason.contains("exited with 1; overlay full: 34 MiB written"), "{reason}");
    let error = String::from_utf8_lossy(&finished.stderr);
    assert!(error.contains("Input/output error"), "{error}");
    assert_eq!(memory(node).free_frames, before);
}

#[test]
fn discarded_and_zeroed_blocks_make_room() {
    let script = "
        for round in 1 2 3; do
            dd if=/dev/zero of=/dev/vda bs=1M seek=32 count=64 oflag=direct 2> /dev/null
            blkdiscard -o $((32 << 20)) -l $((64 << 20)) /dev/vda
        done
        dd if=/dev/zero of=/dev/vda bs=1M count=32 2> /dev/null
        mke2fs -q /dev/vda > /dev/null
        mount -t ext2 /dev/vda /mnt
        dd if=/dev/zero of=/mnt/a bs=1M count=40 2> /dev/null
        sync
        echo fine";
    assert_eq!(output_of(&with_space(script, 96)), "fine\n");
}

#[test]
fn two_machines_do_not_see_each_others_writes_and_leave_no_frame_behind() {
    let node = &ready(node());
    warm_up(node, &on_disk("true"));
    let before = memory(node).free_frames;
    let script = |mine: &str| {
        format!(
            "mount -t ext4 /dev/vda /mnt; cd /mnt; test ! -e mine; echo {mine} > mine; sync; sleep 2
             echo 3 > /proc/sys/vm/drop_caches; cat mine; sha256sum -c {SUMS} > /dev/null"
        )
    };
    let ids = ["one", "two", "three"].map(|mine| (mine, create(node, &on_disk(&script(mine))).id));
    for (mine, id) in ids {
        let job: Job = wait(node, &id);
        assert_eq!(job.conclusion, Some(Conclusion::Success), "{job:?}");
        let log = node.client().log(&id, nestling::client::Streams::Stdout).unwrap();
        assert_eq!(String::from_utf8_lossy(&log), format!("{mine}\n"));
    }
    assert_eq!(memory(node).free_frames, before);
}

#[test]
fn a_disk_that_fails_ends_the_job_that_needs_it_with_a_reason_and_not_the_node() {
    let path = store("failing", &FILE_SYSTEM);
    let bytes = fs::read(&path).unwrap();
    // Some file's data, a good way into the disk.
    let needle = &FILE_SYSTEM[8 * MIB..8 * MIB + 4096];
    let at = (0..bytes.len()).step_by(512).rfind(|at| bytes[*at..].starts_with(needle)).unwrap();
    let options = serde_json::json!({
        "driver": "blkdebug", "node-name": "store", "read-only": true,
        "image": {"driver": "file", "filename": path, "read-only": true},
        "inject-error": [{"event": "none", "iotype": "read", "errno": 5, "sector": at / 512, "once": false}],
    });
    let arguments =
        ["-blockdev".to_owned(), options.to_string(), "-device".into(), "virtio-blk-pci,drive=store".into()];
    let node = ready(Bed::builder().no_image().qemu_args(arguments));
    warm_up(&node, &on_disk("true"));
    let before = memory(&node).free_frames;
    let finished = run(&node, &on_disk("cat /dev/vda > /dev/null; echo still here"));
    assert_eq!(finished.job.conclusion, Some(Conclusion::SystemFailure));
    let reason = finished.job.failure_reason.unwrap();
    assert!(reason.contains("the node could not read the image's disk: the disk answered"), "{reason}");
    assert_eq!(memory(&node).free_frames, before);
    let finished = run(&node, &job("echo fine"));
    assert_eq!(finished.stdout, b"fine\n");
    fs::remove_file(path).unwrap();
}

#[test]
fn a_node_whose_disk_holds_no_store_says_so_and_takes_its_modules() {
    let path = std::env::temp_dir().join(format!("nestling-disk-none-{}.img", std::process::id()));
    fs::write(&path, vec![0x55; 4 * MIB]).unwrap();
    let node = ready(Bed::builder().qemu_args(drive(&path)));
    let log = fs::read_to_string(node.serial_log_path()).unwrap();
    assert!(
        log.contains("no image store on the disk: it holds neither a tar archive nor a partition table"),
        "{log}"
    );
    let list = node.client().images().unwrap();
    assert_eq!((list.images.len(), list.problems.len()), (1, 1), "{list:?}");
    assert!(list.problems[0].starts_with("no image store on the disk"), "{list:?}");
    assert_eq!(run(&node, &job("echo fine")).stdout, b"fine\n");
    fs::remove_file(path).unwrap();
}

#[test]
fn changes_beyond_memory_go_to_the_scratch_partition_and_the_store_may_be_a_partition_too() {
    let store = store("partition", &FILE_SYSTEM);
    let disk = partitioned(&store.with_extension("img"), &store, 300);
    fs::remove_file(store).unwrap();
    // A node of 320 MiB keeps less than 40 MiB of changes in memory.
    let node = ready(Bed::builder().memory_mib(320).no_image().qemu_args(writable_drive(&disk)));
    let script = format!(
        "mount -t ext4 /dev/vda /mnt
         cd /mnt; sha256sum -c {SUMS} > /dev/null; cd /
         umount /mnt
         head -c 4194304 /dev/urandom > /tmp/part
         for i in 10 11 12 13 14 15 16 17 18 19 20 21 22; do
             echo $i | dd of=/tmp/part conv=notrunc 2> /dev/null
             dd if=/tmp/part of=/dev/vda bs=1M seek=$((i * 4 + 8)) 2> /dev/null
         done
         sync
         echo 3 > /proc/sys/vm/drop_caches
         for i in 10 11 12 13 14 15 16 17 18 19 20 21 22; do
             echo $i | dd of=/tmp/part conv=notrunc 2> /dev/null
             dd if=/dev/vda bs=1M skip=$((i * 4 + 8)) count=4 2> /dev/null | cmp - /tmp/part
         done
         echo fine"
    );
    let machine_config =
        MachineConfig { mem_size_mib: 128, disk_size_mib: Some(128), ..MachineConfig::default() };
    let request = JobRequest { machine_config: Some(machine_config), ..on_disk(&script) };
    warm_up(&node, &request);
    let before = memory(&node).free_frames;
    let finished = run(&node, &request);
    let error = String::from_utf8_lossy(&finished.stderr);
    assert_eq!(finished.stdout, b"fine\n", "{:?}\n{error}", finished.job);
    assert!(finished.job.memory.peak_mib.unwrap() < 128 + 40, "{:?}", finished.job.memory);
    assert_eq!(memory(&node).free_frames, before);
    fs::remove_file(disk).unwrap();
}
