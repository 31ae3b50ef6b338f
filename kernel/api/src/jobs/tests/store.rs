//! The table of jobs: order, listing, limits.

use super::*;
use crate::Node;

#[test]
fn jobs_start_in_the_order_they_came() {
    let mut jobs = store();
    let (first, second) = (create(&mut jobs, 1, steps(vec![step("a")]), at(0)), id(2));
    create(&mut jobs, 2, steps(vec![step("b")]), at(0));
    assert_eq!(jobs.get(first).unwrap().queue_position, Some(1));
    assert_eq!(jobs.get(second).unwrap().queue_position, Some(2));
    assert_eq!(jobs.next_queued().unwrap().id, first);
    assert!(jobs.start(first, at(5)));
    assert!(!jobs.start(first, at(5)), "it is not queued any more");
    assert_eq!(jobs.next_queued().unwrap().id, second);
    let (first, second) = (jobs.get(first).unwrap(), jobs.get(second).unwrap());
    assert_eq!((first.queue_position, first.timings.queued_ms), (None, Some(5)));
    assert_eq!(second.queue_position, Some(1));
}

#[test]
fn a_queued_job_says_what_it_waits_for() {
    let mut jobs = store();
    let first = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    let second = create(&mut jobs, 2, steps(vec![step("b")]), at(0));
    let waits = |jobs: &JobStore, job| jobs.get(job).unwrap().waiting_for;
    assert_eq!((waits(&jobs, first), waits(&jobs, second)), (None, Some(WaitingFor::EarlierJobs)));
    jobs.waits_for(first, WaitingFor::Memory);
    assert_eq!(waits(&jobs, first), Some(WaitingFor::Memory));
    jobs.start(first, at(1));
    assert_eq!((waits(&jobs, first), waits(&jobs, second)), (None, None));
    jobs.waits_for(first, WaitingFor::Cores);
    assert_eq!(waits(&jobs, first), None, "it has its machine");
    jobs.waits_for(second, WaitingFor::Cores);
    jobs.cancel(second, at(2)).unwrap();
    assert_eq!(waits(&jobs, second), None, "it waits for nothing any more");
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
        FakeNode::new().largest_machine(),
    );
    let error = jobs.create(id(3), plan.unwrap(), None, at(0)).unwrap_err();
    assert_eq!(
        (error.code, error.headers.first().map(|header| header.0)),
        (ErrorCode::QueueFull, Some("Retry-After"))
    );
}

#[test]
fn big_descriptions_push_out_completed_jobs_and_then_are_refused() {
    let mut jobs = JobStore::new(Limits { jobs_total_bytes: 26_000, ..Limits::default() });
    let big = || steps(vec![step(&"x".repeat(10_000))]);
    let first = create(&mut jobs, 1, big(), at(0));
    jobs.cancel(first, at(0)).unwrap();
    create(&mut jobs, 2, big(), at(0));
    assert!(jobs.get(first).is_ok(), "a completed job keeps no scripts");
    create(&mut jobs, 3, big(), at(0));
    assert!(jobs.get(first).is_err(), "it was in the way");
    let image = crate::types::Image { name: "minimal".into(), ..Default::default() };
    let plan = request::plan(big(), &[image], FakeNode::new().largest_machine()).unwrap();
    assert_eq!(jobs.create(id(4), plan, None, at(0)).unwrap_err().code, ErrorCode::QueueFull);
}

#[test]
fn a_job_that_is_refused_pushes_nothing_out() {
    let mut jobs = JobStore::new(Limits { jobs_total_bytes: 23_000, ..Limits::default() });
    let first = create(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.cancel(first, at(0)).unwrap();
    let image = crate::types::Image { name: "minimal".into(), ..Default::default() };
    let plan =
        request::plan(steps(vec![step(&"x".repeat(30_000))]), &[image], FakeNode::new().largest_machine())
            .unwrap();
    assert_eq!(jobs.create(id(2), plan, None, at(0)).unwrap_err().code, ErrorCode::QueueFull);
    assert!(jobs.get(first).is_ok());
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
fn figures_of_a_running_machine_are_shown() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    jobs.update(job, [("hlt".to_string(), 5)].into(), Some(12));
    let shown = jobs.get(job).unwrap();
    assert_eq!((shown.exits["hlt"], shown.exits["total"], shown.memory.peak_mib), (5, 5, Some(12)));
}
