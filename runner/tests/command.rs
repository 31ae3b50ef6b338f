//! The command, from its arguments to its exit code, against a node in this process.

mod fake;

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};

use fake::FakeNode;
use nestling::client::types::{Conclusion, JobRequest, Status, StepRequest};
use nestling::client::{Client, JobQuery, Streams};

/// The command, talking to `node`, with a state directory of its own.
fn nestling(node: &FakeNode, arguments: &[&str]) -> Command {
    let mut command = bare(arguments);
    command.env("NESTLING_NODE", node.url()).env("NESTLING_TOKEN", fake::TOKEN);
    command
}

/// The command in an environment that names no node.
fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .env_remove("NESTLING_NODE")
        .env_remove("NESTLING_TOKEN")
        .env_remove("NESTLING_IMAGE")
        .env("XDG_STATE_HOME", "/nonexistent/nestling-tests");
    command
}

fn output(node: &FakeNode, arguments: &[&str]) -> Output {
    nestling(node, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn client(node: &FakeNode) -> Client {
    Client::new(node.url(), Some(fake::TOKEN)).unwrap()
}

fn script(run: &str) -> JobRequest {
    JobRequest {
        steps: vec![StepRequest { run: run.to_owned(), ..StepRequest::default() }],
        ..JobRequest::default()
    }
}

/// Waits until the child has written `words` to standard output.
fn read_until(child: &mut Child, words: &str) {
    let mut seen = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    while !seen.contains(words) {
        let mut buffer = [0; 64];
        let length = stdout.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "the output ended with {seen:?}");
        seen.push_str(&text(&buffer[..length]));
    }
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn run_ends_with_the_commands_code_and_keeps_its_outputs_apart() {
    let node = FakeNode::start();
    let output = output(&node, &["run", "-q", "--", "sh", "-c", "echo 'out  put'; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(text(&output.stdout), "out  put\n");
    assert_eq!(text(&output.stderr), "err\n");
}

#[test]
fn output_that_is_no_text_arrives_byte_for_byte() {
    let node = FakeNode::start();
    let output = output(&node, &["run", "-q", "--", "printf", "\\377\\000\\001é\\n\\r"]);
    assert_eq!(output.stdout, b"\xff\0\x01\xc3\xa9\n\r");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn variables_reach_the_job() {
    let node = FakeNode::start();
    let mut command =
        nestling(&node, &["run", "-q", "-e", "A=x y=z", "--env", "B", "--", "sh", "-c", "echo \"$A|$B\""]);
    assert_eq!(text(&command.env("B", "from outside").output().unwrap().stdout), "x y=z|from outside\n");
}

#[test]
fn a_command_killed_by_a_signal_ends_with_128_and_its_number() {
    let node = FakeNode::start();
    assert_eq!(output(&node, &["run", "--", "sh", "-c", "kill -9 $$"]).status.code(), Some(137));
    assert_eq!(output(&node, &["run", "--", "nosuchcommand"]).status.code(), Some(127));
    assert_eq!(output(&node, &["run", "--", "/etc/passwd"]).status.code(), Some(126));
}

#[test]
fn a_word_of_the_shell_is_no_program() {
    let node = FakeNode::start();
    for words in [&["exit", "3"] as &[&str], &["if", "true"], &["cd", "/"], &["A=b", "true"], &["{"]] {
        let output = output(&node, &[&["run", "-q", "--"], words].concat());
        assert_eq!(output.status.code(), Some(127), "{words:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_job_that_runs_too_long_ends_with_124_and_the_reason() {
    let node = FakeNode::start();
    let output = output(&node, &["run", "--timeout", "1", "--", "sleep", "600"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(text(&output.stderr).contains("the job timed out"), "{}", text(&output.stderr));
}

#[test]
fn a_machine_that_ends_is_a_system_failure_told_with_its_console() {
    let node = FakeNode::start();
    let output = output(&node, &["run", "--", "fake-power-off"]);
    assert_eq!(output.status.code(), Some(125));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("the system failed, not the job: the machine powered itself off"), "{stderr}");
    assert!(stderr.contains("  | [    2.000000] last lines"), "{stderr}");
}

#[test]
fn a_failed_job_with_refused_connections_says_where_to_see_them() {
    let node = FakeNode::start();
    let failed =
        output(&node, &["run", "--egress", "example.org", "--", "sh", "-c", ": fake-connect; exit 6"]);
    assert_eq!(failed.status.code(), Some(6));
    let id = client(&node).jobs(&JobQuery::default()).unwrap().jobs[0].id.clone();
    let help = format!("1 connection was refused; see it with `nestling connections {}`", &id[..12]);
    assert!(text(&failed.stderr).contains(&help), "{}", text(&failed.stderr));
    let all = text(&output(&node, &["connections", "last"]).stdout);
    let lines: Vec<&str> = all.lines().collect();
    assert!(lines[1].contains("example.org  192.0.2.7:443  517   4096      allowed"), "{all}");
    assert!(lines[2].ends_with("refused: no egress rule allows it"), "{all}");
    let refused = text(&output(&node, &["connections", "--refused", &id[..12]]).stdout);
    assert!(refused.lines().count() == 2 && !refused.contains("example.org"), "{refused}");
    let json = output(&node, &["connections", "--json", "last"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["total_count"], &json["connections"][1]["verdict"]), (&2.into(), &"refused".into()));
}

#[test]
fn jobs_that_wait_are_shown_with_their_place() {
    let node = FakeNode::start();
    let client = client(&node);
    for _ in 0..3 {
        client.create_job(&script("sleep 600")).unwrap();
    }
    let jobs = text(&output(&node, &["jobs", "--status", "queued"]).stdout);
    assert!(jobs.contains("queued (1)") && jobs.contains("queued (2, for earlier jobs)"), "{jobs}");
}

#[test]
fn a_request_the_node_refuses_ends_with_125_and_names_the_field_once() {
    let node = FakeNode::start();
    let output = output(&node, &["run", "--image", "nope", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(text(&output.stderr).matches("image: ").count(), 1, "{}", text(&output.stderr));
}

#[test]
fn a_disks_size_reaches_the_node_which_says_what_it_takes() {
    let node = FakeNode::start();
    let ran = output(&node, &["run", "-q", "--disk", "2048", "--", "true"]);
    assert_eq!(ran.status.code(), Some(0), "{}", text(&ran.stderr));
    let config = client(&node).jobs(&JobQuery::default()).unwrap().jobs[0].machine_config;
    assert_eq!((config.mem_size_mib, config.disk_size_mib), (256, Some(2048)));
    let small = output(&node, &["run", "--disk", "15", "--", "true"]);
    assert_eq!(small.status.code(), Some(125));
    let stderr = text(&small.stderr);
    assert!(stderr.contains("disk_size_mib: is 15; give 16 to 1048576 MiB"), "{stderr}");
}

#[test]
fn a_wrong_token_is_told_with_what_to_do() {
    let node = FakeNode::start();
    let output = nestling(&node, &["run", "--", "true"]).env("NESTLING_TOKEN", "wrong").output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("NESTLING_TOKEN"), "{}", text(&output.stderr));
}

#[test]
fn a_log_whose_connection_breaks_again_and_again_is_shown_once_and_whole() {
    let node = FakeNode::start();
    node.cut_logs_after(20_000);
    let output = output(&node, &["run", "--", "seq", "1", "20000"]);
    let expected: String = (1..=20_000).map(|number| format!("{number}\n")).collect();
    assert!(text(&output.stdout) == expected, "{} bytes instead of {}", output.stdout.len(), expected.len());
    assert!(text(&output.stderr).contains("trying again"), "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_node_that_is_out_of_reach_is_named() {
    let url = { FakeNode::start().url().to_owned() };
    let output = bare(&["run", "--node", &url, "--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains(&format!("cannot reach the node at {url}")),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn ctrl_c_cancels_the_job_and_ends_with_130() {
    let node = FakeNode::start();
    let mut command = nestling(&node, &["run", "--", "sh", "-c", "echo started; exec sleep 600"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    read_until(&mut child, "started");
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(text(&output.stderr).contains("cancelling the job"), "{}", text(&output.stderr));
    let job = client(&node).jobs(&JobQuery::default()).unwrap().jobs.remove(0);
    assert_eq!(job.conclusion, Some(Conclusion::Cancelled));
}

#[test]
fn a_second_ctrl_c_leaves_at_once() {
    let node = FakeNode::start();
    let mut command = nestling(&node, &["run", "--", "sh", "-c", "echo started; exec sleep 600"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    read_until(&mut child, "started");
    signal(&child, "-TERM");
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).stderr(Stdio::null()).status();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_reader_that_leaves_cancels_the_job() {
    let node = FakeNode::start();
    let mut command = nestling(&node, &["run", "-q", "--", "yes"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    read_until(&mut child, "y\n");
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(text(&output.stderr), "");
    let job = client(&node).jobs(&JobQuery::default()).unwrap().jobs.remove(0);
    assert_eq!(job.name, "yes");
}

#[test]
fn a_reader_that_leaves_after_the_job_is_over_is_no_failure() {
    let node = FakeNode::start();
    let mut command = nestling(&node, &["run", "-q", "--rm", "--", "seq", "100000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let client = client(&node);
    let id = loop {
        if let Some(job) = client.jobs(&JobQuery::default()).unwrap().jobs.pop() {
            break job.id;
        }
    };
    client.wait(&id, std::time::Duration::from_secs(60)).unwrap().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(141), ""));
    assert_eq!(client.jobs(&JobQuery::default()).unwrap().total_count, 0, "--rm holds here too");
}

#[test]
fn ctrl_c_while_a_node_starts_ends_with_130_and_no_error() {
    let home = tempfile::tempdir().unwrap();
    let qemu = home.path().join("qemu-system-x86_64");
    // Slow to start, and then it does not.
    std::fs::write(&qemu, "#!/bin/sh\ntouch \"$XDG_STATE_HOME/started\"\nsleep 1\nexit 1\n").unwrap();
    std::fs::set_permissions(&qemu, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::write(home.path().join("image.tar"), "").unwrap();
    for arguments in [&["up", "-q"] as &[&str], &["run", "-q", "--", "true"]] {
        let started = home.path().join("started");
        let mut child = bare(arguments)
            .env("XDG_STATE_HOME", home.path())
            .env("NESTLING_IMAGE", home.path().join("image.tar"))
            .env("PATH", format!("{}:{}", home.path().display(), std::env::var("PATH").unwrap()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while !started.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        signal(&child, "-INT");
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(130), ""), "{arguments:?}");
        std::fs::remove_file(started).unwrap();
    }
}

#[test]
fn a_detached_job_is_found_again_by_its_beginning_and_as_the_last() {
    let node = FakeNode::start();
    let id = text(&output(&node, &["run", "--detach", "--", "sh", "-c", "echo one; echo two >&2"]).stdout);
    let id = id.trim();
    assert_eq!(id.len(), 32);
    for name in [id, &id[..8], "last"] {
        let followed = output(&node, &["logs", "-f", name]);
        assert_eq!(
            (text(&followed.stdout).as_str(), text(&followed.stderr).as_str()),
            ("one\n", "two\n"),
            "{name}"
        );
    }
    let out = output(&node, &["logs", "--stdout", "last"]);
    assert_eq!((text(&out.stdout).as_str(), text(&out.stderr).as_str()), ("one\n", ""));
    let err = output(&node, &["logs", "--stderr", "-f", "last"]);
    assert_eq!((text(&err.stdout).as_str(), text(&err.stderr).as_str()), ("", "two\n"));
    let missing = output(&node, &["logs", "ffffff"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        text(&missing.stderr).contains("no job whose ID starts with ffffff"),
        "{}",
        text(&missing.stderr)
    );
}

#[test]
fn cancel_ends_a_job_and_says_so_for_each() {
    let node = FakeNode::start();
    let client = client(&node);
    let running = client.create_job(&script("sleep 600")).unwrap().id;
    let queued = client.create_job(&script("sleep 600")).unwrap().id;
    let cancelled = output(&node, &["cancel", &queued, "ffffff", &running]);
    assert_eq!(cancelled.status.code(), Some(1));
    assert_eq!(text(&cancelled.stdout), format!("{queued}: cancelled\n{running}: cancelled\n"));
    for id in [running, queued] {
        let job = client.wait(&id, std::time::Duration::from_secs(60)).unwrap().unwrap();
        assert_eq!(job.conclusion, Some(Conclusion::Cancelled));
        let again = output(&node, &["cancel", &id]);
        assert_eq!(again.status.code(), Some(1));
    }
}

#[test]
fn jobs_lists_the_newest_first_and_says_how_many_more_there_are() {
    let node = FakeNode::start();
    let client = client(&node);
    for number in 0..5 {
        client.run(&JobRequest { name: Some(format!("job {number}")), ..script("exit 3") }).unwrap();
    }
    let listed = output(&node, &["jobs", "--limit", "2"]);
    let table = text(&listed.stdout);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(
        lines[0].starts_with("ID ") && lines[1].contains("job 4") && lines[2].contains("failure"),
        "{table}"
    );
    assert!(text(&listed.stderr).contains("3 more"), "{}", text(&listed.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output(&node, &["jobs", "--json"]).stdout).unwrap();
    assert_eq!(json["total_count"], 5);
    assert_eq!(json["jobs"][0]["exit_code"], 3);
}

#[test]
fn status_shows_the_host_for_people_and_for_programs() {
    let node = FakeNode::start();
    let status = output(&node, &["status"]);
    assert_eq!(status.status.code(), Some(0), "{}", text(&status.stderr));
    assert!(text(&status.stdout).contains("hardware   AMD SVM"), "{}", text(&status.stdout));
    let json: serde_json::Value =
        serde_json::from_slice(&output(&node, &["status", "--json"]).stdout).unwrap();
    assert_eq!(json["name"], "fake");
}

#[test]
fn rm_leaves_no_trace_of_the_job() {
    let node = FakeNode::start();
    assert_eq!(output(&node, &["run", "--rm", "--", "true"]).status.code(), Some(0));
    assert_eq!(client(&node).jobs(&JobQuery::default()).unwrap().total_count, 0);
}

#[test]
fn down_is_content_when_nothing_is_up() {
    let home = tempfile::tempdir().unwrap();
    for arguments in [&["down"] as &[&str], &["down", "--all"], &["down", "other"]] {
        let output = bare(arguments).env("XDG_STATE_HOME", home.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
    let status = bare(&["status"]).env("XDG_STATE_HOME", home.path()).output().unwrap();
    assert_eq!(status.status.code(), Some(1));
    assert!(text(&status.stderr).contains("nestling up"), "{}", text(&status.stderr));
}

#[test]
fn the_client_reads_a_log_in_parts_and_by_stream() {
    let node = FakeNode::start();
    let client = client(&node);
    let finished = client.run(&script("echo out; sleep 0.1; echo err >&2")).unwrap();
    assert_eq!(finished.job.status, Status::Completed);
    assert_eq!(
        (finished.stdout.as_slice(), finished.stderr.as_slice()),
        (b"out\n".as_slice(), b"err\n".as_slice())
    );
    let id = finished.job.id;
    assert_eq!(client.log(&id, Streams::Both).unwrap(), b"out\nerr\n");
    assert_eq!(client.log(&id, Streams::Stderr).unwrap(), b"err\n");
    // At the end of the log there is nothing to read, and that is no error.
    assert_eq!(client.log_stream(&id, Streams::Both, finished.job.log.bytes, true).unwrap().count(), 0);
    client.delete(&id).unwrap();
    assert_eq!(client.job(&id).unwrap_err().code(), Some("job_not_found"));
}

#[test]
fn the_same_idempotency_key_names_the_same_job() {
    let node = FakeNode::start();
    let client = client(&node);
    let one = client.create_job_with_key(&script("true"), "key").unwrap();
    let two = client.create_job_with_key(&script("true"), "key").unwrap();
    assert_eq!(one.id, two.id);
    let other = client.create_job_with_key(&script("false"), "key").unwrap_err();
    assert_eq!(other.code(), Some("idempotency_key_reused"));
}
