//! Workspaces and artifacts that do not go as they should.

use nestling::bed::{Bed, RunningBed};
use nestling::client::types::{ArtifactsStatus, Conclusion, Job, JobRequest, MachineConfig, WorkspaceStatus};
use nestling_tests::http::Connection;
use nestling_tests::job::{create, job, refusal, run, wait, wait_until};
use nestling_tests::node::{Shared, memory};
use std::io::{Read, repeat};
use tar::{Builder, EntryType, Header};

static NODE: Shared = Shared::new(Bed::builder);

/// A job whose machine is ready for its workspace.
fn awaiting(node: &RunningBed, request: JobRequest) -> String {
    let id = create(node, &JobRequest { workspace: true, ..request }).id;
    wait_until(node, &id, |job| job.workspace.is_some_and(|files| files.status == WorkspaceStatus::Awaited));
    id
}

/// A tar of one file of so many bytes.
fn tar_of(bytes: u64) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(bytes);
    tar.append_data(&mut header, "big", repeat(7).take(bytes)).unwrap();
    tar.into_inner().unwrap()
}

fn put(node: &RunningBed, id: &str, tar: Vec<u8>) -> String {
    let length = tar.len() as u64;
    refusal(node.client().put_workspace(id, std::io::Cursor::new(tar), length))
}

#[track_caller]
fn failed_without_a_step(job: &Job, reason: &str) {
    assert_eq!((job.conclusion, job.exit_code), (Some(Conclusion::Failure), None));
    let told = job.failure_reason.as_deref().unwrap_or_default();
    assert!(told.contains(reason), "{told}");
    assert_eq!((job.log.bytes, job.workspace.unwrap().status), (0, WorkspaceStatus::Failed));
}

#[test]
fn a_workspace_larger_than_the_machines_disk_fails_with_the_numbers() {
    let node = NODE.get();
    let before = memory(node).heap_used_bytes;
    let machine_config = Some(MachineConfig { mem_size_mib: 128, ..MachineConfig::default() });
    let id = awaiting(node, JobRequest { machine_config, ..job("echo ran") });
    let tar = tar_of(90 << 20);
    let length = tar.len() as u64;
    // The node may close before its answer is read.
    assert!(node.client().put_workspace(&id, std::io::Cursor::new(tar), length).is_err());
    let done = wait(node, &id);
    failed_without_a_step(&done, "the entry 'big' cannot be written: No space left on device");
    assert!(done.failure_reason.unwrap().contains("MiB of the workspace"));
    let after = memory(node).heap_used_bytes;
    assert!(after < before + (4 << 20), "the node's heap went from {before} to {after} bytes");
}

#[test]
fn a_workspace_that_would_leave_its_directory_is_refused() {
    let node = NODE.get();
    let id = awaiting(node, job("echo ran"));
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..7].copy_from_slice(b"../evil");
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(0);
    header.set_cksum();
    let tar = [header.as_bytes().as_slice(), &[0; 1024]].concat();
    assert_eq!(put(node, &id, tar), "workspace_failed");
    failed_without_a_step(&wait(node, &id), "'../evil' has a part '..'");
}

#[test]
fn a_client_that_vanishes_in_the_middle_ends_the_job() {
    let node = NODE.get();
    let id = awaiting(node, job("echo ran"));
    let mut client = Connection::open(node);
    let token = node.token().unwrap_or_default();
    client.send(format!(
        "PUT /v1/jobs/{id}/workspace HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/x-tar\r\nContent-Length: 100000\r\n\r\n"
    ));
    client.send(&tar_of(10)[..700]);
    wait_until(node, &id, |job| job.workspace.is_some_and(|files| files.bytes == 700));
    drop(client);
    failed_without_a_step(&wait(node, &id), "was gone after 700 bytes");
}

#[test]
fn a_machine_that_ends_while_it_is_kept_for_artifacts_changes_no_result() {
    let node = NODE.get();
    let request =
        JobRequest { artifacts: vec!["a".into()], ..job("echo x > a; (sleep 3; poweroff -f) & exit 5") };
    let id = create(node, &request).id;
    wait_until(node, &id, |job| {
        job.artifacts.as_ref().is_some_and(|files| files.status == ArtifactsStatus::Ready)
    });
    let done = wait(node, &id);
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Failure), Some(5)));
    assert_eq!(done.artifacts.unwrap().status, ArtifactsStatus::Failed);
    assert_eq!(refusal(node.client().artifacts_tar(&id).map(|_| ())), "artifacts_gone");
}

#[test]
fn artifacts_of_more_than_the_nodes_heap_pass_through_it() {
    let node = NODE.get();
    let machine_config = Some(MachineConfig { mem_size_mib: 512, ..MachineConfig::default() });
    let script = "dd if=/dev/zero of=big bs=1M count=100 2>/dev/null";
    let request = JobRequest { artifacts: vec!["big".into()], machine_config, ..job(script) };
    let id = create(node, &request).id;
    wait_until(node, &id, |job| {
        job.artifacts.as_ref().is_some_and(|files| files.status == ArtifactsStatus::Ready)
    });
    let mut tar = node.client().artifacts_tar(&id).unwrap();
    let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
    while let count @ 1.. = tar.read(&mut buffer).unwrap() {
        bytes += count;
    }
    assert_eq!(bytes, (100 << 20) + 3 * 512);
    assert_eq!(wait(node, &id).conclusion, Some(Conclusion::Success));
}

#[test]
fn a_job_without_files_has_none() {
    let node = NODE.get();
    let done = run(node, &job("true")).job;
    assert!(done.workspace.is_none() && done.artifacts.is_none());
    assert_eq!(put(node, &done.id, tar_of(1)), "job_completed");
    assert_eq!(refusal(node.client().artifacts(&done.id)), "artifact_not_found");
}
