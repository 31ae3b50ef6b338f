//! One whole job over HTTP, with the same result and the same log wherever it runs.

use crate::node;
use nestling::client::types::{Conclusion, Condition, JobRequest, MachineConfig, StepConclusion};
use nestling::client::{Finished, LogFrame, Streams};
use nestling_tests::job::{run, step, step_if, steps, warm_up};
use nestling_tests::node::{bed_kind, memory};
use std::sync::{Mutex, OnceLock};

/// Exits of a machine for this job, which no bed comes near; SPECIFICATION.md promises fewer for a boot alone.
const MOST_EXITS: u64 = 6000;

/// What the job's output is, byte for byte: each part with the stream it went to.
const OUTPUT: &[(&str, &str)] = &[
    ("stdout", "hello from step one\n1 2 3\n"),
    ("stderr", "this is standard error\n"),
    ("stdout", "sum 500500\n30e14955\nfailed as it should\nat last, always\n"),
];

/// Held by a test while it runs machines: their memory is not free.
pub(crate) static ALONE: Mutex<()> = Mutex::new(());

/// Runs the job once for all tests; the node's free frames before and after.
fn finished() -> &'static (Finished, u64, u64) {
    static FINISHED: OnceLock<(Finished, u64, u64)> = OnceLock::new();
    FINISHED.get_or_init(|| {
        let mut first = step("echo \"hello from $PLACE\"; seq -s ' ' 1 3");
        first.env.insert("PLACE".into(), "step one".into());
        let mut request = steps([
            first,
            step("echo 'this is standard error' >&2"),
            step("awk 'BEGIN { for (i = 1; i <= 1000; i++) s += i; print \"sum\", s }'"),
            step("head -c 1048576 /dev/zero | sha256sum | cut -c 1-8; exit 7"),
            step("echo never"),
            step_if(Condition::Failure, "echo 'failed as it should'"),
            step_if(Condition::Always, "echo 'at last, always'"),
        ]);
        request.env = [("LC_ALL".into(), "C".into())].into();
        let node = node();
        let _alone = ALONE.lock();
        // The job's machine is a clone then.
        warm_up(node, &request);
        let before = memory(node).free_frames;
        let finished = run(node, &request);
        let after = memory(node).free_frames;
        (finished, before, after)
    })
}

#[test]
fn the_same_job_gives_the_same_result_and_log() {
    let (finished, ..) = finished();
    let of = |stream: &str| -> String {
        OUTPUT.iter().filter(|(to, _)| *to == stream).map(|(_, text)| *text).collect()
    };
    let job = &finished.job;
    assert!(job.timings.cloned_ms.is_some(), "{:?}", job.timings);
    assert_eq!((job.conclusion, job.exit_code), (Some(Conclusion::Failure), Some(7)), "{job:?}");
    assert_eq!(String::from_utf8_lossy(&finished.stdout), of("stdout"));
    assert_eq!(String::from_utf8_lossy(&finished.stderr), of("stderr"));
    use StepConclusion::{Failure, Skipped, Success};
    let conclusions: Vec<StepConclusion> = job.steps.iter().filter_map(|step| step.conclusion).collect();
    assert_eq!(conclusions, [Success, Success, Success, Failure, Skipped, Success, Success]);
    // The log as it is kept, in the order it was written.
    let mut log = node().client().log_stream(&job.id, Streams::Both, 0, true).unwrap();
    let mut parts: Vec<(String, String)> = Vec::new();
    while let Some(frame) = log.next_frame().unwrap() {
        if let LogFrame::Output(stream, data) = frame {
            let (stream, text) =
                (format!("{stream:?}").to_lowercase(), String::from_utf8(data.to_vec()).unwrap());
            match parts.last_mut() {
                Some((last, so_far)) if *last == stream => so_far.push_str(&text),
                _ => parts.push((stream, text)),
            }
        }
    }
    let parts: Vec<(&str, &str)> =
        parts.iter().map(|(stream, text)| (stream.as_str(), text.as_str())).collect();
    assert_eq!(parts, OUTPUT);
}

#[test]
fn the_jobs_exits_are_counted_by_kind() {
    let (finished, ..) = finished();
    let exits = &finished.job.exits;
    let total = exits.get("total").copied().unwrap_or_default();
    assert!(total > 0 && total <= MOST_EXITS, "{exits:?}");
    println!("{exits:?}");
    // `cargo xtask matrix` looks for these words.
    println!("{}: exits of the job: {total}", bed_kind());
    let sum: u64 = exits.iter().filter(|(kind, _)| *kind != "total").map(|(_, count)| count).sum();
    assert_eq!(sum, total, "{exits:?}");
}

#[test]
fn the_jobs_memory_is_free_again() {
    let (_, before, after) = finished();
    assert_eq!(before, after);
}

#[test]
fn a_clone_of_two_vcpus_goes_on_with_both() {
    let script =
        "nproc; (n=0; while [ $n -lt 500 ]; do n=$((n+1)); done; echo $n > /tmp/n) & wait; cat /tmp/n";
    let machine_config = Some(MachineConfig { vcpu_count: 2, ..MachineConfig::default() });
    let request = JobRequest { machine_config, ..steps([step(script)]) };
    let _alone = ALONE.lock();
    for _ in 0..2 {
        let finished = run(node(), &request);
        assert_eq!(String::from_utf8_lossy(&finished.stdout), "2\n500\n", "{:?}", finished.job);
        assert!(finished.job.timings.cloned_ms.is_some(), "{:?}", finished.job.timings);
    }
}
