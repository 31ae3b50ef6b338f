//! What each request gets.

use super::*;

#[test]
fn what_is_public_needs_no_token() {
    let mut peer = Peer::new();
    for (path, content) in
        [("/healthz", "ok\n"), ("/readyz", "ok\n"), ("/version", "1.2.3"), ("/openapi.json", "\"openapi\"")]
    {
        let (answer, _) = parse(&peer.send(format!("GET {path} HTTP/1.1\r\nHost: n\r\n\r\n")), false);
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.text().contains(content), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    }
    peer.node.ready = false;
    let answer = peer.get("/readyz");
    assert_eq!((answer.status, answer.code().as_str()), (503, "not_ready"));
    assert_eq!(peer.get("/healthz").status, 200);
}

#[test]
fn everything_else_needs_the_right_token() {
    let mut peer = Peer::new();
    for (authorization, code) in [
        ("", "missing_token"),
        ("Authorization: Basic abc\r\n", "missing_token"),
        ("Authorization: Bearer\r\n", "missing_token"),
        ("Authorization: Bearer x\r\n", "wrong_token"),
        ("Authorization: Bearer 0123456789abcdeF\r\n", "wrong_token"),
        ("Authorization: Bearer 0123456789abcdef0\r\n", "wrong_token"),
    ] {
        for path in ["/v1/host", "/v1/jobs", "/nothing", "/v1/jobs/x"] {
            let bytes = peer.send(format!("GET {path} HTTP/1.1\r\nHost: n\r\n{authorization}\r\n"));
            let (answer, _) = parse(&bytes, false);
            assert_eq!((answer.status, answer.code().as_str()), (401, code), "{path} {authorization}");
            assert!(answer.header("www-authenticate").unwrap().starts_with("Bearer realm="));
        }
    }
    let request = format!("GET /v1/host HTTP/1.1\r\nHost: n\r\nAuthorization: bearer  {TOKEN}\r\n\r\n");
    assert_eq!(parse(&peer.send(request), false).0.status, 200, "the scheme has no case");
}

#[test]
fn without_a_token_configured_everybody_is_let_in() {
    let mut peer = Peer::with(ApiConfig::default());
    let (answer, _) = parse(&peer.send("GET /v1/host HTTP/1.1\r\nHost: n\r\n\r\n"), false);
    assert_eq!(answer.status, 200);
}

#[test]
fn host_and_images_are_the_nodes() {
    let mut peer = Peer::new();
    assert_eq!(peer.get("/v1/host").json()["vendor"], "amd");
    let images = peer.get("/v1/images").json();
    assert_eq!((images["total_count"].as_u64(), &images["images"][0]["name"]), (Some(1), &json!("minimal")));
}

#[test]
fn paths_and_methods_that_are_not_there_are_told() {
    let mut peer = Peer::new();
    let answer = peer.get("/v2/jobs");
    assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"));
    for (method, path, allow) in [
        ("POST", "/healthz", "GET, HEAD"),
        ("PUT", "/v1/jobs", "GET, HEAD, POST"),
        ("PATCH", "/v1/jobs/0123456789abcdef0123456789abcdef", "GET, HEAD, DELETE"),
        ("GET", "/v1/jobs/0123456789abcdef0123456789abcdef/cancel", "POST"),
        ("OPTIONS", "/v1/host", "GET, HEAD"),
    ] {
        let answer = peer.ask(method, path, "", "");
        assert_eq!((answer.status, answer.code().as_str()), (405, "method_not_allowed"), "{method} {path}");
        assert_eq!(answer.header("allow"), Some(allow));
    }
    for path in ["/v1/jobs/x", "/v1/jobs/0123456789abcdef0123456789abcdef"] {
        let answer = peer.get(path);
        assert_eq!((answer.status, answer.code().as_str()), (404, "job_not_found"));
    }
}

#[test]
fn a_job_goes_through_the_api_from_its_request_to_its_deletion() {
    let mut peer = Peer::new();
    let answer = peer.post(&json!({"name": "test", "steps": [{"run": "make"}]}));
    assert_eq!(answer.status, 202);
    let path = answer.header("location").unwrap().to_string();
    let job: Job = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(path, format!("/v1/jobs/{}", job.id));
    assert_eq!(job.queue_position, Some(1));

    let id = peer.api.jobs.next_queued().unwrap().id;
    peer.api.jobs.start(id, peer.now);
    assert_eq!(peer.get(&path).json()["status"], "in_progress");
    let answer = peer.ask("DELETE", &path, "", "");
    assert_eq!((answer.status, answer.code().as_str()), (409, "job_not_completed"));
    let answer = peer.ask("POST", &format!("{path}/cancel"), "", "");
    assert_eq!((answer.status, answer.json()["status"].as_str()), (202, Some("in_progress")));
    finish(&mut peer.api.jobs, id, peer.now);
    assert_eq!(peer.get(&path).json()["conclusion"], "cancelled");
    let answer = peer.ask("POST", &format!("{path}/cancel"), "", "");
    assert_eq!((answer.status, answer.code().as_str()), (409, "job_completed"));
    let answer = peer.ask("DELETE", &path, "", "");
    assert_eq!((answer.status, answer.body.len(), answer.header("content-length")), (204, 0, None));
    assert_eq!(peer.get(&path).code(), "job_not_found");
}

#[test]
fn jobs_are_listed_in_pages() {
    let mut peer = Peer::new();
    for number in 0..35 {
        assert_eq!(peer.post(&json!({"name": number.to_string(), "steps": [{"run": "a"}]})).status, 202);
    }
    let list = |peer: &mut Peer, query: &str| {
        let answer = peer.get(&format!("/v1/jobs{query}"));
        let link = answer.header("link").map(ToString::to_string);
        let list: JobList = serde_json::from_slice(&answer.body).unwrap();
        (list.total_count, list.jobs.iter().map(|job| job.name.clone()).collect::<Vec<_>>(), link)
    };
    let (total, names, link) = list(&mut peer, "");
    assert_eq!((total, names.len(), names[0].as_str()), (35, 30, "34"));
    assert_eq!(link.as_deref(), Some("</v1/jobs?page=2&per_page=30>; rel=\"next\""));
    let (total, names, link) = list(&mut peer, "?page=4&per_page=10&status=queued");
    assert_eq!((total, names), (35, vec!["4".into(), "3".into(), "2".into(), "1".into(), "0".into()]));
    assert_eq!(link.as_deref(), Some("</v1/jobs?page=3&per_page=10&status=queued>; rel=\"prev\""));
    assert_eq!(list(&mut peer, "?status=completed").0, 0);
    assert_eq!(list(&mut peer, "?page=4294967295&per_page=100").1.len(), 0);
    for query in ["?per_page=0", "?per_page=101", "?page=0", "?status=done", "?sort=asc", "?page=%zz"] {
        let answer = peer.get(&format!("/v1/jobs{query}"));
        assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_query"), "{query}");
    }
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let mut peer = Peer::new();
    let answer = peer.ask("POST", "/v1/jobs", "Content-Type: application/json\r\n", "{\n\"steps\": x}");
    assert_eq!((answer.status, answer.code().as_str()), (400, "invalid_json"));
    assert!(answer.text().contains("line 2 column 10"), "{}", answer.text());
    let answer = peer.post(&json!({"steps": [{"run": "a"}], "step": 1}));
    assert_eq!((answer.status, answer.code().as_str()), (422, "validation_failed"));
    assert_eq!(answer.json()["errors"][0]["field"], "step");
    let answer = peer.post(&json!({"steps": [{"run": "a"}], "machine_config": {"mem_size_mib": 2048}}));
    assert_eq!(answer.json()["errors"][0]["field"], "machine_config.mem_size_mib");
    assert_eq!(peer.api.jobs.count(None), 0);
}

#[test]
fn a_job_has_to_say_that_it_is_json() {
    let mut peer = Peer::new();
    let body = json!({"steps": [{"run": "a"}]}).to_string();
    for header in ["", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n"]
    {
        let answer = peer.ask("POST", "/v1/jobs", header, &body);
        assert_eq!((answer.status, answer.code().as_str()), (415, "unsupported_media_type"));
        assert_eq!(answer.header("connection"), Some("close"), "its body was not read");
        peer.reconnect();
    }
    let header = "Content-Type: Application/JSON; charset=utf-8\r\n";
    assert_eq!(peer.ask("POST", "/v1/jobs", header, &body).status, 202);
}

#[test]
fn an_idempotency_key_makes_one_job() {
    let mut peer = Peer::new();
    let mut post = |key: &str, body: &str| {
        let headers = format!("Content-Type: application/json\r\nIdempotency-Key: {key}\r\n");
        peer.ask("POST", "/v1/jobs", &headers, body)
    };
    let first = post("k", r#"{"steps": [{"run": "a"}]}"#);
    let second = post("k", r#"{ "steps":[{"run":"a"}] }"#);
    assert_eq!((first.status, second.status), (202, 202));
    assert_eq!(first.header("location"), second.header("location"));
    assert_eq!(second.header("idempotency-replayed"), Some("true"));
    let other = post("k", r#"{"steps": [{"run": "b"}]}"#);
    assert_eq!((other.status, other.code().as_str()), (422, "idempotency_key_reused"));
    assert_ne!(post("l", r#"{"steps": [{"run": "a"}]}"#).header("location"), first.header("location"));
    for key in ["", "ä", &"k".repeat(256)] {
        assert_eq!(post(key, r#"{"steps": [{"run": "a"}]}"#).json()["errors"][0]["field"], "Idempotency-Key");
    }
    assert_eq!(peer.api.jobs.count(None), 2);
}

#[test]
fn head_gets_the_head_that_get_would_get() {
    let mut peer = Peer::new();
    let job = peer.begin();
    for path in
        ["/healthz", "/v1/host", "/v1/nothing", &format!("/v1/jobs/{job}"), &format!("/v1/jobs/{job}/logs")]
    {
        let (get, head) = (peer.get(path), peer.ask("HEAD", path, "", ""));
        assert_eq!((get.status, &get.headers), (head.status, &head.headers), "{path}");
    }
}
