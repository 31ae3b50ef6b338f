//! Logs: whole, in parts, as they grow.

use super::*;

#[test]
fn a_log_is_read_whole_in_ranges_and_by_stream() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("0123456789\n"));
    peer.says(job, &crate::agent::AgentMessage::Stderr(b"error\n".to_vec()));
    peer.says(job, &stdout("more\n"));
    let path = format!("/v1/jobs/{job}/logs");
    let whole = "0123456789\nerror\nmore\n";
    let answer = peer.get(&path);
    assert_eq!((answer.status, answer.text().as_str()), (200, whole));
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(peer.get(&format!("{path}?stream=stderr")).text(), "error\n");
    assert_eq!(peer.get(&format!("{path}?stream=stdout&offset=11")).text(), "more\n");
    assert_eq!(peer.get(&format!("{path}?offset=99")).text(), "");

    let range = |peer: &mut Peer, range: &str| peer.ask("GET", &path, &format!("Range: {range}\r\n"), "");
    let answer = range(&mut peer, "bytes=8-12");
    assert_eq!((answer.status, answer.text().as_str()), (206, "89\ner"));
    assert_eq!(answer.header("content-range"), Some("bytes 8-12/*"), "more may come");
    peer.finish(job);
    let answer = range(&mut peer, "bytes=-5");
    assert_eq!((answer.status, answer.text().as_str()), (206, "more\n"));
    assert_eq!(answer.header("content-range"), Some("bytes 17-21/22"));
    let answer = range(&mut peer, "bytes=22-");
    assert_eq!((answer.status, answer.code().as_str()), (416, "range_not_satisfiable"));
    assert_eq!(answer.header("content-range"), Some("bytes */22"));
    assert_eq!(range(&mut peer, "bytes=5-1").text(), whole, "nonsense is no range");
    assert_eq!(range(&mut peer, "bytes=0-1,3-4").text(), whole);
    for query in ["?follow=maybe", "?stream=3", "?offset=-1", "?tail=5"] {
        assert_eq!(peer.get(&format!("{path}{query}")).code(), "invalid_query", "{query}");
    }
}

#[test]
fn a_log_comes_in_frames_for_those_who_ask() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("out"));
    peer.says(job, &crate::agent::AgentMessage::Stderr(b"err".to_vec()));
    let accept = "Accept: text/html, application/vnd.docker.multiplexed-stream\r\n";
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), accept, "");
    assert_eq!(answer.header("content-type"), Some(crate::multiplex::MEDIA_TYPE));
    assert_eq!(answer.body, b"\x01\0\0\0\0\0\0\x03out\x02\0\0\0\0\0\0\x03err");
}

#[test]
fn following_a_log_goes_on_until_the_job_is_over() {
    let mut peer = Peer::new();
    let job = create(&mut peer.api.jobs, 200, steps(vec![step("a")]), peer.now);
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=true")));
    assert!(
        bytes.starts_with(b"HTTP/1.1 200 OK\r\n") && bytes.ends_with(b"\r\n\r\n"),
        "the head comes at once"
    );
    assert!(peer.connection.is_following());
    peer.api.jobs.start(job, peer.now);
    peer.says(job, &hello());
    peer.says(job, &started(0));
    peer.says(job, &stdout("first\n"));
    let more = peer.take();
    assert_eq!(more, b"0006\r\nfirst\n\r\n");
    bytes.extend(more);
    peer.wait(600_000);
    assert!(!peer.connection.wants_close() && !peer.connection.wants_abort(), "waiting is no stall");
    peer.says(job, &stdout("last\n"));
    peer.finish(job);
    bytes.extend(peer.send(get("/healthz")));
    let answers = parse_all(bytes);
    assert_eq!((answers[0].text().as_str(), answers[1].text().as_str()), ("first\nlast\n", "ok\n"));
    assert!(!peer.connection.is_following());
}

#[test]
fn a_follower_that_has_sent_all_it_will_still_follows() {
    let mut peer = Peer::new();
    let job = peer.begin();
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=1")));
    bytes.extend(peer.close());
    assert!(!peer.connection.wants_close());
    peer.says(job, &stdout("text"));
    peer.finish(job);
    bytes.extend(peer.take());
    assert_eq!(parse(&bytes, false).0.text(), "text");
    assert!(peer.connection.wants_close());
}

#[test]
fn a_follower_starts_at_the_offset_it_asks_for() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout("0123456789"));
    let mut bytes = peer.send(get(&format!("/v1/jobs/{job}/logs?follow=true&offset=12")));
    peer.says(job, &stdout("abcdef"));
    bytes.extend(peer.take());
    peer.finish(job);
    bytes.extend(peer.take());
    assert_eq!(parse(&bytes, false).0.text(), "cdef");
}

#[test]
fn a_long_log_is_made_as_fast_as_it_is_taken() {
    let mut peer = Peer::new();
    let job = peer.begin();
    let line = "0123456789abcdef".repeat(4000);
    for _ in 0..20 {
        peer.says(job, &stdout(&line));
    }
    let answer = peer.get(&format!("/v1/jobs/{job}/logs"));
    assert_eq!(answer.body.len(), 20 * 64_000);
    assert_eq!(peer.connection.buffered_capacity(), 0);
}

#[test]
fn dropped_output_is_marked() {
    let limits = Limits { log_bytes: 40_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    let job = peer.begin();
    for _ in 0..10 {
        peer.says(job, &stdout(&"x".repeat(9_999)));
    }
    let start = peer.api.jobs.log_info(job).unwrap().start_offset;
    let text = peer.get(&format!("/v1/jobs/{job}/logs")).text();
    let (mark, rest) = text.split_once('\n').unwrap();
    assert_eq!(mark, format!("[nestling: {start} bytes of earlier output dropped]"));
    assert_eq!(rest.len() as u64, 99_990 - start);
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), "Range: bytes=0-9\r\n", "");
    assert_eq!(answer.status, 416, "gone for good");
    let range = format!("Range: bytes=0-{start}\r\n");
    let answer = peer.ask("GET", &format!("/v1/jobs/{job}/logs"), &range, "");
    assert_eq!(answer.header("content-range"), Some(format!("bytes {start}-{start}/*").as_str()));
}

#[test]
fn a_log_that_is_deleted_while_it_is_read_ends_as_incomplete() {
    let mut peer = Peer::new();
    let job = peer.begin();
    peer.says(job, &stdout(&"x".repeat(60_000)));
    peer.finish(job);
    peer.connection.receive(get(&format!("/v1/jobs/{job}/logs")).as_bytes(), peer.now);
    peer.advance();
    peer.api.jobs.delete(job).unwrap();
    let bytes = peer.take();
    assert!(bytes.starts_with(b"HTTP/1.1 200") && !bytes.ends_with(b"\r\n0\r\n\r\n"));
    assert!(peer.connection.wants_close(), "without a last chunk");
}
