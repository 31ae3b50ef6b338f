//! A workspace into a machine, and what was made of it out again.

use super::job::ALONE;
use super::node;
use nestling::artifacts;
use nestling::client::types::{ArtifactsStatus, Conclusion, JobRequest, WorkspaceStatus};
use nestling::workspace::Workspace;
use nestling_tests::job::{create, job, wait, wait_until};
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn a_project_goes_in_is_built_and_comes_out_byte_for_byte() {
    let (project, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source: Vec<u8> = (0..75_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::create_dir(project.path().join("src")).unwrap();
    fs::write(project.path().join("src/table.bin"), &source).unwrap();
    fs::write(project.path().join("src/main.c"), "int main(void) { return 0; }\n").unwrap();
    fs::write(project.path().join(".gitignore"), "*.o\n").unwrap();
    fs::write(project.path().join("main.o"), "stale").unwrap();
    let build = "#!/bin/sh\nset -e\ntest ! -e main.o\nmkdir -p dist\ncat src/main.c src/table.bin > dist/main\n\
                 chmod 755 dist/main\nsha256sum src/* > dist/sums\nls -la\n";
    fs::write(project.path().join("build.sh"), build).unwrap();
    fs::set_permissions(project.path().join("build.sh"), fs::Permissions::from_mode(0o755)).unwrap();

    let _alone = ALONE.lock();
    let client = node().client();
    let globs = vec!["dist/**".to_owned(), "nope".to_owned()];
    let request = JobRequest { workspace: true, artifacts: globs.clone(), ..job("./build.sh; exit 3") };
    let id = create(node(), &request).id;
    wait_until(node(), &id, |job| {
        job.workspace.is_some_and(|files| files.status == WorkspaceStatus::Awaited)
    });
    let workspace = Workspace::scan(project.path()).unwrap();
    let sent = client.put_workspace(&id, workspace.tar(), workspace.bytes()).unwrap();
    assert_eq!((sent.entries, sent.bytes), (Some(workspace.len() as u64), workspace.bytes()));

    let ready = |artifacts: ArtifactsStatus| artifacts == ArtifactsStatus::Ready;
    wait_until(node(), &id, |job| job.artifacts.as_ref().is_some_and(|files| ready(files.status)));
    let list = client.artifacts(&id).unwrap();
    let names: Vec<&str> = list.artifacts.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["dist/main", "dist/sums"]);
    assert!(list.message.unwrap().contains("matches nope"));
    let unpacked = artifacts::unpack(client.artifacts_tar(&id).unwrap(), out.path(), &globs).unwrap();
    assert_eq!((unpacked.files, unpacked.refused.len()), (2, 0));
    let made = fs::read(out.path().join("dist/main")).unwrap();
    assert!(made == [b"int main(void) { return 0; }\n", source.as_slice()].concat());
    assert_eq!(fs::metadata(out.path().join("dist/main")).unwrap().permissions().mode() & 0o777, 0o755);

    let done = wait(node(), &id);
    assert_eq!((done.conclusion, done.exit_code), (Some(Conclusion::Failure), Some(3)), "{done:?}");
    assert_eq!(done.artifacts.unwrap().status, ArtifactsStatus::Fetched);
}
