//! A run from its agent's hello to its result, or without one.

use super::*;

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
fn a_signal_that_does_not_exist_or_a_timeout_nobody_set_is_no_result() {
    let said = |signal, timed_out| StepCompleted { index: 0, exit_code: Some(0), signal, timed_out };
    for (said, words) in [
        (said(Some(-128), false), "signal -128"),
        (said(Some(0), false), "signal 0"),
        (said(Some(65), false), "signal 65"),
        (said(Some(i32::MAX), false), "signal 2147483647"),
        (said(None, true), "without timeout_seconds"),
    ] {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        say(&mut jobs, job, &started(0), at(0));
        say(&mut jobs, job, &AgentMessage::StepCompleted(said), at(0));
        let done = finish(&mut jobs, job, at(0));
        assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::SystemFailure), None));
        assert!(done.failure_reason.as_deref().unwrap().contains(words), "{done:?}");
    }
}

#[test]
fn rubbish_of_any_length_makes_a_short_reason_that_is_counted() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let payload = format!("{{\"index\":\"{}\"}}", "\u{7f}".repeat(60_000));
    jobs.receive(
        job,
        &crate::agent::encode(crate::agent::Kind::StepCompleted, payload.as_bytes()).unwrap(),
        at(0),
    );
    let reason = finish(&mut jobs, job, at(0)).failure_reason.unwrap();
    assert!(reason.contains("malformed StepCompleted") && reason.len() < 1200, "{reason}");
    let record = jobs.jobs.get_mut(&job).unwrap();
    record.job.failure_reason = None;
    assert_eq!(record.weight, record.weigh() + reason.len());
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
        (vec![old], "speaks protocol 0, this node 3"),
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
fn a_full_disk_is_told_with_a_failure_and_not_with_a_success() {
    for (code, wanted) in [(1, Some("step 1 (one) exited with 1; overlay full: 7 MiB written")), (0, None)] {
        let mut jobs = store();
        let job = create(&mut jobs, 1, steps(vec![step("one")]), at(0));
        jobs.start(job, at(1));
        jobs.agent_connected(job);
        say(&mut jobs, job, &hello(), at(2));
        run(&mut jobs, job, 0, code);
        let problem = Some("overlay full: 7 MiB written".into());
        let done = end_with(&mut jobs, job, MachineEnd::Destroyed, problem, at(3));
        assert_eq!(done.failure_reason.as_deref(), wanted);
    }
    let mut jobs = store();
    let job = create(&mut jobs, 1, steps(vec![step("one")]), at(0));
    jobs.start(job, at(1));
    let done = end_with(&mut jobs, job, MachineEnd::Reset, Some("overlay full".into()), at(2));
    assert!(done.failure_reason.unwrap().ends_with("; overlay full"));
}
