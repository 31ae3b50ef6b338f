//! A workspace's way from a connection into a machine.

use super::*;
use crate::agent::{Decoder, HostMessage};
use crate::jobs::MachineEnd;
use crate::types::{Conclusion, JobRequest, WorkspaceStatus};

/// A job with a workspace whose agent has said hello.
fn ready(peer: &mut Peer) -> JobId {
    begin(&mut peer.api.jobs, 200, JobRequest { workspace: true, ..steps(vec![step("a")]) }, peer.now)
}

fn put(job: JobId, headers: &str) -> String {
    format!(
        "PUT /v1/jobs/{job}/workspace HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {TOKEN}\r\n\
         Content-Type: application/x-tar\r\n{headers}\r\n\r\n"
    )
}

/// The machine takes what waits for it, at most `most` bytes.
fn machine_takes(peer: &mut Peer, job: JobId, decoder: &mut Decoder, most: usize) {
    let waiting = peer.api.jobs.transmit(job);
    let part = waiting.get(..most).unwrap_or(waiting).to_vec();
    peer.api.jobs.transmitted(job, part.len());
    decoder.push(&part);
}

/// The tar's bytes that have come out, and whether its end has.
fn come_out(decoder: &mut Decoder, got: &mut Vec<u8>) -> bool {
    let mut ended = false;
    while let Some(frame) = decoder.next_frame().unwrap() {
        match HostMessage::decode(frame).unwrap() {
            HostMessage::WorkspaceData(bytes) => got.extend(bytes),
            HostMessage::WorkspaceEnd => ended = true,
            other => panic!("{other:?}"),
        }
    }
    ended
}

/// Sends all of a request to a machine that takes so many bytes at once; what the machine got, and the answer.
fn carry(peer: &mut Peer, job: JobId, request: &[u8], piece: usize, takes: usize) -> (Vec<u8>, Answer) {
    let (mut rest, mut decoder, mut got, mut out) = (request, Decoder::new(), vec![], vec![]);
    let (mut stuck, mut ended) = (0, false);
    while stuck < 3 {
        stuck += 1;
        let room = rest.len().min(piece).min(peer.connection.receive_capacity());
        if room > 0 {
            stuck = 0;
            peer.connection.receive(&rest[..room], peer.now);
            rest = &rest[room..];
        }
        out.extend(peer.take());
        assert!(peer.connection.buffered_capacity() <= 64 * 1024);
        assert!(peer.api.jobs.transmit(job).len() <= 80 * 1024, "the node holds no workspace");
        if !ended && !peer.api.jobs.transmit(job).is_empty() {
            stuck = 0;
            machine_takes(peer, job, &mut decoder, takes);
            ended = come_out(&mut decoder, &mut got);
            if ended {
                peer.says(job, &unpacked(2));
            }
        }
        out.extend(peer.take());
    }
    assert!(rest.is_empty(), "{} bytes were not taken", rest.len());
    (got, parse(&out, false).0)
}

#[test]
fn a_workspace_goes_into_the_machine_and_the_answer_comes_when_it_is_unpacked() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let body: Vec<u8> = (0..400_000_u32).flat_map(u32::to_le_bytes).collect();
    let request = [put(job, &format!("Content-Length: {}", body.len())).as_bytes(), &body].concat();
    let (got, answer) = carry(&mut peer, job, &request, 5000, 3000);
    assert!(got == body);
    assert_eq!(answer.status, 200);
    let expected = json!({"status": "unpacked", "bytes": 1_600_000, "entries": 2});
    assert_eq!(answer.json(), expected);
    assert_eq!(told_to_run(&mut peer.api.jobs, job), ["a"]);
    assert_eq!(peer.get("/healthz").status, 200, "the connection goes on");
}

#[test]
fn a_workspace_may_come_in_chunks() {
    let request = put(id(200), "Transfer-Encoding: chunked") + "5\r\nhello\r\n6;x\r\n world\r\n0\r\n\r\n";
    for piece in [1, 7, 1000] {
        let mut peer = Peer::new();
        let job = ready(&mut peer);
        let (got, answer) = carry(&mut peer, job, request.as_bytes(), piece, 1000);
        assert_eq!((got.as_slice(), answer.status), (b"hello world".as_slice(), 200));
    }
}

#[test]
fn a_workspace_of_no_bytes_is_an_empty_one() {
    for headers in ["Content-Length: 0", "X: y"] {
        let mut peer = Peer::new();
        let job = ready(&mut peer);
        let (got, answer) = carry(&mut peer, job, put(job, headers).as_bytes(), 1000, 1000);
        assert_eq!((got.len(), answer.status), (0, 200));
    }
}

#[test]
fn nothing_is_read_ahead_of_a_machine_that_is_not_there() {
    let mut peer = Peer::new();
    let request = JobRequest { workspace: true, ..steps(vec![step("a")]) };
    let job = create(&mut peer.api.jobs, 200, request, peer.now);
    peer.send(put(job, "Expect: 100-continue\r\nContent-Length: 100000"));
    let sent = peer.send([7; 100_000]);
    assert_eq!((sent.len(), peer.connection.receive_capacity()), (0, 0));
    peer.wait(3_600_000);
    assert!(!peer.connection.wants_close() && !peer.connection.wants_abort(), "the node keeps it waiting");
    peer.api.jobs.start(job, peer.now);
    peer.says(job, &hello());
    peer.advance();
    assert!(peer.connection.receive_capacity() > 0 && peer.connection.is_following());
    assert_eq!(peer.api.jobs.get(job).unwrap().workspace.unwrap().status, WorkspaceStatus::Arriving);
}

#[test]
fn a_client_that_expects_it_is_told_to_continue_only_when_the_workspace_is_wanted() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let expect = "Expect: 100-continue\r\nContent-Length: 10";
    assert_eq!(peer.send(put(job, expect)), b"HTTP/1.1 100 Continue\r\n\r\n");
    peer.reconnect();
    let plain = begin(&mut peer.api.jobs, 201, steps(vec![step("a")]), peer.now);
    let (answer, _) = parse(&peer.send(put(plain, expect)), false);
    assert_eq!((answer.status, answer.code().as_str()), (409, "workspace_not_expected"));
}

#[test]
fn a_client_that_stalls_ends_the_job_and_is_told_so() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    peer.send(put(job, "Content-Length: 100") + "half");
    assert_eq!(peer.connection.deadline(), Some(at(30_000).monotonic_ns));
    peer.wait(29_999);
    assert!(!peer.api.jobs.finished(job));
    peer.wait(1);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!((answer.status, answer.header("connection")), (408, Some("close")));
    let done = finish(&mut peer.api.jobs, job, peer.now);
    assert_eq!(done.conclusion, Some(Conclusion::Failure));
    let reason = done.failure_reason.unwrap();
    assert!(reason.contains("after 4 bytes: nothing came of the workspace for 30 s"), "{reason}");
}

#[test]
fn a_machine_that_is_slow_is_no_stall_of_the_client() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    peer.send(put(job, "Content-Length: 1000000"));
    peer.send([7; 100_000]);
    peer.wait(3_000_000);
    assert!(!peer.api.jobs.finished(job));
    assert_eq!(peer.connection.deadline(), None);
}

#[test]
fn a_client_that_closes_in_the_middle_ends_the_job() {
    for dropped in [false, true] {
        let mut peer = Peer::new();
        let job = ready(&mut peer);
        peer.send(put(job, "Content-Length: 100") + "half");
        if dropped {
            peer.reconnect();
        } else {
            let (answer, _) = parse(&peer.close(), false);
            assert_eq!(answer.status, 400);
        }
        peer.api.jobs.poll(peer.now);
        let done = finish(&mut peer.api.jobs, job, peer.now);
        let reason = done.failure_reason.unwrap();
        assert!(reason.contains("was gone after 4 bytes: ") && reason.contains("closed"), "{reason}");
    }
}

#[test]
fn chunks_that_are_none_end_the_job() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let bytes = peer.send(put(job, "Transfer-Encoding: chunked") + "4\r\nhalf\r\nno size\r\n");
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
    assert!(peer.api.jobs.finished(job));
}

#[test]
fn a_machine_that_ends_answers_at_once() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    peer.send(put(job, "Content-Length: 100") + "half");
    end(&mut peer.api.jobs, job, MachineEnd::PowerOff, peer.now);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!((answer.status, answer.code().as_str()), (409, "job_completed"));
    assert!(answer.text().contains("powered itself off"), "{}", answer.text());
    peer.wait(20_000);
    assert!(peer.connection.wants_close(), "what still comes is thrown away for a while, and then it closes");
}

#[test]
fn what_the_agent_cannot_unpack_is_the_answer() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    peer.send(put(job, "Content-Length: 100") + "half");
    let message = "'../x' leaves the tree".to_string();
    peer.says(job, &crate::agent::AgentMessage::WorkspaceFailed(crate::agent::WorkspaceFailed { message }));
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!((answer.status, answer.code().as_str()), (422, "workspace_failed"));
    assert!(answer.text().contains("'../x' leaves the tree"));
}

#[test]
fn what_is_no_plain_tar_for_a_job_that_is_there_is_refused() {
    let mut peer = Peer::new();
    let job = ready(&mut peer);
    let path = format!("/v1/jobs/{job}/workspace");
    for headers in [
        "Content-Type: application/gzip\r\n",
        "Content-Type: application/x-tar\r\nContent-Encoding: gzip\r\n",
        "",
    ] {
        peer.reconnect();
        assert_eq!(peer.ask("PUT", &path, headers, "x").status, 415, "{headers}");
    }
    peer.reconnect();
    let tar = "Content-Type: application/x-tar\r\n";
    assert_eq!(peer.ask("PUT", &format!("/v1/jobs/{}/workspace", id(9)), tar, "x").status, 404);
    peer.reconnect();
    let bytes = peer.send(put(job, "Content-Length: 4294967297"));
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
    assert!(answer.text().contains("4096 MiB"), "{}", answer.text());
    peer.reconnect();
    assert_eq!(peer.get(&path).header("allow"), Some("PUT"));
    let (_, answer) = carry(&mut peer, job, put(job, "Content-Length: 0").as_bytes(), 1000, 1000);
    assert_eq!(answer.status, 200, "none of that took the workspace's place");
    peer.reconnect();
    assert_eq!(peer.ask("PUT", &path, tar, "x").code(), "workspace_not_expected");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_pieces_the_machine_gets_the_body(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20_000), 0..12),
        chunked in any::<bool>(),
        piece in 1_usize..10_000,
        takes in 1_usize..100_000,
    ) {
        let mut peer = Peer::new();
        let job = ready(&mut peer);
        let body = chunks.concat();
        let request = if chunked {
            let mut request = put(job, "Transfer-Encoding: chunked").into_bytes();
            for chunk in &chunks {
                request.extend(format!("{:x}\r\n", chunk.len()).bytes().chain(chunk.iter().copied()).chain(*b"\r\n"));
            }
            request.extend(b"0\r\n\r\n");
            request
        } else {
            [put(job, &format!("Content-Length: {}", body.len())).as_bytes(), &body].concat()
        };
        let (got, answer) = carry(&mut peer, job, &request, piece.max(request.len() / 200), takes);
        prop_assert!(got == body);
        prop_assert_eq!(answer.status, 200);
    }
}
