//! A disk over a boot module: reads, writes, a full file system, discard, and all frames back.

use crate::job::ALONE;
use crate::node;
use nestling::client::types::{Conclusion, JobRequest};
use nestling_tests::disk::{NAME, SUMS};
use nestling_tests::job::{job, run, warm_up};
use nestling_tests::node::memory;

#[test]
fn a_disk_keeps_what_is_written_and_leaves_no_frame_behind() {
    let script = format!(
        "mount -t ext4 -o discard /dev/vda /mnt
         cd /mnt
         sha256sum -c {SUMS} > /dev/null
         cp data/0 copy
         sync
         echo 3 > /proc/sys/vm/drop_caches
         cmp data/0 copy
         ! cat data/* data/* data/* > full 2> /tmp/error || exit 1
         grep -o 'No space left on device' /tmp/error | head -1
         rm full copy
         sync
         fstrim /mnt
         cp data/1 copy
         cd /
         umount /mnt
         mount -t ext4 /dev/vda /mnt
         cmp /mnt/data/1 /mnt/copy
         dd if=/dev/zero of=/dev/vda bs=512 seek=17000 count=3 oflag=direct 2> /dev/null
         echo fine"
    );
    let node = node();
    let _alone = ALONE.lock();
    let request = JobRequest { image: Some(NAME.into()), ..job(&script) };
    warm_up(node, &request);
    let before = memory(node).free_frames;
    for _ in 0..2 {
        let finished = run(node, &request);
        let output = String::from_utf8_lossy(&finished.stdout);
        assert_eq!(output, "No space left on device\nfine\n", "{:?}", finished.job);
        assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{:?}", finished.job);
    }
    assert_eq!(memory(node).free_frames, before);
}
