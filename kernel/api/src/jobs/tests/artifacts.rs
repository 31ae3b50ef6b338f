//! Artifacts on their way out of a machine that is kept for them.

use super::*;
use crate::agent::{ArtifactList, ListArtifacts, SendArtifacts};
use crate::types::Artifact;

fn with_artifacts() -> JobRequest {
    JobRequest { artifacts: vec!["dist/**".into(), "report.xml".into()], ..steps(vec![step("make")]) }
}

fn status(jobs: &JobStore, job: JobId) -> ArtifactsStatus {
    jobs.get(job).unwrap().artifacts.unwrap().status
}

fn data(bytes: &[u8]) -> AgentMessage {
    AgentMessage::ArtifactData(bytes.to_vec())
}

/// A job whose step has ended with this code and whose agent has found two artifacts.
fn ready(jobs: &mut JobStore, code: i32) -> JobId {
    let job = begin(jobs, 1, with_artifacts(), at(0));
    assert_eq!(told_to_run(jobs, job), ["make"]);
    assert_eq!(status(jobs, job), ArtifactsStatus::Pending);
    assert_eq!(jobs.open_artifacts(job, None, at(0)).unwrap_err().code, ErrorCode::ArtifactsNotReady);
    run(jobs, job, 0, code);
    let patterns = vec!["dist/**".to_string(), "report.xml".to_string()];
    assert_eq!(told(jobs, job), [HostMessage::ListArtifacts(ListArtifacts { patterns })]);
    assert_eq!((status(jobs, job), jobs.finished(job)), (ArtifactsStatus::Gathering, false));
    say(jobs, job, &listed(&["dist/a", "report.xml"]), at(0));
    assert_eq!((status(jobs, job), jobs.finished(job)), (ArtifactsStatus::Ready, false));
    job
}

/// All that can be read now, in parts of `room` bytes, and how it ended.
fn read(jobs: &mut JobStore, reader: &ArtifactReader, room: usize, now: Clock) -> (Vec<u8>, ReadState) {
    let mut out = vec![];
    loop {
        let before = out.len();
        let state = jobs.read_artifacts(reader, &mut out, room, now);
        assert!(out.len() - before <= room);
        if state != ReadState::More {
            return (out, state);
        }
    }
}

#[test]
fn the_machine_is_kept_until_all_artifacts_were_read() {
    for (code, conclusion) in [(0, Conclusion::Success), (7, Conclusion::Failure)] {
        let mut jobs = store();
        let job = ready(&mut jobs, code);
        let list = jobs.artifacts(job).unwrap();
        assert_eq!((list.total_count, list.total_bytes, list.omitted_count), (2, 10, 0));
        assert_eq!(list.artifacts[1], Artifact { name: "report.xml".into(), size: 5 });
        let reader = jobs.open_artifacts(job, None, at(1)).unwrap();
        assert_eq!(told(&mut jobs, job), [HostMessage::SendArtifacts(SendArtifacts { name: None })]);
        assert_eq!(read(&mut jobs, &reader, 100, at(1)), (vec![], ReadState::Waiting));
        say(&mut jobs, job, &data(b"some of "), at(2));
        say(&mut jobs, job, &data(b"the tar"), at(2));
        assert_eq!(read(&mut jobs, &reader, 4, at(2)), (b"some of the tar".to_vec(), ReadState::Waiting));
        say(&mut jobs, job, &data(b"!"), at(2));
        say(&mut jobs, job, &sent(None), at(2));
        assert!(!jobs.finished(job), "the client has yet to read the end");
        assert_eq!(read(&mut jobs, &reader, 100, at(3)), (b"!".to_vec(), ReadState::Done));
        assert_eq!(status(&jobs, job), ArtifactsStatus::Fetched);
        let done = finish(&mut jobs, job, at(3));
        assert_eq!((done.conclusion, done.exit_code), (Some(conclusion), Some(code)));
        let error = jobs.open_artifacts(job, None, at(4)).unwrap_err();
        assert_eq!(error.code, ErrorCode::ArtifactsGone);
        assert!(error.message.contains("were fetched already"), "{}", error.message);
    }
}

#[test]
fn one_artifact_can_be_read_by_its_name_and_the_others_stay() {
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    let error = jobs.open_artifacts(job, Some("nope".into()), at(0)).unwrap_err();
    assert_eq!(error.code, ErrorCode::ArtifactNotFound);
    for _ in 0..2 {
        let reader = jobs.open_artifacts(job, Some("dist/a".into()), at(0)).unwrap();
        let name = Some("dist/a".to_string());
        assert_eq!(told(&mut jobs, job), [HostMessage::SendArtifacts(SendArtifacts { name })]);
        say(&mut jobs, job, &data(b"bytes"), at(0));
        say(&mut jobs, job, &sent(None), at(0));
        assert_eq!(read(&mut jobs, &reader, 100, at(0)), (b"bytes".to_vec(), ReadState::Done));
        assert_eq!((status(&jobs, job), jobs.finished(job)), (ArtifactsStatus::Ready, false));
    }
}

#[test]
fn artifacts_that_nobody_fetches_are_kept_for_a_minute() {
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    assert_eq!(jobs.deadline(at(0)), Some(at(60_000).monotonic_ns));
    jobs.poll(at(59_999));
    assert!(!jobs.finished(job));
    jobs.poll(at(60_000));
    assert_eq!(status(&jobs, job), ArtifactsStatus::Expired);
    assert_eq!(finish(&mut jobs, job, at(60_000)).conclusion, Some(Conclusion::Success));
    assert!(jobs.open_artifacts(job, None, at(0)).unwrap_err().message.contains("not fetched within 60 s"));
}

#[test]
fn no_more_is_taken_from_the_agent_than_the_client_is_behind() {
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    let reader = jobs.open_artifacts(job, None, at(0)).unwrap();
    let frame = data(&[7; 32 * 1024]).encode().unwrap();
    let (mut stream, mut most) = (frame.iter().copied().cycle(), 0);
    for _ in 0..50 {
        while let room @ 1.. = jobs.receive_capacity(job, at(0)) {
            let bytes: Vec<u8> = stream.by_ref().take(room.min(4096)).collect();
            jobs.receive(job, &bytes, at(0));
            most += bytes.len();
        }
        assert!(most <= 96 * 1024, "{most}");
        let mut out = vec![];
        jobs.read_artifacts(&reader, &mut out, 16 * 1024, at(0));
        most -= out.len();
    }
}

#[test]
fn a_client_that_vanishes_stops_the_agent_and_another_can_begin_anew() {
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    let reader = jobs.open_artifacts(job, None, at(0)).unwrap();
    told(&mut jobs, job);
    let error = jobs.open_artifacts(job, None, at(0)).unwrap_err();
    assert!(error.message.contains("another client"), "{}", error.message);
    say(&mut jobs, job, &data(b"half"), at(0));
    drop(reader);
    jobs.poll(at(1));
    assert_eq!(told(&mut jobs, job), [HostMessage::StopArtifacts]);
    assert!(jobs.open_artifacts(job, None, at(1)).is_err(), "the agent may still send");
    say(&mut jobs, job, &data(b"more"), at(1));
    say(&mut jobs, job, &sent(Some("stopped")), at(1));
    let reader = jobs.open_artifacts(job, None, at(2)).unwrap();
    say(&mut jobs, job, &data(b"whole"), at(2));
    say(&mut jobs, job, &sent(None), at(2));
    assert_eq!(read(&mut jobs, &reader, 100, at(2)), (b"whole".to_vec(), ReadState::Done));
}

#[test]
fn what_the_agent_cannot_send_breaks_the_answer_off_and_says_why() {
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    let reader = jobs.open_artifacts(job, None, at(0)).unwrap();
    say(&mut jobs, job, &data(b"half"), at(0));
    say(&mut jobs, job, &sent(Some("dist/a changed while it was read")), at(0));
    assert_eq!(read(&mut jobs, &reader, 100, at(0)), (b"half".to_vec(), ReadState::Lost));
    let artifacts = jobs.get(job).unwrap().artifacts.unwrap();
    assert_eq!(artifacts.status, ArtifactsStatus::Ready);
    assert!(artifacts.message.unwrap().contains("dist/a changed"));
}

#[test]
fn a_job_whose_globs_match_nothing_is_over_at_once() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, with_artifacts(), at(0));
    run(&mut jobs, job, 0, 0);
    let message = Some("no file matches dist/**".to_string());
    say(
        &mut jobs,
        job,
        &AgentMessage::ArtifactList(ArtifactList { message, ..ArtifactList::default() }),
        at(0),
    );
    let done = finish(&mut jobs, job, at(0));
    let artifacts = done.artifacts.unwrap();
    assert_eq!((done.conclusion, artifacts.status), (Some(Conclusion::Success), ArtifactsStatus::Empty));
    assert!(artifacts.message.unwrap().contains("dist/**"));
    assert!(jobs.open_artifacts(job, None, at(0)).unwrap_err().message.contains("no file matched"));
}

#[test]
fn whatever_happens_after_the_last_step_its_result_stands() {
    type Event = fn(&mut JobStore, JobId);
    let events: [Event; 6] = [
        |jobs, job| jobs.cancel(job, at(1)).unwrap(),
        |jobs, job| say(jobs, job, &AgentMessage::Failure(Failure { message: "x".into() }), at(1)),
        |jobs, job| say(jobs, job, &started(0), at(1)),
        |jobs, job| {
            jobs.agent_disconnected(job, at(1));
            jobs.poll(at(10_000));
        },
        |jobs, job| {
            // The agent is asked and says nothing.
            let _reader = jobs.open_artifacts(job, None, at(1)).unwrap();
            jobs.poll(at(3_700_000));
            jobs.poll(at(3_800_000));
        },
        |jobs, job| jobs.receive(job, &[0xff; 64], at(1)),
    ];
    for (index, event) in events.into_iter().enumerate() {
        let mut jobs = store();
        let job = ready(&mut jobs, 3);
        event(&mut jobs, job);
        let done = finish(&mut jobs, job, at(2));
        assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Failure), Some(3)), "{index}");
        assert_eq!(done.artifacts.unwrap().status, ArtifactsStatus::Failed, "{index}");
        assert_eq!(jobs.open_artifacts(job, None, at(2)).unwrap_err().code, ErrorCode::ArtifactsGone);
    }
    let mut jobs = store();
    let job = ready(&mut jobs, 0);
    let done = end(&mut jobs, job, MachineEnd::PowerOff, at(2));
    assert_eq!(done.conclusion, Some(Conclusion::Success), "its machine powered off while it was kept");
}

#[test]
fn a_cancelled_job_and_one_out_of_time_leave_no_artifacts() {
    for cancel in [true, false] {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, JobRequest { timeout_seconds: Some(5), ..with_artifacts() }, at(0));
        say(&mut jobs, job, &started(0), at(0));
        if cancel {
            jobs.cancel(job, at(1)).unwrap();
            say(&mut jobs, job, &exited(0, 143), at(1));
        } else {
            jobs.poll(at(6_000));
        }
        let done = finish(&mut jobs, job, at(6_000));
        let expected = if cancel { Conclusion::Cancelled } else { Conclusion::TimedOut };
        assert_eq!(
            (done.conclusion, done.artifacts.unwrap().status),
            (Some(expected), ArtifactsStatus::Failed)
        );
    }
}

#[test]
fn a_jobs_own_timeout_does_not_end_the_time_its_artifacts_are_kept() {
    let mut jobs = store();
    let job = begin(&mut jobs, 1, JobRequest { timeout_seconds: Some(1), ..with_artifacts() }, at(0));
    run(&mut jobs, job, 0, 0);
    say(&mut jobs, job, &listed(&["dist/a"]), at(0));
    jobs.poll(at(30_000));
    assert_eq!((status(&jobs, job), jobs.finished(job)), (ArtifactsStatus::Ready, false));
}

#[test]
fn a_list_beyond_what_there_is_room_for_is_counted_and_not_kept() {
    let mut jobs = JobStore::new(Limits { jobs_total_bytes: 8_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, with_artifacts(), at(0));
    run(&mut jobs, job, 0, 0);
    let names: Vec<String> = (0..100).map(|n| format!("dist/{n:0100}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    say(&mut jobs, job, &listed(&names), at(0));
    let list = jobs.artifacts(job).unwrap();
    assert_eq!((list.total_count, list.omitted_count, list.artifacts.len()), (100, 100, 0));
    assert!(jobs.open_artifacts(job, Some("any".into()), at(0)).is_ok(), "the agent knows which there are");
}

#[test]
fn artifacts_without_having_been_asked_for_end_the_job() {
    for message in [listed(&["a"]), data(b"a"), sent(None)] {
        let mut jobs = store();
        let job = begin(&mut jobs, 1, with_artifacts(), at(0));
        say(&mut jobs, job, &started(0), at(0));
        say(&mut jobs, job, &message, at(0));
        assert_eq!(finish(&mut jobs, job, at(0)).conclusion, Some(Conclusion::SystemFailure), "{message:?}");
    }
    let mut jobs = store();
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    assert_eq!(jobs.artifacts(job).unwrap_err().code, ErrorCode::ArtifactNotFound);
    assert_eq!(jobs.open_artifacts(job, None, at(0)).unwrap_err().code, ErrorCode::ArtifactNotFound);
}
