//! Artifacts' way from a machine to a client.

use super::*;
use crate::agent::AgentMessage;
use crate::types::JobRequest;

/// A job whose steps are over and whose artifacts are ready.
fn ready(peer: &mut Peer) -> JobId {
    let request = JobRequest { artifacts: vec!["dist".into()], ..steps(vec![step("a")]) };
    let job = begin(&mut peer.api.jobs, 200, request, peer.now);
    peer.says(job, &started(0));
    peer.says(job, &exited(0, 0));
    peer.says(job, &listed(&["dist/a b", "dist/c"]));
    job
}

fn data(bytes: &[u8]) -> AgentMessage {
    AgentMessage::ArtifactData(bytes.to_vec())
}

#[test]
fn artifacts_are_listed_and_come_as_a_tar_as_the_machine_sends_it() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let list = peer.get(&format!("/v1/jobs/{job}/artifacts")).json();
    assert_eq!((&list["status"], &list["total_bytes"]), (&json!("ready"), &json!(10)));
    assert_eq!(list["artifacts"][0], json!({"name": "dist/a b", "size": 5}));
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/artifacts.tar")));
    assert!(peer.connection.is_following());
    let mut sent_bytes = vec![];
    for part in 0..20_u8 {
        let part = vec![part; 30_000];
        peer.says(job, &data(&part));
        bytes.extend(peer.take());
        sent_bytes.extend(part);
    }
    peer.says(job, &sent(None));
    bytes.extend(peer.take());
    let (answer, rest) = parse(&bytes, false);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/x-tar")));
    assert!(answer.body == sent_bytes && rest.is_empty());
    assert!(peer.api.jobs.finished(job));
    finish(&mut peer.api.jobs, job, peer.now);
    let gone = peer.get(&format!("/v1/jobs/{job}/artifacts.tar"));
    assert_eq!((gone.status, gone.code().as_str()), (410, "artifacts_gone"));
}

#[test]
fn one_artifact_is_named_by_the_rest_of_the_path() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let bytes = peer.send(get(&format!("/v1/jobs/{job}/artifacts/dist/a%20b")));
    let head = parse(&[&bytes[..], b"0\r\n\r\n"].concat(), false).0;
    assert_eq!((head.status, head.header("content-type")), (200, Some("application/octet-stream")));
    peer.says(job, &data(b"bytes"));
    peer.says(job, &sent(None));
    assert_eq!(peer.take(), b"0005\r\nbytes\r\n0\r\n\r\n");
    for (name, status) in [("dist/nope", 404), ("%ff", 404), ("..%2f..%2fetc/passwd", 404)] {
        assert_eq!(peer.get(&format!("/v1/jobs/{job}/artifacts/{name}")).status, status, "{name}");
    }
}

#[test]
fn artifacts_that_break_off_close_the_connection_without_a_last_chunk() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/artifacts.tar")));
    peer.says(job, &data(b"half"));
    peer.says(job, &sent(Some("it changed")));
    bytes.extend(peer.take());
    assert!(bytes.ends_with(b"0004\r\nhalf\r\n"), "{}", String::from_utf8_lossy(&bytes));
    assert!(peer.connection.wants_close());
}

#[test]
fn a_client_that_takes_nothing_holds_the_machine_back_until_it_is_given_up() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    peer.send(get(&format!("/v1/jobs/{job}/artifacts.tar")));
    while peer.api.jobs.receive_capacity(job, peer.now) > 40_000 {
        peer.says(job, &data(&[7; 30_000]));
        peer.advance();
    }
    assert!(peer.connection.buffered_capacity() <= 40 * 1024);
    peer.wait(59_999);
    assert!(!peer.connection.wants_abort());
    peer.wait(1);
    assert!(peer.connection.wants_abort());
    peer.reconnect();
    peer.api.jobs.poll(peer.now);
    let told = told(&mut peer.api.jobs, job);
    assert_eq!(told.last(), Some(&crate::agent::HostMessage::StopArtifacts));
}

#[test]
fn the_head_of_artifacts_leaves_them_for_another() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let head = peer.ask("HEAD", &format!("/v1/jobs/{job}/artifacts.tar"), "", "");
    assert_eq!(head.status, 200);
    peer.api.jobs.poll(peer.now);
    peer.says(job, &sent(None));
    let bytes = peer.send(get(&format!("/v1/jobs/{job}/artifacts.tar")));
    assert!(bytes.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&bytes));
}
