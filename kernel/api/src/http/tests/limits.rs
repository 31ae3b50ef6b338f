//! What is too large, too slow or too much, and peers that leave.

use super::*;

#[test]
fn a_body_that_is_too_large_is_refused_and_the_peer_has_time_to_read_why() {
    let mut peer = Peer::new();
    let (answer, _) = parse(&peer.send(post_head("Content-Length: 1048577")), false);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
    assert_eq!(answer.header("connection"), Some("close"));
    // A peer that sends all of it before it reads does not run into a reset.
    let mut left = 1_048_577;
    while left > 0 {
        assert!(!peer.connection.wants_close());
        left -= peer.connection.receive(&vec![0; left.min(5000)], peer.now);
        peer.advance();
    }
    assert!(peer.connection.wants_close());

    peer.reconnect();
    let mut request = post_head("Transfer-Encoding: chunked").into_bytes();
    for _ in 0..17 {
        request.extend(b"10000\r\n");
        request.extend([b' '; 65_536]);
        request.extend(b"\r\n");
    }
    let (answer, _) = parse(&peer.send(request), false);
    assert_eq!(answer.status, 413);
    assert!(!peer.connection.wants_close());
    assert!(peer.connection.deadline().unwrap() <= peer.now.monotonic_ns + 500_000_000);
    peer.wait(500);
    assert!(peer.connection.wants_close());
    assert_eq!(peer.api.bodies.free(), Limits::default().bodies_total_bytes);
}

#[test]
fn only_a_new_job_has_a_body_and_no_other_request_gets_memory_for_one() {
    let auth = format!("Authorization: Bearer {TOKEN}\r\n");
    for (request, auth) in [
        ("GET /healthz", ""),
        ("GET /openapi.json", ""),
        ("GET /v1/jobs", &auth),
        ("POST /v1/jobs/0123456789abcdef0123456789abcdef/cancel", &auth),
    ] {
        for (length, body) in [("Content-Length: 1048576", ""), ("Transfer-Encoding: chunked", "1\r\nx")] {
            let mut peer = Peer::new();
            let head = format!("{request} HTTP/1.1\r\nHost: node\r\n{auth}{length}\r\n\r\n{body}");
            let (answer, _) = parse(&peer.send(head), false);
            assert_eq!(
                (answer.status, answer.code().as_str()),
                (413, "body_too_large"),
                "{request} {length}"
            );
            assert!(answer.text().contains("takes no body"));
            assert_eq!(peer.api.bodies.free(), Limits::default().bodies_total_bytes);
        }
    }
    let mut peer = Peer::new();
    let bytes =
        peer.send("GET /healthz HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(parse(&bytes, false).0.status, 200, "an empty body is none");
}

#[test]
fn bodies_of_all_connections_together_are_bounded() {
    let limits = Limits { bodies_total_bytes: 100_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    assert!(peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000)).is_empty());
    let first = core::mem::replace(&mut peer.connection, Connection::new(peer.now));
    let bytes = peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000));
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (503, "overloaded"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    drop(first);
    peer.reconnect();
    assert!(peer.send(post_head("Content-Length: 70000") + &" ".repeat(60_000)).is_empty());
}

#[test]
fn answers_of_all_connections_together_are_bounded() {
    let limits = Limits { answers_total_bytes: 40_000, ..Limits::default() };
    let mut peer = Peer::with(ApiConfig { limits, ..config() });
    for _ in 0..60 {
        assert_eq!(peer.post(&json!({"steps": [{"run": "a"}]})).status, 202);
    }
    assert_eq!(peer.get("/v1/jobs?per_page=40").status, 200);
    let request = get("/v1/jobs?per_page=40");
    peer.connection.receive(request.as_bytes(), peer.now);
    peer.advance();
    let first = core::mem::replace(&mut peer.connection, Connection::new(peer.now));
    assert_eq!(peer.get("/v1/jobs?per_page=40").code(), "overloaded");
    assert_eq!(peer.get("/v1/jobs?per_page=1").status, 200);
    drop(first);
    assert_eq!(peer.get("/v1/jobs?per_page=40").status, 200);
}

#[test]
fn a_page_of_large_jobs_ends_early_and_leads_to_the_next() {
    let mut peer = Peer::new();
    for _ in 0..60 {
        let request = json!({"steps": [{"run": "a"}], "labels": vec!["l".repeat(100); 100]});
        assert_eq!(peer.post(&request).status, 202);
    }
    let (mut path, mut seen, mut pages) = (Some("/v1/jobs?per_page=100".to_string()), vec![], 0);
    while let Some(page) = path {
        let answer = peer.get(&page);
        assert!(answer.status == 200 && answer.body.len() < 600 * 1024);
        let list: JobList = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(list.total_count, 60);
        seen.extend(list.jobs.into_iter().map(|job| job.id));
        let link = answer.header("link").filter(|link| link.contains("next"));
        path = link.map(|link| link[link.rfind('<').unwrap() + 1..link.rfind('>').unwrap()].to_string());
        pages += 1;
    }
    seen.dedup();
    assert_eq!((seen.len(), pages), (60, 2));
}

#[test]
fn a_head_that_is_too_long_is_refused() {
    let mut peer = Peer::new();
    let bytes = peer.send(format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(20_000)));
    let (answer, _) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (431, "head_too_large"));
    peer.wait(500);
    assert!(peer.connection.wants_close());
}

#[test]
fn rubbish_is_refused_and_what_follows_is_not_read() {
    let mut peer = Peer::new();
    let bytes = peer.send(format!("\u{1}\u{2}\r\n\r\n{}", get("/healthz")));
    let (answer, rest) = parse(&bytes, false);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
    assert_eq!(rest, b"");
    let (answer, _) = parse(
        &{
            peer.reconnect();
            peer.send("GET / HTTP/3.0\r\n\r\n")
        },
        false,
    );
    assert_eq!((answer.status, answer.code().as_str()), (505, "http_version_not_supported"));
}

#[test]
fn a_slow_head_is_given_30_s() {
    let mut peer = Peer::new();
    peer.get("/healthz");
    peer.wait(50_000);
    assert!(peer.send("GET /healthz HTTP/1.1\r\nHo").is_empty());
    assert_eq!(peer.connection.deadline(), Some(peer.now.monotonic_ns + 30_000_000_000));
    peer.wait(29_999);
    assert!(peer.send("s").is_empty(), "a byte now and then does not help");
    peer.wait(1);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!((answer.status, answer.code().as_str()), (408, "request_timeout"));
    peer.wait(500);
    assert!(peer.connection.wants_close());
}

#[test]
fn a_connections_first_head_is_given_10_s() {
    let mut peer = Peer::new();
    assert_eq!(peer.connection.deadline(), Some(peer.now.monotonic_ns + 10_000_000_000));
    peer.wait(9_999);
    assert!(!peer.connection.wants_close());
    peer.wait(1);
    assert!(peer.connection.wants_close() && peer.connection.transmit().is_empty());
    peer.reconnect();
    peer.wait(5_000);
    assert!(peer.send("GET /healthz HTTP/1.1\r\nHo").is_empty());
    peer.wait(5_000);
    assert_eq!(parse(&peer.take(), false).0.status, 408);
}

#[test]
fn a_connection_can_be_evicted_unless_a_peer_with_the_token_waits_for_its_answer() {
    let mut peer = Peer::new();
    assert!(peer.connection.can_be_evicted(), "it has said nothing");
    peer.get("/healthz");
    peer.connection.receive(get("/openapi.json").as_bytes(), peer.now);
    peer.wait(0);
    assert!(!peer.connection.transmit().is_empty() && peer.connection.can_be_evicted(), "a stranger");
    peer.take();
    assert!(peer.send(post_head("Content-Length: 10") + "{").is_empty());
    assert!(!peer.connection.can_be_evicted(), "a job is arriving");
    peer.send("\"step\": 1");
    assert!(peer.connection.can_be_evicted(), "it has its answer");
    let job = peer.begin();
    peer.send(get(&format!("/v1/jobs/{job}/logs?follow=true")));
    assert!(!peer.connection.can_be_evicted(), "it follows");
}

#[test]
fn a_slow_body_is_given_30_s() {
    let mut peer = Peer::new();
    assert!(peer.send(post_head("Content-Length: 10") + "{").is_empty());
    peer.wait(29_999);
    assert!(peer.take().is_empty());
    peer.wait(1);
    let (answer, _) = parse(&peer.take(), false);
    assert_eq!(answer.status, 408);
}

#[test]
fn an_idle_connection_is_closed_after_60_s_without_a_word() {
    let mut peer = Peer::new();
    peer.get("/healthz");
    peer.wait(59_999);
    assert!(!peer.connection.wants_close());
    peer.get("/healthz");
    peer.wait(59_999);
    assert!(!peer.connection.wants_close());
    peer.wait(1);
    assert!(peer.connection.wants_close() && peer.connection.transmit().is_empty());
}

#[test]
fn a_peer_that_takes_nothing_for_60_s_is_cut_off() {
    let mut peer = Peer::new();
    peer.connection.receive(get("/openapi.json").as_bytes(), peer.now);
    peer.wait(0);
    assert!(!peer.connection.transmit().is_empty());
    peer.wait(59_000);
    peer.connection.transmitted(1, peer.now);
    peer.wait(59_999);
    assert!(!peer.connection.wants_abort());
    assert_eq!(peer.connection.deadline(), Some(peer.now.monotonic_ns + 1_000_000));
    peer.wait(1);
    assert!(peer.connection.wants_abort() && peer.connection.transmit().is_empty());
}

#[test]
fn a_peer_that_has_sent_all_it_will_still_gets_its_answers() {
    let mut peer = Peer::new();
    peer.connection.receive([get("/healthz"), get("/version")].concat().as_bytes(), peer.now);
    let answers = parse_all(peer.close());
    assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 200]);
    assert!(peer.connection.wants_close());
}

#[test]
fn a_peer_that_leaves_in_the_middle_is_told_so() {
    for (part, silent) in [
        (String::new(), true),
        ("GET / HT".to_string(), false),
        (post_head("Content-Length: 10") + "{", false),
        (post_head("Transfer-Encoding: chunked") + "5\r\nab", false),
    ] {
        let mut peer = Peer::new();
        assert!(peer.send(&part).is_empty());
        let bytes = peer.close();
        if silent {
            assert!(bytes.is_empty());
        } else {
            assert_eq!(parse(&bytes, false).0.code(), "malformed_request", "{part}");
        }
        assert!(peer.connection.wants_close(), "{part}");
    }
}

#[test]
fn an_idle_connection_has_no_buffers() {
    let mut peer = Peer::new();
    peer.get("/openapi.json");
    peer.post(&json!({"steps": [{"run": "a"}]}));
    assert_eq!(peer.connection.buffered_capacity(), 0);
    assert!(size_of::<Connection>() <= 192, "{}", size_of::<Connection>());
}
