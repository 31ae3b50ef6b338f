//! Cancelling, wherever a job stands.

use super::*;

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
