//! `cargo xtask matrix`: CPU models of Bochs, each with the tests that hold on every bed, or with its refusal.

use crate::build::{image, kernel};
use crate::process::span;
use crate::setup::{self, Toolchain};
use crate::test::{Counts, on_bed, watch_lines};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Which models to run.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Models of the list, as `bochs -help cpu` names them; all of them by default
    models: Vec<String>,
}

/// One CPU model, and why it is in the list.
struct Model {
    name: &'static str,
    vendor: &'static str,
    offers: &'static str,
    /// Whether a node must refuse to run on it.
    refused: bool,
}

const fn runs(name: &'static str, vendor: &'static str, offers: &'static str) -> Model {
    Model { name, vendor, offers, refused: false }
}

const fn refuses(name: &'static str, vendor: &'static str, offers: &'static str) -> Model {
    Model { name, vendor, offers, refused: true }
}

const MODELS: [Model; 10] = [
    runs("corei5_arrandale_m520", "Intel", "the least VMX there may be; no x2APIC"),
    runs("corei7_haswell_4770", "Intel", "APIC virtualization, PAUSE-loop exiting"),
    runs("corei7_skylake_x", "Intel", "TSC scaling, XSAVES"),
    runs("corei7_icelake_u", "Intel", "mode-based execute control"),
    runs("ryzen", "AMD", "SVM with next-RIP save"),
    runs("phenom_8650_toliman", "AMD", "SVM without next-RIP save"),
    refuses("corei5_lynnfield_750", "Intel", "no unrestricted guest"),
    refuses("core2_penryn_t9600", "Intel", "no extended page tables"),
    refuses("turion64_tyler", "AMD", "no nested paging"),
    refuses("athlon64_venice", "AMD", "no virtualization"),
];

/// What `vendors/job.rs` prints before the exits of its job.
const EXITS: &str = "exits of the job: ";

/// What came of one model.
struct Row {
    model: &'static Model,
    counts: Counts,
    time: Duration,
    exits: Option<String>,
}

impl Row {
    /// A model nothing was found out about has failed.
    fn passed(&self) -> bool {
        self.counts.failed == 0 && self.counts.passed > 0 && (self.model.refused || self.exits.is_some())
    }
}

/// Runs the models one after another and prints a table of what came of them.
pub(crate) fn run(toolchain: &Toolchain, arguments: &Arguments) -> Result<ExitCode> {
    let models = chosen(&arguments.models)?;
    setup::ensure_bochs()?;
    let elf = kernel(toolchain)?;
    image("minimal")?;
    let mut rows = Vec::new();
    for model in models {
        println!("\n== {}: {}", model.name, model.offers);
        rows.push(run_model(model, &elf));
    }
    print!("{}", table(&rows));
    Ok(if rows.iter().all(Row::passed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The models of these names; all if there are none.
fn chosen(names: &[String]) -> Result<Vec<&'static Model>> {
    if let Some(name) = names.iter().find(|name| MODELS.iter().all(|model| model.name != **name)) {
        let known: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
        bail!(
            "{name} is not in the list; give some of {}, or run another model by `cargo xtask test --bed bochs:MODEL`",
            known.join(", ")
        );
    }
    Ok(MODELS
        .iter()
        .filter(|model| names.is_empty() || names.iter().any(|name| name == model.name))
        .collect())
}

fn run_model(model: &'static Model, elf: &Path) -> Row {
    let began = Instant::now();
    let mut exits = None;
    let mut command = on_bed(&format!("bochs:{}", model.name), elf);
    if model.refused {
        // The tests of the refusals have the models' names; the others have none of them.
        command.args(["--test", "refusals", "--", model.name]);
    } else {
        command.args(["--", "--show-output"]);
    }
    let counts = watch_lines(&mut command, |line| {
        if let Some((_, total)) = line.split_once(EXITS) {
            exits = Some(total.to_owned());
        }
    });
    let counts = counts.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Counts { passed: 0, failed: 1 }
    });
    Row { model, counts, time: began.elapsed(), exits }
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "\n   {:<7} {:<24} {:<7} {:<40} {:>14} {:>8} {:>14}\n",
        "", "model", "vendor", "offers", "tests", "exits", "time"
    );
    for row in rows {
        let result = match (row.passed(), row.model.refused) {
            (true, true) => "refused",
            (true, false) => "ok",
            (false, _) => "FAILED",
        };
        let tests = format!("{} of {}", row.counts.passed, row.counts.passed + row.counts.failed);
        let exits = row.exits.as_deref().unwrap_or("-");
        let Model { name, vendor, offers, .. } = row.model;
        text.push_str(&format!(
            "   {result:<7} {name:<24} {vendor:<7} {offers:<40} {tests:>14} {exits:>8} {:>14}\n",
            span(row.time)
        ));
    }
    let failed = rows.iter().filter(|row| !row.passed()).count();
    text.push_str(&format!("\n{} models passed, {failed} failed\n", rows.len() - failed));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(index: usize, passed: u32, failed: u32, exits: Option<&str>) -> Row {
        let exits = exits.map(str::to_owned);
        Row { model: &MODELS[index], counts: Counts { passed, failed }, time: Duration::from_secs(90), exits }
    }

    #[test]
    fn a_model_without_a_result_has_failed() {
        let refused = MODELS.iter().position(|model| model.refused).unwrap();
        for (row, passed) in [
            (row(0, 50, 0, Some("2100")), true),
            (row(0, 50, 1, Some("2100")), false),
            (row(0, 0, 0, None), false),
            (row(0, 50, 0, None), false),
            (row(refused, 1, 0, None), true),
            (row(refused, 0, 0, None), false),
        ] {
            assert_eq!(row.passed(), passed);
            assert_eq!(table(&[row]).contains("FAILED"), !passed);
        }
    }

    #[test]
    fn a_model_that_is_not_in_the_list_is_refused_with_those_that_are() {
        assert_eq!(chosen(&[]).unwrap().len(), MODELS.len());
        assert_eq!(chosen(&["ryzen".to_owned()]).unwrap().len(), 1);
        let error = chosen(&["z80".to_owned()]).err().unwrap().to_string();
        assert!(error.contains("z80 is not in the list") && error.contains("corei7_haswell_4770"), "{error}");
    }
}
