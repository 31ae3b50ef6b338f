//! How the benchmark's figures are shown.

use super::rows::{Goal, Result, Side};
use crate::process::output;
use serde_json::{Value, json};
use std::process::Command;

/// A table for a terminal: a row a line, medians with the range in brackets.
pub(super) fn text(results: &[Result]) -> String {
    let head = ["row", "unit", "nestling", "peer", "ratio", "goal", ""].map(str::to_owned);
    let mut lines = vec![head];
    for result in results {
        lines.push([
            result.row.name.clone(),
            result.row.unit.to_owned(),
            side(result.ours.as_ref()),
            side(result.peer.as_ref()),
            result.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
            result.row.goal.to_string(),
            match (result.row.goal, result.ok()) {
                (Goal::None, _) => "",
                (_, true) => "ok",
                (_, false) => "MISSED",
            }
            .to_owned(),
        ]);
    }
    let widths: Vec<usize> =
        (0..7).map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0)).collect();
    let mut text = String::from("\n");
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text.push('\n');
    for result in results {
        text.push_str(&format!("{:<12} {}\n", result.row.name, result.row.figure));
    }
    text.push_str(
        "peer: Debian's cloud kernel with kvm_amd as L1, Debian's QEMU microvm with the same kernel as L2\n",
    );
    text
}

/// The same for programs, with every run and what it ran on.
pub(super) fn json(results: &[Result]) -> anyhow::Result<Value> {
    let rows: Vec<Value> = results
        .iter()
        .map(|result| {
            json!({
                "name": result.row.name, "figure": result.row.figure, "unit": result.row.unit, "goal": result.row.goal,
                "ours": result.ours, "peer": result.peer, "ratio": result.ratio(), "ok": result.ok(),
            })
        })
        .collect();
    let qemu = output(Command::new("qemu-system-x86_64").arg("--version"))?;
    Ok(json!({ "rows": rows, "qemu": qemu.lines().next(), "processor": processor() }))
}

/// `median (min-max)`.
fn side(side: Option<&Side>) -> String {
    let number = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") };
    side.map_or_else(
        || "-".to_owned(),
        |side| format!("{} ({}-{})", number(side.median), number(side.min), number(side.max)),
    )
}

/// The processor's name, as the kernel has it.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(": ")?.1.to_owned())
}
