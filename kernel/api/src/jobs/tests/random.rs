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

    #[test]
    fn whatever_happens_to_its_files_a_job_ends_and_what_its_step_gave_stands(
        begun in 0_usize..12,
        events in prop::collection::vec((0_u8..17, 0_i32..3), 0..40),
    ) {
        // As far as all goes well, and then anything.
        let well = [(0, 0), (2, 0), (3, 0), (5, 0), (6, 0), (7, 0), (9, 0), (10, 2), (11, 2), (12, 0), (13, 0), (14, 0)];
        let events = well.into_iter().take(begun).chain(events);
        let mut jobs = store();
        let request = JobRequest { workspace: true, artifacts: vec!["a".into()], ..steps(vec![step("a")]) };
        let job = create(&mut jobs, 1, request, at(0));
        let (mut ms, mut senders, mut readers) = (0, vec![], vec![]);
        let mut result = None;
        for (event, code) in events {
            ms += 700;
            let now = at(ms);
            match event {
                0 | 1 => { jobs.start(job, now); }
                2 => say(&mut jobs, job, &hello(), now),
                3 | 4 => senders.extend(jobs.open_workspace(job, None)),
                5 => for sender in &senders {
                    if let Ok(Upload::Wanted(room)) = jobs.upload(sender) {
                        jobs.push_workspace(sender, &vec![0; room]).unwrap();
                    }
                },
                6 => senders.iter().for_each(|sender| jobs.end_workspace(sender)),
                7 => say(&mut jobs, job, &unpacked(1), now),
                8 => senders.clear(),
                9 => say(&mut jobs, job, &started(0), now),
                10 => say(&mut jobs, job, &exited(0, code), now),
                11 => say(&mut jobs, job, &listed(&["a", "b"][..usize::try_from(code).unwrap()]), now),
                12 => readers.extend(jobs.open_artifacts(job, None, now)),
                13 => say(&mut jobs, job, &AgentMessage::ArtifactData(vec![0; 30_000]), now),
                14 => say(&mut jobs, job, &sent(None), now),
                15 => for reader in &readers {
                    jobs.read_artifacts(reader, &mut vec![], 1000, now);
                },
                _ => readers.clear(),
            }
            jobs.poll(now);
            let artifacts = jobs.get(job).unwrap().artifacts.unwrap().status;
            if event == 10 && artifacts == ArtifactsStatus::Gathering {
                result.get_or_insert(code);
            }
            prop_assert!(jobs.finished(job) || jobs.deadline(now).is_some(), "a job that runs has a deadline");
            // The machine takes what is there for it.
            let waiting = jobs.transmit(job).len();
            prop_assert!(waiting <= 2 * crate::agent::MAX_PAYLOAD, "{}", waiting);
            jobs.transmitted(job, waiting);
        }
        drop((senders, readers));
        jobs.start(job, at(ms));
        for hours in 1..5 {
            jobs.poll(at(ms + hours * 3_700_000));
        }
        prop_assert!(jobs.finished(job));
        let done = finish(&mut jobs, job, at(ms));
        if let Some(code) = result {
            prop_assert_eq!(done.exit_code, Some(code));
        } else {
            prop_assert_ne!(done.conclusion, Some(Conclusion::Success));
        }
    }
}
