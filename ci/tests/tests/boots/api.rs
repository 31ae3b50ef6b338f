//! The node's HTTP against clients that are careless, slow or hostile, over real TCP.

use nestling::bed::Bed;
use nestling_tests::http::{Connection, exchange, request};
use nestling_tests::job::{create, job, wait};
use nestling_tests::node::Shared;
use std::time::Duration;

static NODE: Shared = Shared::new(Bed::builder);

/// What a node must still do after every misuse.
fn assert_serves() {
    let answer = exchange(NODE.get(), "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n");
    assert_eq!((answer.status, answer.text().trim()), (200, "ok"));
}

/// Posts a job request that must be refused; the error's code and the answer's text.
fn refused(body: &str) -> (String, String) {
    let node = NODE.get();
    let answer = exchange(node, request(node, "POST", "/v1/jobs", body));
    assert!((400..500).contains(&answer.status), "{answer:?}");
    let parsed: serde_json::Value = serde_json::from_slice(&answer.body).expect("an error is JSON");
    assert_eq!(parsed["status"], answer.status.to_string());
    for field in ["message", "documentation_url"] {
        assert!(parsed[field].as_str().is_some_and(|text| !text.is_empty()), "{field} in {parsed}");
    }
    (answer.code(), answer.text())
}

#[test]
fn json_that_does_not_parse_is_refused_with_line_and_column() {
    let (code, text) = refused("{\n  \"steps\": [}\n");
    assert_eq!(code, "invalid_json");
    assert!(text.contains("line 2") && text.contains("column"), "{text}");
}

#[test]
fn a_wrong_field_is_refused_by_its_path() {
    for (body, field) in [
        (r#"{"steps": [{"run": "true"}], "step": 1}"#, "step"),
        (r#"{"steps": [{"run": "true", "shell": "bash"}]}"#, "shell"),
        (r#"{"steps": [{"run": 1}]}"#, "steps[0].run"),
        (r#"{"steps": [{"run": "true"}, {"run": ""}]}"#, "steps[1].run"),
        (r#"{"steps": []}"#, "steps"),
        (r#"{}"#, "steps"),
        (r#"{"steps": [{"run": "true", "if": "maybe()"}]}"#, "steps[0].if"),
        (r#"{"steps": [{"run": "true", "timeout_seconds": 0}]}"#, "steps[0].timeout_seconds"),
        (r#"{"steps": [{"run": "true"}], "timeout_seconds": "soon"}"#, "timeout_seconds"),
        (r#"{"steps": [{"run": "true"}], "machine_config": {"vcpu_count": 0}}"#, "machine_config.vcpu_count"),
        (
            r#"{"steps": [{"run": "true"}], "machine_config": {"mem_size_mib": 1}}"#,
            "machine_config.mem_size_mib",
        ),
        (
            r#"{"steps": [{"run": "true"}], "machine_config": {"mem_size_mib": 4000000}}"#,
            "machine_config.mem_size_mib",
        ),
        (r#"{"steps": [{"run": "true"}], "image": "no-such-image"}"#, "image"),
        (r#"{"steps": [{"run": "true"}], "env": {"NOT A NAME": "x"}}"#, "env"),
    ] {
        let (code, text) = refused(body);
        assert_eq!(code, "validation_failed", "{body}: {text}");
        assert!(text.contains(field), "{body}: expected {field} in {text}");
    }
}

#[test]
fn what_needs_a_token_is_refused_without_the_right_one() {
    let node = NODE.get();
    let without = exchange(node, "GET /v1/host HTTP/1.1\r\nHost: node\r\n\r\n");
    assert_eq!((without.status, &*without.code()), (401, "missing_token"));
    assert!(without.header("www-authenticate").is_some_and(|value| value.starts_with("Bearer")));
    let token = node.token().expect("this node has a token");
    let last = if token.ends_with('0') { '1' } else { '0' };
    let nearly = format!("{}{last}", &token[..token.len() - 1]);
    for wrong in ["", "x", &nearly, &format!("{token}0")] {
        let answer = exchange(
            node,
            format!("GET /v1/jobs HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {wrong}\r\n\r\n"),
        );
        assert_eq!(answer.status, 401, "{wrong:?}");
    }
    for open in ["/healthz", "/readyz", "/version", "/openapi.json"] {
        assert_eq!(
            exchange(node, format!("GET {open} HTTP/1.1\r\nHost: node\r\n\r\n")).status,
            200,
            "{open}"
        );
    }
}

#[test]
fn what_is_not_there_is_said_to_be_not_there() {
    let node = NODE.get();
    let unknown = "/v1/jobs/0123456789abcdef0123456789abcdef";
    for (method, path) in [("GET", unknown), ("DELETE", unknown), ("POST", &*format!("{unknown}/cancel"))] {
        let answer = exchange(node, request(node, method, path, ""));
        assert_eq!((answer.status, &*answer.code()), (404, "job_not_found"), "{method} {path}");
    }
    let answer = exchange(node, request(node, "GET", "/v2/jobs", ""));
    assert_eq!((answer.status, &*answer.code()), (404, "not_found"));
    let answer = exchange(node, request(node, "PUT", "/v1/jobs", ""));
    assert_eq!((answer.status, &*answer.code()), (405, "method_not_allowed"));
    assert!(answer.header("allow").is_some_and(|allow| allow.contains("GET") && allow.contains("POST")));
}

#[test]
fn a_body_that_is_too_long_is_refused_before_it_has_arrived() {
    let node = NODE.get();
    let token = node.token().expect("this node has a token");
    let head = format!("POST /v1/jobs HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {token}\r\n");
    let answer = exchange(
        node,
        format!("{head}Content-Type: application/json\r\nContent-Length: 2000000000\r\n\r\n{{"),
    );
    assert_eq!((answer.status, &*answer.code()), (413, "body_too_large"));

    let mut chunked = Connection::open(node);
    chunked.send(format!("{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"));
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    for _ in 0..64 {
        if !chunked.send(&chunk) {
            break;
        }
    }
    let rest = chunked.rest();
    // Closing while the client still sends may lose the answer on its way; it must not have been taken for a job.
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&rest));
    assert_serves();
}

#[test]
fn a_head_that_is_too_long_is_refused() {
    let answer = exchange(
        NODE.get(),
        format!("GET /healthz HTTP/1.1\r\nHost: node\r\nX: {}\r\n\r\n", "x".repeat(20_000)),
    );
    assert_eq!((answer.status, &*answer.code()), (431, "head_too_large"));
}

#[test]
fn a_client_that_never_finishes_its_request_is_given_up_and_holds_up_nobody() {
    let node = NODE.get();
    let mut slow: Vec<Connection> = (0..8).map(|_| Connection::open(node)).collect();
    for connection in &mut slow {
        assert!(connection.send("GET /healthz HTTP/1.1\r\nHo"));
    }
    assert_serves();
    for connection in &mut slow {
        let answer = connection.answer();
        assert!(answer.is_none_or(|answer| answer.status == 408));
    }
    assert_serves();
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_answer() {
    let node = NODE.get();
    let mut connection = Connection::open(node);
    connection.send(request(node, "GET", "/v1/host", ""));
    connection.finish();
    assert_eq!(connection.answer().expect("an answer").status, 200);
}

#[test]
fn a_client_that_leaves_in_the_middle_is_forgotten() {
    let node = NODE.get();
    for part in
        ["", "G", "GET /v1/host HTTP/1.1\r\n", "POST /v1/jobs HTTP/1.1\r\nContent-Length: 10\r\n\r\n{"]
    {
        Connection::open(node).send(part);
    }
    let id = create(node, &job("seq 1 100000")).id;
    let mut follower = Connection::open(node);
    follower.send(request(node, "GET", &format!("/v1/jobs/{id}/logs?follow=true"), ""));
    drop(follower);
    assert_eq!(wait(node, &id).exit_code, Some(0));
    assert_serves();
}

#[test]
fn two_hundred_connections_at_once_are_all_served() {
    let node = NODE.get();
    let open = |_| {
        // QEMU's port forwarding takes one waiting connection at a time; a second waits for TCP's retry, a second later.
        std::thread::sleep(Duration::from_millis(10));
        Connection::open(node)
    };
    let mut connections: Vec<Connection> = (0..200).map(open).collect();
    for round in 0..2 {
        for connection in &mut connections {
            assert!(connection.send("GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n"));
        }
        for (number, connection) in connections.iter_mut().enumerate() {
            let answer = connection
                .answer()
                .unwrap_or_else(|| panic!("round {round}, connection {number}: no answer"));
            assert_eq!(answer.status, 200);
        }
    }
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let node = NODE.get();
    let mut connection = Connection::open(node);
    let paths = ["/healthz", "/version", "/v1/nothing", "/v1/host", "/openapi.json", "/v1/jobs", "/readyz"];
    let requests: String = paths.iter().map(|path| request(node, "GET", path, "")).collect();
    connection.send(requests);
    let statuses: Vec<u16> = paths.iter().map(|_| connection.answer().expect("an answer").status).collect();
    assert_eq!(statuses, [200, 200, 404, 200, 200, 200, 200]);
}

#[test]
fn a_request_that_arrives_byte_by_byte_is_understood() {
    let node = NODE.get();
    let mut connection = Connection::open(node);
    for byte in request(node, "GET", "/v1/host", "").bytes() {
        assert!(connection.send([byte]));
    }
    assert_eq!(connection.answer().expect("an answer").status, 200);
}

#[test]
fn rubbish_gets_a_refusal_or_a_closed_connection() {
    let node = NODE.get();
    // xorshift64, so that a failure can be repeated.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for number in 0..64 {
        let length = 1 + random() as usize % 4096;
        let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        if number % 2 == 0 {
            bytes.splice(0..0, *b"POST /v1/jobs HTTP/1.1\r\n");
        }
        let mut connection = Connection::open(node);
        connection.send(&bytes);
        connection.finish();
        let rest = connection.rest();
        assert!(
            rest.is_empty() || rest.starts_with(b"HTTP/1.1 4") || rest.starts_with(b"HTTP/1.1 5"),
            "{number}: {rest:?}"
        );
    }
    assert_serves();
}

#[test]
fn ambiguous_lengths_are_refused_and_the_connection_closed() {
    let node = NODE.get();
    for fields in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Content-Length: 4\r\nContent-Length: 5",
        "Content-Length: +4",
        "Content-Length: 99999999999999999999999",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding : chunked",
    ] {
        let mut connection = Connection::open(node);
        connection.send(format!(
            "POST /v1/jobs HTTP/1.1\r\nHost: node\r\n{fields}\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n"
        ));
        let rest = connection.rest();
        let text = String::from_utf8_lossy(&rest);
        assert!(text.starts_with("HTTP/1.1 4") || text.starts_with("HTTP/1.1 5"), "{fields}: {text}");
        assert_eq!(
            text.matches("HTTP/1.1 ").count(),
            1,
            "what follows is not read as a request: {fields}: {text}"
        );
    }
}

#[test]
fn the_openapi_document_describes_the_paths_that_are_served() {
    let document = exchange(NODE.get(), "GET /openapi.json HTTP/1.1\r\nHost: node\r\n\r\n");
    let document: serde_json::Value = serde_json::from_slice(&document.body).expect("it is JSON");
    for path in [
        "/healthz",
        "/v1/host",
        "/v1/images",
        "/v1/jobs",
        "/v1/jobs/{id}",
        "/v1/jobs/{id}/logs",
        "/v1/jobs/{id}/cancel",
    ] {
        assert!(document["paths"][path].is_object(), "{path} is missing");
    }
}
