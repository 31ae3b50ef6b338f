//! How requests follow each other on a connection, and how their bodies come.

use super::*;

#[test]
fn a_connection_is_kept_until_somebody_wants_it_closed() {
    let mut peer = Peer::new();
    for _ in 0..3 {
        assert_eq!(peer.get("/healthz").header("connection"), None);
        assert!(!peer.connection.wants_close());
    }
    assert_eq!(peer.ask("GET", "/healthz", "Connection: close\r\n", "").header("connection"), Some("close"));
    assert!(peer.connection.wants_close());
    assert_eq!(peer.connection.receive_capacity(), 0);
}

#[test]
fn http_1_0_is_answered_its_way() {
    let mut peer = Peer::new();
    let (answer, _) = parse(&peer.send("GET /healthz HTTP/1.0\r\n\r\n"), false);
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert!(peer.connection.wants_close());

    peer.reconnect();
    let (answer, _) = parse(&peer.send("GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), false);
    assert_eq!(answer.header("connection"), Some("keep-alive"));
    let job = peer.begin();
    peer.says(job, &stdout("text"));
    let auth = format!("Authorization: Bearer {TOKEN}");
    let request = format!("GET /v1/jobs/{job}/logs HTTP/1.0\r\n{auth}\r\nConnection: keep-alive\r\n\r\n");
    let (answer, _) = parse(&peer.send(request), false);
    assert_eq!((answer.text().as_str(), answer.header("transfer-encoding")), ("text", None));
    assert_eq!(answer.header("connection"), Some("close"), "its end is the connection's");
    assert!(peer.connection.wants_close());
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let mut peer = Peer::new();
    let body = r#"{"steps": [{"run": "a"}]}"#;
    let post = format!("{}{body}", post_head(&format!("Content-Length: {}", body.len())));
    let requests = [get("/healthz"), post, get("/v1/nothing"), get("/v1/jobs")].concat();
    let answers = parse_all(peer.send(requests));
    let statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 202, 404, 200]);
    assert_eq!(answers[3].json()["total_count"], 1);
}

#[test]
fn a_peer_that_does_not_read_is_not_read_from() {
    let mut peer = Peer::new();
    let request = get("/healthz");
    let mut sent = 0;
    // Nothing that is to be sent is taken.
    while sent < 1000 {
        if peer.connection.receive(request.as_bytes(), peer.now) < request.len() {
            break;
        }
        peer.advance();
        sent += 1;
    }
    assert!(sent < 120, "{sent}");
    assert!(peer.connection.transmit().len() < 1000, "one answer at a time");
}

#[test]
fn expect_100_continue_is_met_or_refused_at_once() {
    let body = r#"{"steps": [{"run": "a"}]}"#;
    let mut peer = Peer::new();
    let head = post_head(&format!("Expect: 100-continue\r\nContent-Length: {}", body.len()));
    assert_eq!(peer.send(&head), b"HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(parse(&peer.send(body), false).0.status, 202);
    let answer = peer.send(format!("{head}{body}"));
    assert_eq!(parse(&answer, false).0.status, 202, "nothing to ask for when the body is there");

    let head = post_head("Expect: 100-continue\r\nContent-Length: 2000000");
    let (answer, _) = parse(&peer.send(head), false);
    assert_eq!((answer.status, answer.code().as_str()), (413, "body_too_large"));
}

#[test]
fn bodies_come_in_chunks_too() {
    let mut peer = Peer::new();
    let mut request = post_head("Transfer-Encoding: chunked");
    for byte in r#"{"steps": [{"run": "a"}]}"#.chars() {
        request.push_str(&format!("1\r\n{byte}\r\n"));
    }
    request.push_str("0\r\n\r\n");
    let answers = parse_all(peer.send(request + &get("/healthz")));
    assert_eq!(answers.iter().map(|answer| answer.status).collect::<Vec<_>>(), [202, 200]);
    let (answer, _) = parse(&peer.send(post_head("Transfer-Encoding: chunked") + "x\r\n"), false);
    assert_eq!((answer.status, answer.code().as_str()), (400, "malformed_request"));
}
