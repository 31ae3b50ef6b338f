//! `nestling image`, from its arguments to what is on the disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nestling_image_builder::build::MODULES;
use nestling_image_builder::bundle::Image;
use nestling_image_builder::cpio::Archive;

/// A folder with a bundle that has an agent, a root, a kernel and its modules.
struct Workshop(tempfile::TempDir);

impl Workshop {
    fn new() -> Self {
        let workshop = Self(tempfile::tempdir().unwrap());
        let mut initramfs = Archive::default();
        initramfs.file("init", "the agent", true);
        let kernel = bz_image("6.1");
        let minimal = Image {
            name: "minimal".into(),
            version: "1".into(),
            command_line: String::new(),
            kernel: kernel.clone(),
            initramfs: initramfs.finish(),
            disk: None,
        };
        minimal.write_to(&workshop.path("minimal.tar"), &mut |_, _| {}).unwrap();
        fs::write(workshop.path("vmlinuz"), kernel).unwrap();
        let modules = workshop.path("lib/modules/6.1");
        fs::create_dir_all(&modules).unwrap();
        for name in MODULES {
            fs::write(modules.join(format!("{name}.ko")), "\0depends=\0").unwrap();
        }
        fs::write(modules.join("modules.dep.bin"), "").unwrap();
        fs::create_dir_all(workshop.path("root/bin")).unwrap();
        fs::write(workshop.path("root/bin/sh"), "#!").unwrap();
        let tar = Command::new("tar")
            .args(["-C", "root", "-czf", "root.tar.gz", "."])
            .current_dir(workshop.0.path())
            .status();
        assert!(tar.unwrap().success());
        workshop
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_nestling"))
            .arg("image")
            .args(arguments)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .env("NESTLING_IMAGE", self.path("minimal.tar"))
            .env("XDG_DATA_HOME", self.path("data"))
            .output()
            .unwrap()
    }

    /// Standard output of a command that succeeds.
    fn stdout(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard error of a command that fails.
    fn error(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

/// The head of a bzImage for x86-64 that says this release.
fn bz_image(release: &str) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20F_u16.to_le_bytes());
    image[0x20E..0x210].copy_from_slice(&0x400_u16.to_le_bytes());
    image[0x236] = 1;
    image[0x600..0x600 + release.len()].copy_from_slice(release.as_bytes());
    image
}

const KERNEL: [&str; 4] = ["--kernel", "vmlinuz", "--modules", "lib/modules"];

fn listed(path: &Path) -> String {
    let tar = Command::new("tar").arg("tf").arg(path).output().unwrap();
    assert!(tar.status.success(), "{tar:?}");
    String::from_utf8(tar.stdout).unwrap()
}

#[test]
fn an_image_is_built_added_listed_and_removed() {
    let workshop = Workshop::new();
    let built = workshop.stdout(&[&["build", "mine", "--from", "root.tar.gz"][..], &KERNEL].concat());
    assert_eq!(built, "mine.tar\n");
    let store = workshop.path("data/nestling/images.tar");
    assert!(workshop.run(&["list"]).stdout.is_empty(), "there is no store yet");
    workshop.stdout(&["add", "mine.tar", "minimal.tar"]);
    let list = workshop.stdout(&["list"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((lines[1][0], lines[2][0], lines[2][3]), ("mine", "minimal", "none"), "{list}");
    assert!(list.contains("0.1.0+linux-6.1"), "{list}");
    assert_eq!(listed(&store).lines().count(), 4 + 3);
    assert!(workshop.error(&["add", "mine.tar"]).contains("--replace"));
    workshop.stdout(&["add", "--replace", "mine.tar"]);
    workshop.stdout(&["remove", "minimal"]);
    assert_eq!(listed(&store), "mine/image.json\nmine/vmlinuz\nmine/initramfs.cpio\nmine/disk.img\n");
    assert!(workshop.error(&["remove", "minimal"]).contains("it has: mine"));
}

#[test]
fn what_cannot_become_an_image_is_told_and_leaves_nothing() {
    let workshop = Workshop::new();
    fs::write(workshop.path("no-root.tar"), fs::read(workshop.path("minimal.tar")).unwrap()).unwrap();
    fs::write(workshop.path("not-a-kernel"), "#!/bin/sh").unwrap();
    let cut = fs::read(workshop.path("root.tar.gz")).unwrap();
    fs::write(workshop.path("cut.tar.gz"), &cut[..cut.len() / 2]).unwrap();
    for (arguments, expected) in [
        (&["--from", "no-root.tar", "--kernel", "vmlinuz"][..], "no /bin/sh"),
        (&["--from", "cut.tar.gz", "--kernel", "vmlinuz"], "cut off"),
        (&["--from", "missing.tar", "--kernel", "vmlinuz"], "missing.tar"),
        (&["--from", "oci:root", "--kernel", "vmlinuz"], "no OCI image layout"),
        (&["--from", "root", "--kernel", "own"], "no kernel"),
        (&["--from", "root", "--kernel", "not-a-kernel"], "no Linux kernel"),
        (&["--from", "root", "--kernel", "vmlinuz", "--modules", "root"], "no folder 6.1"),
    ] {
        let error = workshop.error(&[&["build", "mine"][..], arguments].concat());
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!workshop.path("mine.tar").exists());
    }
    let error = workshop.error(&["build", "../mine", "--from", "root", "--kernel", "vmlinuz"]);
    assert!(error.contains("cannot be an image's name"), "{error}");
}
