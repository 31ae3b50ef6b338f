//! The rows of the benchmark: what is compared, and what has to hold.

use super::loads::{LOADS, Load, Measured};
use serde::Serialize;
use std::fmt;

/// What one run of one side gave; `None` where it was not measured. Times in seconds.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Samples {
    /// QEMU's start to the API's first answer (ours) or to userland (the peer's).
    pub(super) cold: Option<f64>,
    /// The same from the L1 kernel's first byte on the serial port.
    pub(super) boot: Option<f64>,
    /// The kernel's own count from its first instruction to ready.
    pub(super) entry: Option<f64>,
    /// The job's request to the agent's hello (ours), or the VMM's exec to userland (the peer's).
    pub(super) job: Option<f64>,
    /// The job's request to the first byte of its output, or the VMM's exec to userland's first output.
    pub(super) first_output: Option<f64>,
    /// Exits of one L2 from its boot to its power-off.
    pub(super) exits: Option<f64>,
    /// The loads that ran, in the order of [`LOADS`].
    pub(super) loads: [Option<Measured>; LOADS.len()],
}

/// What has to hold for a row to be fine.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// Our median over the peer's is at most this.
    Ratio(f64),
    /// Our median over the peer's is at least this.
    AtLeastRatio(f64),
    /// Our median is at most this.
    AtMost(f64),
    /// Nothing: the row informs.
    None,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(ratio) => write!(f, "<= {ratio:.2} x"),
            Self::AtLeastRatio(ratio) => write!(f, ">= {ratio:.2} x"),
            Self::AtMost(value) => write!(f, "<= {value}"),
            Self::None => f.write_str("-"),
        }
    }
}

/// One comparison.
pub(super) struct Row {
    /// What the command line calls it.
    pub(super) name: String,
    /// What is measured, ours and the peer's.
    pub(super) figure: &'static str,
    /// Its unit.
    pub(super) unit: &'static str,
    /// What has to hold.
    pub(super) goal: Goal,
    /// What has to run for it.
    pub(super) needs: Needs,
    value: Value,
}

/// What a row is measured by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Needs {
    /// A boot of L1.
    Boot,
    /// A boot of L1 and short jobs, or the peer's short L2.
    Jobs,
    /// This load, by its place in [`LOADS`], in an L2 with a disk and a network.
    Load(usize),
}

/// Where in the samples a row's figure is.
enum Value {
    /// Ours and the peer's.
    Sides(fn(&Samples) -> Option<f64>, fn(&Samples) -> Option<f64>),
    /// A load's figure.
    Load(&'static Load),
    /// A load's exits.
    Exits,
}

impl Row {
    fn ours(&self, samples: &Samples) -> Option<f64> {
        match self.value {
            Value::Sides(ours, _) => ours(samples),
            _ => self.of_load(samples),
        }
    }

    fn peer(&self, samples: &Samples) -> Option<f64> {
        match self.value {
            Value::Sides(_, peer) => peer(samples),
            _ => self.of_load(samples),
        }
    }

    fn of_load(&self, samples: &Samples) -> Option<f64> {
        let Needs::Load(index) = self.needs else { return None };
        let measured = samples.loads.get(index).copied().flatten()?;
        match self.value {
            Value::Load(load) => Some(load.figure.of(&measured)),
            _ => Some(measured.exits),
        }
    }
}

/// Every row.
pub(super) fn all() -> Vec<Row> {
    let loads = LOADS.iter().enumerate().flat_map(|(index, load)| {
        let row = |name: String, figure, unit, goal, value| Row {
            name,
            figure,
            unit,
            goal,
            needs: Needs::Load(index),
            value,
        };
        [
            row(load.name.to_owned(), load.what, load.figure.unit(), load.goal, Value::Load(load)),
            row(format!("{}-exits", load.name), "exits while it ran", "exits", Goal::None, Value::Exits),
        ]
    });
    boots().into_iter().chain(loads).collect()
}

/// The rows about boots and short jobs.
fn boots() -> [Row; 6] {
    [
        Row {
            name: "boot".to_owned(),
            figure: "L1 kernel start to API ready / to userland",
            unit: "s",
            goal: Goal::Ratio(0.25),
            needs: Needs::Boot,
            value: Value::Sides(|run| run.boot, |run| run.boot),
        },
        Row {
            name: "boot-own".to_owned(),
            figure: "the same, ours by the kernel's own clock",
            unit: "s",
            goal: Goal::Ratio(0.25),
            needs: Needs::Boot,
            value: Value::Sides(|run| run.entry, |run| run.boot),
        },
        Row {
            name: "cold".to_owned(),
            figure: "QEMU start to API ready / to userland",
            unit: "s",
            goal: Goal::None,
            needs: Needs::Boot,
            value: Value::Sides(|run| run.cold, |run| run.cold),
        },
        Row {
            name: "job".to_owned(),
            figure: "job request to agent ready / VMM exec to L2 userland",
            unit: "s",
            goal: Goal::Ratio(1.0),
            needs: Needs::Jobs,
            value: Value::Sides(|run| run.job, |run| run.job),
        },
        Row {
            name: "first-output".to_owned(),
            figure: "job request to its first output / VMM exec to L2 userland",
            unit: "s",
            goal: Goal::None,
            needs: Needs::Jobs,
            value: Value::Sides(|run| run.first_output, |run| run.first_output),
        },
        Row {
            name: "exits".to_owned(),
            figure: "exits of one L2, boot to power-off",
            unit: "exits",
            goal: Goal::AtMost(2500.0),
            needs: Needs::Jobs,
            value: Value::Sides(|run| run.exits, |run| run.exits),
        },
    ]
}

/// One side's runs of one row.
#[derive(Debug, Serialize)]
pub(super) struct Side {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// Every run, in the order they were made.
    pub(super) runs: Vec<f64>,
}

impl Side {
    /// `None` if there is no run.
    fn of(runs: Vec<f64>) -> Option<Self> {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max, runs })
    }
}

/// A row with its figures.
pub(super) struct Result {
    pub(super) row: Row,
    pub(super) ours: Option<Side>,
    pub(super) peer: Option<Side>,
}

impl Result {
    /// The row's figures out of every run's samples (ours, peer's).
    pub(super) fn of(row: Row, samples: &[(Samples, Samples)]) -> Self {
        let ours = Side::of(samples.iter().filter_map(|(ours, _)| row.ours(ours)).collect());
        let peer = Side::of(samples.iter().filter_map(|(_, peer)| row.peer(peer)).collect());
        Self { row, ours, peer }
    }

    /// Our median over the peer's.
    pub(super) fn ratio(&self) -> Option<f64> {
        match (&self.ours, &self.peer) {
            (Some(ours), Some(peer)) if peer.median > 0.0 => Some(ours.median / peer.median),
            _ => None,
        }
    }

    /// Whether the goal holds; a row that could not be measured misses it.
    pub(super) fn ok(&self) -> bool {
        match self.row.goal {
            Goal::Ratio(most) => self.ratio().is_some_and(|ratio| ratio <= most),
            Goal::AtLeastRatio(least) => self.ratio().is_some_and(|ratio| ratio >= least),
            Goal::AtMost(most) => self.ours.as_ref().is_some_and(|ours| ours.median <= most),
            Goal::None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_runs_lies_between_the_middle_two() {
        let side = Side::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((side.median, side.min, side.max), (2.5, 1.0, 4.0));
        assert_eq!(Side::of(vec![9.0, 1.0, 5.0]).unwrap().median, 5.0);
        assert!(Side::of(vec![]).is_none());
    }

    #[test]
    fn a_row_without_figures_misses_its_goal() {
        for row in all().into_iter().filter(|row| !matches!(row.goal, Goal::None)) {
            let name = row.name.clone();
            assert!(!Result::of(row, &[(Samples::default(), Samples::default())]).ok(), "{name}");
        }
    }

    #[test]
    fn a_ratio_is_held_against_the_goal() {
        let ours = Samples { boot: Some(0.4), ..Samples::default() };
        let peer = Samples { boot: Some(2.0), ..Samples::default() };
        let [row, ..] = boots();
        let result = Result::of(row, &[(ours, peer)]);
        assert_eq!(result.ratio(), Some(0.2));
        assert!(result.ok());
    }

    #[test]
    fn row_names_are_unique() {
        let rows = all();
        for (index, row) in rows.iter().enumerate() {
            assert!(rows[..index].iter().all(|other| other.name != row.name), "{}", row.name);
        }
    }
}
