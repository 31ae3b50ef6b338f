//! What a job may do, and what is reported of it.

use nestling::bed::Bed;
use nestling::client::Streams;
use nestling::client::types::{Conclusion, Condition, JobRequest, MachineConfig, Status, StepConclusion};
use nestling_tests::job::{LIMIT, create, job, refusal, run, step, step_if, steps, wait, wait_until};
use nestling_tests::node::{Shared, memory};

static NODE: Shared = Shared::new(Bed::builder);

#[test]
fn a_job_runs_on_debians_kernel_and_its_result_comes_back() {
    let finished = run(NODE.get(), &job("uname -r; echo hi; echo to standard error >&2; exit 7"));
    let output = String::from_utf8_lossy(&finished.stdout);
    let lines: Vec<&str> = output.lines().collect();
    assert!(matches!(lines[..], [kernel, "hi"] if kernel.ends_with("-cloud-amd64")), "{output}");
    assert_eq!(finished.stderr, b"to standard error\n");
    let job = finished.job;
    assert_eq!(
        (job.status, job.conclusion, job.exit_code),
        (Status::Completed, Some(Conclusion::Failure), Some(7))
    );
    assert!(job.failure_reason.is_some(), "{job:?}");
    assert!(job.started_at.is_some() && job.completed_at.is_some());
    let timings = [
        job.timings.queued_ms,
        job.timings.agent_ready_ms,
        job.timings.first_output_ms,
        job.timings.completed_ms,
    ];
    assert!(timings.iter().all(Option::is_some) && timings.is_sorted(), "{timings:?}");
    assert!(job.exits.get("total").is_some_and(|total| *total > 0), "{:?}", job.exits);
    assert_eq!(job.log.bytes, (finished.stdout.len() + finished.stderr.len()) as u64);
}

#[test]
fn steps_run_in_order_with_their_environment_and_conditions() {
    let mut first = step("echo \"$GREETING $PLACE\"");
    first.env.insert("PLACE".into(), "there".into());
    let mut request = steps([
        first,
        step("echo \"$GREETING $PLACE\"; exit 3"),
        step("echo never"),
        step_if(Condition::Success, "echo never either"),
        step_if(Condition::Failure, "echo failed; exit 9"),
        step_if(Condition::Always, "echo always"),
    ]);
    request.env = [("GREETING".into(), "hello".into()), ("PLACE".into(), "here".into())].into();
    let finished = run(NODE.get(), &request);
    assert_eq!(String::from_utf8_lossy(&finished.stdout), "hello there\nhello here\nfailed\nalways\n");
    let job = finished.job;
    let conclusions: Vec<StepConclusion> = job.steps.iter().filter_map(|step| step.conclusion).collect();
    use StepConclusion::{Failure, Skipped, Success};
    assert_eq!(conclusions, [Success, Failure, Skipped, Skipped, Failure, Success]);
    assert_eq!(job.exit_code, Some(3), "the first failing step decides");
    assert_eq!(job.steps[4].exit_code, Some(9));
}

#[test]
fn a_command_that_does_not_exist_exits_with_127() {
    let finished = run(NODE.get(), &job("no-such-command"));
    assert_eq!((finished.job.conclusion, finished.job.exit_code), (Some(Conclusion::Failure), Some(127)));
    assert!(String::from_utf8_lossy(&finished.stderr).contains("not found"), "{:?}", finished.stderr);
}

#[test]
fn a_step_killed_by_signal_n_exits_with_128_plus_n() {
    let finished = run(
        NODE.get(),
        &steps([step("kill -KILL $$"), step_if(Condition::Always, "sh -c 'kill -SEGV $$' || exit $?")]),
    );
    let codes: Vec<_> = finished.job.steps.iter().map(|step| step.exit_code).collect();
    assert_eq!(codes, [Some(128 + 9), Some(128 + 11)]);
    assert_eq!(finished.job.exit_code, Some(128 + 9));
}

#[test]
fn output_arrives_byte_for_byte_whatever_the_bytes_are() {
    let finished = run(NODE.get(), &job(r"printf '\377\376\000\200a\000\r\n\303'; printf '\000\377' >&2"));
    assert_eq!(finished.stdout, b"\xFF\xFE\0\x80a\0\r\n\xC3");
    assert_eq!(finished.stderr, b"\0\xFF");
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success));
}

#[test]
fn a_step_does_not_wait_for_what_it_left_in_the_background() {
    let finished = run(NODE.get(), &steps([step("sleep 1000 & echo left"), step("cat; echo on")]));
    assert_eq!(finished.stdout, b"left\non\n", "and standard input is empty");
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success));
}

#[test]
fn a_hundred_megabytes_of_output_reach_a_follower_whole_and_the_node_keeps_the_end() {
    const BYTES: u64 = 100_000_000;
    let node = NODE.get();
    let job = create(node, &job(&format!("yes 'line of output' | head -c {BYTES}")));
    let mut log = node.client().log_stream(&job.id, Streams::Both, 0, true).unwrap();
    let (pattern, mut seen) = (b"line of output\n", 0_usize);
    while let Some(frame) = log.next_frame().unwrap() {
        let nestling::client::LogFrame::Output(_, data) = frame else {
            panic!("a follower that keeps up misses nothing, but after {seen} bytes came {frame:?}");
        };
        assert!(data.iter().enumerate().all(|(at, byte)| *byte == pattern[(seen + at) % pattern.len()]));
        seen += data.len();
    }
    assert_eq!(seen as u64, BYTES);

    let job = wait(node, &job.id);
    assert_eq!((job.conclusion, job.log.bytes, job.log.truncated), (Some(Conclusion::Success), BYTES, true));
    let kept = node.client().log(&job.id, Streams::Both).unwrap();
    let text = String::from_utf8_lossy(&kept);
    assert!(text.lines().next().is_some_and(|mark| mark.contains("dropped")), "{:?}", text.lines().next());
    assert!(kept.len() as u64 >= BYTES - job.log.start_offset);
    node.client().delete(&job.id).unwrap();
}

#[test]
fn a_step_that_runs_too_long_is_ended_and_the_job_times_out() {
    let mut slow = step("echo begun; sleep 1000");
    slow.timeout_seconds = Some(1);
    let finished =
        run(NODE.get(), &steps([slow, step("echo never"), step_if(Condition::Always, "echo always")]));
    assert_eq!(finished.stdout, b"begun\nalways\n");
    assert_eq!(finished.job.conclusion, Some(Conclusion::TimedOut));
    assert_eq!(finished.job.steps[0].conclusion, Some(StepConclusion::TimedOut));
}

#[test]
fn a_job_that_runs_too_long_is_ended_with_its_machine() {
    let finished = run(
        NODE.get(),
        &JobRequest { timeout_seconds: Some(15), ..job("trap '' TERM; echo begun; sleep 1000") },
    );
    assert_eq!((finished.job.conclusion, finished.job.exit_code), (Some(Conclusion::TimedOut), None));
    assert!(finished.job.failure_reason.is_some_and(|reason| reason.contains("15")));
}

#[test]
fn a_running_job_can_be_cancelled_once() {
    let node = NODE.get();
    let id = create(node, &steps([step("echo begun; sleep 1000"), step("echo never")])).id;
    wait_until(node, &id, |job| job.timings.first_output_ms.is_some());
    node.client().cancel(&id).unwrap();
    let job = wait(node, &id);
    assert_eq!(job.conclusion, Some(Conclusion::Cancelled));
    assert_eq!(node.client().log(&id, Streams::Both).unwrap(), b"begun\n");
    assert_eq!(refusal(node.client().cancel(&id)), "job_completed");
}

#[test]
fn a_job_the_node_has_no_memory_for_waits_and_can_be_cancelled_in_the_queue() {
    let node = NODE.get();
    let most = u32::try_from(memory(node).total_frames / 256).unwrap();
    let machine_config =
        Some(MachineConfig { mem_size_mib: most * 6 / 10 / 2 * 2, ..MachineConfig::default() });
    let first = create(node, &JobRequest { machine_config, ..job("sleep 1000") }).id;
    wait_until(node, &first, |job| job.status == Status::InProgress);
    let second = create(node, &JobRequest { machine_config, ..job("echo never") });
    assert_eq!((second.status, second.queue_position.is_some()), (Status::Queued, true));
    assert_eq!(refusal(node.client().delete(&second.id)), "job_not_completed");
    node.client().cancel(&second.id).unwrap();
    let second = wait(node, &second.id);
    assert_eq!((second.conclusion, second.started_at), (Some(Conclusion::Cancelled), None));
    node.client().cancel(&first).unwrap();
    assert_eq!(wait(node, &first).conclusion, Some(Conclusion::Cancelled));
}

#[test]
fn the_same_idempotency_key_gives_the_same_job() {
    let node = NODE.get();
    let request = job("echo once");
    let first = node.client().create_job_with_key(&request, "the same key").unwrap();
    let second = node.client().create_job_with_key(&request, "the same key").unwrap();
    assert_eq!(first.id, second.id);
    let other = node.client().create_job_with_key(&job("echo twice"), "the same key");
    assert_eq!(refusal(other), "idempotency_key_reused");
    wait(node, &first.id);
    node.client().delete(&first.id).unwrap();
    assert_eq!(refusal(node.client().job(&first.id)), "job_not_found");
}

#[test]
fn a_log_can_be_read_in_ranges_and_followed_from_an_offset() {
    let node = NODE.get();
    let id = create(node, &job("seq 1 2000; echo apart >&2")).id;
    assert!(node.client().wait(&id, LIMIT).unwrap().is_some());
    let stdout: String = (1..=2000).map(|number| format!("{number}\n")).collect();
    assert_eq!(node.client().log(&id, Streams::Stdout).unwrap(), stdout.as_bytes());
    assert_eq!(node.client().log(&id, Streams::Stderr).unwrap(), b"apart\n");

    let whole = node.client().log(&id, Streams::Both).unwrap();
    let path = format!("/v1/jobs/{id}/logs");
    let range = |range: &str| node.client().request("GET", &path, &[("range", range)], None).unwrap();
    let middle = range("bytes=10-19");
    assert_eq!((middle.status, &middle.body[..]), (206, &whole[10..20]));
    assert_eq!(middle.header("content-range"), Some(&*format!("bytes 10-19/{}", whole.len())));
    let end = range("bytes=-5");
    assert_eq!((end.status, &end.body[..]), (206, &whole[whole.len() - 5..]));
    let past = range(&format!("bytes={}-", whole.len()));
    assert_eq!(
        (past.status, past.header("content-range")),
        (416, Some(&*format!("bytes */{}", whole.len())))
    );

    let mut followed = Vec::new();
    let mut log = node.client().log_stream(&id, Streams::Both, 100, true).unwrap();
    while let Some(frame) = log.next_frame().unwrap() {
        if let nestling::client::LogFrame::Output(_, data) = frame {
            followed.extend(data);
        }
    }
    assert_eq!(followed, &whole[100..]);
}
