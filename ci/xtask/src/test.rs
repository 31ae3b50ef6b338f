//! Everything that CI checks, in stages: formatting, lints, host tests, documentation, booting tests.

use crate::build::{image, kernel, kernel_cargo, workspace_root};
use crate::process::{shown, span};
use crate::setup::{self, Toolchain};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Which checks to run.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Stages to run (format, lint, host, docs, boot, bochs), or parts of the names of tests to run; all of them by default
    names: Vec<String>,
    /// Run only the tests that hold on every bed, on this one: qemu-tcg, qemu-kvm, bochs or bochs:MODEL
    #[arg(long, value_name = "BED")]
    bed: Option<String>,
}

/// Test binaries that start nodes in Bochs whatever the bed is.
const BOCHS_ONLY: &[&str] = &["refusals", "parity"];

/// A group of checks with a headline of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// rustfmt.
    Format,
    /// clippy, warnings denied, for the host's crates and for the kernel.
    Lint,
    /// Tests that need no machine.
    Host,
    /// The documentation builds without a warning.
    Docs,
    /// Tests that boot the kernel in QEMU, on AMD's SVM.
    Boot,
    /// Tests that hold on every bed, on Intel's VMX in Bochs; one whole job on its second SVM; CPU models that must be refused.
    Bochs,
    /// Tests that hold on every bed, on the one that was named.
    Bed,
}

impl Stage {
    /// Those that users choose by name. A bed is an option.
    const ALL: [Self; 6] = [Self::Format, Self::Lint, Self::Host, Self::Docs, Self::Boot, Self::Bochs];

    fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Lint => "lint",
            Self::Host => "host",
            Self::Docs => "docs",
            Self::Boot => "boot",
            Self::Bochs => "bochs",
            Self::Bed => "bed",
        }
    }

    fn says(self) -> &'static str {
        match self {
            Self::Format => "formatting",
            Self::Lint => "lints, warnings denied",
            Self::Host => "host tests",
            Self::Docs => "documentation",
            Self::Boot => "booting tests in QEMU",
            Self::Bochs => "booting tests in Bochs",
            Self::Bed => "booting tests on a bed",
        }
    }
}

impl Arguments {
    /// Formatting and lints alone.
    pub(crate) fn lints() -> Self {
        Self { names: vec!["format".into(), "lint".into()], bed: None }
    }

    /// The stages to run, and the test names to run in them (all if empty).
    fn plan(&self) -> (Vec<Stage>, Vec<&str>) {
        let named: Vec<Stage> = Stage::ALL
            .into_iter()
            .filter(|stage| self.names.iter().any(|name| name == stage.name()))
            .collect();
        let filters: Vec<&str> = self
            .names
            .iter()
            .map(String::as_str)
            .filter(|name| Stage::ALL.iter().all(|stage| stage.name() != *name))
            .collect();
        let stages = match (named.is_empty(), filters.is_empty()) {
            _ if self.bed.is_some() => vec![Stage::Bed],
            (false, _) => named,
            (true, true) => Stage::ALL.to_vec(),
            (true, false) => vec![Stage::Host, Stage::Boot],
        };
        (stages, filters)
    }
}

/// How many tests passed and failed.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Counts {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs the stages one after another, all of them even when one fails.
pub(crate) fn run(toolchain: &Toolchain, arguments: &Arguments) -> Result<ExitCode> {
    let (stages, filters) = arguments.plan();
    let bed = arguments.bed.as_deref().unwrap_or_default();
    if arguments.bed.is_some()
        && Stage::ALL.iter().any(|stage| arguments.names.iter().any(|name| name == stage.name()))
    {
        bail!("--bed names the only stage that is run; leave out the others' names");
    }
    // The host tests of the command start a Bochs too.
    if bed.starts_with("bochs") || stages.contains(&Stage::Bochs) || stages.contains(&Stage::Host) {
        setup::ensure_bochs()?;
    }
    let began = Instant::now();
    let mut report: Vec<(&str, bool, Duration)> = Vec::new();
    let mut total = Counts::default();

    let (elf, preparation) = timed("kernel and guest image", || -> Result<PathBuf> {
        let elf = if stages == [Stage::Format] { PathBuf::new() } else { kernel(toolchain)? };
        if stages.iter().any(|stage| matches!(stage, Stage::Boot | Stage::Bochs | Stage::Bed)) {
            image("minimal")?;
        }
        Ok(elf)
    });
    report.push(("kernel and guest image", elf.is_ok(), preparation));
    match elf {
        Ok(elf) => {
            for stage in stages {
                let (counts, time) =
                    timed(stage.says(), || stage_commands(*toolchain, stage, bed, &filters, &elf));
                let counts = counts.unwrap_or_else(|error| {
                    eprintln!("error: {error:#}");
                    Counts { passed: 0, failed: 1 }
                });
                report.push((stage.says(), counts.failed == 0, time));
                total.add(counts);
            }
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            total.failed += 1;
        }
    }

    println!("\n== summary, {}", span(began.elapsed()));
    for (name, ok, time) in &report {
        println!("   {} {name:<26} {}", if *ok { "ok    " } else { "FAILED" }, span(*time));
    }
    println!("\n{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a headline, runs `work` and measures it.
fn timed<T>(headline: &str, work: impl FnOnce() -> T) -> (T, Duration) {
    println!("\n== {headline}");
    let began = Instant::now();
    let result = work();
    let time = began.elapsed();
    println!("-- {headline}: {}", span(time));
    (result, time)
}

/// Runs one stage's commands and counts what their tests say; a command that fails without a failed test counts as one.
fn stage_commands(
    toolchain: Toolchain,
    stage: Stage,
    bed: &str,
    filters: &[&str],
    elf: &Path,
) -> Result<Counts> {
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(arguments).env("NESTLING_KERNEL", elf).current_dir(workspace_root());
        command
    };
    let host = ["--workspace", "--exclude", "nestling-kernel"];
    let commands = match stage {
        Stage::Format => vec![cargo(&["fmt", "--all", "--check"])],
        Stage::Lint => {
            let mut own = cargo(&["clippy"]);
            own.args(host).args(["--all-targets", "--", "-D", "warnings"]);
            let mut kernel = kernel_cargo(toolchain, "clippy");
            kernel.args(["--", "-D", "warnings"]);
            vec![own, kernel]
        }
        Stage::Host => {
            let mut test = cargo(&["test", "--no-fail-fast"]);
            test.args(host).args(["--exclude", "nestling-tests", "--"]).args(filters);
            vec![test]
        }
        Stage::Docs => {
            let mut own = cargo(&["doc", "--no-deps"]);
            own.args(host);
            let mut kernel = kernel_cargo(toolchain, "doc");
            kernel.args(["--no-deps"]);
            vec![own, kernel].into_iter().map(deny_doc_warnings).collect()
        }
        Stage::Boot => {
            let mut test = cargo(&["test", "--no-fail-fast", "-p", "nestling-tests", "--lib"]);
            for binary in test_binaries()?.iter().filter(|binary| !BOCHS_ONLY.contains(&binary.as_str())) {
                test.args(["--test", binary]);
            }
            test.arg("--").args(filters);
            vec![test]
        }
        Stage::Bochs => {
            let mut test = on_bed("bochs", elf);
            for binary in BOCHS_ONLY {
                test.args(["--test", binary]);
            }
            test.arg("--").args(filters);
            let mut commands = vec![test];
            if filters.is_empty() {
                let mut job = on_bed("bochs:ryzen", elf);
                job.args(["--", "the_same_job"]);
                commands.push(job);
            }
            commands
        }
        Stage::Bed => {
            let mut test = on_bed(bed, elf);
            test.arg("--").args(filters);
            vec![test]
        }
    };
    let mut counts = Counts::default();
    for mut command in commands {
        counts.add(watch(&mut command)?);
    }
    Ok(counts)
}

/// The test binaries of ci/tests, by name.
fn test_binaries() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(workspace_root().join("ci/tests/tests"))? {
        let path = entry?.path();
        let is_test =
            path.join("main.rs").is_file() || path.extension().is_some_and(|extension| extension == "rs");
        names.extend(path.file_stem().filter(|_| is_test).map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// A cargo command for the tests that hold on every bed, on this one. More of cargo's arguments may follow.
pub(crate) fn on_bed(bed: &str, elf: &Path) -> Command {
    let mut command = Command::new("cargo");
    command
        .args([
            "test",
            "--no-fail-fast",
            "-p",
            "nestling-tests",
            "--test",
            "vendors",
            "--test",
            "conformance",
        ])
        .env("NESTLING_KERNEL", elf)
        .env("NESTLING_BED", bed)
        .current_dir(workspace_root());
    if bed.starts_with("bochs") {
        // Bochs 2.7 forgets at a VM entry that NMIs are not blocked: one machine's handler would block another machine's.
        command.env("RUST_TEST_THREADS", "1");
    }
    command
}

fn deny_doc_warnings(mut command: Command) -> Command {
    command.env("RUSTDOCFLAGS", "-D warnings");
    command
}

/// Runs `command`, passes its output on and counts the tests in it.
fn watch(command: &mut Command) -> Result<Counts> {
    watch_lines(command, |_| {})
}

/// As [`watch`], and hands every line to `see`.
pub(crate) fn watch_lines(command: &mut Command, mut see: impl FnMut(&str)) -> Result<Counts> {
    println!("$ {}", shown(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let mut counts = Counts::default();
    let Some(output) = child.stdout.take() else { bail!("`{}` has no output", shown(command)) };
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counts.add(result_line(&line));
        see(&line);
    }
    let status = child.wait()?;
    if !status.success() && counts.failed == 0 {
        eprintln!("error: `{}` failed ({status})", shown(command));
        counts.failed = 1;
    }
    Ok(counts)
}

/// What a line like `test result: ok. 12 passed; 0 failed; 1 ignored; ...` says; nothing for any other line.
fn result_line(line: &str) -> Counts {
    let mut counts = Counts::default();
    let Some((_, numbers)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
        return counts;
    };
    for part in numbers.split("; ") {
        match part.split_once(' ') {
            Some((number, "passed")) => counts.passed = number.parse().unwrap_or(0),
            Some((number, "failed")) => counts.failed = number.parse().unwrap_or(0),
            _ => {}
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_closes_a_test_binary_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(result_line(line), Counts { passed: 12, failed: 3 });
        assert_eq!(result_line("test a ... ok"), Counts::default());
    }

    #[test]
    fn a_stage_is_chosen_by_name_and_anything_else_filters_tests() {
        let plan = |names: &[&str]| {
            let arguments = Arguments { names: names.iter().map(ToString::to_string).collect(), bed: None };
            let (stages, filters) = arguments.plan();
            (stages, filters.into_iter().map(str::to_owned).collect::<Vec<_>>())
        };
        assert_eq!(plan(&[]), (Stage::ALL.to_vec(), vec![]));
        assert_eq!(plan(&["docs"]), (vec![Stage::Docs], vec![]));
        assert_eq!(plan(&["boot", "exit_code"]), (vec![Stage::Boot], vec!["exit_code".to_owned()]));
        assert_eq!(plan(&["exit_code"]), (vec![Stage::Host, Stage::Boot], vec!["exit_code".to_owned()]));
    }

    #[test]
    fn every_test_binary_belongs_to_a_stage() {
        let binaries = test_binaries().unwrap();
        for name in BOCHS_ONLY.iter().chain(&["boots", "vendors", "conformance"]) {
            assert!(binaries.iter().any(|binary| binary == name), "{name} is not among {binaries:?}");
        }
    }

    #[test]
    fn a_bed_is_a_stage_of_its_own() {
        let arguments = Arguments { names: vec!["same_job".to_owned()], bed: Some("bochs:ryzen".to_owned()) };
        assert_eq!(arguments.plan(), (vec![Stage::Bed], vec!["same_job"]));
    }
}
