//! Runs the agent as a node would, with workspaces and artifacts: what goes in, what comes out, and what must not.

#[allow(dead_code, reason = "other tests use more of it")]
mod agent;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use agent::Agent;
use nestling_api::agent::{AgentMessage, ArtifactList, HostMessage, ListArtifacts, SendArtifacts};
use tar::{Builder, EntryType, Header};

/// A tar of entries whose names nobody has checked.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(mut self, kind: EntryType, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.entry(EntryType::Regular, name.as_bytes(), b"", data.as_bytes())
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

/// Sends a workspace in pieces: how many entries it has, or why it cannot be unpacked.
fn unpack_in(agent: &mut Agent, tar: &[u8], piece: usize) -> Result<u64, String> {
    for part in tar.chunks(piece) {
        agent.say(&HostMessage::WorkspaceData(part.to_vec()));
    }
    agent.say(&HostMessage::WorkspaceEnd);
    match agent.next() {
        Some(AgentMessage::WorkspaceUnpacked(unpacked)) => Ok(unpacked.entries),
        Some(AgentMessage::WorkspaceFailed(failed)) => Err(failed.message),
        other => panic!("{other:?}"),
    }
}

fn unpack(agent: &mut Agent, tar: &[u8]) -> Result<u64, String> {
    unpack_in(agent, tar, 60_000)
}

fn work(agent: &Agent) -> PathBuf {
    agent.folder.join("work")
}

fn list(agent: &mut Agent, patterns: &[&str]) -> ArtifactList {
    let patterns = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
    agent.say(&HostMessage::ListArtifacts(ListArtifacts { patterns }));
    match agent.next() {
        Some(AgentMessage::ArtifactList(list)) => list,
        other => panic!("{other:?}"),
    }
}

fn names(list: &ArtifactList) -> Vec<&str> {
    list.artifacts.iter().map(|artifact| artifact.name.as_str()).collect()
}

/// What is sent, and why no more of it was.
fn fetch(agent: &mut Agent, name: Option<&str>) -> (Vec<u8>, Option<String>) {
    agent.say(&HostMessage::SendArtifacts(SendArtifacts { name: name.map(str::to_owned) }));
    let mut bytes = Vec::new();
    loop {
        match agent.next() {
            Some(AgentMessage::ArtifactData(part)) => bytes.extend(part),
            Some(AgentMessage::ArtifactsSent(sent)) => return (bytes, sent.failed),
            other => panic!("{other:?}"),
        }
    }
}

/// Files and links of a tar by their names.
fn entries(tar: &[u8]) -> Vec<(PathBuf, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let mut entries = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        if let Some(link) = entry.link_name_bytes() {
            data = [b"-> ", &*link].concat();
        }
        entries.push((entry.path().unwrap().into_owned(), data));
    }
    entries
}

#[test]
fn a_workspace_is_there_before_the_first_step_whatever_the_pieces_it_came_in() {
    let mut tar = Builder::new(Vec::new());
    let long = "x".repeat(90);
    for (name, mode, data) in [
        ("run.sh".to_owned(), 0o755, b"echo hi\n".to_vec()),
        (format!("{long}/{long}/{long}/{long}"), 0o600, vec![7; 5000]),
        ("empty".to_owned(), 0o644, vec![]),
        ("block".to_owned(), 0o4711, vec![1; 512]),
    ] {
        let mut header = Header::new_gnu();
        header.set_mode(mode);
        header.set_mtime(1_234_567_890);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, name, data.as_slice()).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    for piece in [1, 511, 512, 513, 64 * 1024] {
        let mut agent = Agent::start();
        assert_eq!(unpack_in(&mut agent, &tar, piece), Ok(4), "{piece}");
        let work = work(&agent);
        let script = fs::metadata(work.join("run.sh")).unwrap();
        assert_eq!((script.permissions().mode() & 0o7777, script.mtime()), (0o755, 1_234_567_890));
        assert_eq!(fs::metadata(work.join("block")).unwrap().permissions().mode() & 0o7777, 0o4711);
        assert_eq!(fs::read(work.join(&long).join(&long).join(&long).join(&long)).unwrap(), [7; 5000]);
        assert_eq!(agent.run("./run.sh; ls | wc -l").stdout(), "hi\n4\n");
    }
}

#[test]
fn directories_links_and_hard_links_are_kept() {
    let mut agent = Agent::start();
    let tar = Tar::default()
        .entry(EntryType::Directory, b"dir/", b"", b"")
        .file("dir/file", "text")
        .link("dir/out", "/etc/passwd")
        .link("up", "../..")
        .link("loop", "loop")
        .entry(EntryType::Link, b"other", b"dir/file", b"");
    assert_eq!(unpack(&mut agent, &tar.end()), Ok(6));
    let work = work(&agent);
    assert!(work.join("dir").is_dir());
    assert_eq!(fs::read_link(work.join("dir/out")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::read_link(work.join("up")).unwrap(), Path::new("../.."));
    let (one, other) =
        (fs::metadata(work.join("dir/file")).unwrap(), fs::metadata(work.join("other")).unwrap());
    assert_eq!((one.ino(), one.nlink()), (other.ino(), 2));
}

#[test]
fn nothing_is_written_outside_of_the_workspace() {
    for (tar, words) in [
        (Tar::default().file("../evil", "x"), "'../evil' has a part '..'"),
        (Tar::default().file("a/../../evil", "x"), "has a part '..'"),
        (Tar::default().file("/evil", "x"), "'/evil' is an absolute name"),
        (
            Tar::default().link("out", "..").file("out/evil", "x"),
            "'out/evil' goes through 'out', which is a link",
        ),
        (
            Tar::default().link("a", "../").entry(EntryType::Directory, b"a/b/", b"", b""),
            "goes through 'a', which is a link",
        ),
        (Tar::default().entry(EntryType::Link, b"a", b"../kept", b""), "'a' has a part '..'"),
        (
            Tar::default().link("out", "..").entry(EntryType::Link, b"a", b"out/kept", b""),
            "'a' goes through 'out', which is a link",
        ),
        (Tar::default().entry(EntryType::Directory, b"..", b"", b""), "has a part '..'"),
        (Tar::default().entry(EntryType::Symlink, b"../evil", b"x", b""), "has a part '..'"),
        (Tar::default().link("d", "..").entry(EntryType::Directory, b"d", b"", b""), "goes through 'd'"),
    ] {
        let mut agent = Agent::start();
        fs::write(agent.folder.join("kept"), "kept").unwrap();
        let error = unpack(&mut agent, &tar.end()).unwrap_err();
        assert!(error.contains(words), "{error}");
        assert!(!agent.folder.join("evil").exists() && !agent.folder.join("b").exists(), "{error}");
        assert_eq!(fs::read(agent.folder.join("kept")).unwrap(), b"kept", "{error}");
    }
}

#[test]
fn a_file_replaces_a_link_of_its_name_and_is_not_written_through_it() {
    let mut agent = Agent::start();
    fs::write(agent.folder.join("kept"), "kept").unwrap();
    let tar = Tar::default().link("a", "../kept").file("a", "new").file("b", "one").file("b", "two");
    assert_eq!(unpack(&mut agent, &tar.end()), Ok(4));
    assert_eq!(fs::read(agent.folder.join("kept")).unwrap(), b"kept");
    let work = work(&agent);
    assert_eq!(
        (fs::read(work.join("a")).unwrap(), fs::read(work.join("b")).unwrap()),
        (b"new".into(), b"two".into())
    );
    assert!(fs::symlink_metadata(work.join("a")).unwrap().is_file());
}

#[test]
fn names_with_odd_bytes_are_kept_as_they_are() {
    let mut agent = Agent::start();
    let odd: [&[u8]; 6] = [b"\xff\xfe", b"new\nline", b" ", b"-rf", b"\x1b[31m", "ä".as_bytes()];
    let mut tar = Tar::default();
    for name in odd {
        tar = tar.entry(EntryType::Regular, name, b"", name);
    }
    assert_eq!(unpack(&mut agent, &tar.file("./a//./b", "dots").end()), Ok(7));
    for name in odd {
        assert_eq!(fs::read(work(&agent).join(OsStr::from_bytes(name))).unwrap(), name);
    }
    assert_eq!(fs::read(work(&agent).join("a/b")).unwrap(), b"dots");
}

#[test]
fn what_is_no_workspace_is_refused_with_the_entrys_name() {
    let mut sum = Tar::default().file("a", "x").end();
    sum[0] = b'b';
    let unfinished = |tar: Tar, len: usize| tar.end()[..len].to_vec();
    let pax =
        |record: &[u8]| Tar::default().entry(EntryType::XHeader, b"pax", b"", record).file("a", "x").end();
    for (tar, words) in [
        (Tar::default().entry(EntryType::Fifo, b"pipe", b"", b"").end(), "'pipe' is a device or a FIFO"),
        (Tar::default().entry(EntryType::Char, b"null", b"", b"").end(), "'null' is a device or a FIFO"),
        (Tar::default().entry(EntryType::new(b'Z'), b"z", b"", b"").end(), "'z' is of an unknown type, 0x5a"),
        (Tar::default().entry(EntryType::Symlink, b"l", b"", b"").end(), "'l' is a link to nothing"),
        (Tar::default().entry(EntryType::Link, b"l", b"nope", b"").end(), "'l' No such file"),
        (Tar::default().file("d/f", "x").file("d", "x").end(), "'d' would replace a directory"),
        (Tar::default().file("f", "x").file("f/g", "x").end(), "'f/g' goes through 'f'"),
        (Tar::default().file("", "x").end(), "names the workspace itself"),
        (sum, "checksum is wrong"),
        (vec![0x1f; 2048], "is it a tar that is not compressed?"),
        (unfinished(Tar::default().file("a", "text"), 514), "ends in the middle of 'a'"),
        (unfinished(Tar::default().file("a", "text"), 1024), "ends after 1024 bytes without its end mark"),
        (unfinished(Tar::default().file("a", "text"), 100), "without its end mark"),
        (pax(b"nonsense"), "an extended header cannot be read"),
        (pax(b"13 size=evil\n"), "an extended header cannot be read"),
        (pax(b"22 GNU.sparse.major=1\n"), "sparse files"),
        (pax(b"16 path=../evil\n"), "'../evil' has a part '..'"),
    ] {
        let mut agent = Agent::start();
        let error = unpack(&mut agent, &tar).unwrap_err();
        assert!(error.contains(words), "{error}");
        assert_eq!(agent.run("echo on").stdout(), "on\n", "the agent goes on");
    }
}

#[test]
fn pax_headers_give_names_and_links_of_any_length() {
    let mut agent = Agent::start();
    let (name, target) = (format!("{}/file", "n".repeat(200)), "t".repeat(3000));
    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions([("path", name.as_bytes()), ("mtime", b"1.5")]).unwrap();
    let mut header = Header::new_ustar();
    header.set_path("short").unwrap();
    header.set_mode(0o644);
    header.set_size(4);
    header.set_cksum();
    tar.append(&header, b"text".as_slice()).unwrap();
    tar.append_pax_extensions([("linkpath", target.as_bytes())]).unwrap();
    header.set_path("link").unwrap();
    header.set_entry_type(EntryType::Symlink);
    header.set_link_name("short").unwrap();
    header.set_size(0);
    header.set_cksum();
    tar.append(&header, io::empty()).unwrap();
    assert_eq!(unpack(&mut agent, &tar.into_inner().unwrap()), Ok(2));
    assert_eq!(fs::read(work(&agent).join(name)).unwrap(), b"text");
    assert_eq!(fs::read_link(work(&agent).join("link")).unwrap(), Path::new(&target));
}

#[test]
fn nothing_is_an_empty_workspace() {
    let mut agent = Agent::start();
    assert_eq!(unpack(&mut agent, &[]), Ok(0));
    let mut agent = Agent::start();
    assert_eq!(unpack(&mut agent, &Tar::default().end()), Ok(0));
}

#[test]
fn a_hundred_thousand_files_go_in_and_out() {
    let mut agent = Agent::start();
    let mut tar = Tar::default();
    for number in 0..100_000 {
        tar = tar.file(&format!("d{}/f{number}", number / 1000), "x");
    }
    assert_eq!(unpack(&mut agent, &tar.end()), Ok(100_000));
    assert_eq!(agent.run("ls d99 | wc -l").stdout().trim(), "1000");
    let all = list(&mut agent, &["**"]);
    assert_eq!((all.total_count, all.total_bytes), (100_000, 100_000));
    assert!(
        (100..10_000).contains(&all.artifacts.len()),
        "{}: as many as a frame holds",
        all.artifacts.len()
    );
    let (tar, failed) = fetch(&mut agent, None);
    assert_eq!((entries(&tar).len(), failed), (100_000, None));
}

#[test]
fn globs_say_which_files_are_artifacts() {
    let mut agent = Agent::start();
    let work = work(&agent);
    for name in
        ["report.xml", "dist/a.bin", "dist/deep/b.bin", "dist/.hidden", "src/c.rs", "src/d.rs", "log [1]"]
    {
        fs::create_dir_all(work.join(name).parent().unwrap()).unwrap();
        fs::write(work.join(name), name).unwrap();
    }
    for (patterns, expected) in [
        (&["report.xml"] as &[&str], &["report.xml"] as &[&str]),
        (&["./report.xml"], &["report.xml"]),
        (
            &["*"],
            &[
                "dist/.hidden",
                "dist/a.bin",
                "dist/deep/b.bin",
                "log [1]",
                "report.xml",
                "src/c.rs",
                "src/d.rs",
            ],
        ),
        (&["*.xml"], &["report.xml"]),
        (&["dist"], &["dist/.hidden", "dist/a.bin", "dist/deep/b.bin"]),
        (&["dist/"], &["dist/.hidden", "dist/a.bin", "dist/deep/b.bin"]),
        (&["dist/**"], &["dist/.hidden", "dist/a.bin", "dist/deep/b.bin"]),
        (&["dist/*.bin"], &["dist/a.bin"]),
        (&["**/*.bin"], &["dist/a.bin", "dist/deep/b.bin"]),
        (&["src/[cx].rs", "src/c.rs"], &["src/c.rs"]),
        (&["log [[]1[]]"], &["log [1]"]),
    ] {
        let found = list(&mut agent, patterns);
        assert_eq!((names(&found), found.message.clone()), (expected.to_vec(), None), "{patterns:?}");
    }
    let none = list(&mut agent, &["nope", "report.xml", "no/**"]);
    assert_eq!(
        (names(&none), none.message.as_deref()),
        (vec!["report.xml"], Some("nothing in the workspace matches nope, no/**"))
    );
    let broken = list(&mut agent, &["a[", "report.xml"]);
    assert_eq!(broken.total_count, 0);
    assert!(broken.message.unwrap().contains("'a[' is no glob"));
}

#[test]
fn artifacts_come_back_as_a_tar_byte_for_byte() {
    let mut agent = Agent::start();
    let work = work(&agent);
    let (big, deep) = ((0..3_000_000_u32).map(|n| (n % 251) as u8).collect::<Vec<_>>(), "d/".repeat(60));
    fs::create_dir_all(work.join("dist").join(&deep)).unwrap();
    fs::write(work.join("dist").join(&deep).join("deep"), "down here").unwrap();
    fs::write(work.join("dist/big"), &big).unwrap();
    fs::write(work.join("dist/empty"), "").unwrap();
    fs::write(work.join("dist/block"), [9; 512]).unwrap();
    fs::set_permissions(work.join("dist/block"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(work.join("dist").join(OsStr::from_bytes(b"\xff")), "odd").unwrap();
    symlink("/etc", work.join("dist/link")).unwrap();
    assert_eq!(list(&mut agent, &["dist"]).total_count, 6);
    let (tar, failed) = fetch(&mut agent, None);
    assert_eq!(failed, None);
    let entries = entries(&tar);
    let expected: Vec<(PathBuf, Vec<u8>)> = vec![
        ("dist/big".into(), big.clone()),
        ("dist/block".into(), vec![9; 512]),
        (format!("dist/{deep}deep").into(), b"down here".to_vec()),
        ("dist/empty".into(), vec![]),
        ("dist/link".into(), b"-> /etc".to_vec()),
        (Path::new("dist").join(OsStr::from_bytes(b"\xff")), b"odd".to_vec()),
    ];
    assert!(entries == expected);
    assert!(tar.len().is_multiple_of(512) && tar.ends_with(&[0; 1024]));
    assert!(fetch(&mut agent, Some("dist/big")).0 == big);
    assert_eq!(fetch(&mut agent, Some("dist/empty")), (vec![], None));
    assert!(fetch(&mut agent, Some("dist/link")).1.unwrap().contains("is a link"));
    assert!(fetch(&mut agent, Some("../kept")).1.unwrap().contains("no artifact '../kept'"));
}

#[test]
fn links_are_not_followed_to_artifacts() {
    let mut agent = Agent::start();
    fs::create_dir(agent.folder.join("outside")).unwrap();
    fs::write(agent.folder.join("outside/secret"), "x").unwrap();
    symlink("../outside", work(&agent).join("dir")).unwrap();
    symlink(".", work(&agent).join("loop")).unwrap();
    let found = list(&mut agent, &["**", "dir/secret"]);
    assert_eq!(names(&found), ["dir", "loop"]);
    assert!(found.message.unwrap().contains("dir/secret"));
}

#[test]
fn an_artifact_that_is_gone_or_no_file_any_more_breaks_the_tar_off_with_its_name() {
    let mut agent = Agent::start();
    fs::write(work(&agent).join("a"), "a").unwrap();
    fs::write(work(&agent).join("b"), "b").unwrap();
    list(&mut agent, &["*"]);
    agent.run("rm b; mkfifo b");
    let (bytes, failed) = fetch(&mut agent, None);
    assert!(bytes.starts_with(b"a\0") && failed.unwrap().contains("b is no file any more"));
    agent.run("rm b");
    assert!(fetch(&mut agent, None).1.unwrap().contains("b cannot be read: No such file"));
    assert_eq!(fetch(&mut agent, Some("a")), (b"a".to_vec(), None), "the agent goes on");
}

#[test]
fn sending_can_be_stopped_and_begun_again() {
    let mut agent = Agent::start();
    let file = fs::File::create(work(&agent).join("big")).unwrap();
    file.set_len(1 << 30).unwrap();
    list(&mut agent, &["big"]);
    agent.say(&HostMessage::StopArtifacts);
    for _ in 0..2 {
        agent.say(&HostMessage::SendArtifacts(SendArtifacts { name: None }));
        assert!(matches!(agent.next(), Some(AgentMessage::ArtifactData(_))));
        agent.say(&HostMessage::StopArtifacts);
        let mut bytes = 0;
        let failed = loop {
            match agent.next() {
                Some(AgentMessage::ArtifactData(part)) => bytes += part.len(),
                Some(AgentMessage::ArtifactsSent(sent)) => break sent.failed,
                other => panic!("{other:?}"),
            }
        };
        assert!(failed.is_some() && bytes < 1 << 28, "{bytes}");
    }
    assert_eq!(agent.run("echo on").stdout(), "on\n");
}

#[test]
fn artifacts_before_their_list_are_a_failure_with_its_reason() {
    let mut agent = Agent::start();
    agent.say(&HostMessage::SendArtifacts(SendArtifacts { name: None }));
    match agent.next() {
        Some(AgentMessage::Failure(failure)) => assert!(failure.message.contains("before their list")),
        other => panic!("{other:?}"),
    }
}
