//! Whatever a peer sends, however it is cut up.

use super::*;

/// Everything a peer gets for bytes that come in such pieces, when it closes after them.
fn exchange(bytes: &[u8], sizes: &[usize]) -> (Vec<u8>, bool) {
    let mut peer = Peer::new();
    peer.begin();
    let (mut out, mut rest, mut sizes) = (vec![], bytes, sizes.iter().cycle());
    while !rest.is_empty() && peer.connection.receive_capacity() > 0 {
        let (piece, later) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
        let unread = peer.connection.receive_capacity();
        out.extend(peer.send(piece));
        rest = if piece.len() > unread && peer.connection.receive_capacity() == 0 { &[] } else { later };
    }
    out.extend(peer.close());
    peer.wait(10_000);
    out.extend(peer.take());
    assert!(peer.connection.buffered_capacity() <= 64 * 1024);
    (out, peer.connection.wants_close() || peer.connection.wants_abort())
}

proptest! {
    #[test]
    fn random_bytes_end_in_an_answer_or_a_close(
        bytes in prop::collection::vec(any::<u8>(), 0..3000),
        sizes in prop::collection::vec(1_usize..200, 1..10),
    ) {
        let (out, closed) = exchange(&bytes, &sizes);
        prop_assert!(closed);
        prop_assert!(out.is_empty() || out.starts_with(b"HTTP/1.1 "));
    }

    #[test]
    fn bytes_that_look_like_requests_end_in_an_answer_or_a_close(
        parts in prop::collection::vec(prop::sample::select(vec![
            "GET ", "POST ", "HEAD ", "/v1/jobs", "/healthz", "?page=1", "?", "%", " HTTP/1.1\r\n", " HTTP/1.0\r\n",
            "Host: x\r\n", "Content-Length: 5\r\n", "Content-Length: 0\r\n", "Transfer-Encoding: chunked\r\n",
            "Authorization: Bearer 0123456789abcdef\r\n", "Content-Type: application/json\r\n", "Connection: close\r\n",
            "Expect: 100-continue\r\n", "Range: bytes=0-\r\n", "Accept: */*\r\n", "\r\n", "\n", "\r", " ", ":", "5\r\n", "hello",
            "0\r\n\r\n", "{\"steps\":[{\"run\":\"a\"}]}", "/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/logs",
            "/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/cancel", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        ]), 0..30),
        sizes in prop::collection::vec(1_usize..50, 1..10),
    ) {
        let (out, closed) = exchange(parts.concat().as_bytes(), &sizes);
        prop_assert!(closed);
        prop_assert!(out.is_empty() || out.starts_with(b"HTTP/1.1 "));
    }

    #[test]
    fn a_pipeline_is_answered_alike_however_it_is_cut(
        which in prop::collection::vec(0_usize..8, 1..12),
        sizes in prop::collection::vec(1_usize..300, 1..10),
    ) {
        let body = r#"{"steps": [{"run": "a"}]}"#;
        let requests = [
            get("/healthz"),
            get("/openapi.json"),
            get("/v1/jobs"),
            get("/v1/nothing"),
            get("/v1/jobs/c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8c8/logs"),
            format!("{}{body}", post_head(&format!("Content-Length: {}", body.len()))),
            format!("{}5\r\n{}\r\n14\r\n{}\r\n0\r\n\r\n", post_head("Transfer-Encoding: chunked"), &body[..5], &body[5..]),
            "HEAD /version HTTP/1.1\r\nHost: x\r\n\r\n".to_string(),
        ];
        let bytes: String = which.iter().map(|index| requests[*index].as_str()).collect();
        let whole = exchange(bytes.as_bytes(), &[usize::MAX]);
        prop_assert_eq!(exchange(bytes.as_bytes(), &sizes), whole);
    }
}
