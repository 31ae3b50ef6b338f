//! Whatever an agent says and whatever happens, in whatever order.

use super::*;

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
