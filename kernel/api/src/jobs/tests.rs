//! The store and the run, from the engine's and from the API's side.

use alloc::vec;
use proptest::prelude::*;

use super::*;
use crate::agent::{AgentMessage, Failure, Hello, HostMessage, StepCompleted};
use crate::testing::*;
use crate::types::{Condition, JobRequest, StepConclusion, StepRequest};

fn store() -> JobStore {
    JobStore::new(Limits::default())
}

fn when(condition: Condition, run: &str) -> StepRequest {
    StepRequest { condition: Some(condition), ..step(run) }
}

fn step_conclusions(job: &Job) -> Vec<StepConclusion> {
    job.steps.iter().filter_map(|step| step.conclusion).collect()
}

/// Runs the step the agent has been told to run to this exit code.
fn run(jobs: &mut JobStore, job: JobId, index: u32, code: i32) {
    say(jobs, job, &started(index), at(0));
    say(jobs, job, &exited(index, code), at(0));
}

#[test]
fn jobs_start_in_the_order_they_came() {
    let mut jobs = store();
    let (first, second) = (create(&mut jobs, 1, steps(vec![step("a")]), at(0)), id(2));
    create(&mut jobs, 2, steps(vec![step("b")]), at(0));
    assert_eq!(jobs.get(second).unwrap().queue_position, Some(1));
    assert_eq!(jobs.next_queued().unwrap().id, first);
    assert!(jobs.start(first, at(5)));
    assert!(!jobs.start(first, at(5)), "it is not queued any more");
    assert_eq!(jobs.next_queued().unwrap().id, second);
    let (first, second) = (jobs.get(first).unwrap(), jobs.get(second).unwrap());
    assert_eq!((first.queue_position, first.timings.queued_ms), (None, Some(5)));
    assert_eq!(second.queue_position, Some(0));
}

#[test]
fn a_job_of_two_steps_goes_its_way_to_success() {
    let mut jobs = store();
    let job = create(&mut jobs, 1, steps(vec![step("one"), step("two")]), at(0));
    jobs.start(job, at(10));
    jobs.agent_connected(job);
    say(&mut jobs, job, &hello(), at(20));
    assert_eq!(told_to_run(&mut jobs, job), ["one"]);
    assert!(jobs.transmit(job).is_empty());
    say(&mut jobs, job, &started(0), at(21));
    say(&mut jobs, job, &stdout("out\n"), at(30));
    say(&mut jobs, job, &AgentMessage::Stderr(b"err\n".to_vec()), at(31));
    say(&mut jobs, job, &exited(0, 0), at(32));
    assert_eq!(told_to_run(&mut jobs, job), ["two"]);
    assert!(!jobs.finished(job));
    run(&mut jobs, job, 1, 0);
    assert!(jobs.finished(job));
    assert_eq!(jobs.status(job).unwrap(), Status::InProgress, "not completed before the machine is gone");

    let done = finish(&mut jobs, job, at(50));
    assert_eq!((done.status, done.conclusion), (Status::Completed, Some(Conclusion::Success)));
    assert_eq!((done.exit_code, done.failure_reason, done.console), (Some(0), None, None));
    let timings = done.timings;
    let all = [timings.queued_ms, timings.agent_ready_ms, timings.first_output_ms, timings.completed_ms];
    assert_eq!(all, [Some(10), Some(20), Some(30), Some(50)]);
    assert_eq!((done.exits["total"], done.memory.peak_mib), (7, Some(77)));
    assert_eq!(done.log.bytes, 8);
    assert_eq!(done.completed_at.as_deref(), Some("2027-01-15T08:00:00.050Z"));
    assert!(done.steps.iter().all(|step| step.exit_code == Some(0) && step.completed_at.is_some()));
    assert_eq!(jobs.running().count(), 0);
}

#[test]
fn a_steps_environment_goes_over_the_jobs() {
    let mut jobs = store();
    let env = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    let request = JobRequest {
        env: env(&[("A", "job"), ("B", "job")]),
        ..steps(vec![StepRequest { env: env(&[("B", "step")]), timeout_seconds: Some(7), ..step("a") }])
    };
    let job = begin(&mut jobs, 1, request, at(0));
    let told = told(&mut jobs, job);
    let [HostMessage::RunStep(step)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((step.index, step.timeout_seconds), (0, Some(7)));
    assert_eq!(step.env, env(&[("A", "job"), ("B", "step")]));
}

#[test]
fn the_first_failing_step_decides_and_conditions_are_githubs() {
    let mut jobs = store();
    let request = steps(vec![
        when(Condition::Failure, "never"),
        step("fails"),
        step("skipped"),
        when(Condition::Success, "skipped"),
        when(Condition::Failure, "on failure"),
        when(Condition::Always, "always"),
    ]);
    let job = begin(&mut jobs, 1, request, at(0));
    assert_eq!(told_to_run(&mut jobs, job), ["fails"]);
    run(&mut jobs, job, 1, 3);
    assert_eq!(told_to_run(&mut jobs, job), ["on failure"]);
    run(&mut jobs, job, 4, 9);
    assert_eq!(told_to_run(&mut jobs, job), ["always"]);
    run(&mut jobs, job, 5, 0);
    let done = finish(&mut jobs, job, at(0));
    use StepConclusion::{Failure, Skipped, Success};
    assert_eq!(step_conclusions(&done), [Skipped, Failure, Skipped, Skipped, Failure, Success]);
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Failure), Some(3)));
    assert_eq!(done.failure_reason.as_deref(), Some("step 2 (fails) exited with 3"));
}

#[test]
fn a_job_whose_every_step_is_skipped_succeeds() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![when(Condition::Failure, "never")]), at(0));
    assert_eq!(finish(&mut jobs, job, at(0)).conclusion, Some(Conclusion::Success));
}

#[test]
fn a_signal_becomes_128_and_its_number() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let killed = StepCompleted { index: 0, exit_code: None, signal: Some(9), timed_out: false };
    say(&mut jobs, job, &AgentMessage::StepCompleted(killed), at(0));
    let done = finish(&mut jobs, job, at(0));
    assert_eq!((done.exit_code, done.steps[0].exit_code), (Some(137), Some(137)));
    assert_eq!(done.failure_reason.as_deref(), Some("step 1 (a) was killed by signal 9 (SIGKILL)"));
}

#[test]
fn a_signal_beyond_all_numbers_does_not_overflow() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let killed = StepCompleted { index: 0, exit_code: None, signal: Some(i32::MAX), timed_out: false };
    say(&mut jobs, job, &AgentMessage::StepCompleted(killed), at(0));
    assert_eq!(finish(&mut jobs, job, at(0)).exit_code, Some(i32::MAX));
}

#[test]
fn a_step_that_times_out_makes_the_job_timed_out_and_always_steps_still_run() {
    let mut jobs = store();
    let slow = StepRequest { timeout_seconds: Some(2), ..step("slow") };
    let job = begin(&mut jobs, 1, steps(vec![slow, step("b"), when(Condition::Always, "c")]), at(0));
    told(&mut jobs, job);
    say(&mut jobs, job, &started(0), at(0));
    let late = StepCompleted { index: 0, exit_code: None, signal: Some(15), timed_out: true };
    say(&mut jobs, job, &AgentMessage::StepCompleted(late), at(2000));
    assert_eq!(told_to_run(&mut jobs, job), ["c"]);
    run(&mut jobs, job, 2, 0);
    let done = finish(&mut jobs, job, at(0));
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::TimedOut), None));
    assert_eq!(
        done.failure_reason.as_deref(),
        Some("step 1 (slow) ran longer than its timeout_seconds of 2")
    );
    use StepConclusion::{Skipped, Success, TimedOut};
    assert_eq!(step_conclusions(&done), [TimedOut, Skipped, Success]);
}

#[test]
fn a_step_whose_agent_does_not_end_it_is_ended_15_s_later() {
    let mut jobs = store();
    let slow = StepRequest { timeout_seconds: Some(2), ..step("slow") };
    let job = begin(&mut jobs, 1, steps(vec![slow, step("b")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    assert_eq!(jobs.deadline(at(0)), Some(at(17_000).monotonic_ns));
    jobs.poll(at(16_999));
    assert!(!jobs.finished(job));
    jobs.poll(at(17_000));
    let done = finish(&mut jobs, job, at(17_001));
    assert_eq!(done.conclusion, Some(Conclusion::TimedOut));
    assert_eq!(step_conclusions(&done), [StepConclusion::TimedOut, StepConclusion::Skipped]);
}

#[test]
fn a_job_that_runs_too_long_is_ended_at_once() {
    let mut jobs = store();
    let request = JobRequest { timeout_seconds: Some(5), ..steps(vec![step("a"), step("b")]) };
    let job = begin(&mut jobs, 1, request, at(0));
    say(&mut jobs, job, &started(0), at(0));
    assert_eq!(jobs.deadline(at(0)), Some(at(5000).monotonic_ns));
    jobs.poll(at(4999));
    assert!(!jobs.finished(job));
    jobs.poll(at(5000));
    assert_eq!(jobs.deadline(at(5000)), None);
    let done = finish(&mut jobs, job, at(5001));
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::TimedOut), None));
    assert_eq!(done.failure_reason.as_deref(), Some("the job ran longer than its timeout_seconds of 5"));
    assert_eq!(step_conclusions(&done), [StepConclusion::TimedOut, StepConclusion::Skipped]);
}

#[test]
fn an_agent_that_never_comes_is_a_system_failure() {
    for (connects, words) in
        [(false, "did not connect within 120 s"), (true, "did not say hello within 120 s")]
    {
        let mut jobs = store();
        let job = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
        jobs.start(job, at(0));
        if connects {
            jobs.agent_connected(job);
        }
        assert_eq!(jobs.deadline(at(0)), Some(at(120_000).monotonic_ns));
        jobs.poll(at(120_000));
        let done = finish(&mut jobs, job, at(120_001));
        assert_eq!(done.conclusion, Some(Conclusion::SystemFailure));
        assert!(done.failure_reason.as_deref().unwrap().contains(words), "{done:?}");
        assert_eq!(done.console.as_deref(), Some("last words\n"));
        assert_eq!(step_conclusions(&done), [StepConclusion::Skipped]);
    }
}

#[test]
fn a_machine_that_ends_without_a_result_is_a_system_failure_with_a_reason() {
    for (how, words) in [
        (MachineEnd::PowerOff, "powered itself off during step 1 (a)"),
        (MachineEnd::Reset, "kernel panic, during step 1"),
        (MachineEnd::TripleFault, "triple fault during step 1"),
        (MachineEnd::DeviceFault("queue 1: bad index".into()), "wrongly (queue 1: bad index) during step 1"),
        (MachineEnd::InternalError("no frames".into()), "(no frames) during step 1"),
        (MachineEnd::Destroyed, "destroyed during step 1"),
    ] {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, steps(vec![step("a"), when(Condition::Always, "b")]), at(0));
        say(&mut jobs, job, &started(0), at(0));
        say(&mut jobs, job, &stdout("so far"), at(0));
        let done = end(&mut jobs, job, how, at(1));
        assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::SystemFailure), None));
        assert!(done.failure_reason.as_deref().unwrap().contains(words), "{done:?}");
        assert_eq!(done.console.as_deref(), Some("last words\n"));
        assert_eq!(step_conclusions(&done), [StepConclusion::Failure, StepConclusion::Skipped]);
        assert_eq!(done.log.bytes, 6, "what was written stays");
    }
}

#[test]
fn a_machine_that_ends_after_the_result_changes_nothing() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    run(&mut jobs, job, 0, 0);
    let done = end(&mut jobs, job, MachineEnd::TripleFault, at(0));
    assert_eq!((done.conclusion, done.console), (Some(Conclusion::Success), None));
}

#[test]
fn a_job_that_cannot_get_a_machine_is_a_system_failure() {
    let mut jobs = store();
    let job = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.fail(job, "no image", at(1));
    let done = jobs.get(job).unwrap();
    assert_eq!(
        (done.conclusion, done.failure_reason.as_deref()),
        (Some(Conclusion::SystemFailure), Some("no image"))
    );
    assert!(jobs.next_queued().is_none());
}

#[test]
fn an_agent_that_gives_up_says_why() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    let message = "ä".repeat(5000);
    say(&mut jobs, job, &AgentMessage::Failure(Failure { message }), at(0));
    let done = finish(&mut jobs, job, at(0));
    let reason = done.failure_reason.unwrap();
    assert!(reason.starts_with("the agent gave up during step 1 (a): ää"), "{reason}");
    assert!(reason.len() < 1100, "a long message is cut");
}

#[test]
fn an_agent_that_breaks_its_protocol_is_a_system_failure() {
    let completed = |exit_code| {
        AgentMessage::StepCompleted(StepCompleted { index: 0, exit_code, signal: None, timed_out: false })
    };
    let old = AgentMessage::Hello(Hello { protocol: 0, agent: "0".into(), kernel: "6".into() });
    for (words, expected) in [
        (vec![stdout("x")], "unexpected Stdout before Hello"),
        (vec![started(0)], "unexpected StepStarted before Hello"),
        (vec![old], "speaks protocol 0, this node 1"),
        (vec![hello(), hello()], "unexpected Hello before the step started"),
        (vec![hello(), stdout("x")], "unexpected Stdout before the step started"),
        (vec![hello(), exited(0, 0)], "unexpected StepCompleted before the step started"),
        (vec![hello(), started(1)], "unexpected StepStarted"),
        (vec![hello(), started(0), started(0)], "unexpected StepStarted in the middle of a step"),
        (vec![hello(), started(0), exited(1, 0)], "unexpected StepCompleted in the middle of a step"),
        (vec![hello(), started(0), completed(None)], "neither exit_code nor signal"),
    ] {
        let mut jobs = store();
        let job = create(&mut jobs, 1, steps(vec![step("a"), step("b")]), at(0));
        jobs.start(job, at(0));
        for word in &words {
            say(&mut jobs, job, word, at(0));
        }
        let done = finish(&mut jobs, job, at(0));
        assert_eq!(done.conclusion, Some(Conclusion::SystemFailure), "{expected}");
        assert!(done.failure_reason.as_deref().unwrap().contains(expected), "{done:?}");
    }
}

#[test]
fn rubbish_from_the_agent_is_a_system_failure_and_nothing_after_it_counts() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.receive(job, &[0xff; 10], at(0));
    assert_eq!(jobs.receive_capacity(job, at(0)), 0);
    run(&mut jobs, job, 0, 0);
    let done = finish(&mut jobs, job, at(0));
    assert_eq!(done.conclusion, Some(Conclusion::SystemFailure));
    assert!(done.failure_reason.unwrap().contains("unknown frame kind 0xff"));
}

#[test]
fn an_agent_that_hangs_up_gives_its_machine_2_s_to_say_why() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.agent_disconnected(job, at(100));
    jobs.poll(at(2099));
    assert!(!jobs.finished(job));
    jobs.poll(at(2100));
    let done = finish(&mut jobs, job, at(2100));
    assert_eq!(done.failure_reason.as_deref(), Some("the agent closed its connection during step 1 (a)"));
}

#[test]
fn a_queued_job_is_cancelled_at_once() {
    let mut jobs = store();
    let job = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.cancel(job, at(5)).unwrap();
    let done = jobs.get(job).unwrap();
    assert_eq!((done.status, done.conclusion), (Status::Completed, Some(Conclusion::Cancelled)));
    assert_eq!((done.started_at, done.timings.completed_ms), (None, Some(5)));
    assert_eq!(done.steps[0].conclusion, Some(StepConclusion::Cancelled));
    assert!(jobs.next_queued().is_none() && !jobs.start(job, at(6)));
    assert_eq!(jobs.cancel(job, at(7)).unwrap_err().code, ErrorCode::JobCompleted);
}

#[test]
fn a_job_that_boots_is_cancelled_without_asking_anybody() {
    let mut jobs = store();
    let job = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.start(job, at(0));
    jobs.cancel(job, at(1)).unwrap();
    assert_eq!(finish(&mut jobs, job, at(2)).conclusion, Some(Conclusion::Cancelled));
}

#[test]
fn a_running_job_is_cancelled_through_its_agent_and_always_steps_run() {
    let mut jobs = store();
    let request = steps(vec![
        step("a"),
        step("b"),
        when(Condition::Failure, "c"),
        when(Condition::Always, "clean up"),
        when(Condition::Always, "clean up more"),
    ]);
    let job = begin(&mut jobs, 1, request, at(0));
    told(&mut jobs, job);
    say(&mut jobs, job, &started(0), at(0));
    jobs.cancel(job, at(1000)).unwrap();
    jobs.cancel(job, at(1500)).unwrap();
    assert_eq!(told(&mut jobs, job), [HostMessage::CancelStep], "twice is the same as once");
    assert_eq!(jobs.deadline(at(1500)), Some(at(11_000).monotonic_ns));
    say(&mut jobs, job, &exited(0, 143), at(2000));
    assert_eq!(told_to_run(&mut jobs, job), ["clean up"]);
    assert_eq!(jobs.deadline(at(2000)), Some(at(32_000).monotonic_ns));
    say(&mut jobs, job, &started(3), at(2000));
    say(&mut jobs, job, &exited(3, 1), at(31_000));
    assert_eq!(told_to_run(&mut jobs, job), ["clean up more"]);
    jobs.poll(at(31_999));
    assert!(!jobs.finished(job));
    jobs.poll(at(32_000));
    let done = finish(&mut jobs, job, at(32_000));
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Cancelled), None));
    use StepConclusion::{Cancelled, Failure};
    assert_eq!(step_conclusions(&done), [Cancelled, Cancelled, Cancelled, Failure, Cancelled]);
    assert_eq!(done.steps[0].exit_code, Some(143));
}

#[test]
fn a_cancel_that_the_agent_ignores_takes_10_s() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a"), when(Condition::Always, "b")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    jobs.cancel(job, at(1000)).unwrap();
    jobs.poll(at(10_999));
    assert!(!jobs.finished(job));
    jobs.poll(at(11_000));
    assert_eq!(finish(&mut jobs, job, at(11_000)).conclusion, Some(Conclusion::Cancelled));
}

#[test]
fn a_cancel_after_the_result_changes_nothing() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    run(&mut jobs, job, 0, 0);
    jobs.cancel(job, at(1)).unwrap();
    assert_eq!(finish(&mut jobs, job, at(1)).conclusion, Some(Conclusion::Success));
}

#[test]
fn only_a_completed_job_can_be_deleted_and_its_log_goes_with_it() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    let error = jobs.delete(job).unwrap_err();
    assert_eq!(error.code, ErrorCode::JobNotCompleted);
    assert!(error.message.contains("is in_progress"));
    say(&mut jobs, job, &started(0), at(0));
    say(&mut jobs, job, &stdout("text"), at(0));
    say(&mut jobs, job, &exited(0, 0), at(0));
    finish(&mut jobs, job, at(0));
    assert!(jobs.logs_total > 0);
    jobs.delete(job).unwrap();
    assert_eq!((jobs.logs_total, jobs.count(None)), (0, 0));
    for error in [jobs.get(job).err(), jobs.delete(job).err(), jobs.cancel(job, at(0)).err()] {
        assert_eq!(error.unwrap().code, ErrorCode::JobNotFound);
    }
}

#[test]
fn the_oldest_completed_jobs_are_dropped() {
    let mut jobs = JobStore::new(Limits { completed_jobs: 3, ..Limits::default() });
    for number in 0..5 {
        let job = create(&mut jobs, number, steps(vec![step("a")]), at(0));
        jobs.cancel(job, at(0)).unwrap();
    }
    assert_eq!(jobs.list(None).collect::<Vec<_>>(), [id(4), id(3), id(2)]);
    assert_eq!(jobs.count(Some(Status::Completed)), 3);
}

#[test]
fn jobs_are_listed_newest_first_and_by_status() {
    let mut jobs = store();
    for number in 1..=4 {
        create(&mut jobs, number, steps(vec![step("a")]), at(0));
    }
    jobs.start(id(2), at(0));
    jobs.cancel(id(3), at(0)).unwrap();
    let list = |status| jobs.list(status).collect::<Vec<_>>();
    assert_eq!(list(None), [id(4), id(3), id(2), id(1)]);
    assert_eq!(list(Some(Status::Queued)), [id(4), id(1)]);
    assert_eq!(list(Some(Status::InProgress)), [id(2)]);
    assert_eq!(list(Some(Status::Completed)), [id(3)]);
    assert_eq!(jobs.count(Some(Status::Queued)), 2);
}

#[test]
fn a_full_queue_refuses_more() {
    let mut jobs = JobStore::new(Limits { queued_jobs: 2, ..Limits::default() });
    create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    create(&mut jobs, 2, steps(vec![step("a")]), at(0));
    let plan = request::plan(
        steps(vec![step("a")]),
        &[crate::types::Image { name: "minimal".into(), ..Default::default() }],
        1024,
    );
    let error = jobs.create(id(3), plan.unwrap(), None, at(0)).unwrap_err();
    assert_eq!(
        (error.code, error.headers.first().map(|header| header.0)),
        (ErrorCode::QueueFull, Some("Retry-After"))
    );
}

#[test]
fn big_descriptions_push_out_completed_jobs_and_then_are_refused() {
    let mut jobs = JobStore::new(Limits { jobs_total_bytes: 23_000, ..Limits::default() });
    let big = || steps(vec![step(&"x".repeat(10_000))]);
    let first = create(&mut jobs, 1, big(), at(0));
    jobs.cancel(first, at(0)).unwrap();
    create(&mut jobs, 2, big(), at(0));
    assert!(jobs.get(first).is_ok(), "a completed job keeps no scripts");
    create(&mut jobs, 3, big(), at(0));
    assert!(jobs.get(first).is_err(), "it was in the way");
    let image = crate::types::Image { name: "minimal".into(), ..Default::default() };
    let plan = request::plan(big(), &[image], 1024).unwrap();
    assert_eq!(jobs.create(id(4), plan, None, at(0)).unwrap_err().code, ErrorCode::QueueFull);
}

#[test]
fn without_readers_the_log_drops_its_oldest_and_holds_nobody_back() {
    let mut jobs = JobStore::new(Limits { log_bytes: 100_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    for _ in 0..50 {
        assert!(jobs.receive_capacity(job, at(0)) > 70_000);
        say(&mut jobs, job, &stdout(&"x".repeat(10_000)), at(0));
    }
    let info = jobs.log_info(job).unwrap();
    assert!(info.truncated && info.bytes == 500_000 && info.start_offset > 400_000, "{info:?}");
}

/// Lets a job write as long as it may, up to this much; how much it wrote.
fn write(jobs: &mut JobStore, job: JobId, most: usize, now: Clock) -> usize {
    let mut written = 0;
    while written < most {
        let room = jobs.receive_capacity(job, now).min(8192);
        if room < 100 {
            break;
        }
        say(jobs, job, &stdout(&"x".repeat(room - 5)), now);
        written += room - 5;
    }
    written
}

#[test]
fn a_follower_that_reads_slowly_holds_the_job_back_and_loses_nothing() {
    let mut jobs = JobStore::new(Limits { log_bytes: 200_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let mut reader =
        jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    let (mut read, mut written) = (0, 0);
    for second in 0..100 {
        let now = at(second * 5000);
        written += write(&mut jobs, job, usize::MAX, now);
        let mut out = vec![];
        assert_eq!(jobs.read_log(&mut reader, &mut out, 20_000, now), ReadState::More);
        assert!(!out.starts_with(b"[nestling"), "after {read} bytes");
        read += out.len();
    }
    assert!(read == 2_000_000 && written > read && written < read + 200_000, "{read} {written}");
}

#[test]
fn a_follower_that_reads_nothing_for_10_s_loses_output_instead() {
    let mut jobs = JobStore::new(Limits { log_bytes: 200_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let mut reader =
        jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    // It has read everything there is, so its patience counts from the first output after that.
    assert_eq!(jobs.read_log(&mut reader, &mut vec![], 1000, at(1000)), ReadState::Waiting);
    write(&mut jobs, job, 300_000, at(60_000));
    assert_eq!(jobs.receive_capacity(job, at(60_000)), 0);
    assert_eq!(jobs.deadline(at(60_000)), Some(at(70_000).monotonic_ns));
    assert_eq!(jobs.receive_capacity(job, at(69_999)), 0);
    assert!(jobs.receive_capacity(job, at(70_000)) > 0);
    write(&mut jobs, job, 300_000, at(70_000));
    let mut out = vec![];
    let _ = jobs.read_log(&mut reader, &mut out, 1000, at(70_000));
    assert!(out.starts_with(b"[nestling: "), "it is told");
}

#[test]
fn a_follower_that_leaves_holds_nobody_back() {
    let mut jobs = JobStore::new(Limits { log_bytes: 200_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let reader = jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    assert!(write(&mut jobs, job, 300_000, at(0)) < 200_000);
    drop(reader);
    assert!(write(&mut jobs, job, 300_000, at(0)) >= 300_000);
}

#[test]
fn output_held_back_does_not_hold_up_a_timeout() {
    let mut jobs = JobStore::new(Limits { log_bytes: 100_000, ..Limits::default() });
    let request = JobRequest { timeout_seconds: Some(3), ..steps(vec![step("a")]) };
    let job = begin(&mut jobs, 1, request, at(0));
    say(&mut jobs, job, &started(0), at(0));
    let _reader = jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    write(&mut jobs, job, 300_000, at(0));
    assert_eq!(jobs.deadline(at(0)), Some(at(3000).monotonic_ns));
    jobs.poll(at(3000));
    assert!(jobs.finished(job));
}

#[test]
fn all_logs_together_are_bounded_and_the_oldest_completed_one_shrinks_first() {
    let mut jobs =
        JobStore::new(Limits { log_bytes: 100_000, logs_total_bytes: 250_000, ..Limits::default() });
    for number in 1..=3 {
        let job = begin(&mut jobs, number, steps(vec![step("a")]), at(0));
        say(&mut jobs, job, &started(0), at(0));
        write(&mut jobs, job, 200_000, at(0));
        say(&mut jobs, job, &exited(0, 0), at(0));
        finish(&mut jobs, job, at(0));
        let real: usize = jobs.jobs.values().map(|record| record.log.memory()).sum();
        assert_eq!(jobs.logs_total, real);
        assert!(real <= 250_000, "{real}");
    }
    let kept = |number| {
        let info = jobs.log_info(id(number)).unwrap();
        info.bytes - info.start_offset
    };
    assert!(kept(1) < 60_000 && kept(2) > 80_000 && kept(3) > 80_000, "{} {} {}", kept(1), kept(2), kept(3));
}

#[test]
fn figures_of_a_running_machine_are_shown() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.update(job, [("hlt".to_string(), 5)].into(), Some(12));
    let shown = jobs.get(job).unwrap();
    assert_eq!((shown.exits["hlt"], shown.exits["total"], shown.memory.peak_mib), (5, 5, Some(12)));
}

proptest! {
    #[test]
    fn random_bytes_from_an_agent_never_panic_and_never_succeed(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..100), 0..20),
        greeted in any::<bool>(),
    ) {
        let mut jobs = store();
        let job = create(&mut jobs, 1, steps(vec![step("a"), step("b")]), at(0));
        jobs.start(job, at(0));
        if greeted {
            say(&mut jobs, job, &hello(), at(0));
        }
        for chunk in chunks {
            jobs.receive(job, &chunk, at(0));
        }
        let done = end(&mut jobs, job, MachineEnd::PowerOff, at(1));
        prop_assert_eq!(done.conclusion, Some(Conclusion::SystemFailure));
    }

    #[test]
    fn whatever_happens_in_whatever_order_a_job_ends_with_one_conclusion(
        events in prop::collection::vec((0_u8..9, 0_u32..4, -1_i32..3), 0..40),
    ) {
        let mut jobs = store();
        let request = steps(vec![
            StepRequest { timeout_seconds: Some(1), ..step("a") },
            when(Condition::Failure, "b"),
            when(Condition::Always, "c"),
        ]);
        let job = create(&mut jobs, 1, request, at(0));
        let mut ms = 0;
        for (event, index, code) in events {
            ms += 700;
            let now = at(ms);
            match event {
                0 => { jobs.start(job, now); }
                1 => say(&mut jobs, job, &hello(), now),
                2 | 3 => say(&mut jobs, job, &started(index), now),
                4 | 5 => say(&mut jobs, job, &exited(index, code), now),
                6 => say(&mut jobs, job, &stdout("x"), now),
                7 => { let _ = jobs.cancel(job, now); }
                _ => jobs.poll(now),
            }
            let deadline = jobs.deadline(now);
            prop_assert!(jobs.finished(job) || deadline.is_some(), "a job that runs has a deadline");
        }
        jobs.start(job, at(ms));
        jobs.poll(at(ms + 100_000_000));
        prop_assert!(jobs.finished(job));
        if jobs.status(job) != Ok(Status::Completed) {
            finish(&mut jobs, job, at(ms));
        }
        let done = jobs.get(job).unwrap();
        prop_assert!(done.conclusion.is_some());
        prop_assert!(done.steps.iter().all(|step| step.status == Status::Completed && step.conclusion.is_some()));
        if done.conclusion == Some(Conclusion::Success) {
            prop_assert_eq!(done.exit_code, Some(0));
            prop_assert!(done.steps.iter().all(|step| step.exit_code.unwrap_or(0) == 0));
        } else {
            prop_assert!(done.failure_reason.is_some());
        }
    }
}
