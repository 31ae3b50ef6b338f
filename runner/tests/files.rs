//! `nestling run` with workspaces and artifacts, and `nestling artifacts`, against a node in this process.

#[allow(dead_code, reason = "other tests use more of it")]
mod fake;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use fake::FakeNode;
use nestling::client::Client;
use nestling::client::types::{ArtifactsStatus, Conclusion};

fn run(node: &FakeNode, directory: &Path, arguments: &[&str]) -> Output {
    nestling(node, directory, &[&["run"], arguments].concat())
}

fn nestling(node: &FakeNode, directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nestling"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    command.env("NESTLING_NODE", node.url()).env("NESTLING_TOKEN", fake::TOKEN);
    command.env("XDG_STATE_HOME", "/nonexistent/nestling-tests");
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn write(path: &Path, data: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, data).unwrap();
}

#[test]
fn a_directory_goes_in_and_what_was_built_of_it_comes_out() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let big: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 251) as u8).collect();
    write(&dir.path().join("project/src/big"), &big);
    write(&dir.path().join("project/junk.o"), b"x");
    write(&dir.path().join("project/.gitignore"), b"*.o\n");
    let script = "test ! -e junk.o; mkdir -p dist/deep; cat src/big src/big > dist/out; echo hi > dist/deep/hi; echo built";
    let arguments = [
        "--workspace",
        "project",
        "--artifact",
        "dist/**/*",
        "--artifact-dir",
        "out",
        "--",
        "sh",
        "-ec",
        script,
    ];
    let output = run(&node, dir.path(), &arguments);
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(0), "built\n"),
        "{}",
        text(&output.stderr)
    );
    assert!(fs::read(dir.path().join("out/dist/out")).unwrap() == [big.clone(), big].concat());
    assert_eq!(fs::read(dir.path().join("out/dist/deep/hi")).unwrap(), b"hi\n");
    assert!(text(&output.stderr).contains("2 artifacts, 3.8 MiB, in out"), "{}", text(&output.stderr));
}

#[test]
fn artifacts_come_also_from_a_job_that_failed_and_its_code_stays() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let script = "echo no > report.xml; exit 7";
    let output = run(&node, dir.path(), &["--artifact", "report.xml", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(fs::read(dir.path().join("report.xml")).unwrap(), b"no\n");
}

#[test]
fn artifacts_that_are_not_there_are_told_and_change_no_code() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let output = run(&node, dir.path(), &["--artifact", "report.xml", "--", "true"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("no artifacts: nothing matches"), "{}", text(&output.stderr));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn artifacts_that_cannot_be_written_make_no_success_and_hide_no_failure() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    write(&dir.path().join("out"), b"a file where a directory should be");
    for (code, expected) in [("0", 125), ("7", 7)] {
        let script = format!("echo x > a; exit {code}");
        let arguments = ["--artifact", "a", "--artifact-dir", "out", "--", "sh", "-c", &script];
        let output = run(&node, dir.path(), &arguments);
        assert_eq!(output.status.code(), Some(expected));
        assert!(text(&output.stderr).contains("out cannot be written"), "{}", text(&output.stderr));
    }
}

#[test]
fn a_job_that_loses_its_machine_is_told_as_ever() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let output = run(&node, dir.path(), &["--workspace", ".", "--artifact", "a", "--", "fake-power-off"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("powered itself off"), "{}", text(&output.stderr));
}

#[test]
fn what_is_no_directory_ends_it_before_there_is_a_job() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let output = run(&node, dir.path(), &["--workspace", "nope", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("the workspace nope cannot be found"), "{}", text(&output.stderr));
    assert!(
        Client::new(node.url(), Some(fake::TOKEN))
            .unwrap()
            .jobs(&Default::default())
            .unwrap()
            .jobs
            .is_empty()
    );
}

#[test]
fn a_workspace_that_cannot_be_unpacked_is_the_jobs_failure() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    write(&dir.path().join("fake-unpack-fails"), b"x");
    let output = run(&node, dir.path(), &["--workspace", ".", "--artifact", "a", "--", "echo", "ran"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), b"".as_slice()));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("the workspace could not be unpacked: no space left"), "{stderr}");
}

#[test]
fn a_detached_job_has_its_workspace_before_its_id_is_printed() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    write(&dir.path().join("file"), b"x");
    let output = run(&node, dir.path(), &["-q", "--detach", "--workspace", ".", "--", "test", "-e", "file"]);
    let id = text(&output.stdout).trim().to_owned();
    let client = Client::new(node.url(), Some(fake::TOKEN)).unwrap();
    let job = client.wait(&id, Duration::from_secs(60)).unwrap().unwrap();
    assert_eq!((job.conclusion, job.workspace.unwrap().entries), (Some(Conclusion::Success), Some(1)));
}

#[test]
fn a_clients_artifacts_are_read_once() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let output = run(&node, dir.path(), &["--artifact", "a", "--", "sh", "-c", "echo x > a"]);
    assert_eq!(output.status.code(), Some(0));
    let client = Client::new(node.url(), Some(fake::TOKEN)).unwrap();
    let job = client.jobs(&Default::default()).unwrap().jobs.remove(0);
    assert_eq!(client.artifacts(&job.id).unwrap().status, ArtifactsStatus::Fetched);
    let error = client.artifacts_tar(&job.id).map(drop).unwrap_err();
    assert_eq!(error.code(), Some("artifacts_gone"));
}

/// Starts a job that has `globs` for artifacts and leaves it alone. Its ID and what was said of it.
fn detached(node: &FakeNode, directory: &Path, glob: &str, script: &str) -> (String, String) {
    let output = run(node, directory, &["--detach", "--artifact", glob, "--", "sh", "-ec", script]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    (text(&output.stdout).trim().to_owned(), text(&output.stderr))
}

#[test]
fn the_artifacts_of_a_detached_job_are_fetched_afterwards_into_a_directory_of_their_own() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let script = "mkdir dist; echo one > dist/a; printf 12345 > dist/b; sleep 0.5; exit 7";
    let (id, said) = detached(&node, dir.path(), "dist/*", script);
    let help = format!(
        "for 60 s after the command for the artifacts: fetch them with `nestling artifacts {}`",
        &id[..12]
    );
    assert!(said.contains(&help), "{said}");
    let fetched = nestling(&node, dir.path(), &["artifacts", &id[..8]]);
    assert_eq!(fetched.status.code(), Some(0), "{}", text(&fetched.stderr));
    let out = format!("artifacts-{}", &id[..12]);
    assert_eq!(text(&fetched.stdout), format!("4 bytes  {out}/dist/a\n5 bytes  {out}/dist/b\n"));
    assert_eq!(fs::read(dir.path().join(&out).join("dist/a")).unwrap(), b"one\n");
    let client = Client::new(node.url(), Some(fake::TOKEN)).unwrap();
    let job = client.wait(&id, Duration::from_secs(60)).unwrap().unwrap();
    assert_eq!((job.conclusion, job.exit_code), (Some(Conclusion::Failure), Some(7)));
    let again = nestling(&node, dir.path(), &["artifacts", &id, "--dir", "again"]);
    assert_eq!((again.status.code(), text(&again.stdout).as_str()), (Some(1), ""));
    assert!(text(&again.stderr).contains("were fetched already"), "{}", text(&again.stderr));
}

#[test]
fn a_machine_names_no_files_among_those_that_are_there_unless_it_is_asked_for_them() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    write(&dir.path().join("Makefile"), b"mine");
    let (id, _) = detached(&node, dir.path(), "*", "echo theirs > Makefile; echo x > report.xml");
    let refused = nestling(&node, dir.path(), &["artifacts", &id, "--dir", "."]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains(". is not empty"), "{}", text(&refused.stderr));
    let arguments = ["artifacts", "last", "--dir", ".", "--artifact", "*.xml"];
    let fetched = nestling(&node, dir.path(), &arguments);
    assert_eq!((fetched.status.code(), text(&fetched.stdout).as_str()), (Some(0), "2 bytes  ./report.xml\n"));
    assert!(text(&fetched.stderr).contains("Makefile is left out"), "{}", text(&fetched.stderr));
    assert_eq!(fs::read(dir.path().join("Makefile")).unwrap(), b"mine");
}

#[test]
fn artifacts_that_are_not_to_be_had_are_told_with_the_reason() {
    let (node, dir) = (FakeNode::start(), tempfile::tempdir().unwrap());
    let client = Client::new(node.url(), Some(fake::TOKEN)).unwrap();
    let fetch = |id: &str| {
        let output = nestling(&node, dir.path(), &["artifacts", id]);
        (output.status.code(), text(&output.stderr))
    };
    let (none, _) = detached(&node, dir.path(), "nope", "true");
    let (code, said) = fetch(&none);
    assert!(code == Some(0) && said.contains("no artifacts: nothing matches"), "{said}");
    let (lost, _) = detached(&node, dir.path(), "a", "exec fake-power-off");
    client.wait(&lost, Duration::from_secs(60)).unwrap().unwrap();
    let (code, said) = fetch(&lost);
    assert!(code == Some(1) && said.contains("the job ended before its steps had"), "{said}");
    let plain = run(&node, dir.path(), &["--detach", "--", "true"]);
    let (code, said) = fetch(text(&plain.stdout).trim());
    assert!(code == Some(1) && said.contains("`nestling run --artifact GLOB`"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
