//! A workspace on its way into a machine.

use super::*;
use crate::agent::{MAX_PAYLOAD, WorkspaceFailed};

fn with_workspace() -> JobRequest {
    JobRequest { workspace: true, ..steps(vec![step("make"), when(Condition::Always, "clean up")]) }
}

/// The job's workspace and how the job stands.
fn status(jobs: &JobStore, job: JobId) -> (WorkspaceStatus, u64) {
    let workspace = jobs.get(job).unwrap().workspace.unwrap();
    (workspace.status, workspace.bytes)
}

fn failed(message: &str) -> AgentMessage {
    AgentMessage::WorkspaceFailed(WorkspaceFailed { message: message.into() })
}

/// What a job that ended before its first step says of it.
#[track_caller]
fn ended_without_steps(jobs: &mut JobStore, job: JobId, reason: &str) {
    assert_eq!(told_to_run(jobs, job), [""; 0]);
    let done = finish(jobs, job, at(0));
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Failure), None));
    let told = done.failure_reason.unwrap();
    assert!(told.contains(reason), "{told}");
    assert_eq!(done.workspace.unwrap().status, WorkspaceStatus::Failed);
    assert!(done.steps.iter().all(|step| step.conclusion == Some(StepConclusion::Skipped)));
}

#[test]
fn steps_wait_until_the_workspace_is_unpacked() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    assert_eq!(status(&jobs, job), (WorkspaceStatus::Awaited, 0));
    let sender = jobs.open_workspace(job, None).unwrap();
    assert_eq!(jobs.upload(&sender), Ok(Upload::Wanted(MAX_PAYLOAD)));
    jobs.push_workspace(&sender, b"one ").unwrap();
    jobs.push_workspace(&sender, b"two").unwrap();
    assert_eq!(status(&jobs, job), (WorkspaceStatus::Arriving, 7));
    jobs.end_workspace(&sender);
    let expected = [
        HostMessage::WorkspaceData(b"one ".to_vec()),
        HostMessage::WorkspaceData(b"two".to_vec()),
        HostMessage::WorkspaceEnd,
    ];
    assert_eq!(told(&mut jobs, job), expected);
    assert_eq!(jobs.upload(&sender), Ok(Upload::Waiting), "the agent still unpacks");
    say(&mut jobs, job, &unpacked(3), at(1));
    let Ok(Upload::Unpacked(workspace)) = jobs.upload(&sender) else { panic!("not unpacked") };
    assert_eq!((workspace.bytes, workspace.entries), (7, Some(3)));
    assert_eq!(told_to_run(&mut jobs, job), ["make"]);
    drop(sender);
    jobs.poll(at(1));
    assert!(!jobs.finished(job), "a sender that is done may go");
}

#[test]
fn no_more_is_taken_than_the_machine_is_behind() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, None).unwrap();
    let mut most = 0;
    for _ in 0..1000 {
        while let Ok(Upload::Wanted(room)) = jobs.upload(&sender) {
            jobs.push_workspace(&sender, &vec![7; room.min(8192)]).unwrap();
            most = most.max(jobs.transmit(job).len());
        }
        let some = jobs.transmit(job).len().min(10_000);
        jobs.transmitted(job, some);
    }
    assert!((MAX_PAYLOAD..MAX_PAYLOAD + 8192 + 100).contains(&most), "{most}");
    assert!(status(&jobs, job).1 > 9_000_000);
}

#[test]
fn a_workspace_waits_for_its_machine() {
    let mut jobs = store();
    let job = create(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, Some(7)).unwrap();
    assert_eq!((jobs.upload(&sender), status(&jobs, job).0), (Ok(Upload::Waiting), WorkspaceStatus::Pending));
    assert!(jobs.start(job, at(0)));
    jobs.agent_connected(job);
    jobs.poll(at(100_000));
    assert_eq!(jobs.upload(&sender), Ok(Upload::Waiting), "it boots");
    say(&mut jobs, job, &hello(), at(100_000));
    jobs.poll(at(1_000_000));
    assert_eq!(
        jobs.upload(&sender),
        Ok(Upload::Wanted(MAX_PAYLOAD)),
        "somebody sends it: that is their clock"
    );
}

#[test]
fn only_a_job_that_takes_a_workspace_is_given_one_and_only_once() {
    let mut jobs = store();
    let plain = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    let error = jobs.open_workspace(plain, None).unwrap_err();
    assert_eq!(error.code, ErrorCode::WorkspaceNotExpected);
    assert!(error.message.contains("\"workspace\": true"), "{}", error.message);
    let job = begin(&mut jobs, 2, with_workspace(), at(0));
    let first = jobs.open_workspace(job, None).unwrap();
    assert_eq!(jobs.open_workspace(job, None).unwrap_err().code, ErrorCode::WorkspaceNotExpected);
    drop(first);
    let second = jobs.open_workspace(job, None).expect("the first was gone before it sent anything");
    jobs.push_workspace(&second, b"a").unwrap();
    assert_eq!(jobs.open_workspace(job, None).unwrap_err().code, ErrorCode::WorkspaceNotExpected);
    jobs.end_workspace(&second);
    say(&mut jobs, job, &unpacked(0), at(0));
    assert_eq!(jobs.open_workspace(job, None).unwrap_err().code, ErrorCode::WorkspaceNotExpected);
    assert_eq!(jobs.open_workspace(id(9), None).unwrap_err().code, ErrorCode::JobNotFound);
}

#[test]
fn a_client_that_vanishes_ends_the_job() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, None).unwrap();
    jobs.push_workspace(&sender, b"half").unwrap();
    drop(sender);
    jobs.poll(at(1));
    ended_without_steps(&mut jobs, job, "gone after 4 bytes: its connection was closed");
}

#[test]
fn a_client_that_gives_up_says_why() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, None).unwrap();
    jobs.push_workspace(&sender, b"half").unwrap();
    jobs.abort_workspace(sender, "nothing came for 30 s");
    ended_without_steps(&mut jobs, job, "gone after 4 bytes: nothing came for 30 s");
}

#[test]
fn a_workspace_that_nobody_sends_ends_the_job() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let deadline = jobs.deadline(at(0)).unwrap();
    assert_eq!(deadline, at(60_000).monotonic_ns);
    jobs.poll(at(59_999));
    assert!(!jobs.finished(job));
    jobs.poll(at(60_000));
    ended_without_steps(&mut jobs, job, "nobody sent it within 60 s");
}

#[test]
fn what_the_agent_cannot_unpack_ends_the_job_and_tells_the_client() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, None).unwrap();
    jobs.push_workspace(&sender, b"half").unwrap();
    say(&mut jobs, job, &failed("'../x' leaves the tree"), at(0));
    let error = jobs.upload(&sender).unwrap_err();
    assert_eq!(error.code, ErrorCode::WorkspaceFailed);
    assert!(error.message.contains("could not be unpacked: '../x' leaves the tree"), "{}", error.message);
    ended_without_steps(&mut jobs, job, "'../x' leaves the tree");
    assert_eq!(
        jobs.upload(&sender).unwrap_err().code,
        ErrorCode::WorkspaceFailed,
        "also when the machine is gone"
    );
}

#[test]
fn a_machine_that_ends_tells_the_client() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let sender = jobs.open_workspace(job, None).unwrap();
    jobs.push_workspace(&sender, b"half").unwrap();
    let done = end(&mut jobs, job, MachineEnd::PowerOff, at(1));
    assert_eq!(done.conclusion, Some(Conclusion::SystemFailure));
    assert!(done.failure_reason.unwrap().contains("before the workspace was there"));
    assert!(jobs.upload(&sender).unwrap_err().message.contains("powered itself off"));
    jobs.delete(job).unwrap();
    assert_eq!(jobs.upload(&sender).unwrap_err().code, ErrorCode::JobNotFound);
}

#[test]
fn a_cancel_ends_the_wait_for_a_workspace() {
    let mut jobs = store();
    for started in [false, true] {
        let job = create(&mut jobs, u8::from(started), with_workspace(), at(0));
        let sender = jobs.open_workspace(job, None).unwrap();
        if started {
            jobs.start(job, at(0));
            say(&mut jobs, job, &hello(), at(0));
            jobs.push_workspace(&sender, b"half").unwrap();
        }
        jobs.cancel(job, at(1)).unwrap();
        let error = jobs.upload(&sender).unwrap_err();
        assert_eq!(error.code, ErrorCode::JobCompleted, "{started}");
        assert!(error.message.contains("cancelled"), "{}", error.message);
        if started {
            assert_eq!(finish(&mut jobs, job, at(1)).conclusion, Some(Conclusion::Cancelled));
        }
    }
}

#[test]
fn a_workspace_beyond_the_limit_is_refused_with_the_numbers() {
    let mut jobs = JobStore::new(Limits { workspace_bytes: 5 << 20, ..Limits::default() });
    let job = begin(&mut jobs, 1, with_workspace(), at(0));
    let error = jobs.open_workspace(job, Some((5 << 20) + 1)).unwrap_err();
    assert_eq!(error.code, ErrorCode::BodyTooLarge);
    assert!(error.message.contains("5242881 bytes") && error.message.contains("5 MiB"), "{}", error.message);
    let sender = jobs.open_workspace(job, None).expect("nothing of the first one came");
    let error = loop {
        let Ok(Upload::Wanted(room)) = jobs.upload(&sender) else { panic!("not wanted") };
        if let Err(error) = jobs.push_workspace(&sender, &vec![0; room]) {
            break error;
        }
        told(&mut jobs, job);
    };
    assert_eq!(error.code, ErrorCode::BodyTooLarge);
    ended_without_steps(&mut jobs, job, "takes 5242880 (5 MiB) at most");
}

#[test]
fn an_agent_that_has_unpacked_what_it_was_not_sent_is_not_believed() {
    for end in [false, true] {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, if end { steps(vec![step("a")]) } else { with_workspace() }, at(0));
        say(&mut jobs, job, &unpacked(1), at(0));
        assert_eq!(finish(&mut jobs, job, at(0)).conclusion, Some(Conclusion::SystemFailure), "{end}");
    }
}

proptest! {
    #[test]
    fn whatever_the_pieces_the_agent_gets_the_same_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..300_000),
        pieces in prop::collection::vec(1_usize..100_000, 1..20),
        taken in prop::collection::vec(1_usize..100_000, 1..20),
    ) {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, with_workspace(), at(0));
        let sender = jobs.open_workspace(job, Some(bytes.len() as u64)).unwrap();
        let (mut rest, mut pieces, mut taken) = (&bytes[..], pieces.iter().cycle(), taken.iter().cycle());
        let (mut decoder, mut got, mut ended) = (crate::agent::Decoder::new(), vec![], false);
        while !ended {
            match jobs.upload(&sender).unwrap() {
                Upload::Wanted(_) if rest.is_empty() => jobs.end_workspace(&sender),
                Upload::Wanted(room) => {
                    let (piece, later) = rest.split_at(rest.len().min(room).min(*pieces.next().unwrap()));
                    jobs.push_workspace(&sender, piece).unwrap();
                    rest = later;
                }
                _ => {}
            }
            let waiting = jobs.transmit(job);
            prop_assert!(waiting.len() <= 2 * MAX_PAYLOAD);
            let part = waiting.get(..*taken.next().unwrap()).unwrap_or(waiting).to_vec();
            jobs.transmitted(job, part.len());
            decoder.push(&part);
            while let Some(frame) = decoder.next_frame().unwrap() {
                match HostMessage::decode(frame).unwrap() {
                    HostMessage::WorkspaceData(bytes) => got.extend(bytes),
                    HostMessage::WorkspaceEnd => ended = true,
                    other => panic!("{other:?}"),
                }
            }
        }
        prop_assert_eq!(got, bytes);
    }
}
