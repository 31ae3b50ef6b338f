//! What a node has at the end is what it had at the start.

use nestling::bed::Bed;
use nestling::client::types::Conclusion;
use nestling_tests::job::{job, run};
use nestling_tests::node::{memory, ready};

#[test]
fn a_hundred_jobs_one_after_another_leave_as_many_free_frames_and_no_larger_heap() {
    let node = ready(Bed::builder());
    let one = |number: u32| {
        let finished = run(&node, &job("echo done"));
        assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "job {number}: {:?}", finished.job);
        node.client().delete(&finished.job.id).unwrap();
    };
    // The first jobs let tables and buffers grow to the size they keep.
    (0..5).for_each(one);
    let before = memory(&node);
    (5..105).for_each(one);
    let after = memory(&node);
    assert_eq!(after.free_frames, before.free_frames);
    // Answering this very request takes a little heap, not always the same.
    let growth = after.heap_used_bytes.saturating_sub(before.heap_used_bytes);
    assert!(growth <= 64 << 10, "the heap grew by {growth} bytes over 100 jobs: {before:?} {after:?}");
}
